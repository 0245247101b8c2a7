"""How well a model predicts a text: three numbers with different units, and over what they were taken.

Loss in nats per token and token perplexity compare models with the same tokenizer. Word perplexity and bits
per byte divide by what is in the text whatever the tokenizer, so they compare any two models on one text.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ant5m.data.corpus import Corpus
from ant5m.data.loader import IGNORE, sequences
from ant5m.data.shards import COUNTS, META, TOKEN, Shards, Tokens
from ant5m.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from ant5m.errors import UserError
from ant5m.files import read_json, write_json
from ant5m.model.ant import Ant

if TYPE_CHECKING:
    from rich.progress import Progress

ENCODE_AT_ONCE = 256
"""documents"""


@dataclass(frozen=True)
class Evaluation:
    """The sum of a model's surprise over a text, and what the text consists of."""

    text: str
    """what it is, for people"""
    nats: float
    """sum over the scored tokens"""
    tokens: int
    """scored tokens; end-of-text tokens are among them"""
    words: int | None
    """of the text, as `str.split` counts them; None when only a part of the text was scored"""
    bytes: int | None
    """of the text in UTF-8; None when only a part of the text was scored"""
    window: int
    """tokens of one sequence; each begins without context"""

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.tokens

    @property
    def token_perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words): what a model of whole words with the same surprise would have."""
        return _exp(self.nats / self.words) if self.words else None

    @property
    def bits_per_byte(self) -> float | None:
        """nats / (ln 2 * bytes)."""
        return self.nats / (math.log(2) * self.bytes) if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "text": self.text,
            "loss": self.loss,
            "token_perplexity": self.token_perplexity,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
            "window": self.window,
        }


def evaluate(
    net: Ant,
    shards: Shards,
    batch_size: int = 8,
    sequence_length: int | None = None,
    limit_tokens: int | None = None,
    text: str | None = None,
    progress: "Progress | None" = None,
) -> Evaluation:
    """Score every token of a split but its first, in windows that do not overlap.

    A window begins without context, so the loss lies a little above that of a sliding one. Computes in the
    net's dtype, or in that of an autocast around the call.

    Args:
        sequence_length: of a window; default: the model's context.
        limit_tokens: score only so many; words and bytes are unknown then.
        text: what the split is, for people; default: its name and folder.
    """
    window = sequence_length or net.config.max_position_embeddings
    scored = shards.num_tokens - 1
    if limit_tokens is not None:
        scored = min(scored, limit_tokens)
    bar = progress.add_task("evaluating", total=scored) if progress else None
    nats, tokens = 0.0, 0
    training = net.training
    net.eval()
    with torch.inference_mode():
        for input_ids, targets in sequences(shards, batch_size, window, limit_tokens):
            count = int((targets != IGNORE).sum())
            nats += net(input_ids.to(net.device), targets.to(net.device)).item() * count
            tokens += count
            if progress and bar is not None:
                progress.update(bar, completed=tokens)
    net.train(training)
    whole = tokens == shards.num_tokens - 1
    return Evaluation(
        text=text or f"{shards.split} split of {shards.folder}",
        nats=nats,
        tokens=tokens,
        words=shards.counts["words"] if whole else None,
        bytes=shards.counts["bytes"] if whole else None,
        window=window,
    )


def open_data(
    names: Sequence[str | Path], tokenizer: Tokenizer, text_column: str = "text"
) -> tuple[Shards, str]:
    """What to evaluate on, and its name: the validation split of a folder of shards, or texts.

    Raises `UserError` when the shards were packed with another tokenizer, or the texts cannot be read.
    """
    packed = [Path(name) for name in names if (Path(name) / META).exists()]
    if not packed:
        return encode_texts(Corpus.open(names, text_column), tokenizer), ", ".join(
            str(name) for name in names
        )
    if len(names) > 1:
        raise UserError(f"{packed[0]} is a folder of shards: evaluate on it alone")
    shards = Shards.open(packed[0], "validation")
    if shards.tokenizer_fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{packed[0]} was packed with another tokenizer than the model's: pack the text again"
        )
    return shards, f"validation split of {packed[0]}"


def encode_texts(corpus: Corpus, tokenizer: Tokenizer) -> Shards:
    """The documents of a corpus as one split in memory (two bytes a token).

    As in packed data an end-of-text token stands behind every document; here one stands before the first too,
    so that every token of the text is scored. Raises `UserError` when the vocabulary does not fit uint16.
    """
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {tokenizer.vocab_size:,} is too large to evaluate: at most {MAX_VOCAB_SIZE:,}"
        )
    eos = tokenizer.eos_token_id
    parts = [np.array([eos], TOKEN)]
    counts = dict.fromkeys(COUNTS, 0)
    documents = corpus.documents()
    while batch := list(itertools.islice(documents, ENCODE_AT_ONCE)):
        ids, lengths = tokenizer.encode_flat(batch)
        parts.append(np.insert(ids, np.cumsum(lengths), eos).astype(TOKEN))
        counts["documents"] += len(batch)
        counts["bytes"] += sum(len(document.encode()) for document in batch)
        counts["words"] += sum(len(document.split()) for document in batch)
    tokens = np.concatenate(parts)
    counts["tokens"] = len(tokens)
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": eos,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": {"validation": {**counts, "shards": []}},
    }
    return Shards(Path("memory"), "validation", meta, Tokens([tokens]))


def run_data(run: Path) -> Path:
    """The folder of shards that a run was trained on, as its config.json says."""
    values = read_json(run / "config.json")
    train = values.get("train") if isinstance(values, dict) else None
    if not isinstance(train, dict):
        raise UserError(f"{run / 'config.json'} does not say what the run was trained on: give --data")
    folder = Path(train["data"]) if train.get("data") else run / "data"
    if not folder.exists():
        raise UserError(
            f"{folder}, on which {run} was trained, is not here: name it or other text with --data"
        )
    return folder


def record(run: Path, checkpoint: str, evaluation: Evaluation) -> None:
    """Put an evaluation into the run's eval.json, in place of one over the same text; the rest stays."""
    path = run / "eval.json"
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict) or not isinstance(values.setdefault("perplexity", []), list):
        raise UserError(f"{path} is not an eval.json of ant5m: move it away")
    others = [old for old in values["perplexity"] if old.get("text") != evaluation.text]
    values["perplexity"] = [*others, {**evaluation.to_dict(), "checkpoint": checkpoint}]
    write_json(path, values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
