"""N-grams of whole numbers (ids of words or tokens), by their hashes."""

import numpy as np
from numpy.typing import NDArray

_BASE = np.uint64(0x9E3779B97F4A7C15)
"""odd: Knuth's 2^64 / phi"""


def hash_ngrams(ids: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A hash of each n-gram of ids [N], uint64 [max(0, N - n + 1)]: a polynomial modulo 2^64."""
    hashes = np.zeros(max(0, len(ids) - n + 1), np.uint64)
    for place in range(n):
        hashes = hashes * _BASE + ids[place : place + len(hashes)] + np.uint64(1)
    return hashes


def find_repeats(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which n-grams [N] occurred before. Their share is "rep-n" of Welleck et al., "Neural Text Generation
    with Unlikelihood Training"; the rest is "distinct-n" of Li et al., "A Diversity-Promoting Objective
    Function for Neural Conversation Models".
    """
    repeats = np.ones(len(hashes), bool)
    repeats[np.unique(hashes, return_index=True)[1]] = False
    return repeats


def covered_by(starts: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    """Which positions [len(starts) + n - 1] lie in an n-gram of those that begin where `starts` is true."""
    edges = np.zeros(len(starts) + n, np.int64)
    edges[:-n] += starts
    edges[n:] -= starts
    return np.cumsum(edges[:-1]) > 0
