"""Batches out of several data sets, each with its share."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ant5m.data.loader import Loader
from ant5m.data.order import Order, OrderName
from ant5m.data.shards import Shards
from ant5m.data.shares import Shares
from ant5m.errors import UserError

DAMAGED = "the saved position in the mixture is damaged: resume from another checkpoint"


class MixtureLoader(Loader):
    """As `Loader`, from several sources: `shares` says which one each sequence comes from.

    Every source is a data set of its own: each of its sequences comes once in each of its epochs. Which
    sequence has which position depends on `shares` alone, so a run may be resumed with another batch size or
    number of ranks here, too; then a batch is no longer one block of `shares`.
    """

    def __init__(
        self,
        sources: Sequence[Shards],
        joined: Shards,
        shares: Shares,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        resident: torch.device | None = None,
    ) -> None:
        """`joined`: the `sources`, in order, end to end.

        Raises `UserError` when a source is shorter than one sequence and the target of its last token.
        """
        super().__init__(joined, batch_size, sequence_length, seed, rank, world_size, resident)
        self.sizes = [(source.num_tokens - 1) // sequence_length for source in sources]
        """sequences of each source"""
        for source, size in zip(sources, self.sizes, strict=True):
            if not size:
                raise UserError(
                    f"the {source.split} split of {source.folder} has {source.num_tokens:,} tokens, too few "
                    f"for one sequence of {sequence_length:,}: pack more text or use a shorter sequence"
                )
        self._first_tokens = np.cumsum([0, *(source.num_tokens for source in sources[:-1])])
        self._shares = shares
        seen = [[source.fingerprint for source in sources], shares.starts, shares.weights]
        self._fingerprint = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
        self._orders = self._make_orders("feistel")
        self._taken = [0] * len(sources)
        """of each source, in the blocks before the one in which the position lies"""

    @property
    def taken(self) -> list[int]:
        """Sequences that all ranks together have taken of each source."""
        inside = self._shares.deal(self._taken)[: self._position - sum(self._taken)]
        return [t + int((inside == source).sum()) for source, t in enumerate(self._taken)]

    def reach(self, place: int) -> None:
        """The phases up to there begin with the next block, where they have not begun."""
        start = sum(self._taken)
        now = start if start == self._position else start + self._shares.block
        self._shares = self._shares.begun(now, place)

    def state_dict(self) -> dict[str, Any]:
        order, shares = self._orders[0].name, self._shares
        more = {"order": order, "block": shares.block, "taken": self._taken, "starts": list(shares.starts)}
        return {**super().state_dict(), **more}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = {"starts": list(self._shares.starts), **state}  # as planned, in states that do not name them
        taken, block, position = (state.get(name) for name in ("taken", "block", "position"))
        if not _agree(taken, block, position, len(self.sizes)):
            raise UserError(DAMAGED)
        super().load_state_dict(state)
        if not _follow(state["starts"], len(self._shares.starts)):
            raise UserError(DAMAGED)
        starts = tuple(state["starts"])
        self._shares = dataclasses.replace(self._shares, block=state["block"], starts=starts)
        self._taken = list(state["taken"])

    def _starts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """`positions` follow each other, none of them before the present block."""
        starts: list[NDArray[np.int64]] = []
        taken, first = self._taken, sum(self._taken)
        while sum(taken) <= positions[-1]:
            sources = self._shares.deal(taken)
            block = np.empty_like(sources)
            for source, order in enumerate(self._orders):
                here = sources == source
                places = taken[source] + np.arange(here.sum())
                block[here] = self._first_tokens[source] + order.at(places) * self.sequence_length
            starts.append(block)
            taken = self._behind(taken)
        return np.concatenate(starts)[positions - first]

    def _move(self, position: int) -> None:
        super()._move(position)
        while sum(self._taken) + self._shares.block <= position:
            self._taken = self._behind(self._taken)

    def _behind(self, taken: list[int]) -> list[int]:
        return [t + count for t, count in zip(taken, self._shares.counts(taken), strict=True)]

    def _use_order(self, name: OrderName) -> None:
        if name != self._orders[0].name:
            self._orders = self._make_orders(name)

    def _make_orders(self, name: OrderName) -> list[Order]:
        return [Order(size, [self.seed, source], name) for source, size in enumerate(self.sizes)]


def _agree(taken: Any, block: Any, position: Any, sources: int) -> bool:
    """Whether these parts of a saved state are of a loader of so many sources."""
    if not isinstance(taken, list) or len(taken) != sources:
        return False
    if not all(isinstance(number, int) and number >= 0 for number in (*taken, block, position)):
        return False
    return sum(taken) <= position < sum(taken) + block


def _follow(starts: Any, phases: int) -> bool:
    """Whether these are the starts of so many phases."""
    if not isinstance(starts, list) or len(starts) != phases:
        return False
    return all(isinstance(start, int) for start in starts) and starts[0] == 0 and starts == sorted(starts)
