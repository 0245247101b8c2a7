"""What a run writes about itself while it trains: metrics.jsonl, and files for TensorBoard."""

import contextlib
import json
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from msgspec import Meta, Struct

from ant5m.errors import UserError
from ant5m.files import check_json, parse_json, write_file
from ant5m.train.callback import Callback
from ant5m.train.run import Run

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


CHECKSUM = "crc32"
DAMAGED = "metrics-damaged.jsonl"
"""beside metrics.jsonl: lines that could not be read when the run was resumed"""


class MetricsFile(Callback):
    """`metrics.jsonl` in the run folder: one JSON object a line, each with its "kind" and "step", and at its
    end "crc32" of what stands before, so that a changed digit is noticed.

    Kinds: "train" (loss in nats, gradient norm, learning rate of AdamW, tokens so far, tokens/s, seconds so
    far), "validation", "tasks" (the accuracy in each) and "sample". Lines of steps behind the one that a run
    is resumed from are dropped.
    """

    def __init__(self, run: Run):
        self._run = run
        self._file: TextIO | None = None

    def on_start(self, trainer: "Trainer") -> None:
        path = self._run.folder / "metrics.jsonl"
        lines, damaged = split_metrics(path)
        if damaged:
            _keep_aside(damaged, path.with_name(DAMAGED))
        kept = [line for line in lines if line["step"] <= trainer.step]
        write_file(path, "".join(map(to_line, kept)))
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(to_line({"kind": kind, "step": trainer.step, **values}))
        self._file.flush()

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


class _Line(Struct):
    """What every reader of a line relies on."""

    step: Annotated[int, Meta(ge=0)]


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


def to_line(values: dict[str, Any]) -> str:
    """A line of a metrics.jsonl."""
    text = json.dumps(values, ensure_ascii=False)[:-1]
    return f'{text}, "{CHECKSUM}": "{_crc32(text.encode("utf-8", "backslashreplace"))}"}}\n'


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole, in order."""
    return split_metrics(path)[0]


def split_metrics(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a metrics.jsonl, and those that are damaged; a last one that a crash cut short is in
    neither. Lines without a checksum are of an earlier version, and so all of them stand at the beginning."""
    if not path.exists():
        return [], []
    lines: list[dict[str, Any]] = []
    damaged: list[bytes] = []
    checked = False
    for raw in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = parse_json(raw, str(path), dict[str, Any])
            check_json(line, str(path), _Train | _Validation | _Tasks | _Sample)
        except UserError:
            damaged.append(raw)
            continue
        sum_of_line = line.pop(CHECKSUM, None)
        if sum_of_line != _crc32(raw.rpartition(b', "')[0]) and (checked or sum_of_line is not None):
            damaged.append(raw)
            continue
        checked = checked or sum_of_line is not None
        lines.append(line)
    return lines, damaged


def _crc32(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"


def _keep_aside(damaged: list[bytes], path: Path) -> None:
    before = path.read_bytes() if path.exists() else b""
    write_file(path, before + b"\n".join(damaged) + b"\n")
    warnings.warn(f"{len(damaged):,} damaged lines of metrics.jsonl were moved to {path}", stacklevel=3)
