"""The numbers of a run for trackio or Weights & Biases, beside metrics.jsonl."""

import importlib
import importlib.util
import os
import queue
import secrets
import threading
import warnings
from typing import TYPE_CHECKING, Any

from ant5m.errors import UserError
from ant5m.train.callback import Callback
from ant5m.train.metrics import read_metrics
from ant5m.train.run import Run

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

PROJECT = "ant5m"
WAIT_SECONDS = 30.0
"""at the end of a run, for what the tracker has not sent yet"""


def check_tracker(name: str) -> None:
    """Raise `UserError` where the package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name} needs the package {name}: pip install {name}")


class Tracker(Callback):
    """Sends every number that is logged to `package`, which speaks init, log and finish.

    That happens in a thread: a tracker that raises or hangs is left alone with a warning, and the training
    goes on. A resumed run goes on under the same id; what was sent before is not sent again. Stands before
    `MetricsFile` in the list, which drops the lines behind the step that a run is resumed from.
    """

    name = "tracker"

    def __init__(self, run: Run, package: str):
        self._run, self._package = run, package
        self._id = secrets.token_hex(4)
        self._sent = 0
        self._lines: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._failure = ""
        self._thread = threading.Thread(target=self._work, daemon=True)

    def on_start(self, trainer: "Trainer") -> None:
        lines = read_metrics(self._run.folder / "metrics.jsonl")
        self._sent = max((line["step"] for line in lines), default=0)
        self._thread.start()

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        if numbers and trainer.step > self._sent and not self._failure:
            self._lines.put((trainer.step, numbers))

    def close(self) -> None:
        if self._thread.ident is None:
            return
        self._lines.put(None)
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            self._failure = "it does not answer"
        if self._failure:
            warnings.warn(
                f"{self._package} has not got everything ({self._failure}); metrics.jsonl has", stacklevel=2
            )

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._id = state["id"]

    def _work(self) -> None:
        try:
            tracker = importlib.import_module(self._package)
            tracker.init(**self._arguments())
            while (line := self._lines.get()) is not None:
                step, numbers = line
                tracker.log(numbers, step=step)
            tracker.finish()
        except BaseException as error:  # SystemExit too: it would end this thread without a word
            self._failure = f"{type(error).__name__}: {str(error)[:200]}".strip(": ")

    def _arguments(self) -> dict[str, Any]:
        name = f"{self._run.folder.name}-{self._id}"
        shared = {"project": PROJECT, "name": name, "config": self._run.config.to_dict()}
        if self._package == "trackio":
            return {**shared, "resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
        return {**shared, "id": name, "resume": "allow", "mode": mode, "dir": str(self._run.folder)}


def _has_login() -> bool:
    """Whether wandb would get along without asking at the terminal."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
