"""Averages of weights: while they are trained, and of checkpoints."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from test_data_parallel import together
from test_resume import fingerprint, interrupt  # noqa: F401  (a fixture)
from test_step import NoWaiting, batches, make
from test_train import MODEL, config, material, of_kind  # noqa: F401  (fixtures)

from ant5m.cli import call
from ant5m.errors import UserError
from ant5m.model.averaging import average
from ant5m.model.checkpoint import latest_checkpoint, load
from ant5m.train import TrainConfig, pretrain
from ant5m.train.average import AverageWeights


def by_hand(weights, decay):
    """The average of a sequence of weights, the first of which are the initial ones, in float64."""
    mean = weights[0].double()
    for count, weight in enumerate(weights[1:]):
        mean += (1 - min(decay, (1 + count) / (10 + count))) * (weight.double() - mean)
    return mean


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_average_is_that_of_the_formula(decay):
    step = make("adamw", "fp32")
    kept = AverageWeights(step.net, decay)
    step.on_update = [kept.on_update]
    seen = [{name: p.detach().clone() for name, p in step.net.named_parameters()}]
    for ids, targets in batches(6):
        step(ids, targets)
        seen.append({name: p.detach().clone() for name, p in step.net.named_parameters()})
    for name, mean in kept.weights.items():
        expected = by_hand([weights[name] for weights in seen], decay)
        assert torch.allclose(mean.double(), expected, rtol=1e-6, atol=1e-8), name
    if decay == 0.0:
        assert all(torch.equal(kept.weights[name], p) for name, p in step.net.named_parameters())


def test_both_ways_to_move_it_are_the_same(monkeypatch):
    """On a GPU by a few launches for all tensors."""
    step = make("adamw", "fp32")
    one, other = AverageWeights(step.net, 0.9), AverageWeights(step.net, 0.9)
    for p in step.net.parameters():
        p.data.add_(torch.randn_like(p))
    one.on_update(torch.ones(()))
    differences = torch._foreach_sub(list(step.net.parameters()), list(other.weights.values()))
    torch._foreach_mul_(differences, torch.tensor(1 - 0.1))
    torch._foreach_add_(list(other.weights.values()), differences)
    for name, x in one.weights.items():
        assert torch.allclose(x, other.weights[name].detach(), rtol=1e-6, atol=1e-7)


def test_it_waits_for_nothing_and_a_skipped_step_leaves_it():
    step = make("muon", "fp16", scale=2.0**40)
    kept = AverageWeights(step.net, 0.9)
    step.on_update = [kept.on_update]
    for x in kept.weights.values():
        x.zero_()
    before = {name: x.clone() for name, x in kept.weights.items()}
    (ids, targets), *_ = batches(1)
    with NoWaiting():
        stats = step(ids, targets)
    assert stats[2] == 0 and all(torch.equal(x, before[name]) for name, x in kept.weights.items())


def test_the_model_has_it_for_a_while():
    net = make("adamw", "fp32").net
    kept = AverageWeights(net, 0.9)
    trained = {name: p.detach().clone() for name, p in net.named_parameters()}
    places = [p.data_ptr() for p in net.parameters()]
    for x in kept.weights.values():
        x.fill_(3.0)
    with pytest.raises(KeyError), kept.in_place():
        assert all((p == 3.0).all() for p in net.parameters())
        raise KeyError
    assert all(torch.equal(p, trained[name]) for name, p in net.named_parameters())
    assert places == [p.data_ptr() for p in net.parameters()]


def test_a_run_shows_both_and_exports_the_better(config, tmp_path, capsys):  # noqa: F811
    # A rate that stays high to the end leaves noise, which an average takes away.
    noisy = dataclasses.replace(
        config,
        steps=30,
        eval_every=10,
        ema=0.8,
        schedule="wsd",
        decay=0.0,
        learning_rate=0.05,
        muon_learning_rate=0.3,
        sample_every=0,
    )
    run = pretrain(noisy).run
    lines = of_kind(run, "validation")
    assert len(lines) == 2 and all(line["average_loss"] != line["loss"] for line in lines)
    assert f"averaged {lines[0]['average_loss']:.3f}" in capsys.readouterr().err
    averaged = load_file(latest_checkpoint(run) / "average.safetensors")
    trained = load_file(latest_checkpoint(run) / "model.safetensors")
    exported = load_file(run / "hf" / "model.safetensors")
    first, second = json.loads((run / "eval.json").read_text())["perplexity"]
    assert second["checkpoint"] == f"{first['checkpoint']} averaged" and second["loss"] < first["loss"]
    assert all(torch.equal(exported[name], averaged[name]) for name in exported)
    report, card = (run / "report.md").read_text(), (run / "hf" / "README.md").read_text()
    assert "of the better, the averaged ones" in report and f"| {second['loss']:.4f} nats" in report.replace(
        "loss | ", "| "
    )
    assert f"loss {second['loss']:.4f}" in card and "exponential moving average, decay 0.8" in card
    assert call(["runs", str(run)]) == 0
    assert f"{second['loss']:.3f}" in capsys.readouterr().out
    worse = dataclasses.replace(config, steps=6, ema=0.999, out=tmp_path / "worse")
    run = pretrain(worse).run
    assert len(json.loads((run / "eval.json").read_text())["perplexity"]) == 1
    assert "of the better, the trained ones." in (run / "report.md").read_text()
    exported = load_file(run / "hf" / "model.safetensors")
    trained = load_file(latest_checkpoint(run) / "model.safetensors")
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stopped_and_resumed_equals_uninterrupted(config, tmp_path, interrupt, precision):  # noqa: F811
    asked = dataclasses.replace(config, steps=10, ema=0.99, eval_every=3, precision=precision)
    whole = pretrain(dataclasses.replace(asked, out=tmp_path / "whole")).run
    interrupt(15, 5)
    assert pretrain(asked).step == 5
    assert pretrain(TrainConfig(resume=asked.out)).step == 10
    assert "average.safetensors" in fingerprint(whole)[0]["files"]
    assert fingerprint(whole) == fingerprint(asked.out)


@pytest.mark.slow
def test_ranks_have_the_same_average(config, tmp_path):  # noqa: F811
    whole = dataclasses.replace(
        config, steps=6, ema=0.9, precision="fp32", eval_every=2, out=tmp_path / "one"
    )
    told, _ = together(
        [
            {"config": {**whole.to_dict(), "out": str(tmp_path / "two")}, "stop_at": 3},
            {"config": {"resume": str(tmp_path / "two")}},
        ],
        tmp_path,
    )
    assert told[0] == told[1]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain(whole)
    torch.set_num_threads(before)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")


def test_checkpoints_are_averaged(config, tmp_path, capsys):  # noqa: F811
    run = pretrain(dataclasses.replace(config, keep_last=3)).run
    assert call(["average", str(run), "--out", str(tmp_path / "mean")]) == 0
    assert "the mean of 3 checkpoints" in capsys.readouterr().out
    net, tokenizer = load(tmp_path / "mean")
    paths = sorted((run / "checkpoints").iterdir())
    nets = [dict(load(path)[0].named_parameters()) for path in paths]
    for name, weight in net.named_parameters():
        expected = sum(weights[name].double() for weights in nets) / 3
        assert torch.allclose(weight.double(), expected, rtol=1e-6, atol=1e-9)
    assert tokenizer.fingerprint == load(run)[1].fingerprint
    assert "mean of 3 checkpoints: step-00000004" in (tmp_path / "mean" / "README.md").read_text()


def test_what_has_no_average_is_refused(config, tmp_path, capsys):  # noqa: F811
    run = pretrain(config).run
    wide = dataclasses.replace(MODEL, intermediate_size=32)
    (tmp_path / "wide.json").write_text(json.dumps(wide.to_dict()))
    other = pretrain(
        dataclasses.replace(config, model=str(tmp_path / "wide.json"), out=tmp_path / "wide")
    ).run
    place = str(tmp_path / "mean")
    for names, message in (
        ([str(run / "checkpoints" / "step-00000008")], "needs at least two checkpoints, and there is 1"),
        ([str(run), str(other)], "is a model of another shape than"),
        ([str(run), str(tmp_path / "nothing")], "nothing does not exist"),
    ):
        assert call(["average", *names, "--out", place]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "mean").exists()
    with pytest.raises(UserError, match="at least two"):
        average([])
    for value in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="--ema must be a number from 0 to below 1"):
            TrainConfig(ema=value)
