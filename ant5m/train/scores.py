"""Scores in 0-shot tasks while a model is trained."""

import math
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ant5m.console import stderr
from ant5m.data.tokenizer import Tokenizer
from ant5m.model.ant import Ant
from ant5m.train.callback import Callback

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

SHARE = 0.02
"""of the training's time that scores may take, where nothing else was asked for"""
PLANNED = 0.85 * SHARE
"""what is given out: the rest is for a machine that slows down, or a run that goes faster than it began"""
WANTED = 10
"""scores of a run: more are taken only when all items are"""
MOST_ITEMS = 2_000
"""of each task"""
LEAST_ITEMS = 100
"""of each task: below, the standard error is more than 5 points"""
TRIAL_ITEMS = 32
"""scored twice to learn what one costs: the first ones of a process take longer"""


class ScoreTasks(Callback):
    """Logs the accuracy in a fixed part of some tasks, now and then, so that all of it takes at most `SHARE`
    of the training's time: loading the items, a trial, and the scores at the end, too.

    After a fiftieth of the steps a few items are timed. That decides how many items are scored, then how
    often; what each score took corrects how often. Where one score of the fewest items would take more, a
    warning says so, and only the end is scored.

    Args:
        tasks: as `ant5m.eval.tasks.TaskSubset` takes them.
        items: of each; None: chosen.
        every: steps between scores; None: chosen.
        steps: of the whole run.
    """

    name = "scores"
    everywhere = True  # all ranks must know how often

    def __init__(
        self,
        net: Ant,
        tokenizer: Tokenizer,
        tasks: tuple[str, ...],
        data_dir: Path | None,
        items: int | None,
        every: int | None,
        steps: int,
    ):
        from ant5m.eval.tasks import TaskSubset

        started = time.monotonic()
        self._subset = TaskSubset(net, tokenizer, tasks, data_dir, items or MOST_ITEMS)
        self._least = self._subset.items if items or every else min(LEAST_ITEMS, self._subset.items)
        self._every, self._steps = every, steps
        self._items = self._subset.items if items or every else 0
        """of each task that are scored; 0: not chosen yet"""
        self._next = max(1, steps // 50)
        """step of the next scores, where `every` was not given"""
        self._planned = every is not None
        self._seconds = 0.0
        """of one score"""
        self._count, self._scored = 0, 0
        self._spent = time.monotonic() - started

    def is_due(self, step: int) -> bool:
        return step >= self._next if self._every is None else step % self._every == 0

    def act(self, trainer: "Trainer") -> None:
        if self._every is not None:
            if trainer.ranks.is_first:
                self._score(trainer)
            return
        if trainer.ranks.is_first:
            if not self._planned:
                self._plan(trainer)
            if self._left(trainer) > 1:
                self._score(trainer)
            self._spent += trainer.waited
            left = max(1, self._left(trainer))
            self._next = trainer.step + math.ceil((self._steps - trainer.step) / left)
        self._planned = True
        self._next = trainer.ranks.share(self._next)

    def on_end(self, trainer: "Trainer") -> None:
        if not (trainer.complete and trainer.ranks.is_first):
            return
        if not self._planned:
            self._plan(trainer)
        if trainer.step > self._scored:
            self._spent += self._score(trainer)
        if self._every is None:
            share = self._spent / max(trainer.seconds, 1e-9)
            stderr().print(
                f"scores: {self._count} of {self._items:,} items a task, {self._spent:.1f} s with loading, "
                f"{share:.1%} of the training",
                markup=False,
            )

    def _plan(self, trainer: "Trainer") -> None:
        """Choose how many items are scored, from what a few of them take."""
        total = _whole_run(trainer)
        first, again = (self._time(TRIAL_ITEMS) for _ in range(2))
        each = again / min(TRIAL_ITEMS, self._subset.items)
        once = max(0.0, first - again) / min(TRIAL_ITEMS, self._subset.items)  # what is asked about an item
        there = PLANNED * total - self._spent - trainer.waited
        if not self._items:
            most = int(there / (WANTED * each + once))
            self._items = max(self._least, min(self._subset.items, most))
        self._seconds = each * self._items
        count = int((there - once * self._items) / self._seconds)
        share = (self._spent + trainer.waited + self._seconds) / total
        if count < 1 and share > SHARE:
            warnings.warn(
                f"scores take {share:.1%} of this run even when only its end is scored, {self._items:,} "
                f"items a task ({self._spent:.1f} s for loading them, {self._seconds:.1f} s for a score)",
                stacklevel=2,
            )
        often = f"about {count} times" if count > 1 else "at the end"
        stderr().print(f"scores: {self._items:,} items a task, {often}", markup=False)

    def _time(self, items: int) -> float:
        started = time.monotonic()
        self._subset.score(items)
        return time.monotonic() - started

    def _left(self, trainer: "Trainer") -> int:
        """How many more scores there is time for, the one at the end among them."""
        return int((PLANNED * _whole_run(trainer) - self._spent - trainer.waited) / max(self._seconds, 1e-9))

    def _score(self, trainer: "Trainer") -> float:
        """Take the scores; returns the seconds that took."""
        self._scored = trainer.step
        started = time.monotonic()
        scores = self._subset.score(self._items)
        self._seconds = time.monotonic() - started
        self._count += 1
        trainer.log("tasks", seconds=round(self._seconds, 2), **scores)
        return self._seconds

    def state_dict(self) -> dict[str, Any]:
        return {
            "items": self._items,
            "next": self._next,
            "planned": self._planned,
            "seconds": self._seconds,
            "spent": self._spent,
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "items" not in state:  # of an earlier version, which kept how often alone
            return
        self._items, self._next, self._planned = state["items"], state["next"], state["planned"]
        self._seconds, self._count = state["seconds"], state["count"]
        self._spent += state["spent"]  # the items were loaded again


def _whole_run(trainer: "Trainer") -> float:
    """Seconds that the training takes in all, by how far it has come."""
    steps = trainer.settings.steps
    return (trainer.seconds + trainer.waited) * steps / max(1, trainer.step, min(steps, trainer.position))
