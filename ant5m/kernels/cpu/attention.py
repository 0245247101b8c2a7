"""Causal grouped-query attention, inside documents or along the branches of trees."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, attention_shape, empty, gapless, heads
from ant5m.kernels.cpu.bf16 import in_bf16


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ends, bf16):
        q, k, v = (gapless(x) for x in (q, k, v))
        out, ctx.bf16 = empty(q, *q.shape), bf16
        lse = empty(q, q.shape[0], q.shape[2], q.shape[1]) if any(ctx.needs_input_grad) else None
        _cpu.attention_forward(
            shape=attention_shape(q, k),
            q=heads(q),
            k=heads(k),
            v=heads(v),
            ends=address(ends),
            out=address(out),
            lse=address(lse),
            bf16=bf16,
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(q, k, v, out, lse, ends)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, ends = ctx.saved_tensors
        grad = gapless(grad)
        grad_q, grad_k, grad_v = (empty(x, *x.shape) for x in (q, k, v))
        _cpu.attention_backward(
            shape=attention_shape(q, k),
            q=heads(q),
            k=heads(k),
            v=heads(v),
            out=heads(out),
            grad=heads(grad),
            ends=address(ends),
            lse=address(lse),
            grad_q=address(grad_q),
            grad_k=address(grad_k),
            grad_v=address(grad_v),
            bf16=ctx.bf16,
            threads=torch.get_num_threads(),
        )
        return grad_q, grad_k, grad_v, None, None


def attention(q, k, v, starts=None):
    ends = None
    if starts is not None:
        # The first position behind s whose own start is behind s.
        positions = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape).contiguous()
        ends = torch.searchsorted(starts.contiguous(), positions, right=True)
    return tree_attention(q, k, v, ends)


def tree_attention(q, k, v, ends):
    """`attention` where position t sees key s when s <= t < ends[b, s], of ends [B, T] or None."""
    if ends is not None:
        ends = ends.to(torch.int32).contiguous()
    bf16 = in_bf16(q, k, v)
    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()
    return _Attention.apply(q.float(), k.float(), v.float(), ends, bf16).to(q.dtype)
