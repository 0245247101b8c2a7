"""Means over seeds, their intervals, and what an interval says about a claim."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SMALLEST_EFFECT = 0.01
"""bits per byte. A fifth of what a doubling of the tokens brought a public 17M run at 629M tokens (0.05)"""

Verdict = Literal["supported", "not supported", "not decided"]

RULE = (
    "Written down before the runs. Let d be the bits per byte of the arm that a claim blames minus those of "
    "the arm it is held against, paired by seed, with a 95 % t-interval over the seeds. Supported: the "
    f"whole interval lies above {SMALLEST_EFFECT} bits per byte, the smallest effect of interest. Not "
    "supported: it lies below. Not decided at this budget: anything else; always with one seed; and always "
    "when the better of the two arms does not beat a bigram counted on the same training tokens, because "
    "such a model makes no use of its attention yet. One comparison a claim, named in advance."
)

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; `low` and `high` are None with a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def t_quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t; beyond the table Cornish and Fisher's expansion (A&S 26.7.5),
    right to four digits there."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


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
    if not beats_bigram or difference is None or difference.low is None or difference.high is None:
        return "not decided"
    if difference.low > SMALLEST_EFFECT:
        return "supported"
    return "not supported" if difference.high < SMALLEST_EFFECT else "not decided"
