"""The counts behind the predictions, against closed forms, the doctor's and torch's own counter."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ant5m.kernels import dispatch
from ant5m.model.ant import Ant
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.costs import count_flops

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import roofline
from devices import DEVICES, LINKS, Link, Rates, measure
from work import Kernel, Step, ours, traced, update

TINY = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
STEP = Step(TINY, batch_size=16, sequence_length=16, half=False)
SOME = Rates(
    name="some",
    flops=100,
    ops=50,
    exps=10,
    bytes=20,
    launch=0.25,
    units=True,
    backend="triton",
    source="made up",
)


def total(counted, name, *ops, direction=None):
    return sum(
        getattr(k, name)
        for k in counted
        if (not ops or k.op in ops) and (direction is None or k.direction == direction)
    )


@pytest.fixture(scope="module")
def traces():
    return {variant: traced(variant, STEP) for variant in ("transformers", "reference")}


@pytest.mark.parametrize("preset", PRESETS)
def test_products_are_the_doctors(preset):
    step = Step(PRESETS[preset], batch_size=4, sequence_length=1_024, half=True)
    flops = {part: count * step.tokens for part, count in count_flops(step.config).items()}
    for backend, products in (("triton", 4), ("cpu", 3)):  # triton makes the logits twice
        counted = ours(step, backend)
        assert total(counted, "flops", "linears") == 3 * flops["linears"]
        assert total(counted, "flops", "linears", direction="forward") == flops["linears"]
        assert total(counted, "flops", "head") == products * flops["head"]
        assert total(counted, "flops", "attention", direction="forward") == flops["attention"]
        silus = step.tokens * step.config.num_hidden_layers * step.config.intermediate_size
        assert total(counted, "exps", "linears", "swiglu") == 2 * silus
    # The fused block makes gate and up once more, and keeps neither.
    plain, fused = (total(ours(step, name), "flops", "linears") for name in ("triton", "cuda"))
    again = 4 * silus * step.config.hidden_size if step.config.hidden_size == 128 else 0
    assert fused - plain == again
    moved = [total(ours(step, name), "bytes", "linears", "swiglu") for name in ("triton", "cuda")]
    assert (moved[1] < 0.6 * moved[0]) == (again > 0)
    assert total(ours(step), "flops", "attention") == 4.5 * flops["attention"]
    assert total(ours(step, "cpu"), "flops", "attention") == 3.5 * flops["attention"]


@pytest.mark.parametrize("variant", ["transformers", "reference"])
def test_traced_products_are_those_of_the_formulas(traces, variant):
    for op in ("linears", "head", "attention"):
        assert total(traces[variant], "flops", op) == total(ours(STEP, "cpu"), "flops", op), op


def test_traced_products_are_those_that_torch_counts(traces, monkeypatch):
    monkeypatch.setattr(dispatch, "_selected", "reference")
    net = Ant(TINY)
    ids = torch.zeros(STEP.batch_size, STEP.sequence_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        net.model(ids, net.cos[:16], net.sin[:16]).sum().backward()
    assert total(traces["reference"], "flops", "linears") == counter.get_total_flops()


def test_traced_bytes_of_products_and_of_the_eager_head(traces):
    formula = total(ours(STEP), "bytes", "linears")
    assert total(traces["reference"], "bytes", "linears") == formula
    logits = 4 * STEP.tokens * TINY.vocab_size
    # product 1, log-softmax 2, nll backward 1, log-softmax backward 3, two products 2
    least = 9 * logits
    assert least < total(traces["transformers"], "bytes", "head") < 1.25 * least


def test_every_layer_counts():
    deeper = dataclasses.replace(STEP, config=dataclasses.replace(TINY, num_hidden_layers=4))
    two = dataclasses.replace(STEP, config=dataclasses.replace(TINY, num_hidden_layers=2))
    for count in (lambda step: traced("transformers", step), ours):
        at_2, at_3, at_4 = (total(count(step), "bytes", "attention") for step in (two, STEP, deeper))
        assert at_4 - at_3 == at_3 - at_2 > 0
    per_layer = STEP.batch_size * TINY.num_attention_heads * 16 * 17 / 2
    assert total(ours(STEP), "exps", "attention") == 3 * 3 * per_layer


def test_fused_ops_move_less_and_half_precision_moves_less(traces):
    for op in ("rms_norm", "rope", "swiglu", "head"):
        moved = [total(counted, "bytes", op) for counted in (ours(STEP), *traces.values())]
        assert moved[0] < min(moved[1:]), op
    assert total(ours(STEP, "cpu"), "bytes") < total(ours(STEP), "bytes")
    half = dataclasses.replace(STEP, half=True)
    assert total(ours(half), "bytes") < total(ours(STEP), "bytes")


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_qk_norm_is_counted_with_rope(backend):
    """In one pass: nothing more to move forward, and backward q and k as they were before it."""
    normed = dataclasses.replace(STEP, config=dataclasses.replace(TINY, qk_norm=True))
    plain, with_norm = ours(STEP, backend), ours(normed, backend)
    joined = 4 * STEP.tokens * (4 + 2 + 2) * 8 * TINY.num_hidden_layers
    more = {way: 0 if way == "forward" else joined for way in ("forward", "backward")}
    for way, bytes_ in more.items():
        moved = [total(counted, "bytes", "rope", direction=way) for counted in (plain, with_norm)]
        assert moved[1] - moved[0] == bytes_
        assert total(with_norm, "ops", "rope", direction=way) > total(plain, "ops", "rope", direction=way)
    assert total(plain, "flops") == total(with_norm, "flops")


def test_a_traced_qk_norm_moves_more_than_the_fused_one(traces):
    normed = dataclasses.replace(STEP, config=dataclasses.replace(TINY, qk_norm=True))
    for variant, plain in traces.items():
        more = total(traced(variant, normed), "bytes") - total(plain, "bytes")
        assert more > total(ours(normed), "bytes") - total(ours(STEP), "bytes"), variant


def test_muon_does_what_its_iterations_need():
    """Five times three products of every matrix of a layer with its small side."""
    muon = update(dataclasses.replace(STEP, optimizer="muon"))
    sizes = [(32, 32), (32, 32), (16, 32), (16, 32), (32, 52), (32, 52), (32, 52)]
    per_layer = sum(2 * small * small * (2 * large + small) for small, large in sizes)
    assert total(muon, "flops") == 3 * 5 * per_layer
    assert total(update(STEP), "flops") == 0


def test_time_is_that_of_the_slowest_resource():
    kernel = Kernel("swiglu", "forward", flops=100, ops=100, exps=5, bytes=50)
    assert roofline.time_of(kernel, SOME) == (2.5, "memory")
    assert roofline.time_of(dataclasses.replace(kernel, bytes=0), SOME) == (2.0, "arithmetic")
    assert roofline.time_of(kernel, dataclasses.replace(SOME, units=False)) == (3.5, "arithmetic")
    assert roofline.time_of(Kernel("swiglu", "forward", launches=8), SOME) == (2.0, "launches")


def test_predictions_for_the_published_recipe():
    """A T4 must be able to do what is asked of it, and cannot do more than its products allow."""
    step = Step(PRESETS["ant-5m"], 64, 1_024, half=True, optimizer="muon")
    predicted = roofline.predict("ours", step, DEVICES["T4"])
    assert 300_000 < predicted.tokens_per_second < 24e12 / (3 * sum(count_flops(step.config).values()))
    assert predicted.minutes == pytest.approx(655.36e6 / predicted.tokens_per_second / 60)
    assert sum(predicted.of(op) for op in roofline.OPS) == pytest.approx(predicted.total)
    assert predicted.bounds["attention", "forward"] == "products"
    faster = roofline.predict("ours", step, DEVICES["H100"])
    assert faster.bounds["attention", "forward"] == "exponentials"
    assert faster.total < predicted.total / 5


def test_what_was_measured_stands_beside_its_prediction(tmp_path):
    cpu = dataclasses.replace(SOME, units=False, backend="cpu")
    info = {"preset": "ant-5m", "batch": [2, 64], "dtype": "float32"}
    info["variants"] = {
        "trainer": {"tokens_per_second": 1_000},
        "transformers-compiled": {"tokens_per_second": 1},
    }
    values = {"provenance": {"device": "a machine", "commit": "0123456789abcdef"}}
    values["benchmarks"] = [{"group": "training step", "info": info}, {"group": "other", "info": {}}]
    (tmp_path / "without.json").write_text(json.dumps(values))
    (tmp_path / "with.json").write_text(json.dumps({**values, "rates": vars(cpu)}))
    (row,) = roofline.checks(tmp_path)
    expected = roofline.predict("cpu", Step(PRESETS["ant-5m"], 2, 64, half=False), cpu).tokens_per_second
    assert (row["variant"], row["device"], row["commit"]) == ("trainer", "a machine", "012345678")
    assert row["measured_over_predicted"] == pytest.approx(1_000 / expected, rel=1e-3)


def test_the_program_prints_tables_and_keeps_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "RESULTS", tmp_path)
    monkeypatch.setattr(roofline, "PICTURE", tmp_path / "roofline.png")
    monkeypatch.setattr(roofline, "count", lambda variant, step: ours(step))  # the trace takes its time
    monkeypatch.setattr(sys, "argv", ["roofline.py"])
    roofline.main()
    shown = capsys.readouterr().out
    assert "PREDICTED" in shown and all(name in shown for name in DEVICES)
    kept = json.loads((tmp_path / "roofline.json").read_text())
    assert len(kept["predictions"]) == 2 * len(DEVICES)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_rates_of_this_machine(monkeypatch):
    """Plausible, whatever else runs here: more than a pocket calculator, less than a rack."""
    rates = measure("cpu")
    assert 1e8 < rates.flops < 1e14 and rates.ops == rates.flops / 2
    assert 1e6 < rates.exps < 1e12 and 1e7 < rates.bytes < 1e13
    assert 1e-8 < rates.launch < 1 and not rates.units


def test_several_devices_wait_for_the_all_reduce():
    link = Link(4, (1e9, 2e9), 1e-3, "")
    assert link.all_reduce(2_000_000) == pytest.approx((2.5e-3, 4e-3))  # 3 MB to be moved
    for device in LINKS:
        small, large = (roofline.scaling("ant-5m", device, tokens) for tokens in (8_192, 524_288))
        assert 0 < small[-1] < large[-1] < 1
        share, fastest, slowest, _ = large
        assert share > slowest > fastest > 0


def test_the_page_shows_what_the_program_prints():
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "several-gpus.md").read_text()
    table = roofline._scaling_table("ant-5m")
    for cells in zip(*(column._cells for column in table.columns), strict=True):
        assert f"| {' | '.join(cells)} |" in page
