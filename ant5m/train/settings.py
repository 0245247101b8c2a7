"""What a run does, decided in one place: what the flags ask, over what the run's file says, completed by what
the data, the device and the time allow.

After that nothing depends on how fast the machine happens to be, and a resumed run repeats exactly.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ant5m.errors import UserError
from ant5m.model.config import ModelConfig
from ant5m.ranks import Ranks
from ant5m.train.config import TrainConfig, check_steps
from ant5m.train.pace import LARGEST_RESERVE, finish_seconds
from ant5m.train.plan import batch_for_steps, batch_for_tokens, default_learning_rate, micro_batch

OVERRIDABLE = (
    "device",
    "processes",
    "precision",
    "kernels",
    "micro_batch_size",
    "data",
    "max_minutes",
    "push",
    "push_every",
    "track",
)
"""What may be overridden when a run is resumed: where and how it computes, where its data lie now, until
when, who is told."""

BUILTIN_MINUTES = 10.0
"""of training when nothing else is said"""
BUILTIN_EPOCHS = 8
"""and at most this often over the built-in text: more is memorized"""
TIME_FOR_TRAINING = 0.9
"""of a time limit, without what is reserved for the end; the rest is for validation, samples, checkpoints"""


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a run trains; nothing is open. The fields that `TrainConfig` has too are
    documented there.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    sequence_length: int
    short_context: int
    """0: never"""
    short_share: float
    document_mask: bool

    optimizer: str
    learning_rate: float
    muon_learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    schedule: str
    warmup: float
    decay: float
    final_rate: float

    z_loss: float
    ema: float
    """0: no average"""

    loop_loss: str
    loop_loss_weight: float
    loop_loss_share: float

    seed: int
    device: torch.device
    precision: str
    """fp32, bf16 or fp16"""

    eval_every: int
    eval_tokens: int
    early_stop: int
    """0: never"""
    sample_every: int
    """0: never"""
    checkpoint_every: int
    keep_last: int

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.steps * self.batch_size * self.sequence_length

    def fix(self, config: TrainConfig) -> TrainConfig:
        """`config` with what it left open as it was decided here, for the run's file. Device and precision
        stay as they were asked for: a resumed run may be elsewhere."""
        return dataclasses.replace(config, tokens=None, **{name: getattr(self, name) for name in _DECIDED})


_DECIDED = (
    "steps",
    "learning_rate",
    "batch_size",
    "micro_batch_size",
    "sequence_length",
    "eval_every",
    "eval_tokens",
    "sample_every",
    "checkpoint_every",
)


def override(kept: TrainConfig, flags: TrainConfig) -> TrainConfig:
    """What a resumed run is asked to do: its own config, with what `flags` override.

    Raises `UserError` when they ask for more than `OVERRIDABLE` (a flag at its default counts as not given).
    """
    given = {field.name for field in dataclasses.fields(flags) if _given(flags, field)} - {"resume"}
    refused = [field.name for field in dataclasses.fields(flags) if field.name in given - {*OVERRIDABLE}]
    if refused:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        raise UserError(f"a resumed run keeps its own settings: leave out {listed} (or start a new run)")
    if not kept.data and "data" in given:
        raise UserError(f"{flags.resume} was made with the built-in text: resume it without --data")
    # A time limit holds for one call, unless the number of steps is yet to be decided by it.
    limit = kept.max_minutes if kept.steps is None else None
    return dataclasses.replace(
        kept, **{"max_minutes": limit, **{name: getattr(flags, name) for name in given}}
    )


def _given(config: TrainConfig, field: "dataclasses.Field[Any]") -> bool:
    return bool(getattr(config, field.name) != field.default)


def resolve(
    config: TrainConfig,
    model: ModelConfig,
    num_tokens: int,
    device: torch.device,
    precision: str,
    seconds_per_token: Callable[[], float],
    deadline: float | None = None,
    ranks: Ranks | None = None,
    validation_tokens: int = 0,
) -> Settings:
    """Decide what `config` leaves open, alike on all ranks.

    Args:
        num_tokens: of the training split.
        precision: that the device trains in.
        seconds_per_token: measures the training speed; called only when time decides.
        deadline: of `max_minutes`, on `time.monotonic()`.
        validation_tokens: evaluated when the training is over, before the deadline.
        ranks: each takes an equal part of every batch; the one with the least memory decides the micro-batch.

    Raises `UserError` where the batch that was asked for cannot be shared out.
    """
    ranks = ranks or Ranks()
    length = model.max_position_embeddings
    if config.short_context and length % config.short_context:
        raise UserError(
            f"--short-context ({config.short_context:,}) must divide the {length:,} tokens of a sequence"
        )
    steps, batch = config.steps, config.batch_size
    least = (config.micro_batch_size or 1) * ranks.size
    if batch is not None and batch % least:
        each = f" of --micro-batch-size {config.micro_batch_size}" if config.micro_batch_size else ""
        raise UserError(
            f"--batch-size ({batch}) must be a multiple of {least} for {ranks.size} processes{each}: "
            f"take {_multiple(batch, least)}"
        )
    if steps is None:
        tokens = config.tokens or _tokens(config, num_tokens, seconds_per_token, deadline, validation_tokens)
        batch = batch or _multiple(batch_for_tokens(tokens, length), least)
        steps = max(1, round(tokens / (batch * length)))
    check_steps(steps)
    batch = batch or _multiple(batch_for_steps(steps, length), least)
    rows = config.micro_batch_size
    if rows is None:
        share = batch // ranks.size
        rows = micro_batch(model, share, length, device, precision, num_tokens, config.loop_loss)
        (negative,) = ranks.most(-rows)
        rows = -negative
    tenth = max(1, steps // 10)
    eval_every = config.eval_every or tenth
    decided = {
        "steps": steps,
        "batch_size": batch,
        "micro_batch_size": rows,
        "sequence_length": length,
        "learning_rate": config.learning_rate or default_learning_rate(config),
        "eval_every": eval_every,
        "eval_tokens": config.eval_tokens or max(length, round(0.015 * steps * batch * length)),
        "sample_every": eval_every if config.sample_every is None else config.sample_every,
        "checkpoint_every": config.checkpoint_every or tenth,
    }
    asked = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    here = {"device": device, "precision": precision}
    # Rank 0's, because clocks differ.
    return Settings(**{**asked, **ranks.share(decided), **here})


def _multiple(batch: int, least: int) -> int:
    """`batch`, rounded up to a multiple of `least`."""
    return -(-batch // least) * least


def _tokens(
    config: TrainConfig,
    num_tokens: int,
    seconds_per_token: Callable[[], float],
    deadline: float | None,
    validation_tokens: int,
) -> int:
    if deadline is None and config.data:
        return num_tokens
    speed = seconds_per_token()
    seconds = 60 * BUILTIN_MINUTES
    if deadline is not None:  # what the preparation took is gone from it
        left = max(0.0, deadline - time.monotonic())
        seconds = left - min(finish_seconds(validation_tokens, speed), LARGEST_RESERVE * left)
    affordable = int(seconds * TIME_FOR_TRAINING / speed)
    return affordable if config.data else min(affordable, BUILTIN_EPOCHS * num_tokens)
