"""What a run writes about itself while it trains: metrics.jsonl, and files for TensorBoard."""

import contextlib
import json
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from msgspec import Meta, Struct

from ant5m.errors import UserError
from ant5m.files import check_json, parse_json, read_bytes, write_file
from ant5m.train.callback import Callback
from ant5m.train.run import Run

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


NUMBER, CHECKSUM = "line", "crc32"
DAMAGED = "metrics-damaged.jsonl"
"""beside metrics.jsonl: lines that could not be read when the run was resumed"""


class MetricsFile(Callback):
    """`metrics.jsonl` in the run folder: one JSON object a line, each with its "kind" and "step", and at its
    end "line", its number, and "crc32" of what stands before, so that a changed digit and a line that is gone
    are noticed.

    Kinds: "train" (loss in nats, gradient norm, learning rate of AdamW, tokens so far, tokens/s, seconds so
    far), "validation", "tasks" (the accuracy in each) and "sample". Lines of steps behind the one that a run
    is resumed from are dropped.
    """

    name = "metrics"

    def __init__(self, run: Run):
        self._run = run
        self._file: TextIO | None = None
        self._number = 0
        """of the last line"""

    def on_start(self, trainer: "Trainer") -> None:
        path = self._run.folder / "metrics.jsonl"
        found = split_metrics(path)
        if found.damaged:
            _keep_aside(found.damaged, path.with_name(DAMAGED))
        kept = {number: line for number, line in found.numbered.items() if line["step"] <= trainer.step}
        # Lines of the checkpoint's own step may have come behind it.
        self._number = max([self._number, *kept])
        if missing := self._number - len(kept):
            warnings.warn(f"missing lines of {path}: {missing:,}", stacklevel=2)
        write_file(path, "".join(to_line(line, number) for number, line in kept.items()))
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._number += 1
        self._file.write(to_line({"kind": kind, "step": trainer.step, **values}, self._number))
        self._file.flush()

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._number = state["lines"]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard(Callback):
    """The numbers of each line as scalars for TensorBoard, where that is installed."""

    def __init__(self, run: Run):
        self._run = run
        self._board: Any = None

    def on_start(self, trainer: "Trainer") -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        with self._dropped_on_errors():
            self._board = SummaryWriter(str(self._run.folder / "tensorboard"), purge_step=trainer.step + 1)

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        with self._dropped_on_errors():
            for name, value in values.items():
                if self._board is not None and isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, trainer.step)

    def close(self) -> None:
        with self._dropped_on_errors():
            if self._board is not None:
                self._board.close()

    @contextlib.contextmanager
    def _dropped_on_errors(self) -> Iterator[None]:
        """A full disk ends these files, which repeat what metrics.jsonl has, but not the training."""
        try:
            yield
        except OSError as error:
            self._board = None
            warnings.warn(f"no more files for TensorBoard: {error.strerror or error}", stacklevel=3)


class _Line(Struct, kw_only=True):
    """What every reader of a line relies on."""

    step: Annotated[int, Meta(ge=0)]
    line: Annotated[int, Meta(ge=1)] = 1


class _Train(_Line, tag_field="kind", tag="train"):
    loss: float
    tokens: int
    seconds: float = 0.0


class _Validation(_Line, tag_field="kind", tag="validation"):
    loss: float
    tokens: int


class _Tasks(_Line, tag_field="kind", tag="tasks"):
    seconds: float


class _Text(Struct):
    prompt: str
    text: str


class _Sample(_Line, tag_field="kind", tag="sample"):
    samples: list[_Text]


@dataclass
class Metrics:
    """What a metrics.jsonl holds; a last line that a crash cut short is in neither part."""

    numbered: dict[int, dict[str, Any]] = field(default_factory=dict)
    """the lines that are whole, in order, by their numbers from 1 on"""
    damaged: list[bytes] = field(default_factory=list)
    """lines that are no JSON, not what was written, or not in their place"""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return list(self.numbered.values())


def to_line(values: dict[str, Any], number: int) -> str:
    """A line of a metrics.jsonl."""
    text = json.dumps({**values, NUMBER: number}, ensure_ascii=False)[:-1]
    return f'{text}, "{CHECKSUM}": "{_crc32(text.encode("utf-8", "backslashreplace"))}"}}\n'


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole, in order."""
    return split_metrics(path).lines


def split_metrics(path: Path) -> Metrics:
    """All of a metrics.jsonl.

    Lines without a checksum or a number are of an earlier version, and so all of them stand at the beginning;
    they count as if none were missing.
    """
    found = Metrics()
    if not path.exists():
        return found
    checked, last = False, 0
    for raw in read_bytes(path).split(b"\n")[:-1]:
        try:
            line = parse_json(raw, str(path), dict[str, Any])
            check_json(line, str(path), _Train | _Validation | _Tasks | _Sample)
        except UserError:
            found.damaged.append(raw)
            continue
        sum_of_line, number = line.pop(CHECKSUM, None), line.pop(NUMBER, last + 1)
        altered = sum_of_line != _crc32(raw.rpartition(b', "')[0])
        if (altered and (checked or sum_of_line is not None)) or number <= last:
            found.damaged.append(raw)
            continue
        checked, last = checked or sum_of_line is not None, number
        found.numbered[number] = line
    return found


def _crc32(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"


def _keep_aside(damaged: list[bytes], path: Path) -> None:
    before = read_bytes(path) if path.exists() else b""
    write_file(path, before + b"\n".join(damaged) + b"\n")
    warnings.warn(f"{len(damaged):,} damaged lines of metrics.jsonl were moved to {path}", stacklevel=3)
