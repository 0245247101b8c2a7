"""Llama's MLP: in one piece where its weights fit into L2, else products of whole matrices around swiglu."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride
from ant5m.kernels.cpu.bf16 import in_bf16
from ant5m.kernels.cpu.linear import multiply, product, product_over_rows
from ant5m.kernels.cpu.support import FUSED_CHANNELS
from ant5m.kernels.cpu.swiglu import gated, gated_gradients

_FUSED_SUMS = 1 << 17
"""the most numbers of a weight in one piece where there are gradients: the sums of all are read and written
for each block of tokens, and of 256 x 704 they no longer stay in L2 (docs/experiments.md)"""


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, bf16):
        rows = matrix(x)
        gate, up, down = (w.contiguous() for w in (gate, up, down))
        out = empty(x, *x.shape)
        padded = -(-len(rows) // _cpu.MLP_TOKENS) * _cpu.MLP_TOKENS
        keep, ctx.bf16 = any(ctx.needs_input_grad), bf16
        gates, ups = (empty(x, padded * len(gate)) if keep else None for _ in range(2))
        _cpu.mlp_forward(
            shape=(*rows.shape, len(gate)),
            x=address(rows),
            x_row=stride(rows),
            gate=address(gate),
            up=address(up),
            down=address(down),
            out=address(out),
            gates=address(gates),
            ups=address(ups),
            bf16=bf16,
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(rows, gate, up, down, gates, ups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, gate, up, down, gates, ups = ctx.saved_tensors
        grad_rows = matrix(grad)
        grad_x, grad_gate, grad_up, grad_down = (empty(x, *t.shape) for t in (grad, gate, up, down))
        _cpu.mlp_backward(
            shape=(*x.shape, len(gate)),
            x=address(x),
            x_row=stride(x),
            gate=address(gate),
            up=address(up),
            down=address(down),
            gates=address(gates),
            ups=address(ups),
            grad=address(grad_rows),
            grad_row=stride(grad_rows),
            grad_x=address(grad_x),
            grad_gate=address(grad_gate),
            grad_up=address(grad_up),
            grad_down=address(grad_down),
            bf16=ctx.bf16,
            threads=torch.get_num_threads(),
        )
        return grad_x, grad_gate, grad_up, grad_down, None


class _WideMLP(torch.autograd.Function):
    # Kept is what _MLP keeps; the hidden activations are made again, which costs a fiftieth of a product.
    @staticmethod
    def forward(ctx, x, gate, up, down, bf16):
        rows = matrix(x)
        gate, up, down = (w.contiguous() for w in (gate, up, down))
        gates, ups = product(rows, gate, bf16), product(rows, up, bf16)
        ctx.bf16 = bf16
        ctx.save_for_backward(rows, gate, up, down, gates, ups)
        return product(gated(gates, ups), down, bf16).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, gate, up, down, gates, ups = ctx.saved_tensors
        grad_rows, bf16 = matrix(grad), ctx.bf16
        grad_down = product_over_rows(grad_rows, gated(gates, ups), bf16)
        grad_hidden = multiply(grad_rows, down, True, empty(gates, *gates.shape), bf16)
        grad_gates, grad_ups = gated_gradients(gates, ups, grad_hidden)
        del grad_hidden
        grad_x = multiply(grad_gates, gate, True, empty(rows, *rows.shape), bf16)
        multiply(grad_ups, up, True, grad_x, bf16, add=True)
        grad_gate, grad_up = (product_over_rows(g, rows, bf16) for g in (grad_gates, grad_ups))
        return grad_x.view(grad.shape), grad_gate, grad_up, grad_down, None


def mlp(x, gate, up, down):
    """down (silu(gate x) * (up x)) of x [..., D] with gate, up [W, D] and down [D, W]."""
    bf16 = in_bf16(x, gate, up, down)
    if not torch.is_grad_enabled():
        x, gate, up, down = (t.detach() for t in (x, gate, up, down))
    trains = any(t.requires_grad for t in (x, gate, up, down))
    fused = x.shape[-1] <= FUSED_CHANNELS and (not trains or gate.numel() <= _FUSED_SUMS)
    function = _MLP if fused else _WideMLP
    return function.apply(x.float(), gate.float(), up.float(), down.float(), bf16).to(x.dtype)
