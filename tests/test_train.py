"""A whole small training run, what it leaves behind, and the mistakes that users make."""

import dataclasses
import json
import math
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ant5m import kernels
from ant5m.cli import call
from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import train_tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import masks_documents, record_evaluation
from ant5m.export.card import card_of_run
from ant5m.files import write_json
from ant5m.kernels import dispatch
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import latest_checkpoint, load
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.train import TrainConfig, optimizer, plan, pretrain, samples, trainer
from ant5m.train.checkpoint import prune_checkpoints
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.metrics import read_metrics
from ant5m.train.pace import finish_seconds
from ant5m.train.run import Run
from ant5m.train.settings import BUILTIN_EPOCHS, resolve
from ant5m.train.stop import Stop

CPU = torch.device("cpu")
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
WORDS = [
    "the",
    "ant",
    "carries",
    "a",
    "leaf",
    "home",
    "while",
    "other",
    "ants",
    "build",
    "and",
    "sleep",
    "under",
    "old",
    "green",
    "trees",
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model config, shards with their tokenizer, and the folder they lie in."""
    folder = tmp_path_factory.mktemp("material")
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=60)) for _ in range(60)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tokenizer = train_tokenizer(documents, vocab_size=300)
    pack(Corpus.open([text]), tokenizer, folder / "shards", validation_fraction=0.1)
    write_json(folder / "model.json", MODEL.to_dict())
    return folder


@pytest.fixture
def config(material, tmp_path):
    return TrainConfig(
        model=str(material / "model.json"),
        data=material / "shards",
        out=tmp_path / "run",
        steps=8,
        batch_size=4,
        micro_batch_size=2,
        eval_every=4,
        eval_tokens=64,
        checkpoint_every=2,
        device="cpu",
    )


def of_kind(run, kind):
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


def test_a_run_learns_and_leaves_everything_behind(config):
    result = pretrain(dataclasses.replace(config, steps=40, checkpoint_every=30))
    run = result.run
    assert (result.step, result.stopped) == (40, None)
    losses = [line["loss"] for line in of_kind(run, "train")]
    assert len(losses) == 40 and abs(losses[0] - math.log(300)) < 0.2
    assert result.evaluation.loss < losses[0] - 1
    assert [line["step"] for line in of_kind(run, "validation")] == list(range(4, 40, 4))
    assert [line["step"] for line in of_kind(run, "sample")] == list(range(4, 40, 4))
    assert of_kind(run, "train")[-1]["tokens"] == 40 * 4 * 32
    for name in ("config.json", "loss.png", "report.md", "eval.json", "hf/model.safetensors"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((run / "config.json").read_text())
    assert settings["train"]["steps"] == 40 and settings["train"]["seed"] == 1
    assert settings["model"] == MODEL.to_dict()
    assert {"torch", "ant5m", "python"} <= settings["versions"].keys()
    assert settings["ran"]["kernels"].startswith("kernels (") and settings["ran"]["device"]
    net, tokenizer = load(run)
    exported, _ = load(run / "hf")
    assert tokenizer is not None
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), exported.parameters(), strict=True))
    card = (run / "hf" / "README.md").read_text()
    counts = json.loads((run / "config.json").read_text())["data"]["train"]
    assert f"| tokens seen | 5,120 ({5_120 / counts['tokens']:.2f} epochs) |" in card
    for name in ("words", "bytes"):
        assert f"| {name} seen | {round(5_120 * counts[name] / counts['tokens']):,} |" in card
    parameters = sum(weight.numel() for weight in Ant(MODEL).parameters())
    assert f"| parameters | {parameters:,} |" in card
    assert f"| without token embeddings | {parameters - 300 * 16:,} |" in card
    assert all(f"| {name} |" in card for name in ("tokenizer", "hardware", "hours of training", "ant5m"))
    assert "base_model" not in card


def test_the_report_holds_the_numbers(config):
    result = pretrain(config)
    text = (result.run / "report.md").read_text()
    assert f"{result.evaluation.loss:.4f} nats" in text
    assert f"{result.evaluation.bits_per_byte:.4f}" in text
    assert f"{result.evaluation.words:,} words" in text
    assert f"ant5m train --resume {result.run}" in text
    assert "(loss.png)" in text and "{" not in text


def test_the_report_says_when_pieces_of_one_document_are_held_out(config, monkeypatch):
    monkeypatch.setattr(Shards, "holds_out_documents", False)
    text = (pretrain(dataclasses.replace(config, steps=2)).run / "report.md").read_text()
    assert "On the validation split, pieces of the one document" in text and "never saw" not in text


def test_accumulation_is_one_batch(config, tmp_path):
    nets = []
    for size in (1, 4):
        chosen = dataclasses.replace(
            config, steps=3, micro_batch_size=size, optimizer="adamw", out=tmp_path / str(size)
        )
        nets.append(load(pretrain(chosen).run)[0])
    pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-5


def test_the_cpu_kernels_follow_the_losses_of_the_reference(config, tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "_selected", "auto")  # put back afterwards
    losses = []
    for backend in ("reference", "cpu"):
        chosen = dataclasses.replace(
            config, steps=30, precision="fp32", kernels=backend, out=tmp_path / backend
        )
        losses.append([line["loss"] for line in of_kind(pretrain(chosen).run, "train")])
    # 5e-7 is usual; where Muon multiplied in bf16, rounding grew to 3e-5 within these steps.
    assert losses[0] == pytest.approx(losses[1], abs=3e-6, rel=0)


def test_documents_can_be_masked(config, tmp_path, capsys):
    losses = []
    for masked in (False, True):
        chosen = dataclasses.replace(config, document_mask=masked, out=tmp_path / str(masked))
        result = pretrain(chosen)
        losses.append([line["loss"] for line in of_kind(result.run, "train")])
        assert result.evaluation.document_mask == masked and masks_documents(result.run) == masked
        capsys.readouterr()
        assert call(["eval", str(result.run), "--json", "--device", "cpu"]) == 0
        evaluated = json.loads(capsys.readouterr().out)
        assert evaluated["loss"] == pytest.approx(result.evaluation.loss, rel=1e-4)
        assert evaluated["document_mask"] == masked
    assert losses[0] != losses[1]


def test_the_card_tells_of_the_runs_own_text_and_checkpoint(config):
    result = pretrain(config)
    newest, older = latest_checkpoint(result.run), result.run / "checkpoints" / "step-00000006"
    other = dataclasses.replace(result.evaluation, text="validation split of elsewhere", nats=1.0)
    record_evaluation(result.run, newest.name, other, held_out=False)
    record_evaluation(result.run, older.name, dataclasses.replace(result.evaluation, nats=2.0), held_out=True)
    validation = card_of_run("ant", result.run, newest).validation
    assert validation["loss"] == pytest.approx(result.evaluation.loss)
    assert card_of_run("ant", result.run, older).validation["loss"] < 1


def test_checkpoints_are_pruned(config):
    run = pretrain(dataclasses.replace(config, keep_last=3)).run
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006", "step-00000008"]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_of_a_run_is_that_of_muon(config, monkeypatch, precision, dtype):
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda device: True)
    seen = []
    monkeypatch.setattr(optimizer, "newton_schulz", lambda x, *rest: seen.append(x.dtype) or x)
    pretrain(dataclasses.replace(config, precision=precision, optimizer="muon", steps=2))
    assert set(seen) == {dtype}


def test_fp16_skips_overflows_without_counting_them(config, monkeypatch):
    monkeypatch.setattr(trainer, "LossScaler", lambda device: LossScaler(device, 2.0**40))
    run = pretrain(dataclasses.replace(config, precision="fp16")).run
    lines = of_kind(run, "train")
    assert [line["step"] for line in lines] == list(range(1, 9))
    skipped = lines[-1]["skipped"]
    assert skipped > 5 and lines[-1]["tokens"] == (8 + skipped) * 4 * 32
    state = json.loads((latest_checkpoint(run) / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0 ** (40 - skipped)
    assert 1 <= state["scaler"]["good_steps"] <= 8


def test_a_broken_training_stops_and_names_the_last_good_checkpoint(config, monkeypatch):
    forward = Ant.forward

    def break_down(self, input_ids, targets=None, cache=None, **more):
        out = forward(self, input_ids, targets, cache)
        return out * float("nan") if targets is not None and self.training and self.calls() > 10 else out

    calls = iter(range(1_000))
    monkeypatch.setattr(Ant, "calls", lambda self: next(calls), raising=False)
    monkeypatch.setattr(Ant, "forward", break_down)
    with pytest.raises(UserError, match=r"step 6: the loss is nan.*step-00000004\b"):
        pretrain(config)
    monkeypatch.setattr(Ant, "forward", forward)
    assert latest_checkpoint(config.out).name == "step-00000004"
    assert all(torch.isfinite(weight).all() for weight in load(config.out)[0].parameters())


def test_a_run_without_a_checkpoint_is_told_of_as_a_run(tmp_path):
    write_json(tmp_path / "config.json", {"model": MODEL.to_dict(), "train": {"steps": 3}})
    with pytest.raises(UserError, match="has no good checkpoint yet"):
        load(tmp_path)


@pytest.mark.parametrize(
    "rates",
    [
        {"optimizer": "adamw", "learning_rate": 1e15},  # finite weights, products that are not
        {"optimizer": "adamw", "learning_rate": 1e38},
        {"optimizer": "adamw", "learning_rate": 1e300},
        {"learning_rate": 1e10},
        {"muon_learning_rate": 1e18},
        {"weight_decay": 1e30},
    ],
    ids=str,
)
def test_absurd_rates_end_before_anything_is_sampled_or_written(config, rates, monkeypatch):
    sampled = []

    def watched(net, *arguments, **options):
        logits = net(torch.arange(8)[None])
        sampled.append(bool(logits.isfinite().all()))
        return [""] * len(arguments[1])

    monkeypatch.setattr(samples, "generate", watched)
    every = {"eval_every": 1, "sample_every": 1, "checkpoint_every": 1}
    with pytest.raises(UserError, match=r"training diverged at step \d: .*Start again"):
        pretrain(dataclasses.replace(config, **every, **rates))
    assert all(sampled)
    folder = config.out
    assert not any((folder / name).exists() for name in ("hf", "report.md", "eval.json", "loss.png"))
    lines = read_metrics(folder / "metrics.jsonl")
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    last = max((line["step"] for line in lines if line["kind"] == "sample"), default=0)
    assert len(sampled) == last
    checkpoint = latest_checkpoint(folder)
    assert (int(checkpoint.name[5:]) if checkpoint else 0) == last
    if checkpoint:
        net, _ = load(checkpoint)
        assert net(torch.arange(8)[None]).isfinite().all()


@pytest.mark.parametrize(
    ("rows", "remedy"), [(2, "--micro-batch-size 1, or resume"), (1, "a shorter --sequence-length$")]
)
def test_too_little_memory_says_what_to_do(config, rows, remedy, monkeypatch):
    def fail(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Ant, "forward", fail)
    with pytest.raises(UserError, match=f"no memory for {rows} sequences of 32 tokens at once: .*{remedy}"):
        pretrain(dataclasses.replace(config, micro_batch_size=rows))


def tokens_of(planned):
    return planned.steps * planned.batch_size * 32


def test_time_decides_the_number_of_steps():
    asked = TrainConfig(max_minutes=1.0, data="somewhere")
    planned = resolve(asked, MODEL, 10**6, CPU, "fp32", lambda: 1e-3, deadline=time.monotonic() + 60)
    rest = 60_000 - 1_000 * finish_seconds(0, 1e-3)  # without what the end is given
    assert tokens_of(planned) == pytest.approx(0.9 * rest, abs=planned.batch_size * 32)
    # Half of the time went into preparing; the end is never given more than half of what is left.
    planned = resolve(asked, MODEL, 10**6, CPU, "fp32", lambda: 1e-3, deadline=time.monotonic() + 30)
    assert tokens_of(planned) == pytest.approx(0.9 * 15_000, abs=planned.batch_size * 32)
    builtin = resolve(TrainConfig(), MODEL, 1_000, CPU, "fp32", lambda: 1e-6)
    assert builtin.steps * builtin.batch_size * 32 <= 1.2 * BUILTIN_EPOCHS * 1_000


def test_a_micro_batch_that_was_asked_for_divides_the_batch():
    for asked in (TrainConfig(micro_batch_size=3, steps=5), TrainConfig(micro_batch_size=3, tokens=9_000)):
        planned = resolve(asked, MODEL, 10**6, CPU, "fp32", pytest.fail)
        assert planned.batch_size % 3 == 0 and planned.micro_batch_size == 3


def test_one_pass_over_given_data_is_the_default():
    planned = resolve(TrainConfig(data="somewhere"), MODEL, 10**6, CPU, "fp32", pytest.fail)
    assert planned.steps * planned.batch_size * 32 == pytest.approx(10**6, rel=0.05)
    assert planned.batch_size % planned.micro_batch_size == 0


@pytest.mark.parametrize(("gigabytes", "rows", "kept"), [(15.8, 64, True), (8, 64, False), (3, 16, False)])
def test_a_gpu_computes_at_once_what_fits_beside_the_tokens(gigabytes, rows, kept, monkeypatch):
    """A T4 takes the 65,536 tokens of the published recipe as one, and keeps its 655M."""
    monkeypatch.setattr(plan, "_memory", lambda device: int(gigabytes * 1e9))
    device, tokens = torch.device("cuda"), 655_360_000
    asked = TrainConfig(data="somewhere", steps=10_000)
    planned = resolve(asked, PRESETS["ant-5m"], tokens, device, "fp16", pytest.fail)
    assert (planned.batch_size, planned.micro_batch_size) == (64, rows)
    assert plan.keeps_tokens(tokens, device) == kept and not plan.keeps_tokens(tokens, torch.device("cpu"))


def test_the_batch_law_gives_the_published_batch():
    assert plan.batch_for_tokens(655_360_000, 1_024) == 64
    assert plan.batch_for_steps(10_000, 1_024) == 64
    assert plan.batch_for_tokens(1_000, 1_024) == 2


def test_measuring_the_speed_leaves_the_model_alone():
    torch.manual_seed(0)
    net = Ant(MODEL)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    assert plan.measure_speed(net, TrainConfig(), "fp32") > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("asked", "shapes"),
    [
        ({}, {(64, 32)}),
        ({"batch_size": 8}, {(8, 32)}),
        ({"batch_size": 1_000, "short_context": 16}, {(128, 32), (256, 16)}),
    ],
)
def test_the_speed_is_measured_with_the_steps_of_the_run(asked, shapes, monkeypatch):
    measured = set()
    monkeypatch.setattr(plan, "_take", lambda step, tokens: measured.add(tuple(tokens.shape)))
    plan.measure_speed(Ant(MODEL), TrainConfig(**asked), "fp32")
    assert measured == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps must be a whole number of at least 1"),
        ({"steps": 5, "tokens": 100}, "--steps and --tokens"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a number"),
        ({"learning_rate": 0}, "--learning-rate must be a number above 0"),
        ({"warmup": 1.5}, "--warmup must be a number from 0 to 1, not 1.5"),
        ({"betas": (0.9, 1.0)}, "--betas must be 2 values, each a number from 0 to below 1"),
        ({"steps": True}, "--steps must be a whole number"),
        ({"steps": 2.0}, "--steps must be a whole number"),
        ({"eps": float("inf")}, "--eps must be a number above 0, not inf"),
        ({"document_mask": 1}, "--document-mask must be true or false"),
        ({"kernels": 3}, "--kernels must be text, not 3"),
        ({"batch_size": 4, "micro_batch_size": 3}, r"--micro-batch-size \(3\) must divide"),
        ({"optimizer": "sgd"}, "--optimizer must be one of adamw, muon"),
        ({"max_minutes": 0}, "--max-minutes must be a number above 0"),
        ({"keep_last": 0}, "--keep-last"),
        ({"seed": 2**64}, "--seed must be a whole number from 0 to 9,223,372,036,854,775,807"),
        ({"steps": 10**9}, "1,000,000,000 steps are too many: at most 20,000,000"),
        ({"data": 5}, "--data must be values, each text, not 5"),
        ({"model": ["a"]}, "--model must be text"),
        ({"loop_loss": "dito"}, "--loop-loss must be one of none, unlikelihood, ditto"),
        ({"loop_loss_weight": -1.0}, "--loop-loss-weight must be a number of at least 0"),
        ({"loop_loss_share": 1.5}, "--loop-loss-share must be a number from 0 to 1"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({"batch_size": 10**12}, {}, "for a batch"),
        ({}, {"max_position_embeddings": 10**7, "hidden_size": 10**5, "num_hidden_layers": 1_000}, "GB"),
    ],
)
def test_what_no_memory_could_hold_is_refused_at_once(config, tmp_path, changes, model, words):
    shape = json.loads(Path(config.model).read_text()) | model
    (tmp_path / "huge.json").write_text(json.dumps(shape))
    changed = dataclasses.replace(config, model=str(tmp_path / "huge.json"), **changes)
    with pytest.raises(UserError, match=f"needs more than .* GB of memory.*{words}"):
        pretrain(changed)
    assert not config.out.exists()


def test_steps_that_follow_from_tokens_have_the_same_limit(config):
    with pytest.raises(UserError, match="steps are too many"):
        pretrain(dataclasses.replace(config, steps=None, tokens=10**15, batch_size=4))


def test_paths_may_be_strings(config):
    result = pretrain(dataclasses.replace(config, data=config.data[0], out=str(config.out)))
    assert result.run == config.out and result.step == 8


def test_samples_begin_with_words_of_held_out_documents(config, material):
    result = pretrain(dataclasses.replace(config, steps=4, sample_every=2))
    tokenizer = load(result.run)[1]
    shards = Shards.open(config.data[0], "validation")
    prompts = [sample["prompt"] for sample in of_kind(result.run, "sample")[0]["samples"]]
    assert len(prompts) == 4
    text = [json.loads(line)["text"] for line in (material / "text.jsonl").read_text().splitlines()]
    held_out = [one for one in text if is_in(tokenizer.encode(one), shards.tokens[:])]
    assert all(any(one.startswith(prompt + " ") for one in held_out) for prompt in prompts)
    assert all(len(prompt.split()) == 4 for prompt in prompts)


def is_in(ids, tokens):
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(ids))
    return bool((windows == ids).all(1).any())


def test_bits_per_byte_stand_beside_the_loss(config, capsys):
    """Over the whole split they are those of the evaluation."""
    result = pretrain(dataclasses.replace(config, steps=4, eval_every=2, eval_tokens=10**6))
    (line,) = of_kind(result.run, "validation")
    counts = Shards.open(config.data[0], "validation").counts
    expected = line["loss"] * counts["tokens"] / (math.log(2) * counts["bytes"])
    assert line["bits_per_byte"] == pytest.approx(expected) and line["tokens"] == counts["tokens"]
    output = capsys.readouterr().err
    assert f"validation loss {line['loss']:.3f}, {expected:.3f} bits per byte" in output
    assert "bits/byte)  lr" in output


def test_a_context_too_short_for_whole_prompts(config):
    result = pretrain(dataclasses.replace(config, sequence_length=4, steps=4, eval_every=2, sample_every=2))
    assert (result.run / "hf" / "model.safetensors").exists()
    tokenizer = load(result.run)[1]
    prompts = [sample["prompt"] for sample in of_kind(result.run, "sample")[0]["samples"]]
    assert prompts and all(len(prompt.split()) < 4 for prompt in prompts)
    assert all(len(tokenizer.encode(prompt)) < 4 for prompt in prompts)


def test_what_is_no_checkpoint_is_left_alone(config):
    run = pretrain(config).run
    folder = run / "checkpoints"
    for name in ("step-best", "step-00000002-mine"):
        shutil.copytree(folder / "step-00000008", folder / name)
    prune_checkpoints(folder, 1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000002-mine", "step-00000008", "step-best"]
    assert latest_checkpoint(run).name == "step-00000008"


def test_runs_that_start_together_get_their_own_folders(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (Run.create(dataclasses.replace(config, out=None)) for _ in range(2))
    assert first.folder == second.folder
    first.claim(), second.claim()
    assert first.folder != second.folder and second.folder.is_dir()
    named = Run.create(dataclasses.replace(config, out=tmp_path / "named"))
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        named.claim()


def test_a_run_leaves_the_kernels_as_they_were(config):
    before = kernels.selected()
    pretrain(dataclasses.replace(config, kernels="reference", steps=2))
    assert kernels.selected() == before


def test_a_table_that_is_mostly_unused_is_named(config, material, tmp_path):
    wide = dataclasses.replace(MODEL, vocab_size=600)
    write_json(tmp_path / "wide.json", wide.to_dict())
    with pytest.warns(UserWarning, match="4,800 parameters can never be used"):
        pretrain(dataclasses.replace(config, model=str(tmp_path / "wide.json"), steps=2))


def test_config_goes_round():
    config = TrainConfig(data="a/b", betas=(0.5, 0.6), steps=3)
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and again.betas == (0.5, 0.6)
    with pytest.raises(UserError, match="unknown in a training config: colour"):
        TrainConfig.from_dict({"colour": 1})


def refused(config, message):
    """`pretrain` refuses and writes nothing."""
    before = set(config.out.parent.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        pretrain(config)
    assert "\n" not in str(error.value)
    assert set(config.out.parent.rglob("*")) == before


def test_bad_input_is_refused_before_anything_is_written(config, material, tmp_path):
    refused(dataclasses.replace(config, device="cuda:7"), "'cuda:7' is not there")
    refused(dataclasses.replace(config, data=tmp_path / "nothing"), "nothing does not exist")
    refused(dataclasses.replace(config, model="ant-6m"), "ant-6m")
    refused(dataclasses.replace(config, kernels="abacus"), "abacus")
    refused(dataclasses.replace(config, sequence_length=100_000), "too few for one sequence")
    other = train_tokenizer([" ".join(WORDS)] * 3, vocab_size=280)
    other.save(tmp_path / "other")
    refused(dataclasses.replace(config, tokenizer=tmp_path / "other"), "another tokenizer")
    small = {**MODEL.to_dict(), "vocab_size": 290}
    write_json(tmp_path / "small.json", small)
    refused(dataclasses.replace(config, model=str(tmp_path / "small.json")), "the tokenizer has 300 entries")


def test_a_folder_with_other_content_is_refused(config):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("years of work")
    refused(config, "exists already")
    (config.out / "thesis.txt").unlink()
    pretrain(config)


def test_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        run = Run.create(TrainConfig())
        assert str(run.folder) == f"runs/ant-5m-{number}"
        run.write()


def test_command_line(config, capsys):
    flags = [
        *("--model", config.model, "--data", config.data[0], "--out", str(config.out), "--device", "cpu"),
        *("--steps", "3", "--batch-size", "2", "--sample-every", "0"),
    ]
    assert call(["train", *flags]) == 0
    output = capsys.readouterr()
    assert output.out == "" and "validation loss" in output.err and "report.md" in output.err
    assert call(["train", *flags]) == 2
    assert "exists already" in capsys.readouterr().err
    assert call(["train", "--steps", "0"]) == 2
    assert "--steps must be" in capsys.readouterr().err


def test_stop_tells_why():
    assert Stop().reason is None
    assert Stop(deadline=0.0).reason == "time limit"
