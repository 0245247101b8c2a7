"""A time limit always gives a finished model, on whatever machine, and what it did is repeated exactly."""

import dataclasses
import json
import shutil
import time

import pytest
import torch
from test_data_parallel import together
from test_resume import fingerprint, interrupt  # noqa: F401  (a fixture)
from test_step import make
from test_train import config, material, of_kind  # noqa: F401  (fixtures)

from ant5m.train import TrainConfig, pace, pretrain, trainer
from ant5m.train.pace import Pace, finish_seconds, recorded_positions
from ant5m.train.trainer import Trainer


@pytest.fixture
def clock(monkeypatch):
    """A clock that only steps move: `clock.step` seconds each, from the step `clock.slow_from` on 4 times as
    many."""

    class Clock:
        now, step, slow_from, taken = 1_000.0, 1.0, 10**9, 0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    original = Trainer._train_step

    def train_step(self, stop):
        Clock.now += Clock.step * (4 if self._attempts >= Clock.slow_from else 1)
        Clock.taken += 1
        return original(self, stop)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    return Clock


@pytest.fixture
def limited(config, monkeypatch):  # noqa: F811
    """A run of a minute, planned for 35 steps of a second."""
    monkeypatch.setattr(pace, "FINISH_TOKENS", 0)
    monkeypatch.setattr("ant5m.train.pretraining.measure_speed", lambda *_: 1 / 128)
    return dataclasses.replace(
        config, steps=None, max_minutes=1.0, batch_size=4, eval_every=5, checkpoint_every=5, keep_last=9
    )


def finished(run):
    names = ("report.md", "loss.png", "eval.json", "hf/model.safetensors")
    return all((run / name).exists() for name in names)


def rates(run):
    return [line["learning_rate"] / 4e-3 for line in of_kind(run, "train")]


def test_a_machine_that_slows_down_ends_with_a_finished_model(limited, clock):
    clock.slow_from = 8
    result = pretrain(limited)
    assert result.stopped is None and finished(result.run)
    values = json.loads((result.run / "config.json").read_text())
    assert values["minutes"] == 1.0 and values["train"]["steps"] > 30
    assert 12 <= result.step <= 20
    assert rates(result.run)[-1] < 0.2 and rates(result.run)[7] > 0.7
    assert "ended after the time limit" in (result.run / "report.md").read_text()
    # The time for what follows was left.
    seconds = of_kind(result.run, "train")[-1]["seconds"]
    assert seconds <= 60 - finish_seconds(0, 1 / 128)


def test_a_machine_that_is_fast_enough_follows_the_steps(limited, clock):
    result = pretrain(limited)
    values = json.loads((result.run / "config.json").read_text())
    assert result.step == values["train"]["steps"] and finished(result.run)
    lines = of_kind(result.run, "train")
    assert all(line["position"] < line["step"] for line in lines)
    assert "ended after" not in (result.run / "report.md").read_text()


def test_the_limit_leaves_the_middle_of_a_step(limited, clock, monkeypatch):
    """A step that would outlast the limit is not waited for."""
    original = trainer.Trainer._should_abort

    def slower(self, stop):
        clock.now += 1_000 if self.step == 6 else 0
        return original(self, stop)

    monkeypatch.setattr(trainer.Trainer, "_should_abort", slower)
    result = pretrain(limited)
    assert (result.step, result.stopped) == (6, None) and finished(result.run)


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "fp16", "loop_loss": "unlikelihood", "loop_loss_share": 0.3}]
)
def test_from_a_checkpoint_all_is_repeated_whatever_the_clock_says(limited, clock, tmp_path, changes):
    clock.slow_from = 6
    run = pretrain(dataclasses.replace(limited, **changes)).run
    expected = fingerprint(run)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for checkpoint in (again / "checkpoints").iterdir():
        if checkpoint.name != "step-00000005":
            shutil.rmtree(checkpoint)
    clock.step = 0.01
    result = pretrain(TrainConfig(resume=again, max_minutes=30.0))
    last = expected[1][-1]["step"]
    replayed = [line for line in fingerprint(again)[1] if line["step"] <= last]
    assert replayed == expected[1]
    # Then the clock rules again, from there on.
    assert result.stopped is None and finished(again)


def test_stopped_and_resumed_equals_uninterrupted(limited, clock, tmp_path, interrupt):  # noqa: F811
    """With a clock that is the same in both."""
    whole = dataclasses.replace(limited, out=tmp_path / "whole")
    clock.slow_from = 5
    pretrain(whole)
    clock.now = 1_000.0
    stopped = dataclasses.replace(limited, out=tmp_path / "stopped")
    interrupt(15, 7)
    result = pretrain(stopped)
    assert (result.step, result.stopped) == (7, "terminated")
    state = json.loads((stopped.out / "checkpoints" / "step-00000007" / "state.json").read_text())
    assert state["position"] >= of_kind(stopped.out, "train")[-1]["position"] > 0
    result = pretrain(TrainConfig(resume=stopped.out))
    assert result.stopped is None and finished(stopped.out)
    both = [[line["learning_rate"] for line in of_kind(one.out, "train")] for one in (whole, stopped)]
    assert both[0][:7] == both[1][:7] and both[1][-1] < 0.2 * 4e-3
    assert both[1] == sorted(both[1][:2]) + sorted(both[1][2:], reverse=True)


def test_steps_with_a_limit_save_for_the_next_session(config, clock):  # noqa: F811
    result = pretrain(dataclasses.replace(config, max_minutes=0.05))
    assert result.stopped == "time limit" and not finished(result.run)
    assert json.loads((result.run / "config.json").read_text())["minutes"] is None
    assert "position" not in of_kind(result.run, "train")[0]
    assert pretrain(TrainConfig(resume=result.run)).step == 8


def test_the_share_of_the_time_counts_from_where_it_stood(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = Pace(1_000, deadline=310.0, validation_tokens=0, recorded={7: 400})
    kept.start(0)
    assert [kept.position(0, 0.0)] == [0]
    now[0] = 200.0
    assert kept.position(5, 0.0) == 500
    assert kept.position(7, 0.0) == 400
    now[0] = 250.0
    assert kept.position(8, 0.0) == 700  # half of the 100 s that were left
    now[0] = 300.0
    assert kept.position(9, 0.0) == 1_000
    assert finish_seconds(1_000_000, 1e-6) == pytest.approx(10.5)
    assert finish_seconds(1_000_000, 1e-4) == pytest.approx(60.0)
    lines = [
        {"kind": "train", "step": 3, "skipped": 2, "position": 9},
        {"kind": "train", "step": 4, "skipped": 2},
    ]
    assert recorded_positions(lines) == {4: 9}


def test_the_factor_comes_from_a_tensor_that_stays_where_it_is():
    """So a CUDA graph reads it again."""
    place = torch.zeros(1, dtype=torch.int64)
    plain, moved = make("adamw", steps=10), make("adamw", steps=10, position=place)
    ids = torch.arange(8).reshape(1, 8)
    for step in (plain, moved):
        step(ids, ids)
    plain._done.fill_(6), place.fill_(6)
    for step in (plain, moved):
        step(ids, ids)
    pairs = zip(plain.net.parameters(), moved.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_ranks_go_by_the_slowest_clock(config, tmp_path):  # noqa: F811
    """Each has its own; all take the same factor, or their weights would differ."""
    asked = dataclasses.replace(config, steps=None, max_minutes=1.0, batch_size=4, sample_every=0)
    told, _ = together([{"config": asked.to_dict(), "seconds": [1.0, 4.0]}], tmp_path)
    assert told[0] == told[1]
    ((step, stopped, nats),) = told[0]
    assert 8 <= step <= 14 and stopped is None and nats > 0 and finished(asked.out)
    positions = [line["position"] for line in of_kind(asked.out, "train")]
    assert positions == sorted(positions) and positions[-1] > step
