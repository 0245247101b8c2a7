"""Two models on the same items: paired intervals, and one correction for all tasks."""

import dataclasses

import numpy as np
import pytest

from ant5m.errors import UserError
from ant5m.eval.comparison import compare
from ant5m.eval.results import TaskResult

stats = pytest.importorskip("scipy.stats")

SETTINGS = {"limit": None, "data": "x", "sha256": "1", "lm_eval": "1"}


def result(task: str, values, metric: str = "acc") -> TaskResult:
    figure = (float(np.mean(values)), 0.1)
    return TaskResult(task, {metric: figure}, len(values), 0.5, SETTINGS, values={metric: list(values)})


def test_a_difference_is_a_paired_t_test():
    random = np.random.default_rng(0)
    first, second = random.random(200).round(), random.random(200).round()
    (found,) = compare([result("piqa", first)], [result("piqa", second)])
    t = stats.ttest_rel(second, first)
    assert (found.p, found.adjusted) == pytest.approx((t.pvalue, t.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(t.confidence_interval()), abs=1e-6)
    assert found.difference == pytest.approx(np.mean(second - first)) and found.items == 200


def test_tasks_share_the_errors():
    first = np.zeros(100)
    second = np.r_[np.ones(7), np.zeros(93)]  # p = 0.008 alone
    names = ["boolq", "copa", "winogrande", "piqa", "swag", "race", "sciq"]
    alone = compare([result("piqa", first)], [result("piqa", second)])
    assert [one.verdict for one in alone] == ["better"]
    models = [[result(name, values) for name in names] for values in (first, second)]
    assert {one.verdict for one in compare(*models)} == {"no difference shown"}
    assert compare(*models)[0].adjusted == pytest.approx(7 * alone[0].p)
    assert [one.verdict for one in compare([models[1][3]], [models[0][3]])] == ["worse"]


def test_equal_models_differ_in_nothing():
    (found,) = compare([result("piqa", [0, 1, 1])], [result("piqa", [0, 1, 1])])
    assert (found.p, found.low, found.high, found.verdict) == (1.0, 0.0, 0.0, "no difference shown")


def test_parts_are_strata():
    random = np.random.default_rng(1)
    sides = []
    for shift in (0.0, 0.3):
        values = {
            f"blimp_{p}": (random.random(50) + shift > 0.1 + 0.5 * (p == "b")).astype(float) for p in "ab"
        }
        parts = [result(name, each) for name, each in values.items()]
        mean = float(np.mean([each.mean() for each in values.values()]))
        whole = dataclasses.replace(result("blimp", [mean]), values={}, items=100)
        sides.append([*parts, whole])
    (found,) = compare(*sides)
    pairs = [np.subtract(sides[1][i].values["acc"], sides[0][i].values["acc"]) for i in range(2)]
    error = np.sqrt(sum(pair.var(ddof=1) / 50 for pair in pairs)) / 2
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 98) * error, rel=1e-6)
    assert found.items == 100


def test_other_items_are_refused():
    other = dataclasses.replace(result("piqa", [1, 0]), settings={**SETTINGS, "sha256": "2"})
    with pytest.raises(UserError, match="not measured on the same items"):
        compare([result("piqa", [1, 0])], [other])
