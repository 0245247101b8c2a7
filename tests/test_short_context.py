"""Short contexts first: the same tokens in pieces, until a share of the run is over."""

import dataclasses

import pytest
import torch
from test_pace import clock, limited  # noqa: F401  (fixtures)
from test_train import CPU, MODEL, config, material  # noqa: F401  (fixtures)

from ant5m.errors import UserError
from ant5m.model.ant import Ant
from ant5m.train import TrainConfig, plan, pretrain
from ant5m.train.settings import resolve
from ant5m.train.step import Step


@pytest.fixture
def batches(monkeypatch):
    """What the steps are given: (input_ids, targets, rows computed at once)."""
    seen = []
    original = Step.__call__

    def call(self, input_ids, targets, *rest):
        seen.append((input_ids.clone(), targets.clone(), self.micro_batch_size))
        return original(self, input_ids, targets, *rest)

    monkeypatch.setattr(Step, "__call__", call)
    return seen


def test_the_first_steps_take_the_same_tokens_in_pieces(config, tmp_path, batches):  # noqa: F811
    pretrain(config)
    whole = batches.copy()
    batches.clear()
    pretrain(dataclasses.replace(config, short_context=8, short_share=0.6, out=tmp_path / "short"))
    assert [(tuple(ids.shape), rows) for ids, _, rows in batches] == [((16, 8), 8)] * 5 + [((4, 32), 2)] * 3
    for (ids, targets, _), (whole_ids, whole_targets, _) in zip(batches, whole, strict=True):
        assert torch.equal(ids.flatten(), whole_ids.flatten())
        assert torch.equal(targets.flatten(), whole_targets.flatten())


def test_the_clock_ends_the_short_part_too(limited, clock, batches):  # noqa: F811
    clock.slow_from = 8
    result = pretrain(dataclasses.replace(limited, short_context=8, short_share=0.5))
    lengths = [ids.shape[1] for ids, _, _ in batches]
    short = lengths.count(8)
    assert lengths == [8] * short + [32] * (len(lengths) - short)
    assert result.step < 20 and 8 < short < result.step  # planned were 35 steps, 17 of them short


def test_the_length_must_divide_the_sequence():
    with pytest.raises(UserError, match="--short-context \\(5\\) must divide the 32 tokens of a sequence"):
        resolve(TrainConfig(short_context=5, steps=5), MODEL, 10**6, CPU, "fp32", pytest.fail)


def test_the_speed_is_that_of_both_parts(monkeypatch):
    monkeypatch.setattr(plan, "_measure_speed", lambda net, asked, precision, length: float(length))
    asked = TrainConfig(short_context=8, short_share=0.75)
    assert plan.measure_speed(Ant(MODEL), asked, "fp32") == 0.75 * 8 + 0.25 * 32
