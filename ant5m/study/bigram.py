"""What counting pairs of tokens achieves: a model that is no better makes no use of its attention."""

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Counts = tuple[NDArray[np.int64], NDArray[np.float64]]
"""keys, sorted, and how often each came"""
BLOCK = 1 << 24
"""tokens that are sorted at once"""


def bigram_nats(batches: Iterable[NDArray[np.int64]], text: NDArray[np.int64], vocab_size: int) -> float:
    """Nats over text[1:] of a bigram counted on `batches` [rows, length], each token predicted from its
    predecessor.

    Pairs are interpolated with single tokens, and these with a uniform guess, as by Witten and Bell, "The
    Zero-Frequency Problem" (1991): a context that was seen n times with t different successors gives its own
    counts the weight n / (n + t). There is nothing to tune.
    """
    single, (pairs, counts) = _count(batches, vocab_size)
    kinds = np.count_nonzero(single)
    lower = (single + kinds / vocab_size) / (single.sum() + kinds)
    seen = np.bincount(pairs // vocab_size, weights=counts, minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)
    asked = text[:-1] * vocab_size + text[1:]
    places = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    count = np.where(pairs[places] == asked, counts[places], 0)
    n, t = seen[text[:-1]], successors[text[:-1]]
    # A context that never came has n = t = 0, and says nothing.
    chance = (count + np.where(n > 0, t, 1) * lower[text[1:]]) / np.where(n > 0, n + t, 1)
    return float(-np.log(chance).sum())


def bigram_bits_per_byte(
    batches: Iterable[NDArray[np.int64]], text: NDArray[np.int64], vocab_size: int, size: int
) -> float:
    """`bigram_nats` in bits per byte; `size`: bytes of the text."""
    return bigram_nats(batches, text, vocab_size) / (math.log(2) * size)


def _count(batches: Iterable[NDArray[np.int64]], vocab_size: int) -> tuple[NDArray[np.int64], Counts]:
    """How often each token came, and each pair (first * vocab_size + second) that came at all."""
    single = np.zeros(vocab_size, np.int64)
    pairs: Counts = np.empty(0, np.int64), np.empty(0)
    for block in _blocks(batches):
        single += np.bincount(np.concatenate([rows.ravel() for rows in block]), minlength=vocab_size)
        keys = np.concatenate([(rows[:, :-1] * vocab_size + rows[:, 1:]).ravel() for rows in block])
        pairs = _merge(pairs, np.unique(keys, return_counts=True))
    return single, pairs


def _blocks(batches: Iterable[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
    """Batches together that have about `BLOCK` tokens, so that a large text needs no more memory."""
    batches = iter(batches)
    for first in batches:
        yield [first, *itertools.islice(batches, BLOCK // first.size)]


def _merge(one: Counts, other: tuple[NDArray[np.int64], NDArray[np.int64]]) -> Counts:
    keys, places = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    counts = np.bincount(places, weights=np.concatenate([one[1], other[1]]), minlength=len(keys))
    return keys.astype(np.int64), counts.astype(np.float64)
