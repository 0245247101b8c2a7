"""What a model reached in the benchmarks, as a table, and where that is kept (the run's eval.json)."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ant5m.data.contamination import REPORT
from ant5m.data.shards import META
from ant5m.errors import UserError
from ant5m.eval.benchmarks import BENCHMARKS, Benchmark
from ant5m.eval.perplexity import run_data
from ant5m.eval.record import read_record
from ant5m.files import file_sha256, read_json, write_file, write_json
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.schema import CountOrZero


@dataclass(frozen=True)
class TaskResult:
    """What a model reaches in a task, or in a part of one."""

    task: str
    metrics: dict[str, tuple[float, float | None]]
    """name -> value and standard error (None: not known)"""
    items: int
    chance: float | None
    """what guessing gives, for accuracies"""
    settings: dict[str, Any]
    """limit, data, sha256 of the data and lm_eval's version: a result is used again where they are equal"""
    over: dict[str, int] = field(default_factory=dict)
    """of a perplexity: tokens, words, bytes"""
    chance_by_metric: dict[str, float] = field(default_factory=dict)
    """where it differs from `chance`"""
    baselines: dict[str, float] = field(default_factory=dict)
    """a rule that needs no model -> its accuracy"""
    values: dict[str, list[float]] = field(default_factory=dict)
    """accuracy -> one value an item, in the order of the items; none of a mean over parts"""

    @property
    def has_values(self) -> bool:
        """Whether every accuracy has its items, or is a mean over parts, which have them."""
        return not self.settings.get("sha256") or all(
            name in self.values for name in self.metrics if name.startswith("acc")
        )

    def chance_of(self, metric: str) -> float | None:
        """What guessing gives, in an accuracy."""
        return self.chance_by_metric.get(metric, self.chance)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without those of items."""
        metrics = {name: {"value": value, "stderr": error} for name, (value, error) in self.metrics.items()}
        optional = {
            "over": self.over,
            "chance_by_metric": self.chance_by_metric,
            "baselines": self.baselines,
        }
        return {
            "task": self.task,
            "metrics": metrics,
            "items": self.items,
            "chance": self.chance,
            **{name: value for name, value in optional.items() if value},
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TaskResult":
        """The inverse of `to_dict`; other keys are passed over."""
        metrics = {name: (one["value"], one["stderr"]) for name, one in values["metrics"].items()}
        return cls(
            values["task"],
            metrics,
            values["items"],
            values["chance"],
            values["settings"],
            values.get("over", {}),
            values.get("chance_by_metric", {}),
            values.get("baselines", {}),
            {name: list(map(float, line.split())) for name, line in values.get("values", {}).items()},
        )


def weights_sha256(model: Path) -> str:
    """Of the weights in a checkpoint or Hugging Face folder: what a result belongs to."""
    files = sorted(model.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{model} holds no weights")
    return " ".join(file_sha256(file) for file in files)


def recorded(path: Path, weights: str) -> list[TaskResult]:
    """The results in an eval.json that these weights reached; none where there is no such file."""
    tasks = read_record(path).get("tasks", [])
    return [TaskResult.from_dict(one) for one in tasks if one["weights"] == weights]


def record_task(path: Path, weights: str, checkpoint: str, result: TaskResult) -> None:
    """Put a result into an eval.json, in place of one of the same weights, task and limit; the rest stays."""
    values = read_record(path)
    old = values.get("tasks", [])
    limit = result.settings["limit"]

    def replaced(one: dict[str, Any]) -> bool:
        same = one["weights"] == weights and one["task"] == result.task
        return same and one["settings"]["limit"] == limit

    # A line a metric, where JSON would take one an item.
    values_of_items = {name: " ".join(f"{v:g}" for v in each) for name, each in result.values.items()}
    new = {**result.to_dict(), "values": values_of_items, "checkpoint": checkpoint, "weights": weights}
    values["tasks"] = [*(one for one in old if not replaced(one)), new]
    write_json(path, values)


class Row(NamedTuple):
    """One line of the table, as text."""

    task: str
    metric: str
    value: str
    chance: str
    verdict: str
    """at chance (within two standard errors of it), above or below; empty where there is none"""
    over: str
    published: str


HEADINGS = Row("task", "metric", "value", "chance", "", "over", "published Ant-5M")

_OVER = {
    "token_perplexity": "tokens",
    "word_perplexity": "words",
    "byte_perplexity": "bytes",
    "bits_per_byte": "bytes",
}


def rows(results: Sequence[TaskResult], contaminated: Collection[str] = ()) -> list[Row]:
    """The table, without the parts of groups: accuracies in percent, +- standard error."""
    found = {result.task: result for result in results}
    return [
        row._replace(task=f"{name}{CONTAMINATED}") if name in contaminated else row
        for name in BENCHMARKS
        if name in found
        for row in _rows(BENCHMARKS[name], found[name])
    ]


def parts(results: Sequence[TaskResult]) -> list[Row]:
    """The same for the parts of BLiMP and MMLU."""
    return [row for result in results if result.task not in BENCHMARKS for row in _rows(None, result)]


def _rows(benchmark: Benchmark | None, result: TaskResult) -> Iterator[Row]:
    for metric, (value, error) in result.metrics.items():
        unit = _OVER.get(metric, "items")
        over = f"{result.over.get(unit, result.items):,} {unit}"
        if not metric.startswith("acc"):
            digits = 4 if metric == "bits_per_byte" else 2
            yield Row(result.task, metric, _with_error(value, error, digits), "", "", over, "")
            continue
        known = benchmark.published if benchmark and metric == "acc" else None
        published = "" if known is None else f"{known:.1f}"
        share = result.chance_of(metric)
        chance = "" if share is None else f"{100 * share:.1f}"
        percent = _with_error(100 * value, None if error is None else 100 * error, 1)
        yield Row(result.task, metric, percent, chance, _verdict(value, error, share), over, published)
    for rule, value in result.baselines.items():
        yield Row(result.task, rule, f"{100 * value:.1f}", "", "", f"{result.items:,} items", "")


def _with_error(value: float, error: float | None, digits: int) -> str:
    digits = digits if value < 10_000 else 0
    return f"{value:,.{digits}f}" + ("" if error is None else f" ± {error:,.{digits}f}")


def _verdict(value: float, error: float | None, chance: float | None) -> str:
    if chance is None or error is None:
        return ""
    if abs(value - chance) <= 2 * error:
        return "at chance"
    return "above chance" if value > chance else "below chance"


SECTION = "## 0-shot tasks"
CONTAMINATED = "†"
"""behind the name of a task of which items stand in the training text"""


@dataclass(frozen=True)
class Contaminated:
    """What is known of benchmark items in a training text."""

    note: str
    """one sentence"""
    tasks: frozenset[str] = frozenset()
    """that have items in it"""


@dataclass
class _TaskCount:
    contaminated: CountOrZero
    items: CountOrZero
    too_short: CountOrZero


@dataclass
class _Report:
    """What is relied upon of a contamination.json."""

    tasks: dict[str, _TaskCount]


UNCHECKED = Contaminated(
    "The training text was not checked for the items (`ant5m data contamination` does it)."
)


def contamination_of(run: Path | None) -> Contaminated:
    """What the shards that a run was trained on say of benchmark items in them."""
    try:
        folders = run_data(run) if run else []
    except UserError:
        folders = []
    folder = folders[0] if len(folders) == 1 else None  # of a mixture each source would have to say it
    if folder and (folder / REPORT).exists():
        report = read_json(folder / REPORT, _Report)
        counts = {name: one for name, one in report.tasks.items() if one.contaminated}
        listed = ", ".join(
            f"{name} {one.contaminated:,} of {one.items - one.too_short:,}" for name, one in counts.items()
        )
        found = f"{CONTAMINATED} has some there ({listed} that are long enough)" if counts else "it has none"
        return Contaminated(
            f"The training text was checked for 13 words in a row of an item: {found}.", frozenset(counts)
        )
    if folder and (folder / META).exists() and "excluded_items" in read_json(folder / META, dict[str, Any]):
        return Contaminated("Documents with 13 words in a row of an item were left out of the training text.")
    return UNCHECKED


def markdown(results: Sequence[TaskResult], contaminated: Contaminated = UNCHECKED) -> str:
    """The table as a section of a report or model card; empty without results."""
    if not results:
        return ""
    limits = {result.settings["limit"] for result in results}
    limited = "" if limits == {None} else " Only the first items of each task were taken."
    versions = sorted({version for result in results if (version := result.settings["lm_eval"])})
    by = f" of lm-eval {', '.join(versions)}" if versions else ""
    lines = [
        f"{SECTION}",
        f"Definitions{by}; accuracies in percent ± standard error; at chance: within two of them.{limited} "
        "The published table does not say which accuracy it gives: its figures stand beside `acc`. "
        f"{contaminated.note}",
        "",
        *_markdown_table(rows(results, contaminated.tasks)),
    ]
    if inner := parts(results):
        summary = f"<details><summary>The {len(inner)} parts</summary>"
        lines += ["", summary, "", *_markdown_table(inner), "", "</details>"]
    return "\n".join(lines) + "\n\n"


def _markdown_table(lines: Sequence[Row]) -> list[str]:
    rule = Row("---", "---", "---:", "---:", "---", "---:", "---:")
    return [f"| {' | '.join(line)} |" for line in (HEADINGS, rule, *lines)]


def with_section(text: str, section: str, before: str) -> str:
    """A report or card with its 0-shot section renewed, or put before the heading `before`."""
    start = text.find(SECTION + "\n")
    if start < 0:
        start = end = text.index(before)
    else:
        following = text.find("\n## ", start)
        end = len(text) if following < 0 else following + 1
    return text[:start] + section + text[end:]


def section_of(run: Path, model: Path) -> str:
    """The section on what the weights in `model` reached, as the run's eval.json says; empty without one.

    Of a task that was measured in several ways it shows the one with the most items.
    """
    if not (run / "eval.json").exists():
        return ""
    widest: dict[str, TaskResult] = {}
    for result in recorded(run / "eval.json", weights_sha256(model)):
        if result.task not in widest or result.items >= widest[result.task].items:
            widest[result.task] = result
    return markdown(list(widest.values()), contamination_of(run))


def publish(run: Path, model: Path) -> None:
    """Renew the section in a run's report and model card, where those are about the weights in `model`."""
    section = section_of(run, model)
    newest = latest_checkpoint(run)
    if newest is None or newest.resolve() != model.resolve():
        return
    pages = [(run / "report.md", "## Samples")]
    if (run / "hf").is_dir() and weights_sha256(run / "hf") == weights_sha256(model):
        pages.append((run / "hf" / "README.md", "## Limits"))
    for page, before in pages:
        if page.exists():
            write_file(page, with_section(page.read_text(encoding="utf-8"), section, before))
