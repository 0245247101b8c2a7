"""The order of sequences in training: each once an epoch, an order of its own for every epoch."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

OrderName = Literal["permutation", "feistel"]
ORDERS: tuple[OrderName, ...] = get_args(OrderName)

LARGEST_PERMUTATION = 1 << 20
"""sequences: up to here an epoch's permutation is an array, 8 bytes each"""
BLOCK = 1 << 12
"""places that the Feistel network computes at once: the cost of a call to NumPy is nothing beside it"""
ROUNDS = 6


class Order:
    """Of `count` sequences, which one comes at which place.

    "permutation" is an array of a whole epoch, made by NumPy's generator; "feistel" computes any part of an
    epoch by itself and keeps one block, so its memory does not grow with `count`. A run keeps the kind that
    it began with.
    """

    def __init__(self, count: int, seed: Sequence[int], name: OrderName | None = None) -> None:
        """`seed`: numbers from 0 on. `name`: default: by `count`."""
        self.count = count
        self.name = name or ("permutation" if count <= LARGEST_PERMUTATION else "feistel")
        self._seed = list(seed)
        self._block = count if self.name == "permutation" else min(count, BLOCK)
        self._blocks = -(-count // self._block)  # of an epoch
        self._there = -1
        self._numbers: NDArray[np.int64] = np.empty(0, np.int64)

    def at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers below `count` at `places`, which go on from one epoch into the next; int64 of any shape."""
        if not places.size:
            return np.empty_like(places)
        first, last = int(places.min()), int(places.max())
        block = self._block_at(first)
        if block == self._block_at(last):  # as nearly always: then most of what follows is saved
            epoch, part = divmod(block, self._blocks)
            return self._of_block(block)[places - (epoch * self.count + part * self._block)]
        epochs, within = np.divmod(places, self.count)
        blocks = epochs * self._blocks + within // self._block
        numbers = np.empty_like(places)
        for block in np.unique(blocks):
            inside = blocks == block
            numbers[inside] = self._of_block(int(block))[within[inside] % self._block]
        return numbers

    def _block_at(self, place: int) -> int:
        epoch, within = divmod(place, self.count)
        return epoch * self._blocks + within // self._block

    def _of_block(self, block: int) -> NDArray[np.int64]:
        if block != self._there:
            epoch, part = divmod(block, self._blocks)
            self._numbers = self._compute(epoch, part)
            self._there = block
        return self._numbers

    def _compute(self, epoch: int, part: int) -> NDArray[np.int64]:
        seed = [*self._seed, epoch]
        if self.name == "permutation":
            return np.random.default_rng(seed).permutation(self.count)
        keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64).astype(np.uint64)
        first = part * self._block
        places = np.arange(first, min(first + self._block, self.count), dtype=np.uint64)
        return permute(places, self.count, keys).astype(np.int64)


def permute(values: NDArray[np.uint64], count: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where a permutation of the numbers below `count`, one for each choice of keys, takes `values`.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002: a Feistel network over pairs
    (left, right) of about the square root of `count` each, repeated where it leaves the numbers below `count`
    ("cycle walking"). The pairs are fewer than `count` and its square root together, so that is rare.
    """
    rights = math.isqrt(count - 1) + 1
    lefts = -(-count // rights)
    permuted = _network(values, lefts, rights, keys)
    while (outside := permuted >= count).any():
        permuted[outside] = _network(permuted[outside], lefts, rights, keys)
    return permuted


def _network(
    values: NDArray[np.uint64], lefts: int, rights: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = values // np.uint64(rights), _modulo(values, rights)
    for number, key in enumerate(keys):
        if number % 2:
            right = _modulo(right + _modulo(_mix(left + key), rights), rights)
        else:
            left = _modulo(left + _modulo(_mix(right + key), lefts), lefts)
    return left * np.uint64(rights) + right


def _modulo(x: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """x % size. NumPy divides by one number with vector instructions, but takes remainders one by one."""
    divisor = np.uint64(size)
    return x - x // divisor * divisor


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Source: the output function of SplitMix64, in Steele et al., "Fast Splittable Pseudorandom Number
    Generators", 2014, with the constants of Stafford's variant 13."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
