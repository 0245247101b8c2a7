"""RMSNorm with the residual add in front of it. Forward and backward read each row once.

With s = x + residual, u = s / sqrt(mean(s^2) + eps) and y = u * weight: ds = (weight * dy - u * mean(weight *
dy * u)) / sqrt(mean(s^2) + eps), plus the gradient that reaches s directly; dweight = sum over rows of dy *
u, in fp32, first inside a program and then over programs, always in one order.
"""

import torch
import triton
import triton.language as tl

from ant5m.kernels.arguments import rows
from ant5m.kernels.custom_ops import make_rms_norm

MAX_SIZE = 65_536
# Programs of the backward pass: each leaves one partial sum of the weight's gradient.
_PROGRAMS = 1_024
# Columns of a program that adds the partial sums: what a sector of memory holds.
_COLUMNS = 8
# Elements at once, unless a row alone is longer. Backward, few: on an H200 the step's norms of `ant-5m` take
# 47 us with 512, 49 with 1,024, 55 with 2,048, 57 with 4,096.
_FORWARD, _BACKWARD = 2_048, 512


@triton.jit
def rms_norm_fwd_kernel(
    p_x,
    p_residual,
    p_weight,
    p_y,
    p_total,
    p_rstd,
    N,
    eps,
    stride_x,
    stride_residual,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    m = m_n[:, None] & (o_d < D)[None, :]
    o_out = o_n[:, None] * D + o_d[None, :]
    b_x = tl.load(p_x + o_n[:, None] * stride_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [N, D]
    if RESIDUAL:
        b_residual = tl.load(p_residual + o_n[:, None] * stride_residual + o_d[None, :], mask=m, other=0.0)
        b_total = (b_x + b_residual.to(tl.float32)).to(p_total.dtype.element_ty)
        tl.store(p_total + o_out, b_total, mask=m)
        b_x = b_total.to(tl.float32)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / D + eps)  # [N]
    tl.store(p_rstd + o_n, b_rstd, mask=m_n)
    b_weight = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_y = b_x * b_rstd[:, None] * b_weight[None, :]
    tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def rms_norm_bwd_kernel(
    p_dy,
    p_dtotal,
    p_total,
    p_weight,
    p_rstd,
    p_dx,
    p_dresidual,
    p_dweight,
    N,
    stride_dy,
    stride_dtotal,
    stride_total,
    D: tl.constexpr,
    DTOTAL: tl.constexpr,
    DRESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        o_n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        m_n = o_n < N
        m = m_n[:, None] & m_d[None, :]
        b_rstd = tl.load(p_rstd + o_n, mask=m_n, other=0.0)
        b_total = tl.load(p_total + o_n[:, None] * stride_total + o_d[None, :], mask=m, other=0.0)
        b_dy = tl.load(p_dy + o_n[:, None] * stride_dy + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_unit = b_total.to(tl.float32) * b_rstd[:, None]
        b_dweight += b_dy * b_unit
        b_dunit = b_dy * b_weight[None, :]
        b_along = tl.sum(b_dunit * b_unit, 1) / D
        b_ds = (b_dunit - b_unit * b_along[:, None]) * b_rstd[:, None]
        if DTOTAL:
            b_ds += tl.load(p_dtotal + o_n[:, None] * stride_dtotal + o_d[None, :], mask=m, other=0.0).to(
                tl.float32
            )
        o_out = o_n[:, None] * D + o_d[None, :]
        tl.store(p_dx + o_out, b_ds.to(p_dx.dtype.element_ty), mask=m)
        if DRESIDUAL:
            tl.store(p_dresidual + o_out, b_ds.to(p_dresidual.dtype.element_ty), mask=m)
    tl.store(p_dweight + tl.program_id(0) * D + o_d, tl.sum(b_dweight, 0), mask=m_d)


@triton.jit
def rms_norm_weight_kernel(
    p_partial,
    p_dweight,
    PROGRAMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum [D] of what the backward pass's programs left [PROGRAMS, D]."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_n < PROGRAMS)[:, None] & (o_d < D)[None, :]
    b_partial = tl.load(p_partial + o_n[:, None] * D + o_d[None, :], mask=m, other=0.0)
    tl.store(p_dweight + o_d, tl.sum(b_partial, 0).to(p_dweight.dtype.element_ty), mask=o_d < D)


def _forward(x, weight, eps, residual, y, total, rstd):
    wide, weight = rows(x), weight.contiguous()
    other = wide if residual is None else rows(residual)
    tile = _tile(x.shape[-1], _FORWARD)
    with torch.cuda.device_of(x):
        rms_norm_fwd_kernel[(triton.cdiv(len(wide), tile["BLOCK_N"]),)](
            wide,
            other,
            weight,
            y,
            total,
            rstd,
            len(wide),
            eps,
            wide.stride(0),
            other.stride(0),
            D=x.shape[-1],
            RESIDUAL=residual is not None,
            **tile,
        )


def _backward(dy, dtotal, total, weight, rstd, residual_dtype, dx, dresidual, dweight):
    dy, total, weight = rows(dy), rows(total), weight.contiguous()
    direct = dy if dtotal is None else rows(dtotal)
    size = total.shape[-1]
    tile = _tile(size, _BACKWARD)
    programs = max(1, min(_PROGRAMS, triton.cdiv(len(total), tile["BLOCK_N"])))
    partial = torch.empty(programs, size, dtype=torch.float32, device=dy.device)
    with torch.cuda.device_of(dy):
        rms_norm_bwd_kernel[(programs,)](
            dy,
            direct,
            total,
            weight,
            rstd,
            dx,
            dresidual,
            partial,
            len(total),
            dy.stride(0),
            direct.stride(0),
            total.stride(0),
            D=size,
            DTOTAL=dtotal is not None,
            DRESIDUAL=dresidual.numel() > 0,
            **tile,
        )
        rms_norm_weight_kernel[(triton.cdiv(size, _COLUMNS),)](
            partial, dweight, programs, size, triton.next_power_of_2(programs), _COLUMNS
        )


def _tile(size: int, elements: int) -> dict[str, int]:
    block = triton.next_power_of_2(size)
    warps = min(max(4, block // 1_024), 32)
    return {"BLOCK_N": max(1, elements // block), "BLOCK_D": block, "num_warps": warps}


rms_norm = make_rms_norm("ant5m_triton::rms_norm", _forward, _backward)
