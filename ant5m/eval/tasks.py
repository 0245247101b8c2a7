"""The 0-shot table: lm-eval's tasks by their own names and definitions, scored by the fast path.

The definitions (prompts, choices, metrics) are lm-eval's own; only where the items come from may change:
from the hub, as lm-eval does it, or from files (`ant5m.eval.items` says in what layout). lm-eval is imported
when a task is asked for, not before.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ant5m.errors import UserError
from ant5m.eval import arithmark, items
from ant5m.eval.results import BENCHMARKS, GROUPS, Benchmark, TaskResult
from ant5m.model.checkpoint import check_tokenizer

if TYPE_CHECKING:
    from rich.progress import Progress

    from ant5m.data.tokenizer import Tokenizer
    from ant5m.eval.harness import AntLM
    from ant5m.model.ant import Ant


def known_tasks(names: Sequence[str]) -> list[str]:
    """The tasks that names (or `all`) stand for, in the table's order. Raises `UserError` on another name."""
    asked = [name for word in names for name in word.split(",") if name]
    unknown = [name for name in asked if name not in BENCHMARKS and name != "all"]
    if unknown:
        raise UserError(f"there is no task '{unknown[0]}' (known: all, {', '.join(BENCHMARKS)})")
    return [name for name in BENCHMARKS if name in asked or "all" in asked]


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
        tasks: names of `BENCHMARKS`, or `all`.
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
    for benchmark in (BENCHMARKS[name] for name in known_tasks(names) if name != arithmark.NAME):
        for name in _parts(benchmark):
            try:
                rows, _ = source.rows(benchmark, name)
                loaded[name] = _load_task(benchmark.folder, name, rows and rows[:limit])
            except _Missing as reason:
                raise UserError(f"{benchmark.name}: {reason}") from None
    return loaded


class _Missing(Exception):
    """The items of a task are not there."""


class _Source:
    """Where items come from: files of somebody's own, or the hub."""

    def __init__(self, data_dir: Path | None) -> None:
        self.data_dir = data_dir
        self.files = items.find_files(data_dir) if data_dir else []

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

    def arithmark_rows(self, benchmark: Benchmark) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The same for ArithMark-2.0, which lm-eval does not have."""
        if self.data_dir is None:
            rows = _hub_rows(arithmark.HUB, "train")
            return rows, {"data": f"{arithmark.HUB}, train split", "sha256": _digest(rows)}
        path, rows = self._read(benchmark, "train")
        return rows, self._named(path, rows)

    def _named(self, path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.data_dir is not None
        return {"data": path.relative_to(self.data_dir).as_posix(), "sha256": _digest(rows)}

    def _read(self, benchmark: Benchmark, split: str, part: str = "") -> tuple[Path, list[dict[str, Any]]]:
        """The first file of a task that has the fields, and its rows."""
        assert self.data_dir is not None
        named = items.choose_files(self.files, self.data_dir, benchmark.files or benchmark.name, split)
        if part:
            named = items.choose_files(named, self.data_dir, part, split, exact=True)
        if not named:
            raise _Missing(f"{self.data_dir} has no file for {part or benchmark.name}")
        reasons = []
        for path in named:
            try:
                rows = _read_rows(path, benchmark.fields)
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
            if benchmark.name == arithmark.NAME:
                yield self._arithmark(benchmark)
            elif benchmark.name in GROUPS:
                yield from self._group(benchmark)
            else:
                yield self._task(benchmark, benchmark.name)
        except _Missing as reason:
            self.missing.append(f"{benchmark.name}: {reason}")
            warnings.warn(f"{benchmark.name} is left out: {reason}", stacklevel=2)

    def _group(self, benchmark: Benchmark) -> Iterator[TaskResult]:
        parts = []
        for name in _parts(benchmark):
            parts.append(self._task(benchmark, name))
            yield parts[-1]
        yield _mean(benchmark.name, parts)

    def _task(self, benchmark: Benchmark, name: str) -> TaskResult:
        rows, data = self.source.rows(benchmark, name)
        settings = {"limit": self.limit, "lm_eval": version("lm_eval"), **data}
        if (known := self.known.get(name)) and known.settings == settings:
            return known
        task = _load_task(benchmark.folder, name, rows and rows[: self.limit])
        with _compiled_once():
            return self._measure(task, name, settings)

    def _measure(self, task: Any, name: str, settings: dict[str, Any]) -> TaskResult:
        """The loop of `lm_eval.evaluate` for one task: 0-shot, in one process, without logs."""
        where = f"{settings['data']}: lm-eval's {name} cannot use"
        docs, asked = [], []
        for number, doc in enumerate(itertools.islice(task.eval_docs, self.limit)):
            with _explained(f"{where} item {number + 1}"):
                made = task.construct_requests(
                    doc, task.fewshot_context(doc, num_fewshot=0), metadata=(name, number, 1)
                )
            docs.append(doc)
            asked.append(made if isinstance(made, list) else [made])
        lm = self._lm
        scored = lm.rolling_tokens
        with self._bar(name, sum(map(len, asked))) as lm.on_scored:
            answers = iter(getattr(lm, asked[0][0].request_type)(list(itertools.chain(*asked))))
        values: dict[str, list[Any]] = {}
        for doc, requests in zip(docs, asked, strict=True):
            with _explained(f"{where} an item"):
                found = task.process_results(doc, [next(answers) for _ in requests])
            for metric, value in found.items():
                values.setdefault(metric, []).append(value)
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
        return TaskResult(name, metrics, len(docs), _chance(name, docs, asked), settings, over)

    def _arithmark(self, benchmark: Benchmark) -> TaskResult:
        rows, data = self.source.arithmark_rows(benchmark)
        settings = {"limit": self.limit, "lm_eval": None, **data}
        if (known := self.known.get(benchmark.name)) and known.settings == settings:
            return known
        rows = rows[: self.limit]
        with self._bar(benchmark.name, 4 * len(rows)) as on_scored:
            right = arithmark.evaluate(self.net, self.tokenizer, rows, on_scored)
        return TaskResult(
            benchmark.name, {"acc": _mean_and_error(right)}, len(right), arithmark.CHANCE, settings
        )

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
def _compiled_once() -> Iterator[None]:
    """lm-eval compiles a template for every item: 29 % of the time in a part of BLiMP. Here only once."""
    from lm_eval.utils import env

    env.from_string = functools.cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # the method of its class is there again


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever goes wrong in a definition's templates and functions is the fault of the item."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} ({type(error).__name__}: {reason})") from error


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
    if benchmark.name not in GROUPS:
        return [benchmark.name]
    names = _manager(benchmark.folder).all_subtasks
    return [name for name in names if name.startswith(GROUPS[benchmark.name])]


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
            raise _Missing(f"it cannot be loaded from the hub ({_first_line(error)})") from None
        raise UserError(f"lm-eval's {name} cannot use these items ({_first_line(error)})") from error
    return loaded["tasks"][name]


def _with_rows(rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
    """What makes a definition take its items from memory. 0-shot, it needs no others, but wants one."""
    import datasets

    found = datasets.Dataset.from_list(rows)
    splits = {split: found, "one": found.select([0])}
    return {
        "custom_dataset": lambda **_: splits,
        "training_split": "one",
        "fewshot_split": None,
        "fewshot_config": None,
    }


@functools.lru_cache(maxsize=1)
def _read_rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    # The parts of MMLU share a file.
    return items.read_rows(path, fields)


def _hub_rows(path: str, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(path, split=split).to_list()
    except Exception as error:  # of the hub, the network, the data set's layout
        raise _Missing(f"it cannot be loaded from the hub ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    """Of the parts, as lm-eval takes it: in BLiMP all weigh the same, in MMLU all items do."""
    values, errors = np.array([part.metrics["acc"] for part in parts], dtype=float).T  # None becomes nan
    sizes = np.array([part.items for part in parts], dtype=float)
    shares = np.ones_like(sizes) if name == "blimp" else sizes
    weights = shares / shares.sum()
    error = float(np.sqrt((weights**2 * errors**2).sum()))
    chance = float(weights @ [part.chance for part in parts])
    settings = {**parts[0].settings, "data": f"{len(parts)} parts", "sha256": None}
    accuracy = (float(weights @ values), None if math.isnan(error) else error)
    return TaskResult(name, {"acc": accuracy}, int(sizes.sum()), chance, settings)


def _chance(name: str, docs: list[Any], asked: list[list[Any]]) -> float | None:
    """What guessing would reach."""
    if name == "truthfulqa_mc2":
        return float(np.mean([np.mean(doc["mc2_targets"]["labels"]) for doc in docs]))
    if name == "lambada_openai":
        return 0.0  # one word of all there are
    if name == "wikitext":
        return None
    return float(np.mean([1 / len(requests) for requests in asked]))
