"""Running an experiment: each variant with each seed, every one an ordinary run folder; it can be stopped."""

import contextlib
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from ant5m import kernels, torchrun
from ant5m.console import stderr
from ant5m.data.corpus import Corpus
from ant5m.data.loader import Loader
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import check_vocab_size
from ant5m.device import choose_device, choose_precision
from ant5m.errors import UserError
from ant5m.eval.loops import PROMPTS, LoopStatistics, measure_loops
from ant5m.files import is_unused, lock, read_json, read_object, real_path, remove_asides, write_json
from ant5m.model.checkpoint import load_with_tokenizer
from ant5m.ranks import Ranks, join
from ant5m.schema import Positive
from ant5m.study.bigram import bigram_bits_per_byte
from ant5m.study.config import TRAINING, CompareConfig
from ant5m.study.materials import Materials
from ant5m.study.report import RunResult, write_report
from ant5m.study.statistics import RULE
from ant5m.study.studies import STUDIES, Variant
from ant5m.train.config import TrainConfig, check_steps
from ant5m.train.forecast import Forecast, describe_duration
from ant5m.train.metrics import read_metrics
from ant5m.train.plan import batch_for_tokens, check_memory
from ant5m.train.pretraining import pretrain
from ant5m.train.run import versions
from ant5m.train.stop import REASONS, Stop

PLAN, BIGRAMS, RESULT = "plan.json", "bigrams.json", "result.json"
SIGNAL_SECONDS = 1.0
"""until a signal is noticed that came while runs went on in other processes"""
NEW_TOKENS = 128
"""of a text in which loops are counted"""


@dataclass(frozen=True)
class Job:
    """One run: a variant with a seed and a factor on the learning rates."""

    variant: str
    seed: int
    rate_factor: float
    run: TrainConfig
    """its `out` is the run folder"""

    @property
    def result(self) -> Path:
        assert self.run.out
        return self.run.out / RESULT


def compare(config: CompareConfig) -> str | None:
    """Run, or go on with, an experiment; leaves `study.json`, `study.md` and `study.png` in its folder.

    They are written again after every run. Returns None when all is done, else why it stopped (a key of
    `ant5m.train.stop.EXIT_CODES`); the same call goes on. Raises `UserError` when something asked for is
    impossible, or the folder holds another experiment.

    Inside torchrun each process takes the next run and trains it alone, on its own GPU; all of them need the
    folder.
    """
    ranks = join()
    try:
        return _compare_together(config, ranks) if not ranks.alone else _compare_alone(config)
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.leave()


def _compare_alone(config: CompareConfig) -> str | None:
    variants = config.design()
    corpus = Corpus.open(config.data)
    materials = Materials(config.cache or config.folder, corpus, config.validation_fraction)
    check(config, variants)
    _refuse_content(config)
    with contextlib.ExitStack() as locks:
        for folder in {real_path(config.folder), real_path(materials.folder)}:
            locks.enter_context(lock(folder))
            remove_asides(folder)
        return _compare(config, variants, materials)


def _compare(config: CompareConfig, variants: list[Variant], materials: Materials) -> str | None:
    jobs, waiting, progress, bigrams = _prepare(config, variants, materials)
    for stopped in _run_all(waiting, config, progress):
        if stopped:
            return stopped
        progress.run_ended()
        report(config, variants, materials, jobs, bigrams)
    return None


def _prepare(
    config: CompareConfig, variants: list[Variant], materials: Materials
) -> tuple[list[Job], list[Job], "StudyProgress", dict[str, float]]:
    """All that comes before the first run: the jobs, those that wait, and the bigrams."""
    _write_plan(config, variants, materials)
    materials.prepare({variant.model.vocab_size for variant in variants})
    jobs = plan_jobs(config, variants, materials)
    waiting = [job for job in jobs if not job.result.exists()]
    progress = StudyProgress(config.folder, len(jobs), len(waiting))
    progress.announce(forecast_seconds(config, variants, waiting))
    bigrams = count_bigrams(config, variants, jobs)
    report(config, variants, materials, jobs, bigrams)
    return jobs, waiting, progress, bigrams


def _compare_together(config: CompareConfig, ranks: Ranks) -> str | None:
    """Rank 0 prepares and reports; every rank takes the next run that waits, until none is left."""
    if config.workers > 1:
        raise UserError("--workers is for one machine: inside torchrun its processes are the workers")
    variants = config.design()
    materials = Materials(config.cache or config.folder, Corpus.open(config.data), config.validation_fraction)
    with contextlib.ExitStack() as locks:

        def prepare() -> tuple[list[str], dict[str, float]]:
            check(config, variants)
            _refuse_content(config)
            for folder in {real_path(config.folder), real_path(materials.folder)}:
                locks.enter_context(lock(folder))
            _, waiting, _, bigrams = _prepare(config, variants, materials)
            return [job.result.parent.name for job in waiting], bigrams

        names, bigrams = ranks.first(prepare)
        jobs = plan_jobs(config, variants, materials)
        waiting = [job for job in jobs if job.result.parent.name in names]
        stopped = _run_tickets(waiting, ranks, config.device)
        if ranks.is_first:
            report(config, variants, materials, jobs, bigrams)
    return stopped


def _run_tickets(waiting: list[Job], ranks: Ranks, device: str) -> str | None:
    """Run jobs that no other rank has taken; returns, on all ranks alike, why one of them stopped."""
    if choose_device(device).type == "cuda":
        device = str(choose_device("cuda", torchrun.local_rank()))
    stopped = None
    while stopped is None and (number := ranks.ticket("run")) < len(waiting):
        job = waiting[number]
        stderr().print(f"run {number + 1} of {len(waiting)}: {job.result.parent.name}", markup=False)
        job = dataclasses.replace(job, run=dataclasses.replace(job.run, device=device))
        stopped = run_job(job)
    (code,) = ranks.most(REASONS.index(stopped))
    return REASONS[code]


def check(config: CompareConfig, variants: list[Variant]) -> None:
    """Raise `UserError`, before anything is made, for what the first tokenizer or run would refuse."""
    device = choose_device(config.device)
    choose_precision(config.precision, device)
    before = kernels.selected()
    try:
        kernels.select(config.kernels or before)
    finally:
        kernels.select(before)
    for variant in variants:
        check_vocab_size(variant.model.vocab_size)
        check_memory(variant.model, config.batch_size or 1, device)
        settings = {key: getattr(config, key) for key in TRAINING} | variant.train
        rates = {key: getattr(config, key) for key in ("learning_rate", "muon_learning_rate")}
        TrainConfig(batch_size=config.batch_size, **{**rates, **settings})
    # Of the others it depends on the tokenizer.
    length = next(one for one in variants if one.name == config.baseline).model.max_position_embeddings
    batch = config.batch_size or batch_for_tokens(config.tokens, length)
    check_steps(config.tokens // (batch * length))


class StudyProgress:
    """Says which run of how many begins, and about how long all of them will take."""

    def __init__(self, folder: Path, runs: int, waiting: int):
        self._console = stderr()
        self._runs, self._waiting = runs, waiting
        self._begun, self._ended = runs - waiting, 0
        self._started = time.monotonic()
        self._console.print(f"{folder}: {runs} runs, {self._begun} of them done", markup=False)

    def announce(self, seconds: float) -> None:
        """What the runs will cost, before the first."""
        if self._waiting:
            took = f"about {describe_duration(seconds)} of training for {self._waiting} runs"
            self._console.print(f"{took}, by a few steps of each model measured now", markup=False)

    def run_begins(self, job: Job) -> None:
        assert job.run.out
        self._begun += 1
        line = f"run {self._begun} of {self._runs}: {job.run.out.name}"
        self._console.print(line + self._time_left(time.monotonic()), markup=False)

    def run_ended(self) -> None:
        self._ended += 1

    def _time_left(self, now: float) -> str:
        """From the runs of this call that ended; nothing before the first did."""
        if not self._ended:
            return ""
        seconds = (now - self._started) / self._ended * (self._waiting - self._ended)
        return f", about {seconds / 60:,.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def forecast_seconds(config: CompareConfig, variants: list[Variant], jobs: list[Job]) -> float:
    """Of all these runs, from a few steps of each variant on the device."""
    device = choose_device(config.device)
    before = kernels.selected()
    kernels.select(config.kernels or before)
    try:
        seconds = sum(
            sum(_tokens(job, variant) for job in jobs if job.variant == variant.name)
            / Forecast.measure(variant.model, device, _first(jobs, variant).run).tokens_per_second
            for variant in variants
            if any(job.variant == variant.name for job in jobs)
        )
    finally:
        kernels.select(before)
    # Workers share a CPU, and have a GPU each.
    return seconds / (min(config.workers, torch.cuda.device_count()) if device.type == "cuda" else 1)


def _first(jobs: list[Job], variant: Variant) -> Job:
    return next(job for job in jobs if job.variant == variant.name)


def _tokens(job: Job, variant: Variant) -> int:
    assert job.run.steps and job.run.batch_size
    return job.run.steps * job.run.batch_size * variant.model.max_position_embeddings


def count_bigrams(config: CompareConfig, variants: list[Variant], jobs: list[Job]) -> dict[str, float]:
    """Bits per byte of each variant's bigram, counted once and kept; the same tokens share it."""
    path = config.folder / BIGRAMS
    if path.exists():
        return _read_bigrams(path, variants)
    first = {job.variant: job.run for job in reversed(jobs)}
    text = {
        variant.name: (variant.model.vocab_size, variant.model.max_position_embeddings)
        for variant in variants
    }
    found: dict[tuple[int, int], float] = {}
    for variant in variants:
        if text[variant.name] not in found:
            found[text[variant.name]] = count_bigram(first[variant.name], variant)
    bigrams = {variant.name: found[text[variant.name]] for variant in variants}
    write_json(path, bigrams)
    return bigrams


def _read_bigrams(path: Path, variants: list[Variant]) -> dict[str, float]:
    bigrams = read_json(path, dict[str, Positive])
    missing = [variant.name for variant in variants if variant.name not in bigrams]
    if missing:
        raise UserError(f"{path} has no value for {missing[0]}: remove it, and it is made again")
    return bigrams


def count_bigram(run: TrainConfig, variant: Variant) -> float:
    """Bits per byte, on the validation split, of a bigram counted on the very sequences of a run."""
    assert run.data and run.steps and run.batch_size
    train, validation = (Shards.open(run.data[0], split, verify=False) for split in ("train", "validation"))
    loader = Loader(train, run.batch_size, variant.model.max_position_embeddings, run.seed)
    what = f"a bigram, {variant.model.vocab_size:,} entries"
    steps = track(range(run.steps), what, console=Console(stderr=True))
    batches = (_whole(*loader.next()) for _ in steps)
    text = validation.tokens.behind(validation.eos_token_id)[:].astype(np.int64)
    return bigram_bits_per_byte(batches, text, variant.model.vocab_size, validation.counts["bytes"])


def _whole(input_ids: torch.Tensor, targets: torch.Tensor) -> NDArray[np.int64]:
    """The sequences [rows, length + 1] of a batch."""
    return torch.cat((input_ids, targets[:, -1:]), 1).numpy()


def plan_jobs(config: CompareConfig, variants: list[Variant], materials: Materials) -> list[Job]:
    """All runs, seed by seed, so that an experiment that is stopped early has whole rounds.

    Variants with the baseline's tokenizer take as many tokens, in the same order; the others as many bytes.
    """
    baseline = next(variant for variant in variants if variant.name == config.baseline)
    length = baseline.model.max_position_embeddings
    batch = config.batch_size or batch_for_tokens(config.tokens, length)
    text = config.tokens * materials.bytes_per_token(baseline.model.vocab_size)
    order = [(seed, factor) for seed in range(1, config.seeds + 1) for factor in config.rate_factors]
    return [
        _job(config, variant, seed, factor, materials, batch, text)
        for seed, factor in order
        for variant in variants
    ]


def _job(
    config: CompareConfig,
    variant: Variant,
    seed: int,
    factor: float,
    materials: Materials,
    batch: int,
    text: float,
) -> Job:
    """`batch`: sequences a step; `text`: bytes to train on."""
    size = variant.model.vocab_size
    tokens = text / materials.bytes_per_token(size)
    steps = max(1, round(tokens / (batch * variant.model.max_position_embeddings)))
    name = f"{variant.name}-seed{seed}" + (f"-rate{factor:g}" if len(config.rate_factors) > 1 else "")
    settings: dict[str, Any] = {
        **{key: getattr(config, key) for key in TRAINING},
        "learning_rate": config.learning_rate * factor,
        "muon_learning_rate": config.muon_learning_rate * factor,
        **variant.train,
    }
    run = TrainConfig(
        model=str(_model_file(config, variant)),
        data=(str(materials.shards(size)),),
        out=config.folder / "variants" / name,
        steps=steps,
        batch_size=batch,
        seed=seed,
        device=config.device,
        eval_every=steps,
        sample_every=0,
        checkpoint_every=max(1, steps // 5),
        keep_last=1,
        **settings,
    )
    return Job(variant.name, seed, factor, run)


def _model_file(config: CompareConfig, variant: Variant) -> Path:
    return config.folder / "models" / f"{variant.name}.json"


@dataclass
class Plan:
    """The content of a plan.json."""

    format: Literal["ant5m-study-1"]
    settings: dict[str, Any]
    """`CompareConfig.identity`"""
    text: list[tuple[str, int]]
    """name and bytes of each source"""
    variants: dict[str, dict[str, Any]]
    baseline: str
    rule: str
    """how it will be judged"""

    @classmethod
    def of(cls, config: CompareConfig, variants: list[Variant], materials: Materials) -> "Plan":
        described = {
            variant.name: {"model": variant.model.to_dict(), "train": variant.train} for variant in variants
        }
        text = [(name, size) for name, size in materials.text]
        return cls("ant5m-study-1", config.identity(), text, described, config.baseline, RULE)

    def difference(self, other: "Plan") -> str | None:
        """The first field, at any depth, in which the two differ."""
        return _difference(dataclasses.asdict(self), dataclasses.asdict(other))


def _difference(one: Any, other: Any, place: str = "") -> str | None:
    if one == other:
        return None
    if isinstance(one, dict) and isinstance(other, dict):
        found = (_difference(one.get(key), other.get(key), f"{place}.{key}") for key in {**one, **other})
        return next(filter(None, found), None)
    return place.removeprefix(".")


def _write_plan(config: CompareConfig, variants: list[Variant], materials: Materials) -> None:
    """What is to be compared and how it will be judged, on the disk before the first run."""
    plan, path = Plan.of(config, variants, materials), config.folder / PLAN
    if not path.exists():
        write_json(path, dataclasses.asdict(plan))
    elif differs := read_json(path, Plan).difference(plan):
        raise UserError(
            f"{config.folder} holds an experiment with other settings ({differs}): repeat the command that "
            "began it, or choose another --out"
        )
    for variant in variants:  # a kill may have come in between
        if not _model_file(config, variant).exists():
            write_json(_model_file(config, variant), variant.model.to_dict())


def _refuse_content(config: CompareConfig) -> None:
    if not is_unused(config.folder) and not (config.folder / PLAN).exists():
        raise UserError(f"{config.folder} exists with other content: choose another --out")


def _run_all(jobs: list[Job], config: CompareConfig, progress: StudyProgress) -> Iterator[str | None]:
    """Run the jobs and yield after each one: None, or why it was stopped (none is begun after that)."""
    if config.workers == 1:
        for job in jobs:
            progress.run_begins(job)
            yield run_job(job)
        return
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    threads = 0 if gpus else max(1, (os.cpu_count() or 1) // config.workers)
    free, waiting, running = list(range(config.workers)), list(jobs), dict[Future[str | None], int]()
    context = multiprocessing.get_context("spawn")
    with Stop() as stop, ProcessPoolExecutor(config.workers, context) as pool:
        while running or (waiting and not stop.reason):
            # No more than can run: a stopped experiment must not begin what stands in a queue.
            while waiting and free and not stop.reason:
                place, job = free.pop(), waiting.pop(0)
                device = f"cuda:{place % gpus}" if gpus else config.device
                job = dataclasses.replace(job, run=dataclasses.replace(job.run, device=device))
                progress.run_begins(job)
                running[pool.submit(run_job, job, threads)] = place
            for future in wait(running, SIGNAL_SECONDS, FIRST_COMPLETED).done:
                free.append(running.pop(future))
                stopped = _outcome(future, stop)
                if stopped:
                    waiting.clear()
                yield stopped
            if stop.reason == "terminated":
                _pass_on()
        if stop.reason:
            yield stop.reason


def _outcome(future: Future[str | None], stop: Stop) -> str | None:
    """Of a run; one that had nothing to save when the signal came breaks the pool, and starts over."""
    try:
        return future.result()
    except BrokenProcessPool:
        if stop.reason:
            return stop.reason
        raise


def _pass_on() -> None:
    """SIGTERM reaches this process alone, Ctrl-C in a terminal all of them."""
    for child in multiprocessing.active_children():
        child.terminate()


def run_job(job: Job, threads: int = 0) -> str | None:
    """Train, or go on training, one run, and write its result.json; returns why it stopped, or None."""
    if threads:
        torch.set_num_threads(threads)
    out = job.run.out
    assert out
    if (out / "config.json").exists():
        trained = pretrain(TrainConfig(resume=out, device=job.run.device), Ranks())
    else:
        trained = pretrain(job.run, Ranks())
    if trained.stopped:
        return trained.stopped
    assert trained.evaluation
    last = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"][-1]
    write_json(
        job.result,
        {
            "variant": job.variant,
            "seed": job.seed,
            "rate_factor": job.rate_factor,
            **{key: value for key, value in trained.evaluation.to_dict().items() if key != "text"},
            "training_tokens": last["tokens"],
            "training_seconds": last["seconds"],
            "device": trained.device,
            "loops": count_loops(out).to_dict(),
        },
    )
    return None


def count_loops(run: Path) -> LoopStatistics:
    """Of greedy continuations of the fixed prompts, the same text whatever the tokenizer.

    A tiny context may be too short for some of them: they are cut to half of it.
    """
    net, tokenizer = load_with_tokenizer(run)
    half = net.config.max_position_embeddings // 2
    prompts = [tokenizer.decode(tokenizer.encode(prompt)[:half]) for prompt in PROMPTS]
    return measure_loops(net, tokenizer, prompts, max_new_tokens=NEW_TOKENS)


def report(
    config: CompareConfig,
    variants: list[Variant],
    materials: Materials,
    jobs: list[Job],
    bigrams: dict[str, float],
) -> None:
    """Write study.json, study.md and study.png from the results that are there."""
    results = [read_object(job.result, RunResult) for job in jobs if job.result.exists()]
    for one in results:
        one["bytes_seen"] = round(
            one["training_tokens"]
            * materials.bytes_per_token(_variant(variants, one["variant"]).model.vocab_size)
        )
    study = STUDIES[config.study] if config.study else None
    planned = {"runs": len(jobs), "steps": {job.variant: job.run.steps for job in jobs}}
    origin = {"text": materials.text, "versions": versions()}
    write_report(config, study, variants, results, bigrams, planned, origin)


def _variant(variants: list[Variant], name: str) -> Variant:
    return next(variant for variant in variants if variant.name == name)
