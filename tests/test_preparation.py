"""From text to shards on the way to a training: one command, a cache, and what is refused."""

import dataclasses
import json
import random
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from test_train import MODEL, WORDS

from ant5m.cli import call
from ant5m.data import cache, packing
from ant5m.data.shards import META, Shards
from ant5m.data.tokenizer import Tokenizer, train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import run_data
from ant5m.export.card import card_of_run
from ant5m.files import write_json
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.train import TrainConfig, preparation, pretrain
from ant5m.train.run import Run


@pytest.fixture
def config(tmp_path):
    """A run on a folder of text."""
    draw = random.Random(0)
    (tmp_path / "books").mkdir()
    for number in range(40):
        text = " ".join(draw.choices(WORDS, k=90))
        (tmp_path / "books" / f"{number}.txt").write_text(f"{number} {text}")
    write_json(tmp_path / "model.json", MODEL.to_dict())
    return TrainConfig(
        model=str(tmp_path / "model.json"),
        data=str(tmp_path / "books"),
        out=tmp_path / "runs" / "first",
        steps=2,
        batch_size=2,
        sample_every=0,
        device="cpu",
    )


def test_text_is_trained_on_in_one_call_and_the_next_run_uses_its_shards(config, tmp_path, monkeypatch):
    run = pretrain(config).run
    made = sorted(path.name.split("-")[0] for path in (tmp_path / "runs" / cache.NAME).iterdir())
    assert made == ["shards", "tokenizer"]
    values = json.loads((run / "config.json").read_text())
    shards = Shards.open(values["shards"])
    assert values["train"]["data"] == [str(tmp_path / "books")]
    assert shards.vocab_size == MODEL.vocab_size
    assert run_data(run) == [shards.folder]
    assert Tokenizer.load(run / "tokenizer").fingerprint == shards.tokenizer_fingerprint
    assert "0.txt" in card_of_run("it", run, latest_checkpoint(run)).data
    assert "text | books:" in (run / "report.md").read_text()
    monkeypatch.setattr(cache, "pack", None)
    monkeypatch.setattr(cache, "train_tokenizer", None)
    second = pretrain(dataclasses.replace(config, out=tmp_path / "runs" / "second")).run
    assert json.loads((second / "config.json").read_text())["shards"] == values["shards"]


def test_the_same_text_gives_the_same_run_as_its_shards(config, tmp_path):
    run = pretrain(config).run
    shards = json.loads((run / "config.json").read_text())["shards"]
    packed = pretrain(dataclasses.replace(config, data=shards, out=tmp_path / "runs" / "packed")).run
    one, other = (latest_checkpoint(folder) / "model.safetensors" for folder in (run, packed))
    assert one.read_bytes() == other.read_bytes()


def test_a_change_of_text_tokenizer_or_size_makes_new_shards(config, tmp_path):
    def folders():
        return {path.name for path in (tmp_path / "runs" / cache.NAME).iterdir()}

    pretrain(config)
    before = folders()
    with (tmp_path / "books" / "0.txt").open("a") as file:
        file.write(" ant")
    pretrain(dataclasses.replace(config, out=tmp_path / "runs" / "changed"))
    assert len(folders() - before) == 2
    before = folders()
    train_tokenizer([" ".join(WORDS)] * 3, vocab_size=290).save(tmp_path / "own")
    own = dataclasses.replace(config, tokenizer=tmp_path / "own", out=tmp_path / "runs" / "own")
    assert Shards.open(run_data(pretrain(own).run)[0]).vocab_size == 290
    assert [name.split("-")[0] for name in folders() - before] == ["shards"]


def test_files_globs_and_a_column(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "the ant carries a leaf home"}\n' * 30)
    data = (str(tmp_path / "books" / "1*.txt"), str(tmp_path / "rows.jsonl"))
    asked = dataclasses.replace(config, data=data, text_column="body")
    meta = json.loads((run_data(pretrain(asked).run)[0] / META).read_text())
    assert len(meta["sources"]) == 12
    assert sum(split["documents"] for split in meta["splits"].values()) == 41


def test_only_the_beginning_of_a_huge_text_is_read(config, tmp_path, monkeypatch):
    """Of a data set of the hub (here a folder in its layout): for the tokenizer, and to be packed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    draw, folder = random.Random(1), tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    rows = [{"text": " ".join(draw.choices(WORDS, k=90)), "book": number // 5} for number in range(2_000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    read = []
    learn = cache.train_tokenizer

    def learning(texts, *more):
        return learn((read.append(text) or text for text in texts), *more)

    monkeypatch.setattr(cache, "train_tokenizer", learning)
    monkeypatch.setattr(packing, "BATCH_BYTES", 1 << 14)

    def packed(out, **limits):
        read.clear()
        asked = dataclasses.replace(
            config, data=f"hf:{tmp_path / 'hub'}", out=tmp_path / "runs" / out, **limits
        )
        run = Run.create(asked)
        preparation.prepare(run)
        folder = run.packed
        splits = json.loads((folder / META).read_text())["splits"].values()
        return folder, *(sum(split[key] for split in splits) for key in ("documents", "tokens"))

    by_documents, documents, _ = packed("a", max_documents=150)
    assert documents == len(read) == 150
    by_tokens, documents, tokens = packed("b", max_tokens=20_000)
    assert 20_000 <= tokens < 32_000 and documents < 2_000 and len(read) < 400
    grouped, documents, _ = packed("c", max_documents=150, group_column="book")
    assert documents == 150 and len({by_documents, by_tokens, grouped}) == 3
    again, *_ = packed("d", max_tokens=20_000)
    assert again == by_tokens and not read


def test_stopped_packing_goes_on_with_the_same_command(config, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "pack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert "stopped while the text was prepared. Go on with: the same command" in capsys.readouterr().err
    assert not config.out.exists()
    monkeypatch.undo()
    monkeypatch.setattr(cache, "train_tokenizer", None)  # it is there
    assert pretrain(config).step == 2


def test_a_resumed_run_needs_its_shards_and_no_text(config, tmp_path):
    run = pretrain(dataclasses.replace(config, max_minutes=1e-9)).run
    shutil.rmtree(tmp_path / "books")
    assert pretrain(TrainConfig(resume=run)).step == 2


def test_a_resumed_run_makes_its_shards_again(config, tmp_path):
    run = pretrain(dataclasses.replace(config, max_minutes=1e-9)).run
    shutil.rmtree(tmp_path / "runs" / cache.NAME)
    assert pretrain(TrainConfig(resume=run)).step == 2


def refused(config, message):
    """`pretrain` refuses, and nothing is left."""
    before = set(config.out.parent.parent.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        pretrain(config)
    assert "\n" not in str(error.value)
    assert set(config.out.parent.parent.rglob("*")) - before <= {config.out.parent}


def test_bad_text_is_refused_and_nothing_is_left(config, tmp_path):
    refused(dataclasses.replace(config, data=str(tmp_path / "nothing")), "nothing does not exist")
    refused(dataclasses.replace(config, data=str(tmp_path / "no*.txt")), "matches no file")
    refused(dataclasses.replace(config, data="hf:"), "is not of the form hf:OWNER/NAME")
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n{"text"\n')
    refused(dataclasses.replace(config, data=str(tmp_path / "rows.jsonl")), "line 2: not valid JSON")
    (tmp_path / "empty").mkdir()
    refused(dataclasses.replace(config, data=str(tmp_path / "empty")), "holds no text file")
    unpacked = "--max-tokens is for text that is yet to be packed, unlike the built-in text"
    refused(dataclasses.replace(config, data=(), max_tokens=9), unpacked)


def test_a_text_too_small_for_the_model_names_the_preset_that_fits(config):
    small = dataclasses.replace(config, model="archaea-74m")
    refused(small, r"supports a vocabulary of only \d+ entries, archaea-74m has 50,257 rows: give more text")


def test_a_default_model_that_does_not_fit_is_refused_with_one_that_does(config, tmp_path, monkeypatch):
    run = pretrain(config).run
    packed = dataclasses.replace(
        config, data=str(run_data(run)[0]), model=None, out=tmp_path / "runs" / "next"
    )
    refused(packed, "300 entries, the default model ant-5m 16,384 rows, of which 16,084 would never be used")
    given = dataclasses.replace(
        config, tokenizer=run / "tokenizer", model=None, out=tmp_path / "runs" / "next"
    )
    refused(given, "choose a --model with as many rows")
    monkeypatch.setitem(preparation.PRESETS, "fitting", MODEL)
    refused(packed, "take --model fitting$")
    pretrain(dataclasses.replace(packed, model="fitting", steps=1))


def test_on_the_command_line(config, tmp_path, capsys):
    flags = ["--model", config.model, "--out", str(config.out), "--steps", "1", "--batch-size", "1"]
    books = [str(tmp_path / "books" / f"{number}.txt") for number in range(40)]
    assert call(["train", "--data", *books, *flags, "--sample-every", "0", "--device", "cpu"]) == 0
    err = capsys.readouterr().err
    assert "text: 40 sources" in err and "kept in" in err and "done: validation loss" in err
