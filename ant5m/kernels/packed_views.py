"""Tensors that are pieces of one: split and joined, and so are their gradients, without a copy where they lie
beside or above one another in memory already.
"""

from collections.abc import Sequence

import torch


class _Split(torch.autograd.Function):
    """For gate and up of `ant-5m` joining the gradients was 3.6 % of a training step on a CPU."""

    @staticmethod
    def forward(ctx, x, *sizes):
        return x.split(sizes, -1)

    @staticmethod
    def backward(ctx, *grads):
        whole = _side_by_side(grads)
        return (torch.cat(grads, -1) if whole is None else whole, *(None for _ in grads))


def split(x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """x.split(sizes, -1), whose gradient is not copied together when it was made in one piece."""
    # torch.compile sees no addresses, and joins gradients in its own way.
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    return x.split(sizes, -1) if plain else _Split.apply(x, *sizes)


def _side_by_side(parts):
    """The tensor that `parts` split along the last dimension, if they lie beside one another in memory."""
    first, offset = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != offset:
            return None
        offset += part.shape[-1]
    width = offset - first.storage_offset()
    if first.stride(-1) != 1 or first.stride(-2) != width:
        return None
    return first.as_strided((*first.shape[:-1], width), first.stride())


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *matrices):
        ctx.sizes = [len(matrix) for matrix in matrices]
        return matrices[0].as_strided((sum(ctx.sizes), matrices[0].shape[1]), matrices[0].stride())

    @staticmethod
    def backward(ctx, grad):
        return grad.split(ctx.sizes)


def join(*matrices: torch.Tensor) -> torch.Tensor:
    """torch.cat(matrices), for one product with all of them; a view where they lie above one another."""
    if torch.compiler.is_compiling() or not _above_one_another(matrices):
        return torch.cat(matrices)
    return _Join.apply(*matrices)


def _above_one_another(matrices):
    places = [(matrix.untyped_storage().data_ptr(), matrix.storage_offset()) for matrix in matrices]
    ends = [(storage, offset + m.numel()) for (storage, offset), m in zip(places, matrices, strict=True)]
    same = all(m.shape[1] == matrices[0].shape[1] and m.is_contiguous() for m in matrices)
    return same and places[1:] == ends[:-1]
