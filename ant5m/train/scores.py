"""Scores in 0-shot tasks while a model is trained."""

import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant5m.data.tokenizer import Tokenizer
from ant5m.train.callback import Callback

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

SHARE = 0.02
"""of the training's time that scores may take, where nothing else was asked for"""


class ScoreTasks(Callback):
    """Logs the accuracy in a fixed part of some tasks, every so many steps.

    Without `every` the first scores, after a fiftieth of the steps, are timed, and decide how often there are
    more: so that all of them, the first and those at the end too, take at most `SHARE` of the time. Where
    even these two take more, a warning says so.

    Args:
        tasks, items: as `ant5m.eval.tasks.TaskSubset` takes them.
        steps: of the whole run.
    """

    name = "scores"
    everywhere = True  # all ranks must know how often

    def __init__(
        self,
        tokenizer: Tokenizer,
        tasks: tuple[str, ...],
        data_dir: Path | None,
        items: int,
        every: int | None,
        steps: int,
    ):
        from ant5m.eval.tasks import TaskSubset

        self._subset = TaskSubset(tokenizer, tasks, data_dir, items)
        self._every, self._steps, self._first, self._scored = every, steps, max(1, steps // 50), 0

    def is_due(self, step: int) -> bool:
        return step >= self._first if self._every is None else step % self._every == 0

    def act(self, trainer: "Trainer") -> None:
        seconds = self._score(trainer) if trainer.ranks.is_first else 0.0
        if self._every is None:
            total = self._steps * trainer.seconds / trainer.step
            self._every = trainer.ranks.share(self._interval(seconds, total))

    def _interval(self, seconds: float, total: float) -> int:
        """Steps between scores that take so long each, in a run that takes `total` seconds without them."""
        count = int(SHARE * total / max(seconds, 1e-9))
        if count < 2:
            share = 2 * seconds / max(total, 1e-9)
            warnings.warn(
                f"scores take {seconds:.1f} s, {share:.0%} of this run with those at its end: fewer "
                "--eval-items take less",
                stacklevel=2,
            )
        return math.ceil(self._steps / max(1, count - 1))  # so count - 2 between the first and the end

    def on_end(self, trainer: "Trainer") -> None:
        if trainer.complete and trainer.ranks.is_first and trainer.step > self._scored:
            self._score(trainer)

    def _score(self, trainer: "Trainer") -> float:
        self._scored = trainer.step
        started = time.monotonic()
        scores = self._subset.score(trainer.net)
        seconds = time.monotonic() - started
        trainer.log("tasks", seconds=round(seconds, 2), **scores)
        return seconds

    def state_dict(self) -> dict[str, Any]:
        return {"every": self._every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._every = state["every"]
