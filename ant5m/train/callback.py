"""What happens beside the steps of a training: validation, samples, checkpoints, logs, and what you add.

A callback knows when it is due and keeps its own state; the loop in `ant5m.train.trainer` knows none of them
by name. To add one, write a class and put it into the list in `ant5m.train.pretraining`:

    class Push(Periodic):
        def run(self, trainer):
            upload(trainer.net)

The order of the list is the order in which callbacks that are due at the same step act.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


class Callback:
    """Does nothing; override what is needed.

    Whether one is due may depend only on what all ranks know alike: the step, its state, what was logged.
    """

    name = ""
    """of its state in a checkpoint; for those that have a state"""
    everywhere = False
    """whether all ranks call it; else rank 0 alone does, as is right for what writes or prints"""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step; `trainer.step` are behind it when the run is resumed."""

    def is_due(self, step: int) -> bool:
        """Whether `act` is to be called behind this step (never behind the last one)."""
        return False

    def is_overdue(self) -> bool:
        """As `is_due`, by the clock: all ranks take it as due when it is overdue on one."""
        return False

    def act(self, trainer: "Trainer") -> None:
        """What is due; every statistic has been read by then."""

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        """Of every line that the training or a callback logs, about the step `trainer.step`."""

    def on_update(self, counted: Tensor) -> None:
        """Inside each step, behind the optimizer. Part of a CUDA graph on a GPU: it may only queue work on
        tensors of the device that stay where they are. `counted`: 1, or 0 where fp16 overflowed and nothing
        changed; 0-dim."""

    def on_end(self, trainer: "Trainer") -> None:
        """When the training ends or is stopped, but not when it fails."""

    def close(self) -> None:
        """At the end, in any case."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, in plain values for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def tensors(self) -> dict[str, Tensor]:
        """As `state_dict`, of tensors, which stay where they are: `NAME.safetensors` in a checkpoint."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `tensors`, from the CPU. Raises `UserError` when they do not fit."""


class Periodic(Callback):
    """Calls `run` every `every` steps, once each; 0: never."""

    def __init__(self, every: int):
        self.every = every

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def act(self, trainer: "Trainer") -> None:
        self.run(trainer)

    def run(self, trainer: "Trainer") -> None:
        """What is due."""
