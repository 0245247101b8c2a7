"""A run that was stopped and resumed equals, bit for bit, one that was not."""

import dataclasses
import hashlib
import json
import os
import re
import signal
import zlib
from pathlib import Path

import pytest
import torch
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m import kernels
from ant5m.cli import call
from ant5m.errors import UserError
from ant5m.files import lock
from ant5m.kernels import check
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.train import TrainConfig, preparation, pretrain, samples, trainer
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.metrics import Metrics, read_metrics, split_metrics, to_line
from ant5m.train.trainer import Trainer

STOP_AT = 5


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(number, step): once, a signal arrives in the middle of the step after `step`."""

    def arrange(number, step):
        original = Trainer._train_step
        at = [step]

        def train_step(self, stop):
            if self.step + len(self._unread) in at:
                at.clear()
                os.kill(os.getpid(), number)
            return original(self, stop)

        monkeypatch.setattr(Trainer, "_train_step", train_step)

    return arrange


def fingerprint(run):
    """Everything that must be equal: the hashes of the tensors, the rest of the state, and the metrics."""
    folder = latest_checkpoint(run)
    state = json.loads((folder / "state.json").read_text())
    del state["seconds"]
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")
    }
    assert hashes == state["files"]
    lines = read_metrics(run / "metrics.jsonl")
    for line in lines:
        line.pop("seconds", None), line.pop("tokens_per_second", None)
    return state, lines


@pytest.fixture
def noise(monkeypatch):
    """A loss that draws from torch's generator, as dropout would."""
    forward = Ant.forward

    def noisy(self, input_ids, targets=None, cache=None, **more):
        out = forward(self, input_ids, targets, cache, **more)
        return out if targets is None or not self.training else out * (1 + 0.1 * torch.rand(()))

    monkeypatch.setattr(Ant, "forward", noisy)


def test_what_a_stopwatch_chose_is_part_of_the_run(config, interrupt, monkeypatch):  # noqa: F811
    """On a GPU another start may choose otherwise, and round otherwise."""
    monkeypatch.setattr(check, "_choices", {"mlp on a device": "faster"})
    interrupt(signal.SIGTERM, STOP_AT)
    pretrain(dataclasses.replace(config, steps=8))
    assert json.loads((config.out / "config.json").read_text())["ran"]["mlp on a device"] == "faster"
    check._choices.clear()
    pretrain(TrainConfig(resume=config.out))
    assert kernels.choices() == {"mlp on a device": "faster"}
    assert fingerprint(config.out)[0]["kernels"] == kernels.choices()


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "muon", "schedule": "wsd"},
        {"optimizer": "muon", "micro_batch_size": 1, "schedule": "cosine"},
        {"optimizer": "adamw", "precision": "fp16"},
        {"optimizer": "muon", "precision": "bf16", "eval_every": 5},
        {"loop_loss": "ditto", "loop_loss_share": 0.7},
        {"optimizer": "muon", "model": "qk_norm", "z_loss": 1e-3},
        {"z_loss": 1e-3, "loop_loss": "unlikelihood", "loop_loss_share": 0.4},
        {"loop_loss": "unlikelihood", "loop_loss_share": 0.4, "precision": "fp16"},
        {"short_context": 8, "short_share": 0.3},
        {"short_context": 16, "short_share": 0.7},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_stopped_and_resumed_equals_uninterrupted(config, changes, tmp_path, interrupt):  # noqa: F811
    if changes.get("model") == "qk_norm":
        shape = {**json.loads(Path(config.model).read_text()), "qk_norm": True}
        (tmp_path / "model.json").write_text(json.dumps(shape))
        changes = {**changes, "model": str(tmp_path / "model.json")}
    whole = dataclasses.replace(config, steps=10, checkpoint_every=4, out=tmp_path / "whole", **changes)
    pretrain(whole)
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped")
    interrupt(signal.SIGTERM, STOP_AT)
    result = pretrain(stopped)
    assert (result.step, result.stopped, result.evaluation) == (STOP_AT, "terminated", None)
    assert latest_checkpoint(stopped.out).name == "step-00000005"
    result = pretrain(TrainConfig(resume=stopped.out))
    assert (result.step, result.stopped) == (10, None)
    assert fingerprint(whole.out) == fingerprint(stopped.out)
    evaluations = [json.loads((out / "eval.json").read_text()) for out in (whole.out, stopped.out)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("calls", [3, 14])
def test_a_loss_scale_that_still_falls_is_resumed(config, calls, tmp_path, monkeypatch):  # noqa: F811
    """Steps are skipped before and after the stop, or before it only; what was due at step 4 comes once."""
    high = {"scale": 2.0**31}
    monkeypatch.setattr(trainer, "LossScaler", lambda device, **state: LossScaler(device, **(state or high)))
    monkeypatch.setattr(trainer, "READ_SECONDS", 1e9)
    whole = dataclasses.replace(config, precision="fp16", out=tmp_path / "whole")
    pretrain(whole)
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped")
    original, count = Trainer._train_step, iter(range(calls))

    def train_step(self, stop):
        if next(count, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, stop)

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    result = pretrain(stopped)
    monkeypatch.setattr(Trainer, "_train_step", original)
    first = json.loads((latest_checkpoint(stopped.out) / "state.json").read_text())
    assert first["skipped"] > 1 and first["step"] == result.step == calls - first["skipped"]
    pretrain(TrainConfig(resume=stopped.out))
    assert fingerprint(whole.out) == fingerprint(stopped.out)
    lines = fingerprint(whole.out)[1]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [4]
    assert (lines[-1]["skipped"] > first["skipped"]) == (calls == 3)


def test_the_comparison_sees_a_difference(config, tmp_path):  # noqa: F811
    runs = [pretrain(dataclasses.replace(config, seed=seed, out=tmp_path / str(seed))).run for seed in (1, 2)]
    first, second = map(fingerprint, runs)
    assert first[0]["files"] != second[0]["files"] and first[1] != second[1]
    again = pretrain(dataclasses.replace(config, seed=1, out=tmp_path / "again")).run
    assert fingerprint(again) == first


def test_a_crash_loses_only_what_came_after_the_checkpoint(config, tmp_path, monkeypatch):  # noqa: F811
    whole = pretrain(dataclasses.replace(config, out=tmp_path / "whole")).run
    original = Trainer._train_step

    def crash(self, stop):
        if self.step + len(self._unread) == 7:
            self.flush_metrics()  # its metrics are on the disk, its checkpoint is not
            raise RuntimeError("power cut")
        return original(self, stop)

    monkeypatch.setattr(Trainer, "_train_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config)
    monkeypatch.setattr(Trainer, "_train_step", original)
    assert max(line["step"] for line in read_metrics(config.out / "metrics.jsonl")) == 7
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert latest_checkpoint(config.out).name == "step-00000006"
    pretrain(TrainConfig(resume=config.out))
    assert fingerprint(config.out) == fingerprint(whole)


def test_damaged_and_half_written_checkpoints_are_passed_over(config, tmp_path):  # noqa: F811
    whole = pretrain(dataclasses.replace(config, out=tmp_path / "whole")).run
    run = pretrain(dataclasses.replace(config, keep_last=4)).run
    damaged = run / "checkpoints" / "step-00000008" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    (run / "checkpoints" / "step-00000006" / "state.json").unlink()
    (run / "checkpoints" / "step-00000009").mkdir()
    with pytest.warns(UserWarning):
        pretrain(TrainConfig(resume=run))
    with pytest.warns(UserWarning):
        assert latest_checkpoint(run).name == "step-00000008"
    assert (whole / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_save_and_set_the_exit_code(config, interrupt, capsys, number, code, word):  # noqa: F811
    before = signal.getsignal(signal.SIGINT)
    interrupt(number, 3)
    flags = ["--model", config.model, "--data", config.data[0], "--out", str(config.out), "--device", "cpu"]
    with pytest.raises(SystemExit) as exit_:
        call(["train", *flags, "--steps", "8", "--batch-size", "4", "--sample-every", "0"])
    assert exit_.value.code == code
    assert f"{word} at step 3 of 8, saved" in capsys.readouterr().err
    assert latest_checkpoint(config.out).name == "step-00000003"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_interrupt_quits_at_once(config, monkeypatch):  # noqa: F811
    def train_step(self, stop):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "interrupted"
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("still running")

    monkeypatch.setattr(Trainer, "_train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert latest_checkpoint(config.out) is None


def test_the_time_limit_saves_and_counts_anew(config, monkeypatch):  # noqa: F811
    result = pretrain(dataclasses.replace(config, max_minutes=1e-9))
    assert (result.step, result.stopped) == (0, "time limit")
    result = pretrain(TrainConfig(resume=config.out, max_minutes=1e-9))
    assert (result.step, result.stopped) == (0, "time limit")
    assert pretrain(TrainConfig(resume=config.out)).step == 8


def test_resume_refuses_what_does_not_belong(config, material, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="does not exist"):
        pretrain(TrainConfig(resume=tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"config\.json"):
        pretrain(TrainConfig(resume=material))
    run = pretrain(dataclasses.replace(config, max_minutes=1e-9)).run
    with pytest.raises(UserError, match="leave out --steps, --seed"):
        pretrain(TrainConfig(resume=run, steps=9, seed=3))
    values = json.loads((run / "config.json").read_text())
    values["data"]["fingerprint"] = "other"
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not the data of"):
        pretrain(TrainConfig(resume=run))


def test_resuming_a_finished_run_only_repeats_the_report(config):  # noqa: F811
    run = pretrain(config).run
    before = fingerprint(run)
    (run / "report.md").unlink()
    pretrain(TrainConfig(resume=run))
    assert fingerprint(run) == before and (run / "report.md").exists()


def test_no_room_on_the_disk_leaves_no_half_checkpoint(config, monkeypatch):  # noqa: F811
    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    pretrain(dataclasses.replace(config, max_minutes=1e-9))
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        pretrain(TrainConfig(resume=config.out))
    monkeypatch.undo()
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000000"]


def test_a_run_is_found_from_another_folder(config, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.chdir(Path(config.data[0]).parent)
    run = pretrain(dataclasses.replace(config, data=Path(config.data[0]).name, max_minutes=1e-9)).run
    monkeypatch.chdir(tmp_path)
    assert pretrain(TrainConfig(resume=run)).stopped is None


def test_line_separators_in_a_sample_lose_no_metrics(config, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        samples, "generate", lambda net, tokenizer, prompts, **_: ["a\u2028b\x85c"] * len(prompts)
    )
    run = pretrain(config).run
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"] == [
        *range(1, 9)
    ]


def test_a_half_saved_tokenizer_is_saved_again(config):  # noqa: F811
    run = pretrain(config).run
    (run / "tokenizer" / "tokenizer.json").unlink()
    assert pretrain(TrainConfig(resume=run)).step == 8
    assert (run / "tokenizer" / "tokenizer.json").exists()


def test_where_and_how_a_run_computes_may_change(config, interrupt):  # noqa: F811
    interrupt(signal.SIGTERM, STOP_AT)
    run = pretrain(config).run
    overridden = TrainConfig(resume=run, kernels="reference", micro_batch_size=4, precision="fp32")
    result = pretrain(overridden)
    assert result.step == 8
    kept = json.loads((run / "config.json").read_text())["train"]
    assert (kept["kernels"], kept["micro_batch_size"], kept["precision"]) == ("reference", 4, "fp32")


def test_ctrl_c_while_the_text_is_prepared_says_how_to_go_on(config, monkeypatch, capsys):  # noqa: F811
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation.builtin, "load_builtin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(dataclasses.replace(config, data=None))
    assert f"ant5m train --resume {config.out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [('"tokens": ', '"tokens": 1'), ('"position": ', '"position": 1'), ('"step": ', '"step": 1')]
)
def test_an_edited_state_is_never_resumed_from(config, change):  # noqa: F811
    pretrain(dataclasses.replace(config, steps=8, checkpoint_every=4))
    state = config.out / "checkpoints" / "step-00000008" / "state.json"
    text = state.read_text()
    state.write_text(text.replace(*change, 1))
    assert state.read_text() != text
    with pytest.warns(UserWarning, match=r"state\.json is not what was saved"):
        assert latest_checkpoint(config.out).name == "step-00000004"
    manifest = state.with_name("manifest.json")
    state.write_text(text)
    assert latest_checkpoint(config.out).name == "step-00000008"
    manifest.unlink()
    with pytest.warns(UserWarning, match=r"manifest\.json does not exist"):
        assert latest_checkpoint(config.out).name == "step-00000004"


def test_a_checkpoint_of_an_earlier_version_has_no_manifest(config):  # noqa: F811
    pretrain(dataclasses.replace(config, steps=8, checkpoint_every=4))
    folder = config.out / "checkpoints" / "step-00000008"
    (folder / "manifest.json").unlink()
    state = json.loads((folder / "state.json").read_text())
    del state["manifest"]
    (folder / "state.json").write_text(json.dumps(state))
    assert latest_checkpoint(config.out) == folder
    state["loader"] = 5
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.warns(UserWarning, match=r"state\.json: loader: expected object, got int"):
        assert latest_checkpoint(config.out).name == "step-00000004"


def test_damaged_lines_of_metrics_are_kept_aside_and_told(config, interrupt):  # noqa: F811
    interrupt(signal.SIGTERM, STOP_AT)
    pretrain(dataclasses.replace(config, steps=8))
    path = config.out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [line["step"] for line in read_metrics(path)]
    bad = [b'{"kind": "train", "step": 2, "lo', b'{"kind": "train", "step": "2"}', b"\xff", b"[" * 99_999]
    path.write_bytes(
        lines[0] + b"".join(line + b"\n" for line in bad) + b"".join(lines[1:]) + b'{"kind": "tr'
    )
    assert [line["step"] for line in read_metrics(path)] == steps
    with pytest.warns(UserWarning, match=r"4 damaged lines of metrics\.jsonl were moved to"):
        pretrain(TrainConfig(resume=config.out))
    assert (config.out / "metrics-damaged.jsonl").read_bytes() == b"\n".join(bad) + b"\n"
    assert {line["step"] for line in read_metrics(path) if line["kind"] == "train"} == set(range(1, 9))


def test_a_run_has_one_process(config):  # noqa: F811
    pretrain(config)
    with lock(config.out), pytest.raises(UserError, match="another process is writing into"):
        pretrain(TrainConfig(resume=config.out))
    pretrain(TrainConfig(resume=config.out))


def test_what_killed_processes_left_does_not_block_and_goes(config):  # noqa: F811
    config.out.mkdir()
    (config.out / ".lock").touch()
    (config.out / ".config.json.abcdefgh.aside").write_text("{")
    pretrain(dataclasses.replace(config, steps=4, checkpoint_every=4))
    folder = config.out / "checkpoints"
    for name in (".step-00000002.abcdefgh", ".step-00000002.abcdefgh.aside", ".step-00000001.removed"):
        (folder / name).mkdir()
    (config.out / "tokenizer" / "tokenizer_config.json").unlink()
    pretrain(TrainConfig(resume=config.out))
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]
    assert (config.out / "tokenizer" / "tokenizer_config.json").exists()
    assert {path.name for path in config.out.glob(".*")} == {".lock"}


def test_the_first_ctrl_c_says_at_once_what_happens(config, interrupt, capfd):  # noqa: F811
    interrupt(signal.SIGINT, STOP_AT)
    assert pretrain(dataclasses.replace(config, steps=8)).stopped == "interrupted"
    assert "saving; Ctrl-C again stops without saving" in capfd.readouterr().err


def test_a_flipped_bit_of_metrics_is_noticed(tmp_path):
    """Every bit of every line: what is read is what was written, the rest is damaged."""
    values = [
        {"kind": "train", "step": 1, "loss": 5.25, "tokens": 64, "seconds": 0.5},
        {"kind": "validation", "step": 1, "loss": 5.5, "tokens": 640},
        {"kind": "sample", "step": 1, "samples": [{"prompt": "é", "text": "x\u2028y"}]},
    ]
    path, raw = tmp_path / "metrics.jsonl", "".join(map(to_line, values, (1, 2, 3))).encode()
    path.write_bytes(raw)
    assert split_metrics(path) == Metrics(dict(enumerate(values, 1)))
    for place in range(len(raw)):
        for bit in range(8):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
            found = split_metrics(path)
            assert found.damaged or raw[place] == 10 or len(found.lines) == 3, (place, bit)
            for line in found.lines:  # the checksum's name may be the one that was damaged
                assert any(line | known == line for known in values), (place, bit, line)


def test_lines_of_earlier_versions_have_no_checksum(tmp_path):
    values = [{"kind": "validation", "step": step, "loss": 5.5, "tokens": 640} for step in range(4)]
    old, new = json.dumps(values[0]) + "\n", "".join(map(to_line, values[1:], (2, 3, 4)))
    path = tmp_path / "metrics.jsonl"
    whole = Metrics(dict(enumerate(values, 1)))
    path.write_text(old + new)
    assert split_metrics(path) == whole
    path.write_text(old + new + old)
    assert split_metrics(path) == dataclasses.replace(whole, damaged=[old.strip().encode()])
    unnumbered = [re.sub(r', "line": \d+', "", line).rpartition(', "crc32')[0] for line in new.splitlines()]
    path.write_text(old + "".join(f'{x}, "crc32": "{zlib.crc32(x.encode()):08x}"}}\n' for x in unnumbered))
    assert split_metrics(path) == whole


@pytest.mark.parametrize("lost", ["first", "middle", "last", "all", "swapped", "twice"])
def test_a_line_that_is_gone_from_metrics_is_told(config, interrupt, lost):  # noqa: F811
    interrupt(signal.SIGTERM, STOP_AT)
    pretrain(dataclasses.replace(config, steps=8))
    path = config.out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    left = {
        "first": lines[1:],
        "middle": lines[:2] + lines[3:],
        "last": lines[:-1],
        "all": [],
        "swapped": [lines[1], lines[0], *lines[2:]],
        "twice": [lines[0], *lines],
    }[lost]
    path.write_bytes(b"".join(left))
    gone = len(lines) if lost == "all" else 1
    told = {"twice": "1 damaged lines"}.get(lost, rf"missing lines of .*metrics\.jsonl: {gone}$")
    with pytest.warns(UserWarning, match=told):
        pretrain(TrainConfig(resume=config.out))
    numbers = [json.loads(line)["line"] for line in path.read_bytes().splitlines()]
    assert numbers == sorted(set(numbers)) and numbers[-1] == len(numbers) + (lost != "twice") * gone
