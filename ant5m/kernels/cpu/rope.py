"""Rotary position embedding of q and k."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, attention_shape, empty, gapless, heads


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_q, grad_k, cos, sin, -1.0), None, None


def _rotate(q, k, cos, sin, sign):
    q, k = gapless(q), gapless(k)
    out_q, out_k = empty(q, *q.shape), empty(k, *k.shape)
    rotate_into(out_q, out_k, q, k, cos, sin, sign)
    return out_q, out_k


def rotate_into(out_q, out_k, q, k, cos, sin, sign):
    """q and k rotated, or with the sign -1 back; the outputs may be q and k themselves."""
    _cpu.rope(
        shape=attention_shape(q, k),
        q=heads(q),
        k=heads(k),
        cos=address(cos),
        sin=address(sin),
        sign=sign,
        out_q=heads(out_q),
        out_k=heads(out_k),
        threads=torch.get_num_threads(),
    )


def rope(q, k, cos, sin):
    rotated = _Rope.apply(q.float(), k.float(), cos.float(), sin.float())
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)
