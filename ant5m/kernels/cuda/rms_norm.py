"""RMSNorm with its residual added in one pass: csrc/cuda/rms_norm.cu."""

import math

import torch

from ant5m.kernels.cuda.layout import bits, vector
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.layout import compute_dtype, rows

MAX_SIZE = 1_024
"""elements of a row: a warp keeps it in registers"""

_SOURCE = "rms_norm.cu"
_THREADS, _ROWS = 256, 8
# Blocks of the backward pass: 4 for each of a T4's multiprocessors. Each warp leaves a partial sum.
_BLOCKS = 160


@torch.library.custom_op("ant5m_cuda::rms_norm", mutates_args=())
def _forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y in `dtype`, x + residual (empty without one), 1 / root mean square of each row."""
    y, total, scale = _outputs(x, weight, eps, residual, dtype)
    x, size = rows(x), x.shape[-1]
    other = x if residual is None else rows(residual)
    kinds = _kinds(x.dtype, None if residual is None else residual.dtype, dtype)
    weight = weight.float().contiguous()
    if len(x) > 0:
        launch(
            _SOURCE,
            "rms_norm_forward",
            {"SIZE": size, "VECTOR": _vector(size, x, other, weight), "DIRECT": 0, **kinds},
            (math.ceil(len(x) / _ROWS),),
            _THREADS,
            *(x, other, weight, y, total, scale),
            *(len(x), eps, x.stride(0), other.stride(0)),
        )
    return y, total, scale


@_forward.register_fake
def _outputs(x, weight, eps, residual, dtype):
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = x.new_empty(0)
    if residual is not None:
        wide = torch.promote_types(x.dtype, residual.dtype)
        total = torch.empty(x.shape, dtype=wide, device=x.device)
    return y, total, torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)


@torch.library.custom_op("ant5m_cuda::rms_norm_backward", mutates_args=())
def _backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradient of x, of the residual if its dtype is another one (else empty), of the weight."""
    dx, dresidual, dweight = _gradients(dy, dtotal, total, weight, scale, dtype, residual_dtype)
    dy, total, size = rows(dy), rows(total), total.shape[-1]
    direct = total if dtotal is None else rows(dtotal)
    wide_weight = weight.float().contiguous()
    blocks = max(1, min(_BLOCKS, math.ceil(len(total) / _ROWS)))
    partial = torch.empty(blocks * _ROWS, size, dtype=torch.float32, device=dy.device)
    launch(
        _SOURCE,
        "rms_norm_backward",
        {
            "SIZE": size,
            "VECTOR": _vector(size, dy, direct, total, wide_weight),
            "DIRECT": int(dtotal is not None),
            **_kinds(dtype, residual_dtype, dy.dtype),
        },
        (blocks,),
        _THREADS,
        *(dy, direct, total, wide_weight, scale, dx, dresidual, partial),
        *(len(total), dy.stride(0), direct.stride(0), total.stride(0)),
    )
    return dx, dresidual, dweight.copy_(partial.sum(0))


@_backward.register_fake
def _gradients(dy, dtotal, total, weight, scale, dtype, residual_dtype):
    dx = torch.empty(dy.shape, dtype=dtype, device=dy.device)
    another = residual_dtype is not None and residual_dtype != dtype
    dresidual = torch.empty(dy.shape if another else 0, dtype=residual_dtype or dtype, device=dy.device)
    return dx, dresidual, torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, weight, _, residual, _ = inputs
    _, total, scale = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, weight, scale)


def _differentiate(ctx, dy, dtotal, _):
    total, weight, scale = ctx.saved_tensors
    dtype, residual_dtype = ctx.dtypes
    if dy is None:
        dy = torch.zeros_like(total)
    dtotal = None if residual_dtype is None else dtotal
    dx, dresidual, dweight = _backward(dy, dtotal, total, weight, scale, dtype, residual_dtype)
    if residual_dtype is None:
        return dx, dweight, None, None, None
    return dx, dweight, None, dx if dtype == residual_dtype else dresidual, None


_forward.register_autograd(_differentiate, setup_context=_save)


def rms_norm(x, weight, eps=1e-5, residual=None):
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = compute_dtype(x) if torch.is_autocast_enabled(x.device.type) else wide
    y, total, _ = _forward(x, weight, eps, residual, dtype)
    return y if residual is None else (y, total)


def _kinds(x: torch.dtype, residual: torch.dtype | None, y: torch.dtype) -> dict[str, int]:
    return {"X": bits(x), "RESIDUAL": 0 if residual is None else bits(residual), "Y": bits(y)}


def _vector(size: int, *tensors: torch.Tensor) -> int:
    # No more at once than leaves every lane of a warp something to do.
    return min(vector(size, *tensors), 1 << max(0, (size // 32).bit_length() - 1))
