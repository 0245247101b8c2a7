"""Intervals hold what they promise."""

import math

import pytest
import torch

from ant5m.eval.autopsy.evidence import estimate
from ant5m.eval.intervals import holm, t_quantile, t_tail, wilson

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 20, 100, 101, 5000])
@pytest.mark.parametrize("level", [0.95, 0.9875])
def test_student(freedom, level):
    expected = stats.t.ppf((1 + level) / 2, freedom)
    assert t_quantile(freedom, level) == pytest.approx(expected, rel=1e-7)
    for t in (0.0, 0.3, -2.0, 9.0):
        assert t_tail(t, freedom) == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("successes, trials, low, high", [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763)])
def test_wilson_interval(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-3)


def test_tokens_of_one_document_are_alike():
    """95 % of the intervals of few windows hold the mean, however alike the tokens of one are."""
    torch.manual_seed(0)
    inside = []
    for _ in range(2_000):
        windows = torch.randn(8, 1) + torch.randn(8, 64)
        found = estimate(windows)
        inside.append(abs(found.mean) <= found.half)
    assert sum(inside) / len(inside) == pytest.approx(0.95, abs=0.015)
    assert estimate(torch.ones(1, 5)).half == math.inf
