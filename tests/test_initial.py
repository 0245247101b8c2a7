"""Training that begins with a model: its weights, a branch of its run, and what is refused."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from test_data_parallel import together
from test_train import MODEL, WORDS, config, material, of_kind, refused  # noqa: F401  (fixtures)

from ant5m.cli import call
from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.files import write_json
from ant5m.model.checkpoint import latest_checkpoint, load
from ant5m.train import TrainConfig, pretrain


@pytest.fixture
def base(config, tmp_path):  # noqa: F811
    """A trained run."""
    return pretrain(dataclasses.replace(config, keep_last=9, out=tmp_path / "base")).run


def start(run):
    """The weights of a run before its first step: its learning rates are too small to move them."""
    return dict(load(run)[0].named_parameters())


@pytest.fixture
def still(config, base):  # noqa: F811
    """Settings that begin with the run and leave the weights nearly where they are."""
    return dataclasses.replace(
        config, model=None, init=str(base), steps=1, learning_rate=1e-12, muon_learning_rate=1e-12
    )


@pytest.mark.parametrize("kind", ["run", "checkpoint", "hf", "@6"])
def test_a_run_begins_with_the_weights(still, base, kind):
    names = {"run": base, "checkpoint": latest_checkpoint(base), "hf": base / "hf", "@6": f"{base}@6"}
    run = pretrain(dataclasses.replace(still, init=str(names[kind]))).run
    from_ = base / "checkpoints" / "step-00000006" if kind == "@6" else base
    expected = dict(load(from_)[0].named_parameters())
    for name, weight in start(run).items():
        assert torch.allclose(weight, expected[name], atol=1e-8), name
    values = json.loads((run / "config.json").read_text())
    assert values["model"] == MODEL.to_dict() and values["train"]["init"] == str(names[kind])
    assert "| begun with |" in (run / "report.md").read_text()
    assert (
        f"Trained with ant5m from {'/'.join(str(names[kind]).split('/')[-2:])}"
        in (run / "hf" / "README.md").read_text()
    )


def test_a_branch_of_a_run_is_the_run(config, tmp_path):  # noqa: F811
    """WSD with a decay from step 5 on is the stable part with a branch that decays for 5 steps."""
    whole = dataclasses.replace(
        config,
        steps=10,
        schedule="wsd",
        decay=0.5,
        warmup=0.2,
        learning_rate=3e-3,
        z_loss=1e-3,
        ema=0.9,
        keep_last=9,
        out=tmp_path / "whole",
    )
    pretrain(dataclasses.replace(whole, checkpoint_every=5))
    branch = TrainConfig(init=f"{whole.out}@5", keep_optimizer=True, steps=5, device="cpu", out=config.out)
    branch = dataclasses.replace(branch, micro_batch_size=2, eval_tokens=64)
    pretrain(branch)
    asked = json.loads((config.out / "config.json").read_text())["train"]
    assert (asked["learning_rate"], asked["warmup"], asked["batch_size"]) == (3e-3, 0.0, 4)
    for name in ("model.safetensors", "optimizer.safetensors", "average.safetensors"):
        one, other = (
            hashlib.sha256((latest_checkpoint(run) / name).read_bytes()).digest()
            for run in (whole.out, config.out)
        )
        assert one == other, name
    losses = [[line["loss"] for line in of_kind(run, "train")] for run in (whole.out, config.out)]
    assert losses[0][5:] == losses[1]


def test_a_branch_that_was_stopped_at_once_branches_again(config, base, tmp_path):  # noqa: F811
    whole = TrainConfig(init=str(base), keep_optimizer=True, steps=4, device="cpu", out=tmp_path / "whole")
    pretrain(whole)
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped", max_minutes=1e-9)
    pretrain(stopped)
    shutil.rmtree(stopped.out / "checkpoints")
    pretrain(TrainConfig(resume=stopped.out))
    files = [latest_checkpoint(run.out) / "model.safetensors" for run in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_longer_context_and_another_rope_base(still, base, capsys):
    run = pretrain(dataclasses.replace(still, sequence_length=64, rope_theta=5e4)).run
    shape = json.loads((run / "config.json").read_text())["model"]
    assert (shape["max_position_embeddings"], shape["rope_theta"]) == (64, 5e4)
    told = capsys.readouterr().err
    assert f"begins with {latest_checkpoint(base)}, context 32 -> 64, RoPE base 10,000.0 -> 50,000.0" in told


def test_a_larger_vocabulary_keeps_the_old_rows(still, base, material, tmp_path, capsys):  # noqa: F811
    tokenizer = Tokenizer.load(base / "tokenizer")
    tokenizer.backend.add_special_tokens(["<|user|>", "<|assistant|>"])
    tokenizer = Tokenizer(tokenizer.backend, tokenizer.eos_token)
    assert tokenizer.vocab_size == 302
    pack(Corpus.open([material / "text.jsonl"]), tokenizer, tmp_path / "more", validation_fraction=0.1)
    run = pretrain(dataclasses.replace(still, data=(str(tmp_path / "more"),))).run
    assert "vocabulary 300 -> 302" in capsys.readouterr().err
    table, before = (
        dict(load(one)[0].named_parameters())["model.embed_tokens.weight"] for one in (run, base)
    )
    assert table.shape[0] == 302
    assert torch.allclose(table[:300], before, atol=1e-8)
    assert torch.allclose(table[300:], before.mean(0).expand(2, -1), atol=1e-8)


def test_text_is_packed_with_the_tokenizer_of_the_model(still, base, tmp_path):
    (tmp_path / "more.txt").write_text(
        "\n<|endoftext|>\n".join(" ".join(WORDS[n % 7 :] * 9) for n in range(40))
    )
    run = pretrain(dataclasses.replace(still, data=(str(tmp_path / "more.txt"),))).run
    assert Tokenizer.load(run / "tokenizer").fingerprint == Tokenizer.load(base / "tokenizer").fingerprint


def shape(tmp_path, **changes):
    write_json(tmp_path / "other.json", {**MODEL.to_dict(), **changes})
    return str(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intermediate_size": 32},
            r"mlp\.gate_proj\.weight is \(24, 16\) in .*base and \(32, 16\) in the model",
        ),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* in .*base and not there in the model"),
        ({"num_hidden_layers": 3}, r"base has no model\.layers\.2\."),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
            "num_attention_heads is 2 in .*base and 4",
        ),
        ({"tie_word_embeddings": False}, r"base has no lm_head\.weight"),
    ],
)
def test_another_shape_is_refused(still, tmp_path, changes, message):
    refused(dataclasses.replace(still, model=shape(tmp_path, **changes)), message)


def test_what_cannot_be_begun_with_is_refused(still, base, material, tmp_path):  # noqa: F811
    refused(dataclasses.replace(still, init=str(tmp_path / "nothing")), "nothing does not exist")
    refused(
        dataclasses.replace(still, init=f"{base}@7"), r"has no checkpoint of step 7 \(there are: 2, 4, 6, 8\)"
    )
    refused(dataclasses.replace(still, init=f"{base}@last"), "neither a folder nor of the form RUN@STEP")
    with pytest.raises(UserError, match="--keep-optimizer is of the run that --init names"):
        TrainConfig(keep_optimizer=True)
    hub = dataclasses.replace(still, init=str(base / "hf"), keep_optimizer=True)
    refused(hub, "hf has no optimizer: --keep-optimizer needs a run or its checkpoint")
    adamw = dataclasses.replace(still, optimizer="adamw", keep_optimizer=True)
    refused(adamw, "the optimizer state")
    from ant5m.data.tokenizer import train_tokenizer

    other = train_tokenizer([" ".join(reversed(WORDS)) + " xyz"] * 3, vocab_size=290)
    pack(Corpus.open([material / "text.jsonl"]), other, tmp_path / "other", validation_fraction=0.1)
    refused(
        dataclasses.replace(still, data=(str(tmp_path / "other"),)),
        "base has another tokenizer than the data",
    )
    with pytest.raises(UserError, match="leave out --init"):
        pretrain(TrainConfig(resume=base, init=str(base)))


@pytest.mark.slow
def test_ranks_begin_alike(config, base, tmp_path):  # noqa: F811
    asked = TrainConfig(
        init=str(base), keep_optimizer=True, steps=3, device="cpu", precision="fp32", micro_batch_size=2
    )
    jobs = [{"config": {**asked.to_dict(), "out": str(tmp_path / "two")}}]
    told, _ = together(jobs, tmp_path)
    assert told[0] == told[1]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pretrain(dataclasses.replace(asked, out=tmp_path / "one"))
    torch.set_num_threads(before)
    files = [latest_checkpoint(tmp_path / name) / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_on_the_command_line(base, config, capsys):  # noqa: F811
    flags = ["--init", f"{base}@4", "--keep-optimizer", "--steps", "2", "--data", config.data[0]]
    assert call(["train", *flags, "--out", str(config.out), "--device", "cpu", "--sample-every", "0"]) == 0
    assert "begins with" in capsys.readouterr().err
