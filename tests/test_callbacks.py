"""What is added to the loop without changing it: an early stop, an average of the weights."""

import dataclasses
import json
import math

import pytest
import torch
from test_resume import fingerprint, interrupt  # noqa: F401  (fixture)
from test_train import config, material, of_kind  # noqa: F401  (fixtures)

from ant5m.model.checkpoint import latest_checkpoint
from ant5m.train import TrainConfig, pretrain, pretraining, validation
from ant5m.train.callback import Callback
from ant5m.train.early_stop import EarlyStop


@pytest.fixture
def losses(monkeypatch):
    """losses(...): what the validations of the training find, in turn."""

    def arrange(*values):
        rest = iter(values)
        monkeypatch.setattr(
            validation,
            "validate",
            lambda *_: dataclasses.replace(EVALUATION, nats=next(rest)),
        )

    return arrange


EVALUATION = validation.Evaluation("text", nats=0.0, tokens=1, words=1, bytes=1, window=1)


def test_training_ends_when_the_validation_gets_no_better(config, losses):  # noqa: F811
    losses(5.0, 4.0, 4.5, 4.0, 3.0)
    asked = dataclasses.replace(config, steps=20, eval_every=2, early_stop=2, sample_every=0)
    result = pretrain(asked)
    assert (result.step, result.steps, result.stopped) == (8, 20, None)
    assert [line["loss"] for line in of_kind(result.run, "validation")] == [5.0, 4.0, 4.5, 4.0]
    assert result.evaluation and latest_checkpoint(result.run).name == "step-00000008"
    assert "ended after 2 validations without a lower loss" in (result.run / "report.md").read_text()
    before = fingerprint(result.run)
    again = pretrain(TrainConfig(resume=result.run))
    assert (again.step, again.stopped) == (8, None) and fingerprint(result.run) == before


def test_an_early_stop_is_resumed(config, losses, interrupt):  # noqa: F811
    losses(5.0, 4.0, 4.5, 4.0)
    interrupt(15, 7)  # between the validations at 6 and 8
    asked = dataclasses.replace(config, steps=20, eval_every=2, early_stop=2, sample_every=0)
    assert pretrain(asked).step == 7
    result = pretrain(TrainConfig(resume=config.out))
    assert (result.step, result.stopped) == (8, None)


def test_an_early_stop_counts_from_the_lowest_loss():
    trainer = type("Trainer", (), {"ended": "", "end": lambda self, why: setattr(self, "ended", why)})()
    stop = EarlyStop(2)
    assert stop.state_dict() == {"best": None, "failed": 0}
    for loss, failed in ((3.0, 0), (3.5, 1), (2.0, 0), (2.5, 1), (math.nan, 2)):
        assert not trainer.ended
        stop.on_log(trainer, "train", {"loss": 9.0})
        stop.on_log(trainer, "validation", {"loss": loss})
        assert stop.state_dict()["failed"] == failed
    assert trainer.ended and stop.state_dict()["best"] == 2.0
    json.dumps(stop.state_dict(), allow_nan=False)


class Average(Callback):
    """An exponential moving average of the weights, kept on the device by the step itself."""

    def __init__(self, net):
        self.net = net
        self.weights = [p.detach().clone() for p in net.parameters()]

    def on_update(self, counted):
        torch._foreach_lerp_(self.weights, list(self.net.parameters()), 0.5 * counted)


def test_an_average_of_the_weights_is_a_callback(config, monkeypatch):  # noqa: F811
    """Its value is that of the weights behind every step that counted."""
    seen, averages = [], []
    make = pretraining._make_callbacks

    class Look(Callback):
        def is_due(self, step):
            return True

        def act(self, trainer):
            seen.append([p.detach().clone() for p in trainer.net.parameters()])

        def on_end(self, trainer):
            self.act(trainer)

    def with_average(run, settings, net, *rest):
        averages.append(Average(net))
        seen.append([weight.clone() for weight in averages[0].weights])
        return [*make(run, settings, net, *rest), averages[0], Look()]

    monkeypatch.setattr(pretraining, "_make_callbacks", with_average)
    pretrain(dataclasses.replace(config, steps=3))
    expected, *rest = seen
    assert len(rest) == 3
    for weights in rest:
        expected = [(old + new) / 2 for old, new in zip(expected, weights, strict=True)]
    for one, other in zip(averages[0].weights, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
