"""Two models on the same items: differences per task, paired by item, and what they say together."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ant5m.errors import UserError
from ant5m.eval.benchmarks import BENCHMARKS
from ant5m.eval.intervals import holm, t_quantile, t_tail
from ant5m.eval.results import TaskResult

LEVEL = 0.05
"""of all tasks together"""


@dataclass(frozen=True)
class Difference:
    """What the second model reaches beyond the first in one task."""

    task: str
    metric: str
    first: float
    """share of the items that are answered right"""
    second: float
    items: int
    low: float
    """95 % interval of `second - first`, paired by item"""
    high: float
    p: float
    """two-sided, of this task alone"""
    adjusted: float
    """the same corrected for the number of tasks (Holm)"""

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def verdict(self) -> str:
        """better, worse (of the second model), or no difference shown."""
        if self.adjusted >= LEVEL:
            return "no difference shown"
        return "better" if self.difference > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "difference": self.difference, "verdict": self.verdict}


def compare(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[Difference]:
    """The differences in every task that has accuracies: one a task, in `acc_norm` where there is one.

    Of a task with parts it is the mean over parts, weighted as the task's own. Raises `UserError` when the
    items were not the same.
    """
    sides = [{result.task: result for result in results} for results in (first, second)]
    found = []
    for name in BENCHMARKS:
        if name in sides[0] and name in sides[1] and (metric := _metric(sides[0][name])):
            found.append(_paired(name, metric, *sides))
    adjusted = holm([one["p"] for one in found])
    return [Difference(**one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def _metric(result: TaskResult) -> str | None:
    return next((name for name in ("acc_norm", "acc") if name in result.metrics), None)


def _paired(name: str, metric: str, *sides: dict[str, TaskResult]) -> dict[str, Any]:
    """The mean of the items' differences; parts are strata, each with its own variance."""
    parts = [
        task for task in sides[0] if task == name or (BENCHMARKS[name].parts and task.startswith(f"{name}_"))
    ]
    strata = [_differences(task, metric, *sides) for task in parts if sides[0][task].values]
    if not strata:
        raise UserError(f"{name} was measured without its items' values: evaluate it again")
    sizes = np.array([len(stratum) for stratum in strata], float)
    weights = sizes if name == "mmlu" else np.ones_like(sizes)
    weights /= weights.sum()
    error = math.sqrt(sum((w * _error(stratum)) ** 2 for w, stratum in zip(weights, strata, strict=True)))
    first, second = (side[name].metrics[metric][0] for side in sides)
    mean = second - first
    freedom = max(1, int(sizes.sum()) - len(strata))
    half = t_quantile(freedom) * error
    p = t_tail(mean / error, freedom) if error else float(mean == 0)
    return {
        "task": name,
        "metric": metric,
        "first": first,
        "second": second,
        "items": int(sizes.sum()),
        "low": mean - half,
        "high": mean + half,
        "p": p,
    }


def _differences(task: str, metric: str, *sides: dict[str, TaskResult]) -> np.ndarray:
    one, other = (side.get(task) for side in sides)
    same = one and other and one.settings == other.settings and one.items == other.items
    if not (one and other and same):
        raise UserError(f"{task} was not measured on the same items: evaluate both models again")
    return np.array(other.values[metric]) - np.array(one.values[metric])


def _error(values: np.ndarray) -> float:
    """Standard error of a mean; of one value it is not known, and taken as the largest possible."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 1.0
