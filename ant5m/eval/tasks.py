"""The 0-shot table: lm-eval's tasks by their own names and definitions, scored by the fast path.

The definitions (prompts, choices, metrics) are lm-eval's own; only where the items come from may change:
from the hub, as lm-eval does it, or from files (`ant5m.eval.items` says in what layout). lm-eval is imported
when a task is asked for, not before.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from ant5m.errors import UserError, first_line
from ant5m.eval import arithmark, babylm, glint, items
from ant5m.eval.benchmarks import BENCHMARKS, SUITES, Benchmark
from ant5m.eval.protocol import FILE, Measured, Model, Row
from ant5m.eval.results import TaskResult
from ant5m.eval.scoring import Request, Score, score
from ant5m.files import file_sha256
from ant5m.model.checkpoint import check_tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress

    from ant5m.data.tokenizer import Tokenizer
    from ant5m.eval.harness import AntLM
    from ant5m.model.ant import Ant


OFFICIAL = {
    "ArithMark-3.0": "bf8ab1a5193d52cdf0e05ff0b3ca226bdfcf416cb6e75562dcbe72e7e4559435",
    "ArithMark-2.0": "c245b4e50e603b32814d4f489f64934f9eeb4488ae29f744d906c8e3f326ebcd",
}
"""sha256 of the files that the boards publish"""

PROTOCOLS: dict[str, Callable[[Model, Sequence[Row]], dict[str, Measured]]] = {
    "ArithMark-3.0": arithmark.arithmark,
    "ArithMark-2.0": arithmark.arithmark,
    "glint_blimp": glint.blimp,
    "glint_arc_easy": glint.arc_easy,
    "glint_wikitext": glint.wikitext,
    "babylm_blimp": babylm.minimal_pairs,
    "babylm_supplement": babylm.minimal_pairs,
    "babylm_ewok": babylm.ewok,
    "babylm_entity_tracking": babylm.entity_tracking,
}
"""how what lm-eval does not have is scored"""


def known_tasks(names: Sequence[str]) -> list[str]:
    """The tasks that names (of tasks or suites) stand for, in the table's order. Raises `UserError` on
    another name, and without any."""
    asked = [name for word in names for name in word.split(",") if name]
    if not asked:
        raise UserError(f"no task is named (suites: {', '.join(SUITES)}; tasks: {', '.join(BENCHMARKS)})")
    if unknown := [name for name in asked if name not in BENCHMARKS and name not in SUITES]:
        raise UserError(
            f"there is no task '{unknown[0]}' (suites: {', '.join(SUITES)}; tasks: {', '.join(BENCHMARKS)})"
        )
    wanted = {task for name in asked for task in SUITES.get(name, (name,))}
    return [name for name in BENCHMARKS if name in wanted]


def evaluate_tasks(
    net: "Ant",
    tokenizer: "Tokenizer",
    tasks: Sequence[str] = ("all",),
    data_dir: Path | str | None = None,
    limit: int | None = None,
    known: Sequence[TaskResult] = (),
    on_result: Callable[[TaskResult], None] | None = None,
    progress: "Progress | None" = None,
) -> list[TaskResult]:
    """Measure a model in tasks, 0-shot; returns their results in the table's order, parts before their mean.

    A task whose items are not there is named in a warning, and the rest goes on.

    Args:
        tasks: names of `BENCHMARKS` or `SUITES`.
        data_dir: folder of files with the items (see `ant5m.eval.items`); default: the hub.
        limit: take only so many items of each task or part.
        known: results of the same weights; those with the same settings are not computed again.
        on_result: called with every result as it comes.

    Raises `UserError` on an unknown task, a broken file or wrong fields, a tokenizer of another model, or
    when no task has items.
    """
    names = known_tasks(tasks)
    if limit is not None and limit < 1:
        raise UserError(f"the limit must be at least 1 item, not {limit}")
    check_tokenizer(tokenizer, net.config)
    suite = _Suite(net, tokenizer, Path(data_dir) if data_dir else None, limit, known, progress)
    results = []
    with _quiet():
        for result in itertools.chain.from_iterable(suite.run(BENCHMARKS[name]) for name in names):
            results.append(result)
            if on_result:
                on_result(result)
    if not results:
        raise UserError(f"no task has items here: {'; '.join(suite.missing)}")
    return results


def lm_eval_tasks(
    names: Sequence[str], data_dir: Path | str | None = None, limit: int | None = None
) -> dict[str, Any]:
    """lm-eval's own tasks of those names, parts instead of groups, with the same items as `evaluate_tasks`.

    For `lm_eval.evaluate` with any of its models. Raises `UserError` where the items are not there.
    """
    source = _Source(Path(data_dir) if data_dir else None)
    loaded = {}
    for benchmark in (BENCHMARKS[name] for name in known_tasks(names) if BENCHMARKS[name].folder):
        for name in _parts(benchmark):
            try:
                rows, _ = source.rows(benchmark, name)
                loaded[name] = _load_task(benchmark.folder, name, rows and rows[:limit])
            except _Missing as reason:
                raise UserError(f"{benchmark.name}: {reason}") from None
    return loaded


class TaskSubset:
    """A fixed part of some tasks, for scoring a model again and again while it is trained.

    Of every task at most `items` items (of one with parts, as many of each), drawn by a seed of its own. What
    lm-eval asks about an item is worked out once, when it is first scored. Raises `UserError` where a task is
    not known, has no accuracy, or its items are not there.
    """

    SEED = 0

    def __init__(
        self,
        net: "Ant",
        tokenizer: "Tokenizer",
        names: Sequence[str],
        data_dir: Path | str | None = None,
        items: int = 2_000,
    ) -> None:
        source = _Source(Path(data_dir) if data_dir else None)
        self._net, self._tokenizer = net, tokenizer
        self._random = np.random.default_rng(self.SEED)
        self._parts: dict[str, list[_Part]] = {}
        self._rows: dict[str, list[Row]] = {}
        benchmarks = [BENCHMARKS[name] for name in known_tasks(names)]
        if without := [one.name for one in benchmarks if not one.accuracy]:
            raise UserError(f"{without[0]} has no accuracy, which is what is scored while training")
        with _quiet():
            for benchmark in benchmarks:
                try:
                    self._add(benchmark, source, items)
                except _Missing as reason:
                    raise UserError(f"{benchmark.name}: {reason}") from None
        sizes = [sum(len(part.order) for part in parts) for parts in self._parts.values()]
        self.items = max([*sizes, *map(len, self._rows.values())])
        """of the largest task"""

    def _add(self, benchmark: Benchmark, source: "_Source", items: int) -> None:
        if not benchmark.folder:
            rows, _ = source.own_rows(benchmark, None)
            self._rows[benchmark.name] = [rows[number] for number in self._draw(len(rows), items)]
            return
        names = _parts(benchmark)
        each = max(1, items // len(names))
        self._parts[benchmark.name] = []
        for name in names:
            part, _ = source.rows(benchmark, name)
            if part is not None:  # lm-eval would take long to leave out most of them
                part = [part[number] for number in self._draw(len(part), each)]
            task = _load_task(benchmark.folder, name, part)
            order = self._draw(len(task.eval_docs), each)
            self._parts[benchmark.name].append(_Part(task, order))

    def _draw(self, there: int, count: int) -> list[int]:
        return self._random.permutation(there)[:count].tolist()

    def score(self, items: int | None = None) -> dict[str, float]:
        """The accuracy in each task, `acc_norm` where there is one; of a task with parts their mean.

        `items`: take only so many of each task, the first ones in the order in which they were drawn.
        """
        items = items or self.items
        counts = {name: max(1, items // len(parts)) for name, parts in self._parts.items()}
        with _quiet():
            asked = {
                name: [part.first(counts[name], self._lm.tokens) for part in parts[:items]]
                for name, parts in self._parts.items()
            }
        requests = [
            request for parts in asked.values() for part in parts for one in part for request in one.requests
        ]
        scores = iter(score(self._net, requests))
        found = {
            name: float(np.mean([np.mean([one.accuracy(scores) for one in part]) for part in parts]))
            for name, parts in asked.items()
        }
        context = self._net.config.max_position_embeddings
        model = Model(functools.partial(score, self._net), self._tokenizer, context)
        for name, rows in self._rows.items():
            measured = PROTOCOLS[name](model, rows[:items]).values()
            found[name] = float(np.mean([np.mean(next(iter(one.values.values()))) for one in measured]))
        return found

    @functools.cached_property
    def _lm(self) -> "AntLM":
        from ant5m.eval.harness import AntLM

        return AntLM(net=self._net, tokenizer=self._tokenizer)


@dataclass(frozen=True)
class _Asked:
    """An item of one of lm-eval's tasks, and what the model is asked about it."""

    task: Any
    doc: Any
    requests: list[Request]

    def accuracy(self, scores: Iterator[Score]) -> float:
        """1.0 where it is answered right, as lm-eval decides it; takes its scores from the iterator."""
        answers = [(one.log_likelihood, one.greedy) for one in itertools.islice(scores, len(self.requests))]
        metrics = self.task.process_results(self.doc, answers)
        return float(metrics["acc_norm"] if "acc_norm" in metrics else metrics["acc"])


@dataclass
class _Part:
    """A task or part of lm-eval's."""

    task: Any
    order: list[int]
    """numbers of its items, drawn by chance"""
    asked: list[_Asked] = field(default_factory=list)
    """the first ones of that order"""

    def first(self, count: int, to_tokens: Callable[[Sequence[Any]], list[Request]]) -> list[_Asked]:
        """So many items, in that order."""
        if new := self.order[len(self.asked) : count]:
            numbers = sorted(new)
            with _fast_templates(), _explained(f"lm-eval's {self.task.config.task} cannot use these items"):
                self.task.build_all_requests(samples=numbers)
            requests = iter(to_tokens(self.task.instances))
            found: dict[int, _Asked] = {}
            for instance in self.task.instances:
                one = found.setdefault(numbers[instance.doc_id], _Asked(self.task, instance.doc, []))
                one.requests.append(next(requests))
            self.asked += [found[number] for number in new]
        return self.asked[:count]


class _Missing(Exception):
    """The items of a task are not there."""


class _Source:
    """Where items come from: files of somebody's own, or the hub."""

    def __init__(self, data_dir: Path | None) -> None:
        self.data_dir = data_dir
        self.files = items.find_files(data_dir) if data_dir else []
        self._named_files: dict[tuple[str, str], list[Path]] = {}
        """by benchmark and split: its parts share them"""

    def rows(self, benchmark: Benchmark, name: str) -> tuple[list[dict[str, Any]] | None, dict[str, Any]]:
        """The items (None: lm-eval gets them from the hub), and what to call them in the settings."""
        cfg = _manager(benchmark.folder).task_index[name].cfg
        split = cfg.get("test_split") or cfg["validation_split"]
        if self.data_dir is None:
            where = [str(cfg[key]) for key in ("dataset_path", "dataset_name") if cfg.get(key)]
            return None, {"data": f"{' '.join(where)}, {split} split", "sha256": None}
        part = name.removeprefix("blimp_") if benchmark.name == "blimp" else ""
        path, rows = self._read(benchmark, split, part)
        if benchmark.name == "mmlu":
            rows = [row for row in rows if row["subject"] == name.removeprefix("mmlu_")]
            if not rows:
                raise _Missing(f"{path} has no items of {name}")
        return rows, self._named(path, rows)

    def own_rows(self, benchmark: Benchmark, limit: int | None) -> tuple[list[Row], dict[str, Any]]:
        """The items of a task that lm-eval does not have, so many of each file, and what to call them."""
        if self.data_dir is None:
            return self._hub_rows(benchmark, limit)
        if not benchmark.all_files:
            path, rows = self._read(benchmark, benchmark.split)
            _check_official(benchmark.name, path)
            return [{FILE: str(path), **row} for row in rows[:limit]], self._named(path, rows)
        paths = items.all_files(self.files, self.data_dir, benchmark.files)
        if not paths:
            raise _Missing(f"{self.data_dir} has no file for {benchmark.name}")
        files = {path: items.read_rows(path, benchmark.schema) for path in paths}
        read = [{FILE: str(path), **row} for path, rows in files.items() for row in rows[:limit]]
        where = os.path.commonpath([path.relative_to(self.data_dir).parent for path in paths]) or "."
        every = [row for rows in files.values() for row in rows]
        return read, {"data": f"{where}, {len(paths)} files", "sha256": _digest(every)}

    def _hub_rows(self, benchmark: Benchmark, limit: int | None) -> tuple[list[Row], dict[str, Any]]:
        if not benchmark.hub:
            raise _Missing("its items are read from files only: name their folder with --data-dir")
        import datasets

        path, *config = benchmark.hub.split()
        try:
            rows = datasets.load_dataset(path, *config, split=benchmark.split).to_list()
        except Exception as error:  # of the hub, the network, the data set's layout
            raise _Missing(f"it cannot be loaded from the hub ({first_line(error)})") from None
        items.check_rows(benchmark.hub, rows, benchmark.schema)
        data = {"data": f"{benchmark.hub}, {benchmark.split} split", "sha256": _digest(rows)}
        return [{FILE: benchmark.hub, **row} for row in rows[:limit]], data

    def _named(self, path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.data_dir is not None
        return {"data": path.relative_to(self.data_dir).as_posix(), "sha256": _digest(rows)}

    def _read(self, benchmark: Benchmark, split: str, part: str = "") -> tuple[Path, list[dict[str, Any]]]:
        """The first file of a task whose items are as they should be, and its rows."""
        assert self.data_dir is not None
        key = benchmark.name, split
        if key not in self._named_files:
            names = benchmark.files or (benchmark.name,)
            self._named_files[key] = items.choose_files(self.files, self.data_dir, names, split)
        named = self._named_files[key]
        if part:
            named = items.choose_files(named, self.data_dir, [part], split, exact=True)
        if not named:
            raise _Missing(f"{self.data_dir} has no file for {part or benchmark.name}")
        reasons = []
        for path in named:
            try:
                rows = _read_rows(path, benchmark.schema)
            except UserError as error:
                reasons.append(error)
                continue
            if (found := items.splits_of(path, self.data_dir)) and split not in found:
                warnings.warn(
                    f"{benchmark.name}: {path.name} was taken, because lm-eval's {split} split is not there",
                    stacklevel=2,
                )
            return path, rows
        raise reasons[0]


class _Suite:
    """What the tasks of one evaluation share."""

    def __init__(self, net, tokenizer, data_dir, limit, known, progress) -> None:
        self.net, self.tokenizer = net, tokenizer
        self.source = _Source(data_dir)
        self.limit: int | None = limit
        self.known = {result.task: result for result in known}
        self.progress: Progress | None = progress
        self.missing = list[str]()

    def run(self, benchmark: Benchmark) -> Iterator[TaskResult]:
        try:
            if not benchmark.folder:
                yield from self._own(benchmark)
            elif benchmark.parts:
                parts = []
                for name in _parts(benchmark):
                    parts.append(self._task(benchmark, name))
                    yield parts[-1]
                yield _mean(benchmark.name, parts)
            else:
                yield self._task(benchmark, benchmark.name)
        except _Missing as reason:
            self.missing.append(f"{benchmark.name}: {reason}")
            warnings.warn(f"{benchmark.name} is left out: {reason}", stacklevel=2)

    def _task(self, benchmark: Benchmark, name: str) -> TaskResult:
        rows, data = self.source.rows(benchmark, name)
        settings = {"limit": self.limit, "lm_eval": version("lm_eval"), **data}
        known = self.known.get(name)
        if known and known.settings == settings and known.has_values:
            return known
        task = _load_task(benchmark.folder, name, rows and rows[: self.limit])
        return self._measure(task, name, settings)

    def _measure(self, task: Any, name: str, settings: dict[str, Any]) -> TaskResult:
        """One task by lm-eval itself, with our model behind it."""
        import lm_eval

        lm = self._lm
        lm.ask = self._ask(name)
        scored = lm.rolling_tokens
        named = {"tasks": {name: task}, "groups": {}, "group_map": {}}
        with _fast_templates(), _explained(f"{settings['data']}: lm-eval's {name} cannot use these items"):
            samples = lm_eval.evaluate(lm, named, limit=self.limit, bootstrap_iters=0)["samples"][name]
        samples.sort(key=lambda sample: sample["doc_id"])
        docs = [sample["doc"] for sample in samples]
        asked = [sample["arguments"] for sample in samples]
        values = {
            metric: [sample[metric] for sample in samples]
            for metric in task.aggregation()
            if metric in samples[0]
        }
        metrics = {metric: _aggregate(task, metric, found) for metric, found in values.items()}
        over = {}
        if "word_perplexity" in values:
            over = {"tokens": lm.rolling_tokens - scored}
            over["words"], over["bytes"] = (
                sum(weight for _, weight in values[metric])
                for metric in ("word_perplexity", "byte_perplexity")
            )
            nats = -sum(value for value, _ in values["word_perplexity"])
            metrics = {"token_perplexity": (math.exp(nats / over["tokens"]), None), **metrics}
        accuracies = {metric: each for metric, each in values.items() if metric.startswith("acc")}
        chance = _chance(name, docs, asked)
        return TaskResult(name, metrics, len(docs), chance, settings, over, values=accuracies)

    def _own(self, benchmark: Benchmark) -> Iterator[TaskResult]:
        """A task that lm-eval does not have; its parts, if any, and their mean."""
        rows, data = self.source.own_rows(benchmark, self.limit)
        settings = {"limit": self.limit, "lm_eval": None, **data}
        known = [one for one in self.known.values() if one.settings == settings and _is_of(benchmark, one)]
        names = {one.task for one in known}  # a mean comes last, behind all of its parts
        measured = [one for one in known if not (benchmark.parts and one.task == benchmark.name)]
        if benchmark.name in names and all(one.has_values for one in measured):
            yield from known
            return
        model = Model(self._ask(benchmark.name), self.tokenizer, self.net.config.max_position_embeddings)
        found = [
            _result(f"{benchmark.name}_{part}" if part else benchmark.name, measured, settings)
            for part, measured in PROTOCOLS[benchmark.name](model, rows).items()
        ]
        yield from found
        if benchmark.parts:
            yield dataclasses.replace(_mean(benchmark.name, found), settings=settings)

    def _ask(self, name: str) -> Callable[[Sequence[Request]], list[Score]]:
        """What scores requests of a task, under a bar of its own."""

        def ask(requests: Sequence[Request]) -> list[Score]:
            with self._bar(name, len(requests)) as on_scored:
                return score(self.net, requests, on_scored)

        return ask

    @functools.cached_property
    def _lm(self) -> "AntLM":
        from ant5m.eval.harness import AntLM

        return AntLM(net=self.net, tokenizer=self.tokenizer)

    @contextlib.contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar of requests, while the block runs."""
        bar = self.progress.add_task(name, total=total) if self.progress else None

        def advance(count: int) -> None:
            if self.progress and bar is not None:
                self.progress.advance(bar, count)

        yield advance
        if self.progress and bar is not None:
            self.progress.remove_task(bar)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets keep what they are doing to themselves."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _fast_templates() -> Iterator[None]:
    """lm-eval compiles a template for every item (29 % of the time in a part of BLiMP): here only once. And
    its bars give way to ours."""
    import lm_eval.api.task
    from lm_eval.utils import env

    bar = lm_eval.api.task.tqdm
    env.from_string = functools.cache(env.from_string)
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        del env.from_string  # the method of its class is there again


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever goes wrong in a definition's templates and functions is the fault of the item."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


@functools.cache
def _manager(folder: str) -> Any:
    """lm-eval's index of the definitions in one of its folders; reading all of them takes half a minute."""
    try:
        import lm_eval.tasks
    except ImportError:
        raise UserError(
            "the tasks are lm-eval's, which is not installed: pip install 'ant5m[eval]'"
        ) from None
    path = Path(lm_eval.tasks.__file__).parent / folder
    return lm_eval.tasks.TaskManager(include_path=str(path), include_defaults=False)


def _parts(benchmark: Benchmark) -> list[str]:
    """lm-eval's names of what a row of the table consists of."""
    if not benchmark.parts:
        return [benchmark.name]
    names = _manager(benchmark.folder).all_subtasks
    return [name for name in names if name.startswith(f"{benchmark.name}_")]


def _load_task(folder: str, name: str, rows: list[dict[str, Any]] | None) -> Any:
    """lm-eval's task, with its items from the hub, or these."""
    manager = _manager(folder)
    overrides: dict[str, Any] = {}
    if rows is not None:
        cfg = manager.task_index[name].cfg
        split = cfg.get("test_split") or cfg["validation_split"]
        overrides = _with_rows(rows, split)
    try:
        # A member of a group may override what its definition says.
        loaded = manager.load([{"group": "ant5m", "task": [{"task": name, **overrides}]}])
    except Exception as error:
        if rows is None:  # of the hub, the network, the data set's layout
            raise _Missing(f"it cannot be loaded from the hub ({first_line(error)})") from None
        raise UserError(f"lm-eval's {name} cannot use these items ({first_line(error)})") from error
    return loaded["tasks"][name]


def _with_rows(rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """What makes a definition take its items from memory. 0-shot, it needs no others, but wants one."""
    import datasets
    import pyarrow

    # `Dataset.from_list` pickles and hashes itself for a name: half of the time it takes to load BLiMP.
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(rows))
    found = datasets.Dataset(table, fingerprint=_digest(rows)[:16])
    splits = {split: found, "one": found}
    return {
        "custom_dataset": lambda **_: splits,
        "training_split": "one",
        "fewshot_split": None,
        "fewshot_config": None,
    }


@functools.lru_cache(maxsize=1)
def _read_rows(path: Path, schema: type[Struct]) -> list[dict[str, Any]]:
    # The parts of MMLU share a file.
    return items.read_rows(path, schema)


def _check_official(name: str, path: Path) -> None:
    """Warn where a board's items are not those that the board publishes."""
    if name in OFFICIAL and file_sha256(path) != OFFICIAL[name]:
        warnings.warn(
            f"{path} is not {name} as published (sha256 {OFFICIAL[name][:8]}...): scores do not compare",
            stacklevel=2,
        )


def _is_of(benchmark: Benchmark, result: TaskResult) -> bool:
    return result.task == benchmark.name or (benchmark.parts and result.task.startswith(f"{benchmark.name}_"))


def _result(task: str, measured: Measured, settings: dict[str, Any]) -> TaskResult:
    metrics: dict[str, tuple[float, float | None]] = {
        **{metric: (value, None) for metric, value in measured.metrics.items()},
        **{metric: _mean_and_error(values) for metric, values in measured.values.items()},
    }
    count = max((len(values) for values in measured.values.values()), default=1)
    chance = next(iter(measured.chance.values()), None)
    others = {metric: share for metric, share in measured.chance.items() if share != chance}
    return TaskResult(
        task, metrics, count, chance, settings, measured.over, others, measured.baselines, measured.values
    )


def _digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, default=str).encode()).hexdigest()


def _aggregate(task: Any, metric: str, values: list[Any]) -> tuple[float, float | None]:
    """A metric over all items as lm-eval defines it, and its standard error where that has a formula."""
    value = float(task.aggregation()[metric](values))
    if metric == "perplexity":
        # exp(-mean): the error of the mean, carried through the exponential. lm-eval draws bootstraps.
        error = _mean_and_error(values)[1]
        return value, None if error is None else value * error
    if isinstance(values[0], tuple):
        return value, None
    return value, _mean_and_error(values)[1]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error: the sample's deviation / sqrt(n)."""
    array = np.asarray(values, dtype=float)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return float(array.mean()), error


def _mean(name: str, parts: list[TaskResult]) -> TaskResult:
    """Of the parts, as lm-eval takes it: in MMLU all items weigh the same, else all parts do."""
    sizes = np.array([part.items for part in parts], dtype=float)
    shares = sizes if name == "mmlu" else np.ones_like(sizes)
    weights = shares / shares.sum()
    metrics = {}
    for metric in parts[0].metrics:
        values, errors = np.array([part.metrics[metric] for part in parts], dtype=float).T  # None becomes nan
        error = float(np.sqrt((weights**2 * errors**2).sum()))
        metrics[metric] = (float(weights @ values), None if math.isnan(error) else error)
    chance = float(weights @ [part.chance for part in parts])
    settings = {**parts[0].settings, "data": f"{len(parts)} parts", "sha256": None}
    return TaskResult(
        name, metrics, int(sizes.sum()), chance, settings, chance_by_metric=parts[0].chance_by_metric
    )


def _chance(name: str, docs: list[Any], asked: list[list[Any]]) -> float | None:
    """What guessing would reach."""
    if name == "truthfulqa_mc2":
        return float(np.mean([np.mean(doc["mc2_targets"]["labels"]) for doc in docs]))
    if name == "lambada_openai":
        return 0.0  # one word of all there are
    if name == "wikitext":
        return None
    return float(np.mean([1 / len(requests) for requests in asked]))
