"""Training on a mixture: what a run leaves behind, exact resume, and the mistakes that users make."""

import dataclasses
import json
import random
import shutil
import signal

import pytest
from test_pace import clock  # noqa: F401  (a fixture)
from test_resume import fingerprint, interrupt  # noqa: F401  (a fixture)
from test_train import MODEL, WORDS, of_kind

from ant5m.cli import call
from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import run_data
from ant5m.export.card import card_of_run
from ant5m.files import write_json
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.train import TrainConfig, pace, pretrain
from ant5m.train.metrics import read_metrics

MIXTURE = """
[sources.long]
data = "long"
weight = 3

[sources.short]
data = "short"
weight = 1

[[phases]]
from = 0.6
weights = {short = 3}
"""


def texts(seed, count):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=60)) for _ in range(count)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two folders of shards with one tokenizer, one with another, a model, a mixture of the first two."""
    folder = tmp_path_factory.mktemp("mixture")
    write_json(folder / "model.json", MODEL.to_dict())
    tokenizer = train_tokenizer(texts(0, 60), vocab_size=300)
    other = train_tokenizer(texts(0, 60), vocab_size=290)
    for name, count, one in (("long", 60, tokenizer), ("short", 6, tokenizer), ("foreign", 12, other)):
        text = folder / f"{name}.jsonl"
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(name, count)))
        pack(Corpus.open([text]), one, folder / name, validation_fraction=0.1)
    (folder / "mixture.toml").write_text(MIXTURE)
    return folder


@pytest.fixture
def config(material, tmp_path):
    return TrainConfig(
        model=str(material / "model.json"),
        data=str(material / "mixture.toml"),
        out=tmp_path / "run",
        steps=10,
        batch_size=4,
        micro_batch_size=2,
        eval_every=4,
        eval_tokens=64,
        checkpoint_every=4,
        device="cpu",
    )


def test_what_a_run_leaves_behind(config, material, capsys):
    with pytest.warns(UserWarning, match=r"short comes \d\.\d times: beyond about 4 epochs"):
        result = pretrain(dataclasses.replace(config, steps=40, eval_every=20, sample_every=0))
    run = result.run
    told = capsys.readouterr().err
    assert "long: 65.0%" in told and "0.6 to 1 of the run: long 50.0%, short 50.0%" in told
    assert (run / "mixture.toml").read_text() == MIXTURE
    assert run_data(run) == [material / "long", material / "short"]
    values = json.loads((run / "config.json").read_text())
    assert values["mixture"]["phases"][1] == {"from": 0.6, "weights": {"long": 3.0, "short": 3.0}}
    assert set(values["data"]["sources"]) == {"long", "short"}
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]
    for line in lines:
        low, high = sorted((line["loss/long"], line["loss/short"]))
        assert low <= line["loss"] <= high
        assert line["tokens"] == line["tokens/long"] + line["tokens/short"] and line["tokens/short"] >= 32
        assert {"bits_per_byte", "bits_per_byte/long", "bits_per_byte/short"} <= set(line)
    recorded = json.loads((run / "eval.json").read_text())["perplexity"]
    parts, whole = recorded[:2], recorded[2]
    splits = [Shards.open(material / name, "validation") for name in ("long", "short")]
    assert [part["tokens"] for part in parts] == [split.num_tokens for split in splits]
    for name in ("tokens", "words", "bytes"):
        assert whole[name] == sum(part[name] for part in parts)
    nats = sum(part["loss"] * part["tokens"] for part in parts)
    assert whole["loss"] == pytest.approx(nats / whole["tokens"]) == result.evaluation.loss
    report = (run / "report.md").read_text()
    for part, share in zip(parts, ("3,328 (65.0%)", "1,792 (35.0%)"), strict=True):
        assert f"| {share} |" in report and f"| {part['loss']:.4f} | {part['bits_per_byte']:.4f} |" in report
    card = card_of_run("it", run, latest_checkpoint(run))
    assert card.facts["tokens seen"] == "5,120, of a mixture of long, short"
    assert card.validation["loss"] == whole["loss"] and "long.jsonl, short.jsonl" in card.data


def test_stopped_and_resumed_equals_uninterrupted(config, tmp_path, interrupt):  # noqa: F811
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    pretrain(whole)
    interrupt(signal.SIGTERM, 5)
    assert pretrain(config).step == 5
    result = pretrain(TrainConfig(resume=config.out))
    assert (result.step, result.stopped) == (10, None)
    assert fingerprint(whole.out) == fingerprint(config.out)
    evaluations = [json.loads((out / "eval.json").read_text()) for out in (whole.out, config.out)]
    assert evaluations[0] == evaluations[1]


def test_phases_follow_the_clock_as_the_learning_rate_does(config, clock, monkeypatch, tmp_path):  # noqa: F811
    """Planned for 35 steps, a run that has time for half of them still has its last phase; from a checkpoint
    it is repeated exactly, whatever the clock says."""
    monkeypatch.setattr(pace, "FINISH_TOKENS", 0)
    monkeypatch.setattr("ant5m.train.pretraining.measure_speed", lambda *_: 1 / 128)
    clock.slow_from = 6
    limits = {"steps": None, "max_minutes": 1.0, "keep_last": 9, "eval_every": 10, "sample_every": 0}
    run = pretrain(dataclasses.replace(config, **limits)).run
    planned = json.loads((run / "config.json").read_text())["train"]["steps"]
    states = [json.loads((one / "state.json").read_text()) for one in sorted(run.glob("checkpoints/*"))]
    loaders = [state["loader"] for state in states]
    begun = loaders[-1]["starts"][1]
    assert loaders[0]["starts"][1] == round(0.6 * planned * 4) > loaders[-1]["position"] > begun
    assert begun % 4 == 0 and states[-1]["step"] - begun // 4 >= 3
    again = tmp_path / "again"
    shutil.copytree(run, again)
    for checkpoint in (again / "checkpoints").iterdir():
        if checkpoint.name != "step-00000004":
            shutil.rmtree(checkpoint)
    clock.step = 0.01
    pretrain(TrainConfig(resume=again, max_minutes=30.0))
    last = states[-1]["step"]
    lines = [[(line["step"], line["loss"]) for line in of_kind(one, "train")] for one in (run, again)]
    assert lines[0] == lines[1][:last]


def test_a_resumed_run_keeps_its_mixture(config, material, interrupt, tmp_path):  # noqa: F811
    """Whatever becomes of the file; another one may say where the same shards lie now, and nothing else."""
    mine = tmp_path / "mixture.toml"
    text = MIXTURE.replace('"long"', f'"{material / "long"}"').replace('"short"', f'"{material / "short"}"')
    mine.write_text(text)
    interrupt(signal.SIGTERM, 5)
    pretrain(dataclasses.replace(config, data=str(mine)))
    mine.write_text(text.replace("weight = 1", "weight = 2"))
    with pytest.raises(UserError, match="not those of the checkpoint"):
        pretrain(TrainConfig(resume=config.out, data=str(mine)))
    with pytest.raises(UserError, match="is not the data of"):
        pretrain(TrainConfig(resume=config.out, data=str(material / "long")))
    assert pretrain(TrainConfig(resume=config.out)).step == 10


def test_sources_of_text_are_packed_with_one_tokenizer(config, material, tmp_path):
    (tmp_path / "notes.txt").write_text("<|endoftext|>".join(texts(5, 30)))
    mixture = tmp_path / "mixture.toml"
    named = MIXTURE.replace('"long"', f'"{material / "long"}"').replace('"short"', '"notes.txt"')
    mixture.write_text(named.replace("short", "notes"))
    first = pretrain(dataclasses.replace(config, data=str(mixture), steps=2)).run
    packed = [Shards.open(folder) for folder in run_data(first)]
    assert packed[0].folder == material / "long"
    assert packed[1].tokenizer_fingerprint == packed[0].tokenizer_fingerprint
    mixture.write_text(mixture.read_text().replace(str(material / "long"), str(material / "long.jsonl")))
    second = pretrain(dataclasses.replace(config, data=str(mixture), steps=2, out=tmp_path / "second")).run
    assert [Shards.open(folder).vocab_size for folder in run_data(second)] == [300, 300]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("weight = 3", "weight = -3", "broken.toml: the weight of long must be a number from 0 on, not -3"),
        ('"short"', '"foreign"', "packed with another tokenizer"),
        ('"short"', '"nowhere"', "nowhere does not exist"),
        ("short = 3", "shirt = 3", "'shirt', which is not a source"),
        ("", "[[phases]]\nfrom=0.5\nto=0.7\nweights={short=1}", "phases overlap"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(config, material, tmp_path, capsys, before, after, message):
    mixture = material / "broken.toml"
    mixture.write_text(MIXTURE.replace(before, after) if before else MIXTURE + after)
    files = sorted(path for path in tmp_path.rglob("*"))
    flags = ["--model", str(config.model), "--data", str(mixture), "--out", str(config.out), "--steps", "2"]
    assert call(["train", *flags]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert sorted(path for path in tmp_path.rglob("*")) == files


def test_a_mixture_stands_alone(config, material):
    for changes, message in (
        ({"data": (str(material / "mixture.toml"), str(material / "long"))}, "one mixture, alone"),
        ({"checkpoint_words": ("1M",)}, "--checkpoint-words"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain(dataclasses.replace(config, **changes))
        assert not config.out.exists()
