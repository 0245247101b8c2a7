"""The learning-rate schedules, by hand-computed values."""

import math

import pytest

from ant5m.errors import UserError
from ant5m.train.schedule import SHAPES, Schedule


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 101])
def test_factors_are_possible(shape, steps):
    schedule = Schedule(steps, shape, warmup=0.1, floor=0.05)
    factors = [schedule(step) for step in range(steps)]
    assert all(0.05 <= factor <= 1 for factor in factors)
    assert steps < 10 or schedule(steps) == pytest.approx(0.05)


def test_warmup_rises_to_the_peak():
    schedule = Schedule(100, warmup=0.1)
    assert [schedule(step) for step in (0, 4, 9, 10)] == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1])
    assert Schedule(100, warmup=0.0)(0) == 1


def test_linear():
    schedule = Schedule(100, "linear", warmup=0.0, floor=0.0)
    assert [schedule(step) for step in (0, 25, 75, 99)] == pytest.approx([1, 0.75, 0.25, 0.01])


def test_cosine():
    schedule = Schedule(100, "cosine", warmup=0.0, floor=0.1)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert [schedule(step) for step in (0, 25, 50)] == pytest.approx([1, middle, 0.55])


def test_wsd_is_flat_then_falls():
    schedule = Schedule(100, "wsd", warmup=0.1, decay=0.2)
    assert [schedule(step) for step in (10, 50, 80, 90, 99)] == pytest.approx([1, 1, 1, 0.5, 0.05])


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="linear, cosine, wsd"):
        Schedule(10, "step")
    with pytest.raises(UserError, match="at least one step"):
        Schedule(0)
