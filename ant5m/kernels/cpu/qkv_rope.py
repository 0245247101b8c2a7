"""q, k and v of one product, q and k rotated, and normed before that where there are norms."""

import torch
from torch.autograd.function import once_differentiable

from ant5m.kernels.cpu.arguments import empty, gapless, matrix
from ant5m.kernels.cpu.bf16 import in_bf16
from ant5m.kernels.cpu.linear import product, product_gradients
from ant5m.kernels.cpu.qk_norm_rope import differentiate_into, normed_and_rotated
from ant5m.kernels.cpu.rope import rotate_into


class _QKVRope(torch.autograd.Function):
    # q, k and v share one tensor, in which q and k are rotated where they lie: rotated q and k beside the
    # product would be two thirds more to keep for the backward pass.
    @staticmethod
    def forward(ctx, x, weight, cos, sin, heads, bf16):
        rows, weight, cos, sin = matrix(x), weight.contiguous(), cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(rows, weight, cos, sin)
        ctx.heads, ctx.bf16 = heads, bf16
        q, k, v = _parts(product(rows, weight, ctx.bf16), x.shape[:2], heads)
        rotate_into(q, k, q, k, cos, sin, 1.0)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        rows, weight, cos, sin = ctx.saved_tensors
        shape = grad_q.shape[:2]
        grad = empty(rows, len(rows), len(weight))
        q, k, v = _parts(grad, shape, ctx.heads)
        rotate_into(q, k, gapless(grad_q), gapless(grad_k), cos, sin, -1.0)
        v.copy_(grad_v)
        grad_x, grad_weight = product_gradients(rows, weight, grad, ctx.bf16)
        return grad_x.view(*shape, rows.shape[1]), grad_weight, None, None, None, None


class _QKVNormRope(torch.autograd.Function):
    # The norm's gradient needs q and k as they were, so what is rotated lies beside the product.
    @staticmethod
    def forward(ctx, x, weight, cos, sin, q_norm, k_norm, heads, eps, bf16):
        rows, weight, cos, sin = matrix(x), weight.contiguous(), cos.contiguous(), sin.contiguous()
        norms = q_norm.contiguous(), k_norm.contiguous()
        qkv = product(rows, weight, bf16)
        ctx.save_for_backward(rows, weight, cos, sin, *norms, qkv)
        ctx.heads, ctx.eps, ctx.bf16 = heads, eps, bf16
        q, k, v = _parts(qkv, x.shape[:2], heads)
        return *normed_and_rotated(q, k, cos, sin, norms, eps), v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k, grad_v):
        rows, weight, cos, sin, *norms, qkv = ctx.saved_tensors
        shape = grad_q.shape[:2]
        grad = empty(rows, len(rows), len(weight))
        q, k, _ = _parts(qkv, shape, ctx.heads)
        out_q, out_k, v = _parts(grad, shape, ctx.heads)
        grad_norms = differentiate_into(out_q, out_k, grad_q, grad_k, q, k, cos, sin, norms, ctx.eps)
        v.copy_(grad_v)
        grad_x, grad_weight = product_gradients(rows, weight, grad, ctx.bf16)
        return grad_x.view(*shape, rows.shape[1]), grad_weight, None, None, *grad_norms, None, None, None


def _parts(qkv, shape, heads):
    """q, k and v, views [B, T, heads, d] of the product's rows [B * T, sum(heads) * d]."""
    return qkv.view(*shape, sum(heads), qkv.shape[1] // sum(heads)).split(heads, 2)


def qkv_rope(x, weight, cos, sin, heads, norms=None, eps=1e-5):
    """q, k and v, side by side in x [B, T, D] @ weight [sum(heads) * d, D]^T; q and k rotated by `rope`, or
    with norms by `qk_norm_rope`."""
    bf16 = in_bf16(x, weight)
    inputs = x.float(), weight.float(), cos.float(), sin.float()
    if norms is None:
        parts = _QKVRope.apply(*inputs, heads, bf16)
    else:
        parts = _QKVNormRope.apply(*inputs, *(norm.float() for norm in norms), heads, eps, bf16)
    return tuple(part.to(x.dtype) for part in parts)
