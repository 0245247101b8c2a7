"""Exports after so many words of text, as the BabyLM challenge asks for them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.export.card import ModelCard
from ant5m.export.huggingface import export
from ant5m.train.callback import Callback
from ant5m.train.settings import Settings

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


class ExportAtWords(Callback):
    """Writes a Hugging Face folder `chck_1M` (`chck_10M`, ...) as soon as the training has read so many
    words.

    The words that a step reads are counted by the mean over the training split, `words_per_token`.
    """

    def __init__(
        self,
        folder: Path,
        budgets: tuple[str, ...],
        settings: Settings,
        words_per_token: float,
        tokenizer: Tokenizer,
    ):
        self._folder, self._tokenizer = folder, tokenizer
        self._words_per_step = settings.batch_size * settings.sequence_length * words_per_token
        self._budgets = {f"chck_{budget}": parse_words(budget) for budget in budgets}

    def is_due(self, step: int) -> bool:
        return self._reached(step) != self._reached(step - 1)

    def act(self, trainer: "Trainer") -> None:
        for name in self._reached(trainer.step):
            if (self._folder / name).exists():
                continue
            card = ModelCard(name, data=f"{name.removeprefix('chck_')} words", tokens=trainer.tokens)
            export(trainer.net, self._tokenizer, self._folder / name, card)

    def on_end(self, trainer: "Trainer") -> None:
        self.act(trainer)

    def _reached(self, step: int) -> list[str]:
        words = step * self._words_per_step
        return [name for name, budget in self._budgets.items() if words >= budget]


def parse_words(budget: str) -> int:
    """1000000 of "1M". Raises `UserError` for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})([KMB])", budget)
    if not found:
        raise UserError(f"--checkpoint-words takes numbers like 1M, 10M or 500K, not {budget!r}")
    return int(found[1]) * UNITS[found[2]]
