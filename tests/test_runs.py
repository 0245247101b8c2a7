"""Runs side by side, the newest one, and settings from a file."""

import dataclasses
import os
from pathlib import Path

import pytest
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m.cli import call
from ant5m.errors import UserError
from ant5m.files import lock
from ant5m.model.costs import count_flops
from ant5m.train import TrainConfig, pretrain
from ant5m.train.config_file import read_config
from ant5m.train.run import latest_run
from ant5m.train.summary import summarize


@pytest.fixture
def runs(config, tmp_path, monkeypatch):  # noqa: F811
    """A finished run and one that was stopped, in runs/."""
    monkeypatch.chdir(tmp_path)
    asked = dataclasses.replace(config, steps=4, eval_every=2, sample_every=0)
    first = pretrain(dataclasses.replace(asked, out=Path("runs/first"))).run
    second = pretrain(dataclasses.replace(asked, out=Path("runs/second"), max_minutes=1e-9)).run
    os.utime(first / "config.json", (1, 1)), os.utime(first / "metrics.jsonl", (1, 1))
    return first, second


def test_latest_is_the_run_that_was_written_to_last(runs, tmp_path, monkeypatch):
    assert latest_run() == runs[1]
    result = pretrain(TrainConfig(resume="latest"))
    assert result.run == runs[1] and result.step == 4
    os.utime(runs[0] / "metrics.jsonl")
    os.utime(runs[1] / "metrics.jsonl", (2, 2)), os.utime(runs[1] / "config.json", (2, 2))
    assert latest_run() == runs[0]
    monkeypatch.chdir(tmp_path / "runs" / "first")
    with pytest.raises(UserError, match="there is no run in runs: name the one to continue"):
        pretrain(TrainConfig(resume="latest"))


def test_runs_are_listed_with_their_state(runs, capsys, config):  # noqa: F811
    Path("runs/ant5m-cache").mkdir()
    assert call(["runs"]) == 0
    first, second = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()][-2:]
    assert first[0] == "first" and first[-1] == "done" and second[0] == "second" and second[-1] == "stopped"
    found = summarize(runs[0])
    assert found.tokens == found.planned_tokens == 4 * 4 * 32
    assert first[-3:-1] == [f"{found.loss:.3f}", f"{found.bits_per_byte:.3f}"]
    assert "512" in first and "(0%)" in second
    with lock(runs[1]):
        assert summarize(runs[1]).state == "preparing"


@pytest.mark.parametrize("by", ["tokens", "flops", "time"])
def test_their_losses_in_one_picture(runs, by, capsys):
    assert call(["runs", str(runs[0]), str(runs[1]), "--plot", "all.png", "--by", by]) == 0
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")
    places, losses = summarize(runs[0]).curve(by)
    assert len(places) == len(losses) == 4 and places == sorted(places)
    if by == "tokens":
        assert places == [128, 256, 384, 512]


def test_flops_of_a_run_that_begins_with_short_contexts(runs):
    summary = dataclasses.replace(summarize(runs[0]), short_context=8, short_tokens=200.0)
    short, whole = (3 * sum(count_flops(summary.shape, context).values()) for context in (8, 32))
    places, _ = summary.curve("flops")
    assert places == [128 * short, 200 * short + 56 * whole, *(200 * short + n * whole for n in (184, 312))]


def test_what_cannot_be_listed_is_told(runs, tmp_path, capsys):
    for flags, message in (
        (["nothing"], "nothing is not a folder"),
        ([str(runs[1]), "--plot", "all.png"], "has taken a step yet"),
        ([str(runs[0]), "--plot", "all.pdf"], "must end with .png"),
    ):
        assert call(["runs", *flags]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("all.*"))
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.json").write_text("{}")
    assert call(["runs"]) == 0
    assert "left out: runs/other is not a run folder" in " ".join(capsys.readouterr().err.split())


def test_settings_from_a_file_and_flags_before_them(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "ant-5m-best"\nsteps = 7\nbetas = [0.8, 0.9]\ndata = ["a b", "c"]\noptimizer = "adamw"\n'
    )
    assert read_config(path) == TrainConfig(
        model="ant-5m-best", steps=7, betas=(0.8, 0.9), data=("a b", "c"), optimizer="adamw"
    )
    assert call(["train", "--config", str(path), "--optimizer", "muon", "--seed", "5", "--print-config"]) == 0
    written = tmp_path / "written.toml"
    written.write_text(capsys.readouterr().out)
    expected = dataclasses.replace(read_config(path), optimizer="muon", seed=5)
    assert read_config(written) == expected
    assert call(["train", f"--config={written}", "--print-config"]) == 0
    assert capsys.readouterr().out == written.read_text()


def test_the_settings_that_nobody_named_go_round(tmp_path, capsys):
    assert call(["train", "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(text)
    assert read_config(tmp_path / "run.toml") == TrainConfig()
    assert "# peak learning rate of Muon\nmuon_learning_rate = 0.014\n" in text and "# steps =\n" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not valid TOML"),
        ("steps = 0", "run.toml: --steps must be a whole number of at least 1"),
        ("colour = 1", "run.toml: unknown in a training config: colour"),
        (None, "run.toml does not exist"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert call(["train", "--config", str(tmp_path / "run.toml")]) == 2
    assert message in capsys.readouterr().err


def test_a_run_from_a_file_is_the_run_of_its_flags(config, tmp_path):  # noqa: F811
    flags = [f"--config={tmp_path / 'run.toml'}", "--out", str(config.out)]
    lines = [f'{name} = "{getattr(config, name)}"' for name in ("model", "device")]
    (tmp_path / "run.toml").write_text(
        "\n".join([*lines, f'data = "{config.data[0]}"', "steps = 2", "batch_size = 2"])
    )
    assert call(["train", *flags]) == 0
    assert summarize(config.out).planned_tokens == 2 * 2 * 32
