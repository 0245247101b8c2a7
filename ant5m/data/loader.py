"""Batches out of shards: a seeded permutation for training, reading order for evaluation.

Sequence i of a split is tokens [i*T, i*T + T); its targets are the same shifted by one. Document borders are
not special: the end-of-text id between documents is a token like any other.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ant5m.data.order import ORDERS, Order, OrderName
from ant5m.data.resident import ResidentTokens
from ant5m.data.shards import IGNORE, Shards, Tokens
from ant5m.errors import UserError

Batch = tuple[torch.Tensor, torch.Tensor]


class Loader:
    """Endless training batches. Every sequence comes exactly once an epoch, in an order new for each epoch.

    The state is the number of sequences that all ranks together have taken, so a run may be resumed with
    another batch size or number of ranks. A batch at the end of an epoch is filled up from the next one.
    """

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        resident: torch.device | None = None,
    ) -> None:
        """Each of `world_size` ranks takes its own `batch_size` rows of every step. With `resident` the split
        is copied to that device, and batches are made there.

        Raises `UserError` when the split is shorter than one sequence and the target of its last token.
        """
        if batch_size < 1 or sequence_length < 1 or seed < 0 or not 0 <= rank < world_size:
            raise UserError(
                f"batch_size ({batch_size}) and sequence_length ({sequence_length}) must be above 0, "
                f"seed ({seed}) not below 0, and rank ({rank}) below world_size ({world_size})"
            )
        self.num_sequences = (shards.num_tokens - 1) // sequence_length
        if self.num_sequences < 1:
            raise UserError(
                f"the {shards.split} split of {shards.folder} has {shards.num_tokens:,} tokens, too few "
                f"for one sequence of {sequence_length:,}: pack more text or use a shorter sequence"
            )
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.masked = shards.tokens.masked
        """whether some targets are `IGNORE`"""
        self._tokens = shards.tokens
        self._resident = None if resident is None else ResidentTokens(shards.tokens, resident)
        self._fingerprint = shards.fingerprint
        self._rank = rank
        self._world_size = world_size
        self._position = 0
        self._order = Order(self.num_sequences, [seed])

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the first sequence of the next batch."""
        return self._position // self.num_sequences

    def next(self) -> Batch:
        """The next (input_ids, targets), int64 [batch_size, sequence_length], new tensors each time."""
        first = self._position + self._rank * self.batch_size
        starts = self._starts(np.arange(first, first + self.batch_size))
        self._move(self._position + self.batch_size * self._world_size)
        if self._resident is not None:
            return self._resident.gather(starts, self.sequence_length)
        return _gather(self._tokens, starts, self.sequence_length)

    def reach(self, place: int) -> None:
        """By the clock the run is as far as if all ranks together had taken so many sequences. Without phases
        nothing follows from it."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON: where the loader is, and on what data."""
        return {
            "position": self._position,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "data": self._fingerprint,
            "order": self._order.name,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken. Raises `UserError` when data, seed or length differ."""
        current = self.state_dict()
        state = {"order": "permutation", **state}  # the only one there was, in states that do not name it
        position = state.get("position")
        whole = set(state) == set(current) and isinstance(position, int) and position >= 0
        if not whole or state["order"] not in ORDERS:
            raise UserError("the saved position in the data is damaged: resume from another checkpoint")
        if state["data"] != current["data"]:
            raise UserError(
                "the shards are not those of the checkpoint: resume with the same data, or start a new run"
            )
        for name in ("seed", "sequence_length"):
            if state[name] != current[name]:
                raise UserError(
                    f"the checkpoint has {name} {state[name]}, not {current[name]}: resume with the same one"
                )
        self._use_order(state["order"])
        self._position = state["position"]

    def _starts(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first tokens of the sequences at these positions."""
        return self._order.at(positions) * self.sequence_length

    def _move(self, position: int) -> None:
        self._position = position

    def _use_order(self, name: OrderName) -> None:
        if name != self._order.name:
            self._order = Order(self.num_sequences, [self.seed], name)


def document_starts(input_ids: torch.Tensor, eos_token_id: int) -> torch.Tensor:
    """Where the document of each token of input_ids [B, T] starts in its row, int64 [B, T].

    The end-of-text id belongs to the document that it ends. What a row begins with counts as a document.
    """
    following = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    places = following * (input_ids[:, :-1] == eos_token_id)
    return torch.nn.functional.pad(places, (1, 0)).cummax(1).values


def sequences(
    shards: Shards, batch_size: int, sequence_length: int, limit_tokens: int | None = None
) -> Iterator[Batch]:
    """A split in reading order: every token is a target exactly once, the first one behind an end-of-text.

    Yields (input_ids, targets), int64 [rows, sequence_length] with rows <= batch_size. What is missing in the
    last row is padded: inputs with the end-of-text id, targets with -100. With `limit_tokens` there are only
    so many targets, in windows that are spread evenly over the split, always the same ones.
    """
    if batch_size < 1 or sequence_length < 1 or (limit_tokens is not None and limit_tokens < 1):
        raise UserError("batch_size, sequence_length and limit_tokens must be above 0")
    there = shards.num_tokens
    scored = there if limit_tokens is None else min(limit_tokens, there)
    tokens = shards.tokens.behind(shards.eos_token_id)
    count, full = -(-scored // sequence_length), there // sequence_length
    numbers = np.arange(count) if count > full else np.linspace(0, full - 1, count).astype(np.int64)
    starts = numbers * sequence_length
    whole, rest = divmod(scored, sequence_length)
    for first in range(0, whole, batch_size):
        yield _gather(tokens, starts[first : min(first + batch_size, whole)], sequence_length)
    if rest:
        yield _padded(tokens, int(starts[-1]), rest, sequence_length, shards.eos_token_id)


def _padded(tokens: Tokens, start: int, rest: int, length: int, filler: int) -> Batch:
    """One row [1, length] whose first `rest` tokens have targets."""
    inputs = torch.full((1, length), filler, dtype=torch.int64)
    targets = torch.full((1, length), IGNORE, dtype=torch.int64)
    window = torch.from_numpy(tokens[start : start + rest + 1].astype(np.int64))
    inputs[0, :rest] = window[:-1]
    counted = torch.from_numpy(tokens.counted(start + 1, start + rest + 1))
    targets[0, :rest] = torch.where(counted, window[1:], IGNORE)
    return inputs, targets


def _gather(tokens: Tokens, starts: NDArray[np.int64], length: int) -> Batch:
    inputs = torch.empty(len(starts), length, dtype=torch.int64)
    targets = torch.empty_like(inputs)
    tokens.gather(starts, length, inputs.numpy(), targets.numpy())
    return inputs, targets
