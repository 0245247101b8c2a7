"""What the benchmarks rest on: no wrong result is timed, clocks are read, seconds are those of the marks."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import peers
import same_bits
import test_ops as ops
from bars import draw_file
from stopwatch import Stopwatch
from telemetry import QUERY, Telemetry
from variant import backends

from ant5m import kernels
from ant5m.files import write_json


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.setattr(ops, "BATCH", 2)
    monkeypatch.setattr(ops, "LENGTH", 12)
    return ops._cases("ant-5m")


@pytest.mark.parametrize("op", (*kernels.OPS, "mlp"))
def test_peers_compute_our_ops_and_a_wrong_one_is_not_timed(cases, op):
    case, peer = cases[f"ant-5m {op}"], getattr(peers, op)
    inputs = case.make(torch.device("cpu"), torch.float32)
    assert ops._why_wrong(peer, op, inputs) is None

    def wrong(*given):
        out = peer(*given)
        return tuple(1.1 * x for x in out) if isinstance(out, tuple) else 1.1 * out

    assert ops._why_wrong(wrong, op, inputs).startswith("is off by 1.0e-01 in result 0")

    def broken(*given):
        raise RuntimeError("no such device\nsomewhere")

    assert ops._why_wrong(broken, op, inputs) == "cannot run: no such device"


def test_a_variant_is_timed_in_both_directions(cases):
    case = cases["ant-5m swiglu"]
    timed = ops.Timed(
        peers.swiglu, [case.make(torch.device("cpu"), torch.float32) for _ in range(2)], torch.device("cpu")
    )
    for _ in range(3):
        timed.run()
    assert [len(taken) for taken in timed.seconds.values()] == [3, 3, 3]
    for forward, backward, both in zip(*timed.seconds.values(), strict=True):
        assert forward > 0 and backward > 0 and both == forward + backward


def test_a_stopwatch_gives_the_time_between_marks():
    watch = Stopwatch(torch.device("cpu"))
    watch.start()
    time.sleep(0.02)
    watch.split()
    watch.split()
    first, second = watch.read()
    assert first >= 0.02 and second >= 0


def test_telemetry_of_a_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    lines = "".join(f"echo '{1000 + 100 * n}, 5000, {60 + n}.5, [N/A], 97'\n" for n in range(5))
    program.write_text(f"#!/bin/sh\n{lines}echo '1100, 50'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    telemetry = Telemetry()
    while telemetry._log.seek(0, 2) < 100:
        time.sleep(0.01)
    found = telemetry.stop()
    assert set(found) == set(QUERY) - {"temperature_c"}
    assert found["sm_clock_mhz"] == {"q10": 1040, "median": 1200, "q90": 1360}
    assert found["power_w"]["median"] == 62.5


def test_without_nvidia_smi_there_is_no_telemetry(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert Telemetry().stop() == {}


def test_variants_of_this_machine(cases):
    """Ours run here, or say why not; nothing that is made for another device is asked."""
    for name in ("ant-5m rope", "ant-5m mlp"):
        case = cases[name]
        inputs = case.make(torch.device("cpu"), torch.float32)
        found = {
            variant: ops._why_wrong(ops._ours(case.op, variant), case.op, inputs)
            for variant in ("reference", "cpu")
        }
        assert found == {"reference": None, "cpu": None}
    reason = ops._why_wrong(ops._ours("mlp", "triton"), "mlp", inputs)
    assert reason in ("cannot run: there is no NVIDIA GPU", "cannot run: Triton is not installed")
    assert backends()[0] == "reference" and "triton" not in backends()


def test_steps_are_drawn_and_ops_are_not(tmp_path):
    variants = {
        name: {"tokens_per_second": 10, "peak_bytes": 10**6} for name in ("transformers", "cpu", "trainer")
    }
    where = {"device": "a device", "commit": "abc"}
    steps = {"info": {"preset": "ant-5m", "variants": variants}}
    for name, rows in (("steps", [steps, {"info": {}}]), ("ops", [{"info": {}}])):
        write_json(tmp_path / f"{name}.json", {"provenance": where, "benchmarks": rows})
        draw_file(tmp_path / f"{name}.json", tmp_path / f"{name}.png")
    assert imread(tmp_path / "steps.png").shape[1] == 960
    assert not (tmp_path / "ops.png").exists()


def test_two_trees_with_the_same_bits_and_a_difference_of_the_last_one(tmp_path):
    steps = [(1.0, 2.0), (0.5, 1.5)]
    assert same_bits.difference(steps, list(steps)) == ""
    other = [steps[0], (0.5, 1.5000000000000002)]
    assert same_bits.difference(steps, other) == (
        "DIFFERS at step 2: loss 0.5 and 0.5, norm 1.5 and 1.5000000000000002"
    )
    assert same_bits.difference(steps, steps[:1]) == "DIFFERS: 2 and 1 steps"
    command = [sys.executable, same_bits.__file__, ".", ".", "--steps", "2", "--only", "adamw"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout == "fp32 adamw           2 steps, every bit the same\n"
