"""Ending a training when it has stopped to get better."""

import math
from typing import TYPE_CHECKING, Any

from ant5m.train.callback import Callback

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


class EarlyStop(Callback):
    """Ends the training after `patience` validations in a row without a new lowest loss; 0: never."""

    name = "early_stop"
    everywhere = True

    def __init__(self, patience: int):
        self._patience = patience
        self._best, self._failed = math.inf, 0

    def on_start(self, trainer: "Trainer") -> None:
        self._end_if_due(trainer)  # of a run that is resumed although it had ended

    def on_log(self, trainer: "Trainer", kind: str, values: dict[str, Any]) -> None:
        if kind != "validation":
            return
        loss = min(values["loss"], values.get("average_loss", math.inf))
        self._failed = 0 if loss < self._best else self._failed + 1
        self._best = min(self._best, loss)
        self._end_if_due(trainer)

    def _end_if_due(self, trainer: "Trainer") -> None:
        if 0 < self._patience <= self._failed:
            trainer.end(f"{self._failed} validations without a lower loss")

    def state_dict(self) -> dict[str, Any]:
        return {"best": None if self._best == math.inf else self._best, "failed": self._failed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best = math.inf if state["best"] is None else state["best"]
        self._failed = state["failed"]
