"""mixture.toml: several data sets, the weight of each, and how the weights change over a run."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from ant5m.data.shares import Shares, make_shares
from ant5m.errors import UserError
from ant5m.files import read_toml, what_and_where

SUFFIX = ".toml"
MANY_EPOCHS = 4
"""Repeating a text so often is nearly as good as new text; more is worth less and less.
Source: Muennighoff et al., "Scaling Data-Constrained Language Models", 2023."""

LARGEST_WEIGHT = 1e9
Share = Annotated[float, Meta(ge=0, le=1)]


class _Source(Struct, forbid_unknown_fields=True):
    data: str
    weight: float


class _Phase(Struct, forbid_unknown_fields=True, rename={"start": "from", "end": "to"}):
    start: Share
    weights: dict[str, float]
    end: Share = 1.0


class _File(Struct, forbid_unknown_fields=True):
    sources: dict[str, _Source]
    phases: list[_Phase] = []


class _KeptPhase(Struct, rename={"start": "from"}):
    start: Share
    weights: dict[str, Annotated[float, Meta(ge=0, le=LARGEST_WEIGHT)]]


class _Kept(Struct):
    """A mixture in a run's config.json."""

    sources: Annotated[dict[str, str], Meta(min_length=1)]
    phases: Annotated[list[_KeptPhase], Meta(min_length=1)]

    def __post_init__(self) -> None:
        for phase in self.phases:
            if list(phase.weights) != list(self.sources) or not any(phase.weights.values()):
                raise ValueError("each phase must have a weight for each source, one of them above 0")
        starts = [phase.start for phase in self.phases]
        if starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError("the phases must begin at 0, and one behind the other")


@dataclass(frozen=True)
class Phase:
    """A part of a run."""

    start: float
    """as a share of the run; it lasts until the next one starts"""
    weights: tuple[float, ...]
    """of the sources, in their order; their sum is above 0"""


@dataclass(frozen=True)
class Mixture:
    """The content of a mixture.toml."""

    names: tuple[str, ...]
    """of the sources"""
    data: tuple[str, ...]
    """of each: a folder of shards, or text as `ant5m.data.corpus.Corpus.open` takes it"""
    phases: tuple[Phase, ...]
    """one behind the other, from 0 to the end of the run"""

    @classmethod
    def read(cls, file: Path, folder: Path | None = None) -> "Mixture":
        """`folder`: what paths in it are relative to; default: where the file lies.

        Raises `UserError` with one line about the first thing that is wrong.
        """
        parsed = read_toml(file, _File)
        try:
            return _checked(parsed, folder or file.parent)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def shares(self, total: int, batch: int) -> Shares:
        """For a run of `total` sequences in steps of `batch`."""
        return make_shares([(phase.start, phase.weights) for phase in self.phases], total, batch)

    def at(self, data: Sequence[str]) -> "Mixture":
        """The same, its data elsewhere."""
        return dataclasses.replace(self, data=tuple(data))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        phases = [
            {"from": phase.start, "weights": dict(zip(self.names, phase.weights, strict=True))}
            for phase in self.phases
        ]
        return {"sources": dict(zip(self.names, self.data, strict=True)), "phases": phases}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Mixture":
        """The inverse of `to_dict`. Raises `UserError` where a field is missing or impossible."""
        try:
            kept = msgspec.convert(values, _Kept)
        except msgspec.ValidationError as error:
            raise UserError(f"mixture: {what_and_where(error)}") from None
        phases = tuple(Phase(phase.start, tuple(phase.weights.values())) for phase in kept.phases)
        return cls(tuple(kept.sources), tuple(kept.sources.values()), phases)

    def describe(self) -> list[str]:
        """A line for each phase, for people."""
        ends = [*(phase.start for phase in self.phases[1:]), 1.0]
        return [
            f"{phase.start:.4g} to {end:.4g} of the run: "
            + ", ".join(
                f"{name} {weight / sum(phase.weights):.1%}"
                for name, weight in zip(self.names, phase.weights, strict=True)
                if weight
            )
            for phase, end in zip(self.phases, ends, strict=True)
        ]


def is_mixture(name: str) -> bool:
    """Whether what `--data` names is a mixture.toml."""
    return not _is_no_path(name) and name.lower().endswith(SUFFIX)


def _checked(file: _File, folder: Path) -> Mixture:
    if not file.sources:
        raise UserError("it names no sources: write a table [sources.NAME] with data and weight for each")
    for name in file.sources:
        if not re.fullmatch(r"[\w.-]{1,40}", name):
            raise UserError(f"sources.{name!r}: a name has 1 to 40 letters, digits, dots, - or _")
    base = {name: source.weight for name, source in file.sources.items()}
    for name, weight in [*base.items(), *(one for phase in file.phases for one in phase.weights.items())]:
        if not 0 <= weight <= LARGEST_WEIGHT:
            raise UserError(f"the weight of {name} must be a number from 0 on, not {weight}")
    phases = tuple(Phase(start, _weights(base, changed)) for start, changed in _spans(file.phases))
    for index, name in enumerate(base):
        if not any(phase.weights[index] for phase in phases):
            raise UserError(f"sources.{name} has weight 0 in the whole run: leave it out")
    data = tuple(_place(source.data, folder) for source in file.sources.values())
    if len(set(data)) < len(data):
        twice = next(one for one in data if data.count(one) > 1)
        raise UserError(
            f"two sources have the same data, {twice}: give them one name and the sum of the weights"
        )
    return Mixture(tuple(base), data, phases)


def _spans(phases: Sequence[_Phase]) -> list[tuple[float, dict[str, float]]]:
    """Where each part of the run starts, and the weights that it changes."""
    spans: list[tuple[float, dict[str, float]]] = []
    reached = 0.0
    for phase in sorted(phases, key=lambda phase: phase.start):
        if phase.start >= phase.end:
            raise UserError(
                f"a phase from {phase.start} to {phase.end} is empty: its end must be behind its start"
            )
        if phase.start < reached:
            raise UserError(f"phases overlap: one ends at {reached}, the next one starts at {phase.start}")
        if phase.start > reached:
            spans.append((reached, {}))
        spans.append((phase.start, phase.weights))
        reached = phase.end
    return spans if reached == 1 else [*spans, (reached, {})]


def _weights(base: dict[str, float], changed: dict[str, float]) -> tuple[float, ...]:
    unknown = [name for name in changed if name not in base]
    if unknown:
        raise UserError(
            f"a phase has a weight for '{unknown[0]}', which is not a source ({', '.join(base)} are)"
        )
    weights = {**base, **changed}
    if not any(weights.values()):
        raise UserError("all weights are 0: give a source a weight above 0")
    return tuple(weights.values())


def _place(data: str, folder: Path) -> str:
    """Relative paths begin where the file lies."""
    return data if _is_no_path(data) else os.path.normpath(folder / data)


def _is_no_path(name: str) -> bool:
    return name == "builtin" or name.startswith("hf:")
