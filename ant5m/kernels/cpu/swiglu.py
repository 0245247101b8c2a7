"""silu(gate) * up."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        gate_rows, up_rows = matrix(gate), matrix(up)
        out = empty(gate, *gate.shape)
        _cpu.swiglu_forward(
            rows=gate_rows.shape[0],
            width=gate_rows.shape[1],
            gate=address(gate_rows),
            gate_row=stride(gate_rows),
            up=address(up_rows),
            up_row=stride(up_rows),
            out=address(out),
            threads=torch.get_num_threads(),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        gate_rows, up_rows, grad_rows = matrix(gate), matrix(up), matrix(grad)
        width = gate.shape[-1]
        # Side by side, so that the gradient of a product that made both is one tensor already.
        grad_gate, grad_up = empty(grad, *gate.shape[:-1], 2 * width).split(width, -1)
        _cpu.swiglu_backward(
            rows=gate_rows.shape[0],
            width=width,
            gate=address(gate_rows),
            gate_row=stride(gate_rows),
            up=address(up_rows),
            up_row=stride(up_rows),
            grad=address(grad_rows),
            grad_row=stride(grad_rows),
            grad_gate=address(grad_gate),
            grad_up=address(grad_up),
            grad_in_row=2 * width,
            threads=torch.get_num_threads(),
        )
        return grad_gate, grad_up


def swiglu(gate, up):
    return _SwiGLU.apply(gate.float(), up.float()).to(gate.dtype)
