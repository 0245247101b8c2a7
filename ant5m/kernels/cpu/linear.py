"""The product with a weight, and its gradients."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride
from ant5m.kernels.cpu.bf16 import in_bf16


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bf16):
        rows, weight = matrix(x), weight.contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.bf16 = bf16
        return product(rows, weight, bf16).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad_x, grad_weight = product_gradients(rows, weight, matrix(grad), ctx.bf16)
        return grad_x.view(*grad.shape[:-1], rows.shape[1]), grad_weight, None


def linear(x, weight):
    """x [..., D] @ weight [R, D]^T: [..., R]."""
    return _Linear.apply(x.float(), weight.float(), in_bf16(x, weight)).to(x.dtype)


def product(rows, weight, bf16):
    """rows [N, D] @ weight [R, D]^T."""
    return multiply(rows, weight, False, empty(rows, len(rows), len(weight)), bf16)


def product_gradients(rows, weight, grad, bf16):
    """Of `product`, for the gradient `grad` [N, R] of its result: those of rows and weight."""
    return multiply(grad, weight, True, empty(rows, *rows.shape), bf16), product_over_rows(grad, rows, bf16)


def product_over_rows(a, b, bf16):
    """a [N, R]^T @ b [N, D]: [R, D]."""
    out = empty(a, a.shape[1], b.shape[1])
    _cpu.product_over_tokens(
        tokens=a.shape[0],
        rows=a.shape[1],
        columns=b.shape[1],
        a=address(a),
        a_row=stride(a),
        b=address(b),
        b_row=stride(b),
        out=address(out),
        bf16=bf16,
        threads=torch.get_num_threads(),
    )
    return out


def multiply(rows, weight, transposed, out, bf16, add=False):
    """rows @ weight^T, or `transposed` rows @ weight, put into `out` or added to it; returns `out`."""
    _cpu.product(
        tokens=rows.shape[0],
        depth=rows.shape[1],
        rows=out.shape[1],
        x=address(rows),
        x_row=stride(rows),
        weight=address(weight),
        transposed=transposed,
        out=address(out),
        add=add,
        bf16=bf16,
        threads=torch.get_num_threads(),
    )
    return out
