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
from ant5m.train.config import TrainConfig, check_steps
from ant5m.train.plan import batch_for_steps, batch_for_tokens, default_learning_rate, micro_batch

OVERRIDABLE = (
    "device",
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
"""of a time limit; the rest is for validation, samples and checkpoints"""


@dataclass(frozen=True)
class Settings:
    """Everything that decides how a run trains; nothing is open. The fields that `TrainConfig` has too are
    documented there.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    sequence_length: int
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
    if kept.data is None and "data" in given:
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
) -> Settings:
    """Decide what `config` leaves open.

    Args:
        num_tokens: of the training split.
        precision: that the device trains in.
        seconds_per_token: measures the training speed; called only when time decides.
        deadline: of `max_minutes`, on `time.monotonic()`.
    """
    length = model.max_position_embeddings
    steps, batch = config.steps, config.batch_size
    if steps is None:
        tokens = config.tokens or _tokens(config, num_tokens, seconds_per_token, deadline)
        batch = batch or _multiple(batch_for_tokens(tokens, length), config.micro_batch_size)
        steps = max(1, round(tokens / (batch * length)))
    check_steps(steps)
    batch = batch or _multiple(batch_for_steps(steps, length), config.micro_batch_size)
    rows = config.micro_batch_size
    rows = rows or micro_batch(model, batch, length, device, precision, num_tokens, config.loop_loss)
    tenth = max(1, steps // 10)
    eval_every = config.eval_every or tenth
    decided = {
        "steps": steps,
        "batch_size": batch,
        "micro_batch_size": rows,
        "sequence_length": length,
        "learning_rate": config.learning_rate or default_learning_rate(config),
        "device": device,
        "precision": precision,
        "eval_every": eval_every,
        "eval_tokens": config.eval_tokens or max(length, round(0.015 * steps * batch * length)),
        "sample_every": eval_every if config.sample_every is None else config.sample_every,
        "checkpoint_every": config.checkpoint_every or tenth,
    }
    asked = {field.name: getattr(config, field.name) for field in dataclasses.fields(Settings)}
    return Settings(**{**asked, **decided})


def _multiple(batch: int, rows: int | None) -> int:
    """`batch`, rounded up to a multiple of a micro-batch that was asked for."""
    return batch if rows is None else -(-batch // rows) * rows


def _tokens(
    config: TrainConfig,
    num_tokens: int,
    seconds_per_token: Callable[[], float],
    deadline: float | None,
) -> int:
    if deadline is None and config.data is not None:
        return num_tokens
    speed = seconds_per_token()
    # What the preparation took is gone from a time limit.
    seconds = 60 * BUILTIN_MINUTES if deadline is None else max(0.0, deadline - time.monotonic())
    affordable = int(seconds * TIME_FOR_TRAINING / speed)
    return affordable if config.data is not None else min(affordable, BUILTIN_EPOCHS * num_tokens)
