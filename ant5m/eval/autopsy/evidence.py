"""What an autopsy collects: findings, with their uncertainty, and the text that they were seen on."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ant5m.data.shards import Shards
from ant5m.errors import UserError
from ant5m.eval.autopsy import forward
from ant5m.eval.intervals import t_quantile
from ant5m.model.ant import Ant

Step = Callable[[str], object]
"""called with what is being looked at"""


@dataclass(frozen=True)
class Finding:
    """One number about the model, and how to read it."""

    topic: str
    value: float | None
    number: str
    """the same for people, with its uncertainty"""
    comparison: str
    """the baseline: what the number would be by chance, without training, or in the text"""
    meaning: str
    limits: str
    """what it does not show"""
    summary: str = ""
    """a few words for the summary at the beginning; only of the main findings"""


@dataclass(frozen=True)
class Section:
    """The findings about one part of the model."""

    name: str
    findings: list[Finding]
    figures: dict[str, Figure]
    """file name without its ending -> picture"""
    data: dict[str, Any] = field(default_factory=dict)
    """the values behind the pictures, plain"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        findings = [dataclasses.asdict(finding) for finding in self.findings]
        return {"findings": findings, "data": self.data}


@dataclass(frozen=True)
class Estimate:
    """A mean and the half width of its 95 % interval."""

    mean: float
    half: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}"

    def to_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "half": self.half}

    @property
    def clear(self) -> bool:
        """Zero lies outside the interval."""
        return abs(self.mean) > self.half


def within(value: Estimate) -> str:
    """A share or ratio with its uncertainty."""
    return f"{value.mean:.2f} ± {value.half:.2f}"


def estimate(values: Tensor) -> Estimate:
    """Mean of values [W, N] of a window's tokens or heads, with a t-interval over the windows.

    Tokens of a window are of one document or a few: blocks of 64 of them, taken as independent, gave
    intervals that held the mean of all windows 57 % of the time, not 95 (`ant-5m`, 8 of 165 windows).
    """
    windows = values.double().mean(1)
    return Estimate(windows.mean().item(), half_widths(windows).item())


def half_widths(values: Tensor) -> Tensor:
    """Half the width of the 95 % interval of each mean over windows, [...] of values [W, ...]."""
    count = len(values)
    if count < 2:
        return torch.full(values.shape[1:], float("inf"), dtype=torch.float64)
    return t_quantile(count - 1) * values.double().std(0) / count**0.5


@dataclass(frozen=True)
class Windows:
    """Held-out windows, and what the model makes of them untouched."""

    input_ids: Tensor
    """int64 [W, T]"""
    targets: Tensor
    """int64 [W, T]"""
    streams: list[Tensor]
    """the residual stream [W, T, C] before each layer"""
    read: Tensor
    """what the head reads, [W, T, C]"""
    losses: Tensor
    """nats, [W, T]"""

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    def spread(self, count: int) -> Tensor:
        """The inputs of so many windows [W, T], spread evenly over them all."""
        chosen = np.linspace(0, len(self.input_ids) - 1, min(count, len(self.input_ids))).astype(int)
        return self.input_ids[chosen.tolist()]

    def cost(self, net: Ant, attend: forward.Attend, first: int = 0) -> Estimate:
        """How much the loss rises, in nats per token, when heads attend otherwise from layer `first` on."""
        read = forward.hidden(net, self.streams[first], attend, first)
        return estimate(forward.token_losses(net, read, self.targets) - self.losses)


def windows(shards: Shards, length: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [W, T] of about `tokens` tokens, in windows spread evenly over a split.

    Raises `UserError` when the split does not fill two windows.
    """
    there = (shards.num_tokens - 1) // length
    if there < 2:
        raise UserError(
            f"{shards.num_tokens:,} tokens are too little text for an autopsy: two windows of {length:,} are "
            "the least (give more with --data)"
        )
    count = max(2, min(there, tokens // length))
    starts = np.linspace(0, there - 1, count).astype(np.int64) * length
    rows = np.stack([shards.tokens[start : start + length + 1] for start in starts.tolist()])
    ids = torch.from_numpy(rows.astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def sample(net: Ant, input_ids: Tensor, targets: Tensor) -> Windows:
    """The untouched model on windows."""
    attend = forward.Attention.of(net, input_ids.shape[1])
    start = net.model.embed_tokens(input_ids)
    streams = [start, *forward.residuals(net, start, attend)]
    read = forward.normed(net.model.norm, streams[-1])
    return Windows(input_ids, targets, streams[:-1], read, forward.token_losses(net, read, targets))


def untrained(net: Ant) -> Ant:
    """A net of the same shape that has learned nothing; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Ant(net.config).to(net.device)


def write_values(axis: Axes, values: Tensor, bright: float) -> None:
    """Each value [rows, columns] into its cell of an image; black where the color is brighter than half."""
    for (row, column), value in np.ndenumerate(values.numpy()):
        color = "black" if value > bright else "white"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=color)
