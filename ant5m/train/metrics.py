"""What a run writes about itself while it trains: metrics.jsonl, and files for TensorBoard."""

import json
from pathlib import Path
from typing import Any

from ant5m.files import write_file


class Metrics:
    """`metrics.jsonl` in the run folder: one JSON object a line, each with its "kind" and "step".

    Kinds: "train" (loss in nats, gradient norm, learning rate of AdamW, tokens so far, tokens/s, seconds so
    far), "validation" and "sample". Numbers also go to TensorBoard when that is installed.

    Args:
        step: the run goes on after this step; lines of later steps are dropped.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_file(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", step)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Add one line."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
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


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
