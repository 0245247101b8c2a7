"""RMSNorm with its residual added in one pass: csrc/cuda/rms_norm.cu."""

import math

import torch

from ant5m.kernels.arguments import rows
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.cuda.vectors import bits, vector
from ant5m.kernels.custom_ops import make_rms_norm

MAX_SIZE = 1_024
"""elements of a row: a warp keeps it in registers"""

_SOURCE = "rms_norm.cu"
_THREADS, _ROWS = 256, 8
# Blocks of the backward pass: 4 for each of a T4's multiprocessors. Each warp leaves a partial sum.
_BLOCKS = 160


def _forward(x, weight, eps, residual, y, total, rstd):
    x, size = rows(x), x.shape[-1]
    other = x if residual is None else rows(residual)
    kinds = _kinds(x.dtype, None if residual is None else residual.dtype, y.dtype)
    weight = weight.float().contiguous()
    if len(x) > 0:
        launch(
            _SOURCE,
            "rms_norm_forward",
            {"SIZE": size, "VECTOR": _vector(size, x, other, weight), "DIRECT": 0, **kinds},
            (math.ceil(len(x) / _ROWS),),
            _THREADS,
            *(x, other, weight, y, total, rstd),
            *(len(x), eps, x.stride(0), other.stride(0)),
        )


def _backward(dy, dtotal, total, weight, rstd, residual_dtype, dx, dresidual, dweight):
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
            **_kinds(dx.dtype, residual_dtype, dy.dtype),
        },
        (blocks,),
        _THREADS,
        *(dy, direct, total, wide_weight, rstd, dx, dresidual, partial),
        *(len(total), dy.stride(0), direct.stride(0), total.stride(0)),
    )
    dweight.copy_(partial.sum(0))


def _kinds(x: torch.dtype, residual: torch.dtype | None, y: torch.dtype) -> dict[str, int]:
    return {"X": bits(x), "RESIDUAL": 0 if residual is None else bits(residual), "Y": bits(y)}


def _vector(size: int, *tensors: torch.Tensor) -> int:
    # No more at once than leaves every lane of a warp something to do.
    return min(vector(size, *tensors), 1 << max(0, (size // 32).bit_length() - 1))


rms_norm = make_rms_norm("ant5m_cuda::rms_norm", _forward, _backward)
