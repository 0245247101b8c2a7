"""The learning rate over a run: warm-up, then cosine, linear or warm-up-stable-decay."""

import math
from dataclasses import dataclass

from ant5m.errors import UserError

SHAPES = ("linear", "cosine", "wsd")


@dataclass(frozen=True)
class Schedule:
    """Factor on the learning rate as a pure function of the step: a resumed run needs no state for it.

    The factor rises linearly over `warmup` x steps, and would be `floor` behind the last step: along a line
    or half a cosine, or, for "wsd", after a plateau, along a line over the last `decay` x steps.
    """

    steps: int
    shape: str = "linear"
    warmup: float = 0.03
    """share of the steps"""
    decay: float = 0.4
    """share of the steps, for wsd"""
    floor: float = 0.0
    """factor at the end"""

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UserError(f"there is no schedule '{self.shape}' (use {', '.join(SHAPES)})")
        if self.steps < 1:
            raise UserError(f"a schedule needs at least one step, not {self.steps}")

    def __call__(self, step: int) -> float:
        """The factor for step 0, 1, ..., steps - 1: above 0 on the first, `floor` only after the last."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        start = max(warmup, self.steps - round(self.decay * self.steps)) if self.shape == "wsd" else warmup
        progress = min(1.0, max(0.0, (step - start) / max(1, self.steps - start)))
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * fall
