"""RMSNorm of each head of q and k, and RoPE, in one pass."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, attention_shape, empty, gapless, heads


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, q_norm, k_norm, eps):
        q, k, cos, sin = gapless(q), gapless(k), cos.contiguous(), sin.contiguous()
        norms = q_norm.contiguous(), k_norm.contiguous()
        ctx.save_for_backward(q, k, cos, sin, *norms)
        ctx.eps = eps
        return normed_and_rotated(q, k, cos, sin, norms, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q, grad_k):
        q, k, cos, sin, *norms = ctx.saved_tensors
        outs = empty(q, *q.shape), empty(k, *k.shape)
        grad_norms = differentiate_into(*outs, grad_q, grad_k, q, k, cos, sin, norms, ctx.eps)
        return *outs, None, None, *grad_norms, None


def normed_and_rotated(q, k, cos, sin, norms, eps):
    """`qk_norm_rope` without gradients."""
    q_norm, k_norm = norms
    out_q, out_k = empty(q, *q.shape), empty(k, *k.shape)
    _cpu.qk_norm_rope(
        shape=attention_shape(q, k),
        q=heads(q),
        k=heads(k),
        q_norm=address(q_norm),
        k_norm=address(k_norm),
        eps=eps,
        cos=address(cos),
        sin=address(sin),
        out_q=heads(out_q),
        out_k=heads(out_k),
        threads=torch.get_num_threads(),
    )
    return out_q, out_k


def differentiate_into(out_q, out_k, grad_q, grad_k, q, k, cos, sin, norms, eps):
    """The gradients of q and k, put into `out_q` and `out_k`; returns those of the norms' weights."""
    q_norm, k_norm = norms
    grad_q, grad_k = gapless(grad_q), gapless(grad_k)
    grad_q_norm, grad_k_norm = torch.empty_like(q_norm), torch.empty_like(k_norm)
    _cpu.qk_norm_rope_backward(
        shape=attention_shape(q, k),
        q=heads(q),
        k=heads(k),
        q_norm=address(q_norm),
        k_norm=address(k_norm),
        eps=eps,
        cos=address(cos),
        sin=address(sin),
        grad_out_q=heads(grad_q),
        grad_out_k=heads(grad_k),
        grad_q=heads(out_q),
        grad_k=heads(out_k),
        grad_q_norm=address(grad_q_norm),
        grad_k_norm=address(grad_k_norm),
        threads=torch.get_num_threads(),
    )
    return grad_q_norm, grad_k_norm


def qk_norm_rope(q, k, cos, sin, norms, eps=1e-5):
    weights = (norm.float() for norm in norms)
    out = _QKNormRope.apply(q.float(), k.float(), cos.float(), sin.float(), *weights, eps)
    return tuple(x.to(q.dtype) for x in out)
