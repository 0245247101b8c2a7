"""Let a model write, and notice when it goes round in circles.

Prompts of different length need no padding here: every row starts at position 0, all rows advance together,
and while a row's own prompt lasts its next token is read from the prompt instead of drawn. So each row
computes exactly what it would compute alone.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ant5m.data.ngrams import find_repeats, hash_ngrams
from ant5m.errors import UserError
from ant5m.model.ant import NOT_FINITE, KVCache

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.model.ant import Ant


TEMPERATURE, REPETITION_PENALTY = 0.8, 1.1
"""the defaults, also those of an exported model: greedy text, and text without a penalty, loops"""
SMALLEST = 1e-3
"""temperature, and repetition penalty: far below, logits divided by it would be infinite"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The definitions and their order are those of transformers' logits
    processors.

    Raises `UserError` on an impossible value.
    """

    temperature: float = 0.8
    """logits are divided by it; 0: greedy, always the most likely token"""
    top_k: int = 0
    """sample from the k most likely tokens; 0: from all"""
    top_p: float = 1.0
    """sample from the smallest set of most likely tokens with at least this probability"""
    repetition_penalty: float = 1.0
    """above 1: logits of tokens that are already in prompt or text are divided by it (multiplied if
    negative)"""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not SMALLEST <= self.temperature < float("inf"):
            raise UserError(
                f"the temperature must be 0 (greedy) or at least {SMALLEST}, not {self.temperature}"
            )
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (no limit) or above, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if not SMALLEST <= self.repetition_penalty <= 1 / SMALLEST:
            raise UserError(
                f"the repetition penalty must be from {SMALLEST} to {1 / SMALLEST:g} (1: none), not "
                f"{self.repetition_penalty}"
            )


def generate(
    net: "Ant",
    tokenizer: "Tokenizer",
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int = 200,
    temperature: float = TEMPERATURE,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = REPETITION_PENALTY,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Continue each prompt; returns the continuations, without the prompts.

    A text ends with one of the tokenizer's `end_ids` (which is left out), after `max_new_tokens`, or where
    the model's context is full: it never slides, because a model has not learned positions beyond it. An
    empty prompt starts a new text. Row i draws from its own generator, seeded with `seed` + i, so a text
    does not depend on its batch.

    Args:
        prompts: texts, or their token ids.
        temperature, top_k, top_p, repetition_penalty: see `Sampling`.
        on_token: called with (row, token id) for every new token, as it comes.

    Raises `UserError` on an impossible value, when a prompt leaves no room in the context, or when the model
    computes NaN or infinity.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    if max_new_tokens < 1:
        raise UserError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= seed < 2**62:
        raise UserError(f"the seed must be at least 0 and below 2^62, not {seed}")
    encoded = [tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    rows = [ids or [tokenizer.eos_token_id] for ids in encoded]
    if not rows:
        return []
    context = net.config.max_position_embeddings
    longest = max(len(row) for row in rows)
    if longest >= context:
        raise UserError(
            f"a prompt of {longest:,} tokens leaves no room in the model's context of {context:,}"
        )
    training = net.training
    net.eval()
    try:
        texts = _generate(net, rows, max_new_tokens, sampling, seed, tokenizer.end_ids, on_token)
    finally:
        net.train(training)
    return [_continuation(tokenizer, row, text) for row, text in zip(rows, texts, strict=True)]


def _continuation(tokenizer: "Tokenizer", prompt: list[int], text: list[int]) -> str:
    """What `text` adds to `prompt`: some decoders treat the beginning of a text apart."""
    return tokenizer.decode(prompt + text)[len(tokenizer.decode(prompt)) :]


@torch.inference_mode()
def _generate(
    net: "Ant",
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    end_ids: Sequence[int],
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    config, device, count = net.config, net.device, len(prompts)
    ends = [min(len(prompt) + max_new_tokens, config.max_position_embeddings) for prompt in prompts]
    uniforms = _uniforms(count, config.max_position_embeddings, seed).to(device)
    seen = torch.zeros(count, config.vocab_size, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, torch.tensor(prompt, device=device)] = True
    cache = KVCache(config, count, max(ends), device=device, dtype=net.head_weight.dtype)
    texts = [list(prompt) for prompt in prompts]
    writing = set(range(count))
    position = min(len(prompt) for prompt in prompts)
    inputs = torch.tensor([prompt[:position] for prompt in prompts], device=device)
    while writing:
        logits = net(inputs, cache=cache)[:, -1].float()
        ids = draw(logits, seen, sampling, uniforms[:, position])
        drawn, finite = torch.stack([ids, logits.isfinite().all(-1).long()]).tolist()
        if not all(finite):
            raise UserError(NOT_FINITE)
        for row in sorted(writing):
            if position < len(prompts[row]):
                continue
            if drawn[row] in end_ids:
                writing.remove(row)
                continue
            texts[row].append(drawn[row])
            seen[row, drawn[row]] = True
            if on_token:
                on_token(row, drawn[row])
            if len(texts[row]) == ends[row]:
                writing.remove(row)
        # A row that has ended repeats its last token; nobody looks at what it makes of that.
        inputs = torch.tensor([[text[min(position, len(text) - 1)]] for text in texts], device=device)
        position += 1
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _uniforms(rows: int, length: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for every row and position, drawn on the CPU: the same on every device."""
    generators = [torch.Generator().manual_seed(seed + row) for row in range(rows)]
    return torch.stack([torch.rand(length, generator=generator) for generator in generators])


def draw(logits: Tensor, seen: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """Next token ids [B] of logits [B, V]; `seen` (bool [B, V]): tokens so far; `uniform` [B] in [0, 1)."""
    scores = process(logits, seen, sampling)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    # Inverse of the cumulative distribution, in double precision; a token of probability 0 is never hit.
    cumulative = scores.double().softmax(-1).cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def process(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """Scores [B, V] after repetition penalty, temperature, top-k and top-p; removed tokens are -inf."""
    scores = logits
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if sampling.temperature == 0:
        return scores
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        # What lies below the smallest set that reaches top_p; the most likely token always stays.
        below = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(below).scatter(1, order, below), -torch.inf)
    return scores


@dataclass(frozen=True)
class LoopReport:
    """How much a text repeats itself, and whether that is more than people do."""

    words: int
    repeated: dict[int, float]
    """n -> share of the n-grams that occurred before in the text (rep-n), n = 1..4"""
    cycle: str
    """what is repeated back to back over the longest stretch"""
    times: int
    """how often in a row"""
    cycle_words: int
    """words of that stretch"""
    looping: bool

    @property
    def advice(self) -> str:
        """One line for people, empty when the text does not loop."""
        if not self.looping:
            return ""
        what = f"{self.repeated[4]:.0%} of its 4-grams are repeats"
        if self.times >= MAX_TIMES:
            what += f", and {self.cycle[:60]!r} comes {self.times} times in a row"
        return (
            f"the text loops: {what}. Now: a repetition penalty of 1.1-1.3 or a temperature of 0.8-1.0. For "
            "good: train longer, and clean the data of repeated lines, lists and URLs."
        )


# Where people end and loops begin. Of 22,500 excerpts (40-800 words) from textbooks and novels these take 9
# for a loop (0.04 %), mostly fairy tales that repeat on purpose; of 777 from children's stories, 12.
MAX_REPEATED = 0.3  # share of repeated 4-grams
MAX_TIMES, MIN_CYCLE_WORDS = 4, 12  # back to back


def find_loops(text: str) -> LoopReport:
    """Measure repetition in a text of any length; below about 20 words there is little to see."""
    words = words_of(text)
    ids = np.unique(words, return_inverse=True)[1].astype(np.uint64)
    repeats = {n: find_repeats(hash_ngrams(ids, n)) for n in range(1, 5)}
    repeated = {n: float(found.mean()) if len(found) else 0.0 for n, found in repeats.items()}
    start, period, length = _longest_cycle(ids)
    times = length // period if period else 0
    looping = (repeated[4] > MAX_REPEATED) or (times >= MAX_TIMES and length >= MIN_CYCLE_WORDS)
    cycle = " ".join(words[start : start + period])
    return LoopReport(len(words), repeated, cycle, times, length, looping)


def words_of(text: str) -> list[str]:
    """Words and marks of a text, as repetition is counted over them."""
    # Long words are cut, so that "aaaa..." is a loop too: 12 is a multiple of the short periods.
    return re.findall(r"\w{1,12}|[^\w\s]", text)


def _longest_cycle(ids: np.ndarray) -> tuple[int, int, int]:
    """(start, period, length) of the longest stretch that repeats its first `period` ids at least twice."""
    best = (0, 0, 0)
    for period in range(1, len(ids) // 2 + 1):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2)
        if not len(edges):
            continue
        run = int((edges[:, 1] - edges[:, 0]).argmax())
        start, matched = int(edges[run, 0]), int(edges[run, 1] - edges[run, 0])
        if matched >= period and matched + period > best[2]:
            best = (start, period, matched + period)
    return best
