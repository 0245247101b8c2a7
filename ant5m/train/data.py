"""What a run trains on: both splits of its shards and the tokenizer that they were packed with."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ant5m.console import stderr
from ant5m.data.loader import Loader
from ant5m.data.mixture import MANY_EPOCHS, Mixture
from ant5m.data.mixture_loader import MixtureLoader
from ant5m.data.shards import Shards
from ant5m.data.shares import Shares
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.model.checkpoint import check_tokenizer
from ant5m.ranks import Ranks
from ant5m.train.plan import keeps_tokens
from ant5m.train.run import Run
from ant5m.train.settings import Settings


@dataclass(frozen=True)
class Source:
    """One data set of a mixture."""

    name: str
    train: Shards
    validation: Shards


@dataclass(frozen=True)
class TrainingData:
    train: Shards
    """of a mixture: of all its sources, one behind the other"""
    validation: Shards
    tokenizer: Tokenizer
    mixture: Mixture | None = None
    sources: tuple[Source, ...] = ()
    """of the mixture"""

    @classmethod
    def open(cls, run: Run, verify: bool = True) -> "TrainingData":
        """`verify`: compare the shards' hashes. Raises `UserError` where the parts do not belong together,
        or to the run."""
        sources = _open_sources(run.mixture, verify) if run.mixture else ()
        if sources:
            train = Shards.join([source.train for source in sources])
            validation = Shards.join([source.validation for source in sources])
        else:
            train = Shards.open(run.shards, verify=verify)
            validation = Shards.open(run.shards, "validation", verify)
        known = run.data.get("fingerprint")
        if known not in (None, train.fingerprint):
            raise UserError(f"{train.folder} is not the data of {run.folder}: resume with the same data")
        tokenizer = Tokenizer.load(run.tokenizer_source)
        if not tokenizer.has_fingerprint(train.tokenizer_fingerprint):
            given = run.tokenizer_source
            raise UserError(
                f"{train.folder} was packed with another tokenizer than {given}: pack the text again"
            )
        check_tokenizer(tokenizer, run.model)
        if run.config.document_mask:
            _check_documents(train)
        _warn_of_unused_rows(run, tokenizer)
        return cls(train, validation, tokenizer, run.mixture, sources)

    @property
    def held_out(self) -> dict[str, Shards]:
        """The validation split of each source, by name; without a mixture the one there is."""
        return {source.name: source.validation for source in self.sources} or {"": self.validation}

    def make_loader(self, settings: Settings, device: torch.device, ranks: Ranks) -> Loader:
        """For this rank's share of every batch."""
        resident = device if keeps_tokens(self.train.num_tokens, device) else None
        batch, length = settings.batch_size // ranks.size, settings.sequence_length
        more = (batch, length, settings.seed, ranks.rank, ranks.size, resident)
        if not self.mixture:
            return Loader(self.train, *more)
        shares = self._shares(settings)
        return MixtureLoader([source.train for source in self.sources], self.train, shares, *more)

    def _shares(self, settings: Settings) -> Shares:
        assert self.mixture
        return self.mixture.shares(settings.steps * settings.batch_size, settings.batch_size)

    def introduce(self, settings: Settings) -> None:
        """Say what each source of a mixture will be in the run, and warn of those that come very often."""
        if not self.mixture:
            return
        sequences = settings.steps * settings.batch_size
        planned = self._shares(settings).planned(sequences)
        lines = []
        for source, count in zip(self.sources, planned, strict=True):
            epochs = self.epochs(source, count, settings)
            lines.append(
                f"{source.name}: {count / sequences:.1%}, {epochs:.2f} epochs of {source.train.num_tokens:,} "
                "tokens"
            )
            if epochs > MANY_EPOCHS:
                warnings.warn(
                    f"{source.name} comes {epochs:.1f} times: beyond about {MANY_EPOCHS} epochs repeated "
                    "text is worth less and less. Lower its weight, train shorter, or give more of it",
                    stacklevel=2,
                )
        if len(self.mixture.phases) > 1:
            lines += self.mixture.describe()
        stderr().print("\n".join(lines), markup=False)

    def epochs(self, source: Source, sequences: float, settings: Settings) -> float:
        """That so many of its sequences are."""
        return sequences / ((source.train.num_tokens - 1) // settings.sequence_length)

    def describe(self) -> dict[str, Any]:
        """For the run's config.json."""
        counts = {"train": self.train.counts, "validation": self.validation.counts}
        sources = {
            source.name: {"train": source.train.counts, "validation": source.validation.counts}
            for source in self.sources
        }
        return {
            "fingerprint": self.train.fingerprint,
            **counts,
            **({"sources": sources} if sources else {}),
            "held_out": "documents" if self.validation.holds_out_documents else "pieces",
        }


def _open_sources(mixture: Mixture, verify: bool) -> tuple[Source, ...]:
    return tuple(
        Source(name, Shards.open(folder, verify=verify), Shards.open(folder, "validation", verify))
        for name, folder in zip(mixture.names, mixture.data, strict=True)
    )


def _check_documents(shards: Shards) -> None:
    """Refuse conversations with end-of-text tokens inside: the mask takes each for the end of a document."""
    if shards.tokens.masked and sum(1 for _ in shards.documents()) > shards.counts["documents"]:
        raise UserError(
            f"--document-mask would cut the conversations of {shards.folder}: their chat template puts the "
            "end-of-text token behind each reply. Leave it out"
        )


def _warn_of_unused_rows(run: Run, tokenizer: Tokenizer) -> None:
    unused = run.model.vocab_size - tokenizer.vocab_size
    if unused > run.model.vocab_size / 10:
        warnings.warn(
            f"the model has a row for {run.model.vocab_size:,} tokens, the tokenizer only "
            f"{tokenizer.vocab_size:,}: {unused * run.model.hidden_size:,} parameters can never be used. "
            "Choose a --model with as many rows, or learn a larger vocabulary",
            stacklevel=2,
        )
