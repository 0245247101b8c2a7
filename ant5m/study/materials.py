"""Tokenizers and shards of a study: one of each for every vocabulary, from the same text, made once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ant5m.data.corpus import Corpus, tracked
from ant5m.data.packing import pack
from ant5m.data.shards import META, Meta, Shards
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.files import read_json

SAMPLE_BYTES = 50_000_000
"""of text, evenly spread, that the tokenizers learn from"""


@dataclass(frozen=True)
class Materials:
    """The folder, and what it is made from."""

    folder: Path
    corpus: Corpus
    validation_fraction: float

    def prepare(self, vocab_sizes: set[int]) -> None:
        """Make what is missing; a packing that was stopped goes on.

        BPE learns its entries one after the other, so the smaller vocabularies are the beginning of the
        largest: one is learned, the others are cut from it. Raises `UserError` when the folder was made from
        another text.
        """
        missing = {size for size in vocab_sizes if not self._packed(size)}
        if not missing:
            return
        with Progress(console=Console(stderr=True)) as progress:
            self._train_tokenizers(missing, progress)
            for size in sorted(missing):
                tokenizer = Tokenizer.load(self.tokenizer(size))
                pack(self.corpus, tokenizer, self.shards(size), self.validation_fraction, progress=progress)

    @property
    def text(self) -> list[list[Any]]:
        """[name, bytes] of each source, whatever the path by which it was found."""
        return [_identity(source.name, source.size) for source in self.corpus.sources]

    def tokenizer(self, vocab_size: int) -> Path:
        return self.folder / "tokenizers" / str(vocab_size)

    def shards(self, vocab_size: int) -> Path:
        return self.folder / "shards" / str(vocab_size)

    def bytes_per_token(self, vocab_size: int) -> float:
        """Of the training split."""
        counts = Shards.open(self.shards(vocab_size), verify=False).counts
        return counts["bytes"] / counts["tokens"]

    def _train_tokenizers(self, sizes: set[int], progress: Progress) -> None:
        untrained = {size for size in sizes if not (self.tokenizer(size) / "tokenizer_config.json").exists()}
        if not untrained:
            return
        texts = tracked(self.corpus, progress)
        largest = train_tokenizer(texts, max(untrained), SAMPLE_BYTES, progress)
        for size in untrained:
            largest.shrunk(size).save(self.tokenizer(size))

    def _packed(self, size: int) -> bool:
        path = self.shards(size) / META
        if not path.exists():
            return False
        meta = read_json(path, Meta)
        then = [_identity(source.name, source.size) for source in meta.sources]
        if self.text != then or meta.options.validation_fraction != self.validation_fraction:
            raise UserError(f"{path.parent} was packed from another text: choose another --cache or --out")
        return True


def _identity(name: str, size: int) -> list[Any]:
    return [name if name.startswith("hf:") else Path(name).name, size]
