"""Llama's MLP in one piece."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride
from ant5m.kernels.cpu.bf16 import in_bf16


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


def mlp(x, gate, up, down):
    """down (silu(gate x) * (up x)) of x [..., D] with gate, up [W, D] and down [D, W]."""
    bf16 = in_bf16(x, gate, up, down)
    if not torch.is_grad_enabled():
        x, gate, up, down = (t.detach() for t in (x, gate, up, down))
    return _MLP.apply(x.float(), gate.float(), up.float(), down.float(), bf16).to(x.dtype)
