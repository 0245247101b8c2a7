"""What a run trains on: both splits of its shards and the tokenizer that they were packed with."""

import warnings
from dataclasses import dataclass
from typing import Any

from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.model.checkpoint import check_tokenizer
from ant5m.train.run import Run


@dataclass(frozen=True)
class TrainingData:
    train: Shards
    validation: Shards
    tokenizer: Tokenizer

    @classmethod
    def open(cls, run: Run, verify: bool = True) -> "TrainingData":
        """`verify`: compare the shards' hashes. Raises `UserError` where the parts do not belong together,
        or to the run."""
        train = Shards.open(run.shards, verify=verify)
        validation = Shards.open(run.shards, "validation", verify)
        known = run.data.get("fingerprint")
        if known not in (None, train.fingerprint):
            raise UserError(f"{run.shards} is not the data of {run.folder}: resume with the same data")
        given = run.config.tokenizer or run.shards / "tokenizer"
        folder = run.tokenizer if run.has_tokenizer else given
        tokenizer = Tokenizer.load(folder)
        if not tokenizer.has_fingerprint(train.tokenizer_fingerprint):
            raise UserError(
                f"{run.shards} was packed with another tokenizer than {folder}: pack the text again"
            )
        check_tokenizer(tokenizer, run.model)
        _warn_of_unused_rows(run, tokenizer)
        return cls(train, validation, tokenizer)

    def describe(self) -> dict[str, Any]:
        """For the run's config.json."""
        return {
            "fingerprint": self.train.fingerprint,
            "train": self.train.counts,
            "validation": self.validation.counts,
        }


def _warn_of_unused_rows(run: Run, tokenizer: Tokenizer) -> None:
    unused = run.model.vocab_size - tokenizer.vocab_size
    if unused > run.model.vocab_size / 10:
        warnings.warn(
            f"the model has a row for {run.model.vocab_size:,} tokens, the tokenizer only "
            f"{tokenizer.vocab_size:,}: {unused * run.model.hidden_size:,} parameters can never be used. "
            "Choose a --model with as many rows, or learn a larger vocabulary",
            stacklevel=2,
        )
