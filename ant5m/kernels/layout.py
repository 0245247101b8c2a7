"""What GPU kernels share about tensors: rows without gaps, autocast's dtype, q, k and v as parts of a row."""

import torch


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension has no gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [N, D] without gaps inside a row; a view where the strides allow it."""
    return dense(x.reshape(-1, x.shape[-1]))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """x's, or that of an autocast, which does not reach into an op of our own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _TurnedParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, turn, turn_back, qkv, cos, sin, heads):
        q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, 2)
        ctx.turn_back, ctx.shape = turn_back, qkv.shape
        ctx.save_for_backward(cos, sin)
        return *turn(q, k, cos, sin, False), v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        return None, None, ctx.turn_back(dq, dk, dv, *ctx.saved_tensors).view(ctx.shape), None, None, None


def turn_parts(turn, turn_back, qkv, cos, sin, heads):
    """`rope_qkv` of a backend with turn(q, k, cos, sin, back) and turn_back(dq, dk, dv, cos, sin)."""
    return _TurnedParts.apply(turn, turn_back, qkv, cos, sin, heads)
