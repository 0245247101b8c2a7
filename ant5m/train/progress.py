"""What a run shows on stderr: a bar on a terminal, elsewhere a plain line now and then."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ant5m.console import stderr
from ant5m.train.callback import Callback

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

PLAIN_SECONDS = 30.0
WIDE = 100
"""characters; a narrower terminal has no room for the bar, the learning rate and MFU"""


class TrainingProgress(Callback):
    """Shows step, loss, learning rate, tokens/s, MFU (where the device's peak is known) and the time left;
    validations and samples on lines of their own.

    Args:
        steps: of the whole run.
        flops_per_token: of a training step, given its context.
        peak: FLOP/s of all devices, or None when not known.
        bytes_per_token: of the training text; None when not known.
    """

    def __init__(
        self,
        steps: int,
        flops_per_token: Callable[[int], float],
        peak: float | None,
        bytes_per_token: float | None = None,
    ):
        self.steps = steps
        self._done = self._first = 0
        self._flops_per_token = flops_per_token
        self._peak = peak
        self._bytes_per_token = bytes_per_token
        self._console = stderr()
        self._started = self._last_line = time.monotonic()
        self._narrow = self._console.is_terminal and self._console.width < WIDE
        self._bar = Progress(
            *([] if self._narrow else [BarColumn(bar_width=20)]),
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("", total=steps, numbers="")

    def on_start(self, trainer: "Trainer") -> None:
        self._done = self._first = trainer.step
        self._started = self._last_line = time.monotonic()
        self._bar.reset(self._task, completed=trainer.step, numbers="")
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        step = trainer.step
        if kind == "train":
            self._update(trainer, values["loss"], values["learning_rate"], values["tokens_per_second"])
        elif kind == "validation":
            bits = f", {values['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in values else ""
            average = f"; averaged {values['average_loss']:.3f}" if "average_loss" in values else ""
            self._print(f"step {step:,}: validation loss {values['loss']:.3f}{bits}{average}")
        elif kind == "sample":
            first = values["samples"][0]
            self._print(f"step {step:,}: " + " ".join(f"{first['prompt']}{first['text']}".split()))

    def _update(
        self, trainer: "Trainer", loss: float, learning_rate: float, tokens_per_second: float
    ) -> None:
        step = trainer.step
        numbers = f"loss {loss:.3f}"
        if self._bytes_per_token:
            numbers += f" ({loss / (math.log(2) * self._bytes_per_token):.3f} bits/byte)"
        numbers += "" if self._narrow else f"  lr {learning_rate:.1e} "
        numbers += f" {tokens_per_second:,.0f} tokens/s"
        if self._peak and not self._narrow:
            numbers += f"  MFU {tokens_per_second * self._flops_per_token(trainer.context) / self._peak:.1%}"
        self._done = step
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= PLAIN_SECONDS or step == self.steps):
            self._last_line = now
            self._console.print(f"step {step:,}/{self.steps:,}  {numbers}  {self._time_left(now)} left")

    def _print(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._bar.console.print(escape(text))

    def _time_left(self, now: float) -> str:
        per_step = (now - self._started) / max(1, self._done - self._first)
        seconds = round(per_step * (self.steps - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
