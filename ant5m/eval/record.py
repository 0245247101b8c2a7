"""The `eval.json` of a run: what its checkpoints reached."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ant5m.errors import UserError
from ant5m.files import read_object
from ant5m.schema import CountOrZero


@dataclass
class Perplexity:
    """One evaluation on text; `ant5m.eval.perplexity.Evaluation` says what else is there."""

    text: str
    checkpoint: str
    held_out: bool
    loss: float
    bits_per_byte: float | None = None


@dataclass
class Metric:
    value: float
    stderr: float | None


@dataclass
class TaskSettings:
    limit: int | None
    lm_eval: str | None = None
    sha256: str | None = None


@dataclass
class Task:
    """One result in a task; the fields are those of `ant5m.eval.results.TaskResult`."""

    task: str
    weights: str
    metrics: dict[str, Metric]
    items: CountOrZero
    chance: float | None
    settings: TaskSettings
    over: dict[str, int] = field(default_factory=dict)
    chance_by_metric: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    """numbers with a space between them"""


@dataclass
class Record:
    """The content of an eval.json."""

    perplexity: list[Perplexity] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)


def read_record(path: Path) -> dict[str, Any]:
    """All that an eval.json holds; nothing where there is none. `UserError` when it is another file."""
    if not path.exists():
        return {}
    try:
        return read_object(path, Record)
    except UserError as error:
        raise UserError(f"{error}: this is no eval.json of ant5m, move it away") from None
