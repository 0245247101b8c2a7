"""q, k and v of one product, q and k rotated."""

import torch
from torch.autograd.function import once_differentiable

from ant5m.kernels.cpu.arguments import empty, gapless, matrix
from ant5m.kernels.cpu.bf16 import in_bf16
from ant5m.kernels.cpu.linear import product, product_gradients
from ant5m.kernels.cpu.rope import rotate_into


class _QKVRope(torch.autograd.Function):
    # q, k and v share one tensor, in which q and k are rotated where they lie: rotated q and k beside the
    # product would be two thirds more to keep for the backward pass.
    @staticmethod
    def forward(ctx, x, weight, cos, sin, heads, bf16):
        rows, weight, cos, sin = matrix(x), weight.contiguous(), cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(rows, weight, cos, sin)
        ctx.heads, ctx.bf16 = heads, bf16
        qkv = product(rows, weight, ctx.bf16)
        q, k, v = qkv.view(*x.shape[:2], sum(heads), len(weight) // sum(heads)).split(heads, 2)
        rotate_into(q, k, q, k, cos, sin, 1.0)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        rows, weight, cos, sin = ctx.saved_tensors
        shape = grad_q.shape[:2]
        grad = empty(rows, len(rows), len(weight))
        q, k, v = grad.view(*shape, sum(ctx.heads), grad_q.shape[-1]).split(ctx.heads, 2)
        rotate_into(q, k, gapless(grad_q), gapless(grad_k), cos, sin, -1.0)
        v.copy_(grad_v)
        grad_x, grad_weight = product_gradients(rows, weight, grad, ctx.bf16)
        return grad_x.view(*shape, rows.shape[1]), grad_weight, None, None, None, None


def qkv_rope(x, weight, cos, sin, heads):
    """q, k and v, side by side in x [B, T, D] @ weight [sum(heads) * d, D]^T; q and k rotated by `rope`."""
    bf16 = in_bf16(x, weight)
    parts = _QKVRope.apply(x.float(), weight.float(), cos.float(), sin.float(), heads, bf16)
    return tuple(part.to(x.dtype) for part in parts)
