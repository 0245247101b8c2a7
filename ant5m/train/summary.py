"""What is known of runs at a glance, from their folders alone; and their curves in one picture."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from ant5m.errors import UserError
from ant5m.eval.record import read_record
from ant5m.files import is_locked, write_file
from ant5m.model.config import ModelConfig
from ant5m.model.costs import count_flops
from ant5m.model.run_file import read_run_file
from ant5m.train.metrics import read_metrics
from ant5m.train.report import running_mean

Axis = Literal["tokens", "flops", "time"]
LABELS = {"tokens": "training tokens", "flops": "training FLOPs", "time": "minutes of training"}


@dataclass(frozen=True)
class RunSummary:
    """One run as its folder shows it."""

    folder: Path
    model: str
    data: str
    tokens: int
    """trained on so far"""
    planned_tokens: int | None
    loss: float | None
    """nats per token on validation text: over the whole split when the run is done, else of the last
    validation"""
    bits_per_byte: float | None
    state: str
    """done, running, stopped or preparing"""
    lines: list[dict[str, Any]]
    """of metrics.jsonl"""
    shape: ModelConfig
    bytes_per_token: float | None
    """of the training text; None when not known"""
    short_context: int
    """that the run begins with; 0: it does not"""
    short_tokens: float
    """of the run, with that context"""

    def curve(self, axis: Axis) -> tuple[list[float], list[float]]:
        """Training losses in nats per token, a running mean over a fiftieth of the steps, over `axis`."""
        train = [line for line in self.lines if line["kind"] == "train"]
        losses = tuple(line["loss"] for line in train)
        place = self._place(axis)
        return [place(line) for line in train], running_mean(losses, len(losses) // 50 + 1)

    def _place(self, axis: Axis) -> Callable[[dict[str, Any]], float]:
        if axis == "time":
            return lambda line: line["seconds"] / 60
        if axis == "tokens":
            return lambda line: line["tokens"]
        whole = 3 * sum(count_flops(self.shape, self.shape.max_position_embeddings).values())
        if not self.short_context:
            return lambda line: line["tokens"] * whole
        saved = whole - 3 * sum(count_flops(self.shape, self.short_context).values())
        return lambda line: line["tokens"] * whole - min(line["tokens"], self.short_tokens) * saved


def summarize(run: Path) -> RunSummary:
    """Raises `UserError` when the folder is not a run's, or its config.json is damaged."""
    file = read_run_file(run)
    if file is None or file.train is None or not file.model:
        raise UserError(f"{run} is not a run folder: its config.json is of another kind")
    asked, counts = file.train, file.data.train
    try:
        shape = ModelConfig.from_dict(file.model)
    except UserError as error:
        raise UserError(f"{run / 'config.json'}: {error}") from None
    lines = read_metrics(run / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    last = train[-1] if train else {"step": 0, "tokens": 0}
    sizes = [size for size in (asked.steps, asked.batch_size, asked.sequence_length) if size is not None]
    planned = math.prod(sizes) if len(sizes) == 3 else None
    loss, bits = _measured(run, lines)
    return RunSummary(
        folder=run,
        model=str(asked.model),
        data=_data(asked.data),
        tokens=last["tokens"],
        planned_tokens=planned,
        loss=loss,
        bits_per_byte=bits,
        state=_state(run, last["step"]),
        lines=lines,
        shape=shape,
        bytes_per_token=counts.bytes / counts.tokens if counts else None,
        short_context=asked.short_context,
        short_tokens=asked.short_share * (planned or 0),
    )


def plot(runs: Sequence[RunSummary], axis: Axis, path: Path) -> None:
    """Draw the training losses of all runs over `axis`: in bits per byte, which compare between tokenizers,
    or in nats per token where a run does not know its bytes."""
    in_bits = all(run.bytes_per_token for run in runs)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = []
    for run in runs:
        places, losses = run.curve(axis)
        scale = math.log(2) * run.bytes_per_token if in_bits and run.bytes_per_token else 1.0
        axes.plot(places, [loss / scale for loss in losses], label=run.folder.name)
        drawn += [loss / scale for loss in losses[len(losses) // 20 :]]
    if not drawn:
        raise UserError("none of these runs has taken a step yet: there is nothing to draw")
    # The first steps would take all of the height.
    axes.set(
        xlabel=LABELS[axis], ylabel=f"training loss ({'bits per byte' if in_bits else 'nats per token'})"
    )
    axes.set_ylim(min(drawn) * 0.97, max(drawn) * 1.03)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def _measured(run: Path, lines: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Loss and bits per byte on validation text."""
    if (run / "report.md").exists() and (run / "eval.json").exists():
        held_out = [one for one in read_record(run / "eval.json").get("perplexity", []) if one["held_out"]]
        if held_out:
            return held_out[-1]["loss"], held_out[-1].get("bits_per_byte")
    validations = [line for line in lines if line["kind"] == "validation"]
    return (validations[-1]["loss"], validations[-1].get("bits_per_byte")) if validations else (None, None)


def _state(run: Path, step: int) -> str:
    if is_locked(run):
        return "running" if step else "preparing"
    return "done" if (run / "report.md").exists() else "stopped"


def _data(names: str | list[str] | None) -> str:
    """A run's data for people; one name was a string before ant5m 0.2."""
    given = [names] if isinstance(names, str) else names or []
    shown = [name if name.startswith("hf:") else Path(name).name for name in given]
    return ", ".join(shown[:2]) + (f" and {len(shown) - 2} more" if len(shown) > 2 else "") or "built-in"
