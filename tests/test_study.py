"""Studies hold what they say, statistics equal closed forms, and an experiment survives being stopped."""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_ranks import free_port

from ant5m.cli import call
from ant5m.data.corpus import Corpus
from ant5m.data.tokenizer import Tokenizer
from ant5m.device import choose_precision
from ant5m.errors import UserError
from ant5m.files import lock, write_json
from ant5m.model.ant import Ant
from ant5m.model.config import PRESETS, ModelConfig
from ant5m.model.costs import count_flops
from ant5m.study import experiment, report
from ant5m.study.bigram import bigram_bits_per_byte, bigram_nats
from ant5m.study.config import CompareConfig
from ant5m.study.materials import Materials
from ant5m.study.statistics import CLAIMS_TESTED, SMALLEST_EFFECT, Interval, interval, judge, paired
from ant5m.study.studies import CLAIMS, STUDIES, TOLERANCE, Variant, fill, variants_of_study
from ant5m.train.config import TrainConfig
from ant5m.train.pretraining import Result

CONTROLLED = [name for name, study in STUDIES.items() if study.parameters is not None]
FACTOR = {
    "vocab": {"vocab_size"},
    "head-dim": {"head_dim", "num_attention_heads", "num_key_value_heads"},
    "kv-heads": {"num_key_value_heads"},
    "depth": {"num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"},
    "rope-base": {"rope_theta"},
    "tied": {"tie_word_embeddings"},
    "optimizer": set(),
}
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


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_study_varies_its_factor_and_holds_the_parameters(name):
    variants = variants_of_study(name)
    assert {variant.parameters for variant in variants} and STUDIES[name].baseline in {
        variant.name for variant in variants
    }
    for variant in variants:
        assert abs(variant.parameters / STUDIES[name].parameters - 1) <= TOLERANCE
    shapes = [variant.model.to_dict() for variant in variants]
    varied = {key for key in shapes[0] if len({shape[key] for shape in shapes}) > 1}
    assert varied - {"intermediate_size"} == FACTOR[name]
    assert all(variant.train for variant in variants) == (name == "optimizer")


def test_the_counter_is_right_about_an_variant():
    variant = variants_of_study("head-dim")[0]
    assert variant.parameters == sum(parameter.numel() for parameter in Ant(variant.model).parameters())


def test_head_sizes_have_equal_flops_and_equal_width_of_keys():
    models = [variant.model for variant in variants_of_study("head-dim")]
    assert len({sum(count_flops(model, 256).values()) for model in models}) == 1
    assert {model.head_size * model.num_key_value_heads for model in models} == {64}


def test_the_base_of_a_study_is_ant_5m():
    small = dataclasses.replace(PRESETS["ant-5m"], vocab_size=4_096)
    assert STUDIES["kv-heads"].parameters == Variant("", small).parameters
    assert STUDIES["vocab"].parameters == Variant("", PRESETS["ant-5m"]).parameters
    assert next(variant for variant in variants_of_study("kv-heads") if variant.name == "2").model == small
    assert (
        next(variant for variant in variants_of_study("vocab") if variant.name == "16384").model
        == PRESETS["ant-5m"]
    )


def test_every_claim_names_variants_of_its_study():
    claims = [(study, study.claim) for study in STUDIES.values() if study.claim]
    assert len(claims) == 4
    for study, claim in claims:
        assert {claim.blamed, claim.against} <= set(study.variants)


def test_a_shape_that_cannot_be_filled_is_refused():
    with pytest.raises(UserError, match="no SwiGLU width"):
        fill(PRESETS["ant-5m"], 1_000_000)


def test_intervals():
    # Mean 2, standard deviation 1, three values: 4.3027 / sqrt(3) to each side.
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-4)
    assert 2 - found.low == pytest.approx(found.high - 2)
    assert interval([1.5]) == Interval(1.5, None, None, 1)


def test_pairs_are_over_the_seeds_that_both_have():
    found = paired({1: 1.1, 2: 2.1, 3: 9.0}, {1: 1.0, 2: 2.0, 4: 0.0})
    assert found.count == 2 and found.mean == pytest.approx(0.1) and found.high - found.low < 1e-9
    assert paired({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.015, 0.02, "supported"),  # at 98.75 % [0.0122, 0.0228]
        (0.011, 0.02, "not decided"),  # supported if it were the only claim
        (0.001, 0.02, "not decided"),
        (-0.02, 0.02, "not decided"),
        (0.001, 0.006, "not supported"),
        (-0.03, -0.02, "not supported"),
        (None, None, "not decided"),
    ],
)
def test_the_rule(low, high, verdict):
    assert SMALLEST_EFFECT == 0.01 and len(CLAIMS) == CLAIMS_TESTED
    assert judge(Interval(0.0, low, high, 3), True) == verdict
    assert judge(Interval(0.0, low, high, 3), False) == judge(None, True) == "not decided"


def test_the_bigram_against_counting_by_hand():
    sequences = np.array([[0, 1, 0, 1], [0, 2, 0, 1]])
    text = np.array([0, 1, 2, 0, 3])
    # Single tokens: 4, 3, 1, 0 of 8, and three kinds; then each pair, Witten and Bell's way.
    lower = [(count + 3 / 4) / 11 for count in (4, 3, 1, 0)]
    pairs = [(3 + 2 * lower[1]) / 6, (0 + 1 * lower[2]) / 2, (1 + 1 * lower[0]) / 2, 2 * lower[3] / 6]
    assert bigram_nats([sequences], text, 4) == pytest.approx(-sum(map(math.log, pairs)))
    # Token 3 was never a context: the probabilities of single tokens, which add up to 1.
    assert bigram_nats([sequences], np.array([3, 1]), 4) == pytest.approx(-math.log(lower[1]))
    assert bigram_bits_per_byte([sequences], np.array([3, 1]), 4, 2) == pytest.approx(
        -math.log2(lower[1]) / 2
    )
    for context in range(4):
        probabilities = [
            math.exp(-bigram_nats([sequences], np.array([context, token]), 4)) for token in range(4)
        ]
        assert sum(probabilities) == pytest.approx(1)


def test_the_bigram_counts_block_by_block(monkeypatch):
    draw = np.random.default_rng(0)
    batches = draw.integers(0, 9, (5, 3, 8))
    text = draw.integers(0, 9, 40)
    whole = bigram_nats([batches.reshape(15, 8)], text, 9)
    monkeypatch.setattr("ant5m.study.bigram.BLOCK", 2 * batches[0].size)
    assert bigram_nats(iter(batches), text, 9) == pytest.approx(whole, rel=1e-12)


def result(variant, seed, bits, factor=1.0):
    return {
        "variant": variant,
        "seed": seed,
        "rate_factor": factor,
        "bits_per_byte": bits,
        "training_tokens": 100,
        "bytes_seen": 400,
        "training_seconds": 2.0,
        "loops": {"looping": 1, "texts": 4},
    }


def test_a_verdict_comes_from_the_claim_s_own_contrast():
    config = CompareConfig(study="head-dim", seeds=3)
    bits = {"8": 2.3, "16": 2.1, "32": 2.02, "64": 2.0}
    results = [
        result(variant, seed, value + 0.1 * seed) for variant, value in bits.items() for seed in (1, 2, 3)
    ]
    rows = report.summarize(config, config.design(), results, dict.fromkeys(bits, 2.25))
    verdicts = {one["claim"]: one for one in report.judge_claims("head-dim", rows)}
    tested = verdicts["16-dim heads break RoPE"]
    assert tested["verdict"] == "supported" and tested["interval"]["mean"] == pytest.approx(0.1)
    assert [one["tested"] for one in verdicts.values()].count(True) == 1
    rows = report.summarize(config, config.design(), results, dict.fromkeys(bits, 2.15))
    tested = {one["claim"]: one for one in report.judge_claims("head-dim", rows)}["16-dim heads break RoPE"]
    assert tested["verdict"] == "not decided" and not tested["beats_bigram"]
    # The better of the two has to beat its own bigram.
    rows = report.summarize(config, config.design(), results, bits | {"16": 2.31, "32": 2.2})
    tested = {one["claim"]: one for one in report.judge_claims("head-dim", rows)}["16-dim heads break RoPE"]
    assert tested["verdict"] == "not decided" and not tested["beats_bigram"]
    assert rows[1].tokens_per_second == 50 and rows[1].loop_rate == 0.25


def test_the_best_rate_is_taken_among_whole_rounds():
    config = CompareConfig(study="optimizer", rate_factors=(0.5, 1.0))
    results = [result("adamw", 1, 2.0, 0.5), result("adamw", 1, 2.1), result("adamw", 2, 2.1)]
    row = report.summarize(config, config.design(), results, {"adamw": 3.0, "muon": 3.0})[0]
    assert row.rate_factor == 1.0 and row.by_seed == {1: 2.1, 2: 2.1}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A text, two models with vocabularies of their own, and their tokenizers and shards."""
    folder = tmp_path_factory.mktemp("study")
    draw = random.Random(0)
    documents = [" ".join(draw.choices(WORDS, k=50)) for _ in range(60)]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    small = ModelConfig(300, 16, 24, 1, 2, 1, max_position_embeddings=32)
    write_json(folder / "one.json", small.to_dict())
    write_json(folder / "two.json", {**small.to_dict(), "vocab_size": 280, "intermediate_size": 32})
    Materials(folder / "cache", Corpus.open([text]), 0.1).prepare({300, 280})
    return folder


@pytest.fixture
def config(material, tmp_path):
    return CompareConfig(
        models=(str(material / "one.json"), str(material / "two.json")),
        data=(str(material / "text.jsonl"),),
        cache=material / "cache",
        out=tmp_path / "study",
        tokens=256,
        seeds=2,
        batch_size=2,
        validation_fraction=0.1,
        device="cpu",
    )


def test_smaller_vocabularies_are_the_beginning_of_the_largest(material):
    sizes = {size: Tokenizer.load(material / "cache" / "tokenizers" / str(size)) for size in (280, 300)}
    assert {size: tokenizer.vocab_size for size, tokenizer in sizes.items()} == {280: 280, 300: 300}
    assert sizes[280].vocab.items() <= sizes[300].vocab.items()


def test_an_experiment_stopped_after_one_variant_goes_on(config, monkeypatch):
    began = []

    def power_cut(job):
        began.append(job.run.out.name)
        if len(began) == 2:
            raise KeyboardInterrupt
        return experiment_run(job)

    experiment_run = experiment.run_job
    monkeypatch.setattr(experiment, "run_job", power_cut)
    with pytest.raises(KeyboardInterrupt):
        experiment.compare(config)
    first = config.folder / "variants" / "one-seed1"
    untouched = (first / "result.json").stat().st_mtime_ns
    partial = json.loads((config.folder / "study.json").read_text())
    assert len(partial["runs"]) == 1 and "1 of 4 runs are done" in (config.folder / "study.md").read_text()

    assert experiment.compare(config) is None
    assert began == ["one-seed1", "two-seed1", "two-seed1", "one-seed2", "two-seed2"]
    assert (first / "result.json").stat().st_mtime_ns == untouched
    values = json.loads((config.folder / "study.json").read_text())
    one, two = values["rows"]
    assert one["bits_per_byte"]["count"] == two["difference"]["count"] == 2
    assert one["training_tokens"] < two["training_tokens"]  # fewer bytes a token, so more of them
    assert two["bytes_seen"] == pytest.approx(one["bytes_seen"], rel=0.15)
    assert values["planned"]["steps"]["one"] == 4 and one["texts"] > 0
    assert (config.folder / "study.png").stat().st_size > 5_000
    (device,) = {run["device"] for run in values["runs"]}
    assert device.endswith(choose_precision("auto", torch.device("cpu")))
    assert f"Run on: {device}." in (config.folder / "study.md").read_text()
    with pytest.raises(UserError, match=r"other settings \(settings\.\w+\)"):
        experiment.compare(dataclasses.replace(config, tokens=512))


def test_an_interrupted_run_is_resumed_with_the_same_result(config, monkeypatch):
    config = dataclasses.replace(config, seeds=1, tokens=640)
    variants = config.design()[:1]
    materials = Materials(config.cache, Corpus.open(config.data), config.validation_fraction)
    whole, halved = (
        experiment.plan_jobs(dataclasses.replace(config, out=config.out / name), variants, materials)[0]
        for name in ("whole", "halved")
    )
    write_json(config.out / "whole" / "models" / "one.json", variants[0].model.to_dict())
    write_json(config.out / "halved" / "models" / "one.json", variants[0].model.to_dict())
    assert experiment.run_job(whole) is None
    monkeypatch.setattr("ant5m.train.trainer.Trainer._train_step", stopping_after(4))
    assert experiment.run_job(halved) == "interrupted" and not halved.result.exists()
    monkeypatch.undo()
    assert experiment.run_job(halved) is None
    bits = [json.loads(job.result.read_text())["bits_per_byte"] for job in (whole, halved)]
    assert bits[0] == bits[1]


def stopping_after(steps):
    from ant5m.train.trainer import Trainer

    original = Trainer._train_step

    def step(self, stop):
        taken = original(self, stop)
        if self.step + len(self._unread) == steps:
            stop._signal = "interrupted"
        return taken

    return step


def test_a_stopped_run_begins_no_other(config, monkeypatch):
    stopped = Result(config.folder, 1, 4, "interrupted", None, "a device")
    calls = []
    monkeypatch.setattr(experiment, "pretrain", lambda run, ranks: calls.append(run) or stopped)
    assert experiment.compare(config) == "interrupted" and len(calls) == 1


def test_command_line(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    flags = [
        *("compare", *config.models, "--data", *config.data, "--cache", str(config.cache)),
        *("--out", str(config.folder), "--tokens", "128", "--seeds", "1", "--batch-size", "2"),
        *("--validation-fraction", "0.1", "--device", "cpu", "--workers", "2"),
    ]
    assert call(flags) == 0
    output = capsys.readouterr()
    assert "bits per byte" in output.out and "one" in output.out and "study.md" in output.err
    assert "of training for 2 runs, by a few steps of each model measured now" in output.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name two models or more, or --study"),
        (["ant-5m", "--study", "vocab"], "name two models or more, or --study"),
        (["ant-5m"], "needs two models or more"),
        (["ant-5m", "ant-6m"], "ant-6m"),
        (["ant-5m", "ant-5m"], "two models are called ant-5m"),
        (["--study", "vocab", "--variants", "77"], "there is no variant '77'"),
        (["--study", "vocab", "--seeds", "0"], "--seeds must be"),
        (["--study", "vocab", "--rate-factors", "0"], "--rate-factors"),
        (["--study", "vocab", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--study", "vocab", "--validation-fraction", "1"], "--validation-fraction"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys, tmp_path):
    out = tmp_path / "study"
    assert call(["compare", *flags, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_a_folder_with_other_content_is_refused(config):
    config.folder.mkdir()
    (config.folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="other content"):
        experiment.compare(config)


def test_the_same_text_by_another_path(config, material, monkeypatch):
    monkeypatch.chdir(material)
    monkeypatch.setattr("ant5m.study.materials.pack", pytest.fail)
    relative = dataclasses.replace(config, data=("text.jsonl",), models=("one.json", "two.json"))
    assert relative.identity() == config.identity()
    Materials(config.cache, Corpus.open(relative.data), 0.1).prepare({280, 300})


@pytest.mark.parametrize("other", [{"validation_fraction": 0.2}, {"text": "an ant"}])
def test_materials_of_another_text_are_refused(config, tmp_path, other):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": other.get("text", "")}) + "\n")
    names = [text] if "text" in other else config.data
    with pytest.raises(UserError, match="another text"):
        Materials(config.cache, Corpus.open(names), other.get("validation_fraction", 0.1)).prepare({300})


def test_sigterm_saves_every_worker_and_the_study_goes_on(material, tmp_path):
    """A job scheduler tells the main process alone."""
    out = tmp_path / "study"
    flags = ["compare", str(material / "one.json"), str(material / "two.json"), "--seeds", "1"]
    flags += ["--data", str(material / "text.jsonl"), "--validation-fraction", "0.1", "--device", "cpu"]
    flags += ["--cache", str(material / "cache"), "--out", str(out), "--workers", "2", "--batch-size", "2"]
    flags += ["--tokens", "640000"]
    command = [sys.executable, "-c", "import ant5m.cli; raise SystemExit(ant5m.cli.main())", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while (
        process.poll() is None
        and sum(path.stat().st_size > 0 for path in out.glob("variants/*/metrics.jsonl")) < 2
    ):
        time.sleep(0.1)
    process.terminate()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143 and "Repeat the command" in error
    assert len(list(out.glob("variants/*/checkpoints/*"))) == 2 and not list(
        out.glob("variants/*/result.json")
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "nowhere"}, "nowhere"),
        ({"kernels": "nothing"}, "nothing"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"batch_size": 10**12}, "GB of memory"),
        ({"data": ("absent.txt",)}, "absent.txt does not exist"),
    ],
)
def test_what_is_impossible_is_said_before_anything_is_made(tmp_path, changes, words):
    (tmp_path / "text.txt").write_text("the ant")
    fields = {
        "models": ("ant-5m", "ant-5m-fit"),
        "data": (str(tmp_path / "text.txt"),),
        "out": tmp_path / "out",
    }
    with pytest.raises(UserError, match=words):
        experiment.compare(CompareConfig(**{**fields, **changes}))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--seeds and --workers must be at most 1,000"):
        CompareConfig(models=("ant-5m", "ant-5m-fit"), seeds=10**9)


def test_a_study_says_which_run_begins_and_how_long_it_will_take(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 301.0])
    monkeypatch.setattr(experiment.time, "monotonic", lambda: next(clock))
    progress = experiment.StudyProgress(tmp_path / "[/red]", runs=6, waiting=4)
    job = experiment.Job("a", 1, 1.0, TrainConfig(out=tmp_path / "a-seed1"))
    progress.run_begins(job)
    progress.run_ended()
    progress.run_begins(job)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("[/red]: 6 runs, 2 of them done")
    assert lines[1:] == ["run 3 of 6: a-seed1", "run 4 of 6: a-seed1, about 15 min left"]


def test_a_study_has_one_process_and_goes_on_where_a_kill_came_early(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the ant")
    config = CompareConfig(
        models=("ant-5m", "ant-5m-fit"), data=(str(tmp_path / "text.txt"),), out=tmp_path / "out"
    )
    with lock(tmp_path / "out"), pytest.raises(UserError, match="another process is writing into"):
        experiment.compare(config)
    for stop_at in range(3):
        real, calls = experiment.write_json, iter(range(10))

        def write(path, value, stop_at=stop_at, real=real, calls=calls):
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            real(path, value)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(experiment, "write_json", write)
            patch.setattr(Materials, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            experiment.compare(config)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Materials, "prepare", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        experiment.compare(config)
    assert {path.name for path in (tmp_path / "out" / "models").iterdir()} == {
        "ant-5m.json",
        "ant-5m-fit.json",
    }


def test_inside_torchrun_each_process_takes_the_next_run(config, tmp_path):
    """The same study.json but for times, whoever trains which run; also after one of two was killed."""
    together = tmp_path / "together"
    flags = ["compare", *config.models, "--data", *config.data, "--cache", config.cache, "--out", together]
    flags += [
        "--tokens",
        256,
        "--seeds",
        2,
        "--batch-size",
        2,
        "--validation-fraction",
        0.1,
        "--device",
        "cpu",
    ]

    def start(rank, port):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return subprocess.Popen(
            [sys.executable, "-m", "ant5m", *map(str, flags)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **place},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    port = free_port()
    killed = [start(rank, port) for rank in range(2)]
    while not list(together.glob("variants/*/config.json")):
        assert killed[0].poll() is None, killed[0].communicate()
        time.sleep(0.05)
    killed[1].kill()
    _, lost = killed[0].communicate(timeout=120)
    # Unless rank 0 had no run left to wait for, it says that it lost the other.
    assert killed[0].returncode == 1 and "another process" in lost, lost
    port = free_port()
    processes = [start(rank, port) for rank in range(2)]
    printed = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "done. Read" in printed[0][1] and printed[1] == ("", "")

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of them has
    try:
        assert experiment.compare(config) is None
    finally:
        torch.set_num_threads(before)
    ours, theirs = (json.loads((out / "study.json").read_text()) for out in (config.folder, together))
    assert _without_times(ours) == _without_times(theirs)


def _without_times(value):
    """Of a study.json: all that does not depend on the clock or the folder."""
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if "second" not in k and k != "out"}
    return [_without_times(v) for v in value] if isinstance(value, list) else value
