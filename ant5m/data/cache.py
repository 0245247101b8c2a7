"""Tokenizers and shards made of a text on the way to a training, kept for the next one.

Each lies in a folder named by the fingerprint of all that decides it, so that nothing is ever used for a text
that has changed. A file is known by its place, size and time of change, as in packing: reading a whole text
to learn that it is the same would take a good part of the time that packing takes. `hf:` does not tell of
changes: remove the folder to read such a data set again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant5m.data.builtin import load_builtin
from ant5m.data.corpus import Corpus, tracked
from ant5m.data.packing import pack
from ant5m.data.shards import META
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.files import new_folder

if TYPE_CHECKING:
    from rich.progress import Progress

NAME = "ant5m-cache"
"""the usual name of such a folder"""
SAMPLE_BYTES = 100_000_000
"""of text, evenly spread, that a tokenizer learns from"""
BYTES_A_TOKEN = 5
"""of English text, about"""


@dataclass(frozen=True)
class Cache:
    """A folder with `tokenizer-FINGERPRINT` and `shards-FINGERPRINT` in it, made when the first is.

    Making either can be stopped at any time. A tokenizer starts over then, shards go on where they were.
    """

    folder: Path

    def tokenizer(
        self, corpus: Corpus, vocab_size: int, progress: "Progress", max_tokens: int | None = None
    ) -> Path:
        """The folder of a tokenizer of so many entries, learned from `corpus` where it is not there yet; with
        `max_tokens` from about as much text as these are.

        Raises `UserError` when the text supports no such vocabulary.
        """
        path = self.folder / f"tokenizer-{_fingerprint(corpus, max_tokens, vocab_size, SAMPLE_BYTES)}"
        if not path.exists():
            texts = tracked(corpus, progress)
            if max_tokens is not None:
                texts = _beginning(texts, BYTES_A_TOKEN * max_tokens)
            with new_folder(path) as aside:
                train_tokenizer(texts, vocab_size, SAMPLE_BYTES, progress).save(aside)
        return path

    def shards(
        self, corpus: Corpus, tokenizer: Tokenizer, progress: "Progress", max_tokens: int | None = None
    ) -> Path:
        """The folder of the shards of `corpus`, packed with `tokenizer` where it is not there yet."""
        path = self.folder / f"shards-{_fingerprint(corpus, max_tokens, tokenizer.fingerprint)}"
        if not (path / META).exists():
            pack(corpus, tokenizer, path, progress=progress, max_tokens=max_tokens)
        return path


def _beginning(texts: Iterator[str], size: int) -> Iterator[str]:
    """The first texts, until they have so many bytes."""
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _fingerprint(corpus: Corpus, max_tokens: int | None, *more: Any) -> str:
    text = [[_place(source.name), source.size, _version(source.name)] for source in corpus.sources]
    limits = [corpus.max_documents, corpus.group_column, max_tokens]
    chosen = [limits] if any(limit is not None for limit in limits) else []
    seen = json.dumps([text, corpus.text_column, corpus.on_error, *more, *chosen])
    return hashlib.sha256(seen.encode()).hexdigest()[:16]


def _place(name: str) -> str:
    return os.path.realpath(name) if os.path.exists(name) else name


def _version(name: str) -> int | str | None:
    if name == "builtin":
        return load_builtin().fingerprint
    return os.stat(name).st_mtime_ns if os.path.exists(name) else None
