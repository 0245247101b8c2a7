"""What a run writes about itself while it trains: metrics.jsonl, and files for TensorBoard."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ant5m.files import write_file
from ant5m.train.callback import Callback
from ant5m.train.run import Run

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


class MetricsFile(Callback):
    """`metrics.jsonl` in the run folder: one JSON object a line, each with its "kind" and "step".

    Kinds: "train" (loss in nats, gradient norm, learning rate of AdamW, tokens so far, tokens/s, seconds so
    far), "validation" and "sample". Lines of steps behind the one that a run is resumed from are dropped.
    """

    def __init__(self, run: Run):
        self._run = run
        self._file: TextIO | None = None

    def on_start(self, trainer: "Trainer") -> None:
        path = self._run.folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= trainer.step]
        write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        assert self._file is not None
        line = {"kind": kind, "step": trainer.step, **values}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
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
        self._board = SummaryWriter(str(self._run.folder / "tensorboard"), purge_step=trainer.step + 1)

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if self._board is not None and isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, trainer.step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a last line that was cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    # Not splitlines(): a sample may hold other characters that it takes for the end of a line.
    for text in path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n"):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
