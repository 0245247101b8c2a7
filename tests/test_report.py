"""The run without data: built-in text to report; and the parts of the report."""

import io
import json
import random
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_train import MODEL, WORDS

from ant5m.data import packing
from ant5m.data.builtin import Builtin
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.files import write_json
from ant5m.train import TrainConfig, preparation, pretrain, report
from ant5m.train.progress import TrainingProgress
from ant5m.train.samples import GeneratedText


@pytest.fixture
def builtin(monkeypatch):
    """A small corpus in place of the machine's."""
    draw = random.Random(1)
    documents = tuple(" ".join(draw.choices(WORDS, k=80)) for _ in range(60))
    size = sum(map(len, documents))
    monkeypatch.setattr("ant5m.data.builtin._LOADED", [Builtin(documents, {"ants": size})])


@pytest.fixture
def config(tmp_path):
    write_json(tmp_path / "model.json", MODEL.to_dict())
    settings = {"device": "cpu", "tokens": 4_096, "batch_size": 4, "sample_every": 0}
    return TrainConfig(model=str(tmp_path / "model.json"), out=tmp_path / "run", **settings)


def test_without_data_everything_comes_from_the_built_in_text(config, builtin):
    result = pretrain(config)
    run = result.run
    assert result.step == 32 and result.evaluation.bits_per_byte > 0
    shards, tokenizer = Shards.open(run / "data"), Tokenizer.load(run / "tokenizer")
    assert tokenizer.vocab_size == MODEL.vocab_size
    assert shards.tokenizer_fingerprint == tokenizer.fingerprint
    assert (
        shards.meta["splits"]["train"]["documents"] + shards.meta["splits"]["validation"]["documents"] == 60
    )
    assert "the built-in text: " in (run / "report.md").read_text()
    assert "docstrings" in (run / "hf" / "README.md").read_text()


def test_a_run_stopped_in_its_preparation_goes_on(config, builtin, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("power cut")

    monkeypatch.setattr(preparation, "pack", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(config)
    tokenizer = Tokenizer.load(config.out / "tokenizer").fingerprint
    monkeypatch.setattr(preparation, "pack", packing.pack)
    assert pretrain(TrainConfig(resume=config.out)).step == 32
    assert Tokenizer.load(config.out / "tokenizer").fingerprint == tokenizer


def test_a_given_tokenizer_is_used(config, builtin, tmp_path):
    given = train_tokenizer([" ".join(WORDS)] * 3, vocab_size=280)
    given.save(tmp_path / "given")
    values = {**config.to_dict(), "tokenizer": str(tmp_path / "given")}
    run = pretrain(TrainConfig.from_dict(values)).run
    assert Tokenizer.load(run / "tokenizer").fingerprint == given.fingerprint
    with pytest.raises(UserError, match="made with the built-in text"):
        pretrain(TrainConfig(resume=run, data=tmp_path))


def test_loops_are_named():
    good = GeneratedText("The", " ant carries a leaf.", looping=False)
    bad = GeneratedText("The", " the the the", looping=True)
    assert "None of these texts loops" in report._remark([good])
    assert "1 of these 2 texts fall" in report._remark([good, bad])
    assert "falls into a loop" in report._quoted(bad) and "falls into a loop" not in report._quoted(good)


def test_running_mean():
    assert report.running_mean((4.0, 2.0, 0.0, 8.0), 2) == pytest.approx([4.0, 3.0, 1.0, 4.0])


def test_the_plot_takes_a_run_without_training_lines(tmp_path):
    validation = {"kind": "validation", "step": 0, "loss": 9.7, "tokens": 8}
    report.plot_loss([validation], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1_000


def test_losses_over_different_text_are_not_joined():
    lines = [
        {"kind": kind, "step": step, "loss": loss, "tokens": tokens}
        for kind, step, loss, tokens in (
            ("validation", 1, 7.0, 50),
            ("train", 1, 7.5, 64),
            ("validation", 2, 6.0, 50),
            ("validation", 2, 6.5, 900),
        )
    ]
    assert report._by_text(lines) == {50: [(1, 7.0), (2, 6.0)], 900: [(2, 6.5)]}


def test_a_text_read_in_part_is_not_read_no_times():
    read = [report.count_epochs(tokens, 1_000) for tokens in (48, 999, 1_000, 12_345)]
    assert read == ["0.05", "1.00", "1.0", "12.3"]


def test_progress_shows_mfu_only_with_a_known_peak(capsys):
    for peak in (None, 4e6):
        progress = TrainingProgress(10, lambda context: 10.0 * context, peak)
        progress.on_log(
            SimpleNamespace(step=10, context=100),
            "train",
            {"loss": 4.25, "learning_rate": 0.001, "tokens_per_second": 2_000},
        )
        output = capsys.readouterr()
        assert output.out == ""
        assert "step 10/10  loss 4.250  lr 1.0e-03  2,000 tokens/s" in output.err
        assert ("MFU 50.0%" in output.err) == (peak is not None)


def test_the_time_left_fits_80_columns(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr("ant5m.train.progress.stderr", lambda: terminal)
    bar = TrainingProgress(20_000, lambda context: 1_000.0, peak=1e9, bytes_per_token=4.0)
    values = {"loss": 5.75, "learning_rate": 0.001, "tokens_per_second": 3_456_789}
    bar.on_log(SimpleNamespace(step=12_345, context=64), "train", values)
    terminal.print(bar._bar.get_renderable())
    assert shown.getvalue().rstrip().endswith(" left") and "…" not in shown.getvalue()


def test_config_json_is_enough_to_repeat_the_run(config, builtin, tmp_path):
    first = pretrain(config)
    values = json.loads((first.run / "config.json").read_text())
    again = TrainConfig.from_dict({**values["train"], "out": str(tmp_path / "again")})
    assert pretrain(again).evaluation.nats == first.evaluation.nats
