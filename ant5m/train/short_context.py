"""Short contexts first: the first part of a run trains on pieces of its sequences.

A step then takes as many tokens as ever, of the same sequences, in less time, because attention reads less;
and early on a model makes no use of a long context yet. Source: Press et al., "Shortformer: Better Language
Modeling Using Shorter Inputs", 2021.
"""

from typing import TYPE_CHECKING

from ant5m.train.callback import Callback

if TYPE_CHECKING:
    from ant5m.train.settings import Settings
    from ant5m.train.trainer import Trainer


class ShortContext(Callback):
    """Cuts the sequences into pieces of `short_context` tokens until its share of the run is over."""

    everywhere = True

    def __init__(self, settings: "Settings"):
        self._settings = settings
        self._end = round(settings.short_share * settings.steps)
        self._short = bool(settings.short_context)
        self._trainer: Trainer | None = None

    def on_start(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        if self.is_due(trainer.step):
            self.act(trainer)
        elif self._short:
            trainer.use_context(self._settings.short_context)

    def is_due(self, step: int) -> bool:
        position = self._trainer.position if self._trainer else 0  # of a run that a time limit ends
        return self._short and max(step, position) >= self._end

    def act(self, trainer: "Trainer") -> None:
        self._short = False
        trainer.use_context(self._settings.sequence_length)
