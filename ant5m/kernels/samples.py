"""Arguments of the ops as a training step has them, for the check, the tests, the benchmarks and the tables
of resources.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    """Of a Llama and of what it reads. Unless told, those of `ant-5m` and of a few rows."""

    batch: int = 2
    # More than one tile, and not a whole number of them; a multiple of 16 as usual lengths are, because
    # Triton compiles for that.
    length: int = 144
    hidden: int = 128
    intermediate: int = 516
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 16
    vocab: int = 16_384


@dataclass(frozen=True)
class Draw:
    """Draws tensors of these sizes. `dtype` is that of activations and of the matrices that multiply them;
    the residual stream and the norms' weights are in fp32, unless `dtype` is float64."""

    sizes: Sizes = Sizes()
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    requires_grad: bool = False
    generator: torch.Generator = dataclasses.field(default_factory=lambda: torch.Generator().manual_seed(0))

    def activations(self, *tail: int, scale: float = 1.0) -> torch.Tensor:
        """[batch, length, *tail]"""
        return self._draw((self.sizes.batch, self.sizes.length, *tail), self.dtype, scale)

    def stream(self, *tail: int) -> torch.Tensor:
        """[batch, length, *tail] of the residual stream"""
        return self._draw((self.sizes.batch, self.sizes.length, *tail), self._wide, 1.0)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        """A weight whose products are about as large as their inputs."""
        return self._draw((rows, columns), self.dtype, columns**-0.5)

    def vector(self, size: int) -> torch.Tensor:
        """A norm's weight."""
        return self._draw((size,), self._wide, 1.0)

    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, fp32 [length, head size / 2]"""
        angle = torch.arange(self.sizes.length)[:, None] * torch.logspace(0, -3, self.sizes.head_size // 2)
        return angle.cos().to(self.device), angle.sin().to(self.device)

    def packed(self) -> tuple[torch.Tensor, list[int]]:
        """The product that makes q, k and v, [batch, length, ...], and how many heads each has."""
        heads = [self.sizes.heads, self.sizes.kv_heads, self.sizes.kv_heads]
        return self.activations(sum(heads) * self.sizes.head_size), heads

    def query_key_value(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q and k dense, as RoPE leaves them; v is a view of the product."""
        packed, heads = self.packed()
        q, k, v = packed.unflatten(-1, (sum(heads), -1)).split(heads, 2)
        return q.contiguous(), k.contiguous(), v

    def starts(self) -> torch.Tensor:
        """Of documents of 50 tokens, int64 [batch, length]."""
        starts = torch.arange(self.sizes.length) // 50 * 50
        return starts.repeat(self.sizes.batch, 1).to(self.device)

    def targets(self) -> torch.Tensor:
        """int64 [batch * length], some of them -100."""
        targets = torch.arange(self.sizes.batch * self.sizes.length) * 7 % self.sizes.vocab
        targets[::5] = -100
        return targets.to(self.device)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _draw(self, shape: Iterable[int], dtype: torch.dtype, scale: float) -> torch.Tensor:
        numbers = torch.randn(*shape, generator=self.generator) * scale
        return numbers.to(self.device, dtype).requires_grad_(self.requires_grad)


def tensors_of(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """Those among the arguments, and in lists of them."""
    found: list[torch.Tensor] = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += [y for y in x if isinstance(y, torch.Tensor)]
    return found


def with_tensors(arguments: Sequence[Any], tensors: Sequence[torch.Tensor]) -> tuple:
    """The arguments with others in the place of `tensors_of` them."""
    others = iter(tensors)

    def replaced(x):
        if isinstance(x, torch.Tensor):
            return next(others)
        return [replaced(y) for y in x] if isinstance(x, list | tuple) else x

    return tuple(replaced(x) for x in arguments)
