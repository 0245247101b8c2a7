"""The matrices of the layers in the dtype of products, for one step.

They lie one behind the other in memory, in the order of the model: so q, k and v are one matrix for the
product that takes them together, as gate and up are, and nothing is joined in a layer. Zeros bring the width
of SwiGLU to a multiple of 8 here, once, and not in the stored weights: the fastest products of 16-bit numbers
take rows of whole 16 bytes. In a step of `ant-5m` 23 small kernels do what 121 did.
"""

import math
from typing import Any

import torch
from torch import nn

from ant5m.train.optimizer import is_hidden

_ALIGNED = 8
"""16-bit numbers in 16 bytes"""


def half_precision_weights(net: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """{name: weight in `dtype`} of the matrices of `net`'s layers, for `torch.func.functional_call`.

    The gradients of the parameters come in their own dtype.
    """
    matrices = {name: p for name, p in net.named_parameters() if is_hidden(name, p)}
    shapes = [_padded(name, *p.shape) for name, p in matrices.items()]
    weights = _Cast.apply(dtype, shapes, *matrices.values())  # type: ignore[no-untyped-call]
    return dict(zip(matrices, weights, strict=True))


def _padded(name: str, rows: int, columns: int) -> tuple[int, int]:
    if name.endswith(("gate_proj.weight", "up_proj.weight")):
        rows += -rows % _ALIGNED
    if name.endswith("down_proj.weight"):
        columns += -columns % _ALIGNED
    return rows, columns


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, shapes: list[tuple[int, int]], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.likes = [torch.empty_like(x, device="meta") for x in tensors]
        sizes = [math.prod(shape) for shape in shapes]
        places = [size + -size % _ALIGNED for size in sizes]
        memory = torch.zeros(sum(places), dtype=dtype, device=tensors[0].device)
        parts = memory.split(places)
        copies = [part[:size].view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]
        _copy([_corner(copy, x) for copy, x in zip(copies, tensors, strict=True)], list(tensors))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wide = [torch.empty_like(like, device=g.device) for like, g in zip(ctx.likes, grads, strict=True)]
        _copy(wide, [_corner(g, like) for g, like in zip(grads, ctx.likes, strict=True)])
        return None, None, *wide


def _corner(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return matrix[: like.shape[0], : like.shape[1]]


def _copy(to: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """One launch for all that lie alike in memory; each of the others is one by itself."""
    alike = [x.stride() == y.stride() for x, y in zip(to, tensors, strict=True)]
    for group in (True, False):
        mine = [i for i, same in enumerate(alike) if same == group]
        if mine:
            torch._foreach_copy_([to[i] for i in mine], [tensors[i] for i in mine])
