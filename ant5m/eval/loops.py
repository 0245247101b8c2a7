"""How often a model's text falls into a loop, over a fixed set of prompts.

What a loop is says `ant5m.model.generation.find_loops`; here it is counted, with the repetition of n-grams
that the literature reports ("rep-n", "distinct-n"), under greedy decoding, sampling and a repetition penalty.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ant5m.data.ngrams import find_repeats, hash_ngrams
from ant5m.errors import UserError
from ant5m.eval.intervals import wilson
from ant5m.model.generation import LoopReport, Sampling, find_loops, generate, words_of

if TYPE_CHECKING:
    from ant5m.data.shards import Shards
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.model.ant import Ant

DECODINGS = {
    "greedy": Sampling(temperature=0),
    "sampled at 0.8": Sampling(temperature=0.8),
    "sampled at 1.0": Sampling(temperature=1.0),
    "greedy, penalty 1.2": Sampling(temperature=0, repetition_penalty=1.2),
}
"""the ways of writing that are compared"""

PROMPTS = (
    "The",
    "In the beginning",
    "Once upon a time",
    "This is an example of how to",
    "It is well known that",
    "The first thing that I saw was",
    "When the sun came up,",
    "She looked at the",
    "He said that",
    "There are many ways to",
    "The house stood",
    "One of the most important",
    "After the rain",
    "A long time ago",
    "The children went to",
    "We do not know why",
    "The answer to this question",
    "In the middle of the night",
    "The water was",
    "My father told me",
    "The second part of",
    "People often think that",
    "It was a cold day",
    "The ants carried",
    "If you want to learn",
    "The river runs",
    "On the other hand,",
    "The old man sat",
    "Before we begin,",
    "The number of",
    "At the end of the road",
    "They had never seen",
    "The light in the window",
    "Some animals live",
    "The story begins",
    "What happened next was",
    "The city is",
    "During the summer",
    "The reason for this is",
    "I remember",
    "The teacher asked",
    "In most cases,",
    "The wind blew",
    "As soon as the door opened,",
    "The following table shows",
    "Every morning",
    "The two friends",
    "Most of the time",
    "The mountain was",
    "For this reason,",
    "The letter arrived",
    "A small boat",
    "Nobody could say",
    "The work was",
    "To make bread, you need",
    "The last time",
)
"""short, neutral beginnings for any English text"""

EVERY = 16
"""tokens: the first loop is looked for in beginnings that grow by so many"""


@dataclass(frozen=True)
class LoopStatistics:
    """Repetition in the texts that one way of decoding wrote, one for each prompt."""

    decoding: str
    texts: int
    max_new_tokens: int
    """tokens that a text could have; fewer where the model's context ended"""
    looping: int
    """texts that `find_loops` takes for a loop"""
    interval: tuple[float, float]
    """95 % Wilson interval of `loop_rate`"""
    repeated: dict[int, float]
    """n -> share of the n-grams of a text that occurred before in it (rep-n), n = 1..4; mean over texts"""
    distinct: dict[int, float]
    """n -> different n-grams of all texts / all their n-grams (distinct-n), n = 1..4; falls with `texts`"""
    first_loop: float | None
    """tokens until a text that loops does (in steps of 16), median; None when none does"""
    ended: float
    """share of the texts that end with the end-of-text token"""
    longest: "Loop | None"
    """the loop with the longest stretch, if any text loops"""

    @property
    def loop_rate(self) -> float:
        """Share of the texts that loop."""
        return self.looping / self.texts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"loop_rate": self.loop_rate, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Loop:
    """One text that loops."""

    prompt: str
    text: str
    cycle: str
    """what is repeated"""
    times: int
    """how often in a row"""
    words: int
    """of the whole stretch"""


def measure_loops(
    net: "Ant",
    tokenizer: "Tokenizer",
    prompts: Sequence[str] = PROMPTS,
    decoding: str = "greedy",
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> LoopStatistics:
    """Let the model continue every prompt, and count loops.

    Args:
        decoding: one of `DECODINGS`. A text ends with the end-of-text token, after `max_new_tokens`, or where
            the context is full.
        advance: called with the number of texts that were finished just now.

    Raises `UserError` when there is no prompt, one leaves no room in the context, or the decoding is unknown.
    """
    if decoding not in DECODINGS:
        raise UserError(f"there is no decoding '{decoding}': use one of {', '.join(DECODINGS)}")
    if not prompts:
        raise UserError("loops are measured over prompts: give at least one")
    # Rows of like length beside one another: a batch computes as many positions as its longest row.
    by_length = sorted(prompts, key=lambda prompt: len(tokenizer.encode(prompt)))
    room = [_room(net, tokenizer, prompt, max_new_tokens) for prompt in by_length]

    def write(first: int) -> list[list[int]]:
        batch = by_length[first : first + batch_size]
        return _write(net, tokenizer, batch, DECODINGS[decoding], max_new_tokens, seed + first)

    training = net.training
    net.eval()  # before the threads: generate would switch the mode back while another still writes
    rows: list[list[int]] = []
    with _side_by_side(net.device.type == "cpu") as workers:
        for batch in workers.map(write, range(0, len(by_length), batch_size)):
            rows += batch
            if advance:
                advance(len(batch))
    net.train(training)
    ended = [len(row) < most for row, most in zip(rows, room, strict=True)]
    return _statistics(tokenizer, decoding, by_length, rows, ended, max_new_tokens)


def text_loops(
    tokenizer: "Tokenizer", texts: Sequence[Sequence[int]], max_new_tokens: int, name: str = "held-out text"
) -> LoopStatistics:
    """The same statistics of texts that people wrote, given as token ids: what to compare a model with."""
    if not texts:
        raise UserError("there is no text to compare with: give longer documents")
    rows = [list(text) for text in texts]
    return _statistics(tokenizer, name, [""] * len(rows), rows, [False] * len(rows), max_new_tokens)


def validation_prompts(
    shards: "Shards", tokenizer: "Tokenizer", count: int = 500, tokens: int = 16
) -> list[str]:
    """The first `tokens` tokens of up to `count` documents, evenly spread over a split; short ones are left
    out."""
    starts = document_starts(shards, tokens)
    chosen = np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(int)
    return [tokenizer.decode(shards.tokens[start : start + tokens]) for start in starts[chosen]]


def document_starts(shards: "Shards", tokens: int) -> np.ndarray:
    """Where the documents of at least `tokens` tokens begin in a split, int64."""
    ends = np.flatnonzero(shards.tokens[:] == shards.eos_token_id)
    starts = np.concatenate([[0], ends + 1])
    lengths = np.concatenate([ends, [shards.num_tokens]]) - starts
    return starts[lengths >= tokens]


@contextmanager
def _side_by_side(cpu: bool) -> Iterator[ThreadPoolExecutor]:
    """Workers for batches: on a CPU one for each thread of torch, which then splits no product itself.

    The products of 64 rows and one position are too small to split: on two busy cores, one thread a batch
    wrote 3 to 10 times as many tokens a second as two.
    """
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads if cpu else 1) as workers:
        if cpu:
            torch.set_num_threads(1)
        try:
            yield workers
        finally:
            torch.set_num_threads(threads)


def _write(
    net: "Ant",
    tokenizer: "Tokenizer",
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """The new tokens of every prompt."""
    rows: list[list[int]] = [[] for _ in prompts]
    generate(
        net,
        tokenizer,
        prompts,
        max_new_tokens,
        temperature=sampling.temperature,
        repetition_penalty=sampling.repetition_penalty,
        seed=seed,
        on_token=lambda row, token: rows[row].append(token),
    )
    return rows


def _room(net: "Ant", tokenizer: "Tokenizer", prompt: str, max_new_tokens: int) -> int:
    length = len(tokenizer.encode(prompt)) or 1  # an empty prompt is one end-of-text token
    return min(max_new_tokens, net.config.max_position_embeddings - length)


def _statistics(
    tokenizer: "Tokenizer",
    decoding: str,
    prompts: Sequence[str],
    rows: list[list[int]],
    ended: list[bool],
    max_new_tokens: int,
) -> LoopStatistics:
    texts = [tokenizer.decode(row) for row in rows]
    reports = [find_loops(text) for text in texts]
    loops = [index for index, report in enumerate(reports) if report.looping]
    firsts = [_first_loop(tokenizer, rows[index]) for index in loops]
    longest = max(loops, key=lambda index: reports[index].cycle_words, default=None)
    return LoopStatistics(
        decoding=decoding,
        texts=len(rows),
        max_new_tokens=max_new_tokens,
        looping=len(loops),
        interval=wilson(len(loops), len(rows)),
        repeated={n: float(np.mean([report.repeated[n] for report in reports])) for n in range(1, 5)},
        distinct={n: _distinct(texts, n) for n in range(1, 5)},
        first_loop=float(np.median(firsts)) if firsts else None,
        ended=sum(ended) / len(ended),
        longest=None if longest is None else _loop(prompts[longest], texts[longest], reports[longest]),
    )


def _loop(prompt: str, text: str, report: LoopReport) -> Loop:
    return Loop(prompt, text, report.cycle, report.times, report.cycle_words)


def _first_loop(tokenizer: "Tokenizer", row: list[int]) -> int:
    """Tokens of the shortest beginning (in steps of `EVERY`) of a looping text that loops already."""
    beginnings = range(EVERY, len(row), EVERY)
    return next((end for end in beginnings if find_loops(tokenizer.decode(row[:end])).looping), len(row))


def _distinct(texts: list[str], n: int) -> float:
    numbers: dict[str, int] = {}
    ids = ([numbers.setdefault(word, len(numbers)) for word in words_of(text)] for text in texts)
    hashes = np.concatenate([hash_ngrams(np.array(text, np.uint64), n) for text in ids])
    return 1 - float(find_repeats(hashes).mean()) if len(hashes) else 0.0
