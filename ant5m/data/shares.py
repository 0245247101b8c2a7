"""Which source each sequence of a run comes from, when several are mixed."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

UNIT = 1 << 32
"""A share is a whole number of these parts, so that sums are exact however long a run is."""


@dataclass(frozen=True)
class Shares:
    """Deals out the places of a run to its sources, block by block (a block is a batch of all ranks).

    In every block each source has its share of the places within one sequence, and over the blocks what is
    left over is paid back: after any of them a source has what it was to have until then, within two
    sequences (within one in all that `tests/test_mixture.py` tries).

    Args:
        starts: the first place of each phase; the first one is 0.
        weights: of each phase, the sources' shares in `UNIT`s, which they sum to.
        block: places that are dealt out at once.
    """

    starts: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    block: int

    def asked(self, places: int) -> list[int]:
        """What each source is to have of the first `places` of the run, in `UNIT`s of a sequence."""
        ends = [*self.starts[1:], max(places, self.starts[-1])]
        lengths = [max(0, min(end, places) - start) for start, end in zip(self.starts, ends, strict=True)]
        return [
            sum(length * weight for length, weight in zip(lengths, weights, strict=True))
            for weights in zip(*self.weights, strict=True)
        ]

    def counts(self, taken: Sequence[int]) -> list[int]:
        """How many sequences of each source are in the next block, when `taken` are in those before it."""
        start = sum(taken)
        before, after = self.asked(start), self.asked(start + self.block)
        counts, rests = zip(*(divmod(b - a, UNIT) for a, b in zip(before, after, strict=True)), strict=True)
        missing = self.block - sum(counts)
        if not missing:
            return list(counts)
        # What each would lack without one more, and in how many such blocks it would lack a whole sequence.
        lacks = [a - UNIT * t + r for a, t, r in zip(before, taken, rests, strict=True)]
        urgency = [
            (lack <= 0, (UNIT - lack) / rest, index)
            for index, (lack, rest) in enumerate(zip(lacks, rests, strict=True))
            if rest
        ]
        more = {index for *_, index in sorted(urgency)[:missing]}
        return [count + (index in more) for index, count in enumerate(counts)]

    def deal(self, taken: Sequence[int]) -> NDArray[np.int64]:
        """The sources of the next block's places, int64 [block]; those of each are spread over it."""
        counts = self.counts(taken)
        sources = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        return sources[np.argsort(places, kind="stable")]

    def begun(self, now: int, reached: int) -> "Shares":
        """The same, but the phases up to the place `reached` begin now, at the end of a block, where they
        have not begun."""
        starts = tuple(now if now < start <= reached else start for start in self.starts)
        return dataclasses.replace(self, starts=starts)

    def planned(self, places: int) -> list[float]:
        """Sequences of each source in the first `places` of the run."""
        return [asked / UNIT for asked in self.asked(places)]


def make_shares(phases: Sequence[tuple[float, Sequence[float]]], total: int, block: int) -> Shares:
    """`phases`: where each begins, as a share of the `total` places of a run, and its weights, whose sum may
    be anything above 0. One that has no place left in so short a run is dropped."""
    starts = [round(start * total) for start, _ in phases]
    kept = [index for index, (a, b) in enumerate(pairwise([*starts, max(total, 1)])) if a < b]
    weights = tuple(_in_units(phases[index][1]) for index in kept)
    return Shares(tuple(starts[index] for index in kept), weights, block)


def _in_units(weights: Sequence[float]) -> tuple[int, ...]:
    total = sum(weights)
    units = [round(weight / total * UNIT) for weight in weights]
    units[int(np.argmax(units))] += UNIT - sum(units)
    return tuple(units)
