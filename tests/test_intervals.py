"""Intervals hold what they promise."""

import math

import pytest
import torch

from ant5m.eval.autopsy.evidence import estimate
from ant5m.eval.intervals import t_quantile, wilson


def student_cdf(t, freedom):
    """Probability of |T| < t: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term = math.cos(angle), 1.0
    if freedom % 2:
        total, term = 0.0, cosine
        for k in range(1, (freedom - 1) // 2 + 1):
            total += term
            term *= cosine**2 * 2 * k / (2 * k + 1)
        return 2 / math.pi * (angle + math.sin(angle) * total)
    total = 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k - 1) / (2 * k)
    return math.sin(angle) * total


@pytest.mark.parametrize("freedom", [*range(1, 22), 30, 101])
def test_quantiles_of_student(freedom):
    assert student_cdf(t_quantile(freedom), freedom) == pytest.approx(0.95, abs=5e-6)


@pytest.mark.parametrize("successes, trials, low, high", [(0, 10, 0.0, 0.278), (5, 10, 0.237, 0.763)])
def test_wilson_interval(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-3)


def test_tokens_of_one_document_are_alike():
    """95 % of the intervals of few windows hold the mean, however alike the tokens of one are."""
    torch.manual_seed(0)
    held = []
    for _ in range(2_000):
        windows = torch.randn(8, 1) + torch.randn(8, 64)
        found = estimate(windows)
        held.append(abs(found.mean) <= found.half)
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.015)
    assert estimate(torch.ones(1, 5)).half == math.inf
