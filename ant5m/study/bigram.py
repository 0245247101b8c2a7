"""What counting pairs of tokens achieves: a model that is no better makes no use of its attention."""

import math

import numpy as np
from numpy.typing import NDArray


def bigram_nats(sequences: NDArray[np.int64], text: NDArray[np.int64], vocab_size: int) -> float:
    """Nats over text[1:] of a bigram counted on `sequences` [rows, length], each predicted from its
    predecessor.

    Pairs are interpolated with single tokens, and these with a uniform guess, as by Witten and Bell, "The
    Zero-Frequency Problem" (1991): a context that was seen n times with t different successors gives its own
    counts the weight n / (n + t). There is nothing to tune.
    """
    single = np.bincount(sequences.ravel(), minlength=vocab_size)
    kinds = np.count_nonzero(single)
    lower = (single + kinds / vocab_size) / (single.sum() + kinds)
    pairs, counts = np.unique(
        sequences[:, :-1].ravel() * vocab_size + sequences[:, 1:].ravel(), return_counts=True
    )
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
    sequences: NDArray[np.int64], text: NDArray[np.int64], vocab_size: int, size: int
) -> float:
    """`bigram_nats` in bits per byte; `size`: bytes of the text."""
    return bigram_nats(sequences, text, vocab_size) / (math.log(2) * size)
