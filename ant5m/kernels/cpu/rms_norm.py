"""RMSNorm, with the residual stream's addition."""

import torch
from torch.autograd.function import once_differentiable

from ant5m import _cpu
from ant5m.kernels.cpu.arguments import address, empty, matrix, stride


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        ctx.set_materialize_grads(False)
        rows, weight = matrix(x), weight.contiguous()
        out, rstd = empty(x, *x.shape), empty(x, len(rows))
        total = None if residual is None else empty(x, *x.shape)
        other = None if residual is None else matrix(residual)
        _cpu.rms_norm_forward(
            rows=rows.shape[0],
            dim=rows.shape[1],
            eps=eps,
            x=address(rows),
            x_row=stride(rows),
            residual=address(other),
            residual_row=stride(other),
            weight=address(weight),
            out=address(out),
            total=address(total),
            rstd=address(rstd),
            threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(rows if total is None else total, weight, rstd)
        return out if total is None else (out, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_total=None):
        x, weight, rstd = ctx.saved_tensors
        if grad is None:
            return grad_total, None, None, grad_total
        shape = grad.shape
        x, grad = matrix(x), matrix(grad)
        grad_total = None if grad_total is None else matrix(grad_total)
        grad_x, grad_weight = empty(x, *shape), empty(x, *weight.shape)
        _cpu.rms_norm_backward(
            rows=x.shape[0],
            dim=x.shape[1],
            x=address(x),
            x_row=stride(x),
            weight=address(weight),
            rstd=address(rstd),
            grad=address(grad),
            grad_row=stride(grad),
            grad_total=address(grad_total),
            grad_total_row=stride(grad_total),
            grad_x=address(grad_x),
            grad_weight=address(grad_weight),
            threads=torch.get_num_threads(),
        )
        return grad_x, grad_weight, None, grad_x if ctx.needs_input_grad[3] else None


def rms_norm(x, weight, eps=1e-5, residual=None):
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if residual is None:
        return _RMSNorm.apply(x.float(), weight.float(), eps, None).to(dtype)
    out, total = _RMSNorm.apply(x.float(), weight.float(), eps, residual.float())
    return out.to(dtype), total.to(torch.promote_types(x.dtype, residual.dtype))
