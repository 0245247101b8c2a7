"""Means over seeds, their intervals, and what an interval says about a claim."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ant5m.eval.intervals import t_quantile

SMALLEST_EFFECT = 0.01
"""bits per byte. A fifth of what a doubling of the tokens brought a public 17M run at 629M tokens (0.05)"""

Verdict = Literal["supported", "not supported", "not decided"]

CLAIMS_TESTED = 4
"""published claims, each with a study of its own: they share the 5 % of errors"""
CORRECTED_LEVEL = 1 - 0.05 / CLAIMS_TESTED

RULE = (
    "Written down before the runs. Let d be the bits per byte of the variant that a claim blames minus "
    "those of the variant it is compared with, paired by seed, with a t-interval over the seeds. Four "
    "published claims are tested, so the interval that decides has 98.75 % (Holm's correction, its "
    "first step, because a study does not know what the others found); beside it stands the one of 95 "
    f"%. Supported: the whole 98.75 % interval lies above {SMALLEST_EFFECT} bits per byte, the smallest "
    "effect of interest. Not supported: it lies below. Not decided at this budget: anything else; "
    "always with one seed; and always when the better of the two variants does not beat a bigram counted on "
    "the same training tokens, because such a model makes no use of its attention yet. One comparison a "
    "claim, named in advance; repeated at another budget, it is another comparison, and more is asked "
    "of both."
)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `low` and `high` are None with a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def corrected(self) -> "Interval":
        """The same at `CORRECTED_LEVEL`."""
        if self.low is None or self.high is None:
            return self
        freedom = self.count - 1
        wider = t_quantile(freedom, CORRECTED_LEVEL) / t_quantile(freedom)
        middle, half = (self.low + self.high) / 2, wider * (self.high - self.low) / 2
        return Interval(self.mean, middle - half, middle + half, self.count)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of values that are independent and roughly normal."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def paired(values: dict[int, float], baseline: dict[int, float]) -> Interval | None:
    """Interval of value - baseline over the seeds that both have; None when there is none."""
    shared = sorted(values.keys() & baseline.keys())
    return interval([values[seed] - baseline[seed] for seed in shared]) if shared else None


def judge(difference: Interval | None, beats_bigram: bool) -> Verdict:
    """What `RULE` says of a difference."""
    deciding = difference.corrected() if difference else None
    if not beats_bigram or deciding is None or deciding.low is None or deciding.high is None:
        return "not decided"
    if deciding.low > SMALLEST_EFFECT:
        return "supported"
    return "not supported" if deciding.high < SMALLEST_EFFECT else "not decided"
