"""How well a model predicts a text: three numbers with different units, and over what they were taken.

Loss in nats per token and token perplexity compare models with the same tokenizer. Word perplexity and bits
per byte divide by what is in the text whatever the tokenizer, so they compare any two models on one text.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ant5m.data.corpus import Corpus
from ant5m.data.loader import document_starts, sequences
from ant5m.data.shards import COUNTS, IGNORE, META, TOKEN, Shards, Tokens
from ant5m.data.spelling import check_no_end_of_text, describe_lost, lost_bytes, spells_everything
from ant5m.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from ant5m.errors import UserError
from ant5m.eval.record import read_record
from ant5m.eval.scoring import Request, score
from ant5m.files import write_json
from ant5m.model.ant import NOT_FINITE, Ant
from ant5m.model.run_file import read_run_file
from ant5m.ranks import Ranks

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
    document_mask: bool = False
    """whether documents in one window did not see each other"""
    lost_bytes: int = 0
    """of the text, that the tokenizer cannot spell: where there are any, `words` and `bytes` are None, since
    the model is not asked for all of them"""

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
            "document_mask": self.document_mask,
            "lost_bytes": self.lost_bytes,
        }


def evaluate(
    net: Ant,
    shards: Shards,
    batch_size: int = 8,
    sequence_length: int | None = None,
    limit_tokens: int | None = None,
    text: str | None = None,
    progress: "Progress | None" = None,
    document_mask: bool = False,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Score every token of a split, in windows that do not overlap; the first one behind an end-of-text
    token.

    The end-of-text token behind every document is scored, too. A window begins without context, so the loss
    lies a little above that of a sliding one. Computes in the net's dtype, or in that of an autocast around
    the call.

    Args:
        sequence_length: of a window; default: the model's context.
        limit_tokens: score only so many, in windows spread evenly over the split, always the same ones; words
            and bytes are unknown then.
        text: what the split is, for people; default: its name and folder.
        document_mask: for a net that was trained so: no document sees another in its window.
        ranks: share the batches among themselves; each gets the sum that one process would have, bit for bit.

    Raises `UserError` when the loss is not finite.
    """
    ranks = ranks or Ranks()
    window = sequence_length or net.config.max_position_embeddings
    scored = shards.num_tokens
    if limit_tokens is not None:
        scored = min(scored, limit_tokens)
    bar = progress.add_task("evaluating", total=scored) if progress else None
    sums: list[float] = []  # of each batch, 0 for those of other ranks
    tokens = 0
    training = net.training
    net.eval()
    with torch.inference_mode():
        for number, (input_ids, targets) in enumerate(sequences(shards, batch_size, window, limit_tokens)):
            count = int((targets != IGNORE).sum())
            tokens += count
            sums.append(0.0)
            if number % ranks.size != ranks.rank:
                continue
            ids = input_ids.to(net.device)
            starts = document_starts(ids, shards.eos_token_id) if document_mask else None
            sums[-1] = net(ids, targets.to(net.device), starts=starts).item() * count
            if progress and bar is not None:
                progress.update(bar, completed=tokens)
    net.train(training)
    joined = torch.tensor(sums, dtype=torch.float64)
    ranks.sum(joined)
    nats = sum(joined.tolist())
    if not math.isfinite(nats):
        raise UserError(NOT_FINITE)
    whole = tokens == shards.num_tokens and not shards.lost_bytes
    return Evaluation(
        text=text or f"{shards.split} split of {shards.folder}",
        nats=nats,
        tokens=tokens,
        words=shards.counts["words"] if whole else None,
        bytes=shards.counts["bytes"] if whole else None,
        window=window,
        document_mask=document_mask,
        lost_bytes=shards.lost_bytes,
    )


def put_together(evaluations: Sequence[Evaluation], text: str) -> Evaluation:
    """One of all their texts, called `text`."""

    def total(counts: Sequence[int | None]) -> int | None:
        return None if None in counts else sum(count or 0 for count in counts)

    return dataclasses.replace(
        evaluations[0],
        text=text,
        nats=sum(one.nats for one in evaluations),
        tokens=sum(one.tokens for one in evaluations),
        words=total([one.words for one in evaluations]),
        bytes=total([one.bytes for one in evaluations]),
        lost_bytes=sum(one.lost_bytes for one in evaluations),
    )


@dataclass(frozen=True)
class LmEvalPerplexity:
    """A text as lm-eval's perplexity tasks count it: each document by itself behind the BOS token, its
    end-of-text token not scored, words split at white space by `re`, in windows that do not overlap."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def word_perplexity(self) -> float:
        return _exp(self.nats / self.words)

    @property
    def byte_perplexity(self) -> float:
        return _exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / (math.log(2) * self.bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": self.byte_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "words": self.words,
            "bytes": self.bytes,
        }


def evaluate_as_lm_eval(
    net: Ant, shards: Shards, tokenizer: Tokenizer, progress: "Progress | None" = None
) -> LmEvalPerplexity:
    """The documents of a split by lm-eval's convention (`loglikelihood_rolling` of its `hf` model)."""
    most = net.config.max_position_embeddings
    nats, tokens, words, size = 0.0, 0, 0, 0
    bar = progress.add_task("as lm-eval counts", total=shards.num_tokens) if progress else None
    documents = shards.documents()
    while batch := list(itertools.islice(documents, ENCODE_AT_ONCE)):
        requests = [one for ids in batch for one in rolling(ids.tolist(), tokenizer.bos_token_id, most)]
        nats -= sum(one.log_likelihood for one in score(net, requests))
        texts = [tokenizer.decode(ids) for ids in batch]
        tokens += sum(map(len, batch))
        words += sum(len(re.split(r"\s+", text)) for text in texts)
        size += sum(len(text.encode()) for text in texts)
        if progress and bar is not None:
            progress.advance(bar, sum(len(ids) + 1 for ids in batch))  # with their end-of-text tokens
    return LmEvalPerplexity(nats, tokens, words, size)


def rolling(ids: Sequence[int], prefix: int, most: int) -> Iterator[Request]:
    """The windows of a document: `most` tokens each, the first behind `prefix`; the last begins earlier, so
    that it is as long, but scores only what is left."""
    if ids:
        yield Request([prefix], ids[:most])
    for start in range(most, len(ids), most):
        end = min(start + most, len(ids))
        yield Request(ids[max(0, end - most - 1) : start], ids[start:end])


def open_data(
    names: Sequence[str | Path], tokenizer: Tokenizer, text_column: str = "text", allow_loss: bool = False
) -> tuple[Shards, str]:
    """What to evaluate on, and its name: the validation splits of folders of shards, or texts.

    Raises `UserError` when the shards were packed with another tokenizer, the texts cannot be read, or the
    tokenizer loses bytes of them (with `allow_loss` they are only counted).
    """
    packed = [Path(name) for name in names if (Path(name) / META).exists()]
    if not packed:
        return encode_texts(Corpus.open(names, text_column), tokenizer, allow_loss), ", ".join(
            str(name) for name in names
        )
    if len(names) > len(packed):
        raise UserError(f"{packed[0]} is a folder of shards: evaluate on shards alone, or on text")
    splits = [Shards.open(folder, "validation") for folder in packed]
    for split in splits:
        if not tokenizer.has_fingerprint(split.tokenizer_fingerprint):
            raise UserError(
                f"{split.folder} was packed with another tokenizer than the model's: pack the text again"
            )
    shards = splits[0] if len(splits) == 1 else Shards.join(splits)
    return shards, f"validation split of {shards.folder}"


def encode_texts(corpus: Corpus, tokenizer: Tokenizer, allow_loss: bool = False) -> Shards:
    """The documents of a corpus as one split in memory (two bytes a token).

    As in packed data an end-of-text token stands behind every document. Raises `UserError` when the
    vocabulary does not fit uint16, or when the tokenizer loses bytes of the text that `allow_loss` does not
    allow.
    """
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {tokenizer.vocab_size:,} is too large to evaluate: at most {MAX_VOCAB_SIZE:,}"
        )
    eos = tokenizer.eos_token_id
    parts = [np.empty(0, TOKEN)]
    counts = dict.fromkeys(COUNTS, 0)
    lossless, total_lost = spells_everything(tokenizer), 0
    documents = corpus.documents()
    while batch := list(itertools.islice(documents, ENCODE_AT_ONCE)):
        ids, lengths = tokenizer.encode_flat(batch)
        check_no_end_of_text(tokenizer, ids)
        if not lossless:
            lost = lost_bytes(tokenizer, batch, np.split(ids, np.cumsum(lengths)[:-1]))
            if lost.any() and not allow_loss:
                raise UserError(
                    f"{describe_lost(tokenizer, batch, lost)}: evaluate without it (--allow-loss)"
                )
            total_lost += int(lost.sum())
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
        "splits": {"validation": {**counts, "lost_bytes": total_lost, "shards": []}},
    }
    return Shards(Path("memory"), "validation", meta, Tokens([tokens]))


def masks_documents(run: Path) -> bool:
    """Whether a run was trained with documents that do not see each other, as its config.json says."""
    file = read_run_file(run)
    return bool(file and file.train and file.train.document_mask)


def run_data(run: Path) -> list[Path]:
    """The folder of shards that a run was trained on, as its config.json says; of a mixture several."""
    file = read_run_file(run)
    if file is None or file.train is None:
        raise UserError(f"{run / 'config.json'} does not say what the run was trained on: give --data")
    folders = file.shards_folders(run)
    for folder in folders:
        if not folder.exists():
            raise UserError(
                f"{folder}, on which {run} was trained, is not here: name it or other text with --data"
            )
    return folders


def record_evaluation(run: Path, checkpoint: str, evaluation: Evaluation, held_out: bool) -> None:
    """Put an evaluation into the run's eval.json, in place of one of the same checkpoint over the same text.

    `held_out`: the text is the validation split of what the run was trained on.
    """
    path = run / "eval.json"
    values = read_record(path)
    new = {**evaluation.to_dict(), "checkpoint": checkpoint, "held_out": held_out}
    place = ("text", "checkpoint", "held_out")
    others = [old for old in values.get("perplexity", []) if any(old.get(key) != new[key] for key in place)]
    values["perplexity"] = [*others, new]
    write_json(path, values)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
