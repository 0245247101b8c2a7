"""silu(gate) * up."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return gated(matrix(gate), matrix(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return tuple(x.view(grad.shape) for x in gated_gradients(matrix(gate), matrix(up), matrix(grad)))


def gated(gate, up):
    """silu(gate) * up of matrices."""
    out = empty(gate, *gate.shape)
    _cpu.swiglu_forward(
        rows=gate.shape[0],
        width=gate.shape[1],
        gate=address(gate),
        gate_row=stride(gate),
        up=address(up),
        up_row=stride(up),
        out=address(out),
        threads=torch.get_num_threads(),
    )
    return out


def gated_gradients(gate, up, grad):
    """Of `gated`, for the gradient of its result: halves of one matrix, as a product that made both gate and
    up takes it."""
    rows, width = gate.shape
    grad_gate, grad_up = empty(grad, rows, 2 * width).split(width, -1)
    _cpu.swiglu_backward(
        rows=rows,
        width=width,
        gate=address(gate),
        gate_row=stride(gate),
        up=address(up),
        up_row=stride(up),
        grad=address(grad),
        grad_row=stride(grad),
        grad_gate=address(grad_gate),
        grad_up=address(grad_up),
        grad_in_row=2 * width,
        threads=torch.get_num_threads(),
    )
    return grad_gate, grad_up


def swiglu(gate, up):
    return _SwiGLU.apply(gate.float(), up.float()).to(gate.dtype)
