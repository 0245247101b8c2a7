"""The product with a weight, and its gradients."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride
from ant5m.kernels.cpu.bf16 import in_bf16
from ant5m.kernels.cpu.support import FEW_TOKENS

_FEWEST = 16
"""tokens; of fewer, products read the weights once and pack nothing (csrc/cpu/skinny_gemm.h)"""


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
    out = empty(rows, len(rows), len(weight))
    if len(rows) >= _FEWEST and _leave_to_torch(rows, bf16):
        return torch.mm(rows, weight.T, out=out)
    return _multiply(rows, weight, False, out, bf16)


def product_gradients(rows, weight, grad, bf16):
    """Of `product`, for the gradient `grad` [N, R] of its result: those of rows and weight."""
    grad_rows = empty(rows, *rows.shape)
    if _leave_to_torch(rows, bf16):
        return torch.mm(grad, weight, out=grad_rows), grad.T @ rows
    grad_weight = empty(weight, *weight.shape)
    _cpu.product_over_tokens(
        tokens=grad.shape[0],
        rows=grad.shape[1],
        columns=rows.shape[1],
        a=address(grad),
        a_row=stride(grad),
        b=address(rows),
        b_row=stride(rows),
        out=address(grad_weight),
        bf16=bf16,
        threads=torch.get_num_threads(),
    )
    return _multiply(grad, weight, True, grad_rows, bf16), grad_weight


def _leave_to_torch(rows, bf16):
    # MKL is 6 to 19 % slower than ours (on a Zen 4), but needs no weight in another order: much for few rows.
    return not bf16 and (len(rows) < FEW_TOKENS or _cpu.instruction_set() == "portable")


def _multiply(rows, weight, transposed, out, bf16):
    """rows @ weight^T, or `transposed` rows @ weight, in `out`, which it returns."""
    _cpu.product(
        tokens=rows.shape[0],
        depth=rows.shape[1],
        rows=out.shape[1],
        x=address(rows),
        x_row=stride(rows),
        weight=address(weight),
        transposed=transposed,
        out=address(out),
        bf16=bf16,
        threads=torch.get_num_threads(),
    )
    return out
