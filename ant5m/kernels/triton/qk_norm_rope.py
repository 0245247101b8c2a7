"""QK-norm: RMSNorm of each head of q and k, and RoPE behind it, in one launch; half-rotate layout.

With u = x / sqrt(mean(x^2) + eps) and g the gradient rotated back: dweight = sum of g * u over heads and
positions, and dx = (weight * g - u * mean(weight * g * u)) / sqrt(mean(x^2) + eps). The backward pass makes
the statistic again, because it reads x anyway; as in `rope`, it brings the gradients of q, k and v together
as that of the product that they are parts of.
"""

import torch
import triton
import triton.language as tl

from ant5m.kernels.arguments import dense
from ant5m.kernels.custom_ops import make_qk_norm_rope
from ant5m.kernels.triton.rms_norm import _COLUMNS, rms_norm_weight_kernel
from ant5m.kernels.triton.rope import _places, _store_rotated

# Programs of the backward pass: each leaves one partial sum of the weights' gradients.
_PROGRAMS = 1_024
# Pairs of numbers at once.
_FORWARD, _BACKWARD = 1_024, 1_024


@triton.jit
def _angles(p_cos, p_sin, i_t, T, HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    o_t = tl.arange(0, BLOCK_T)[:, None, None]
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    m = (i_t + o_t < T) & (o_d < HALF)
    o = i_t * HALF + (o_t * HALF + o_d)
    return tl.load(p_cos + o, mask=m, other=0.0), tl.load(p_sin + o, mask=m, other=0.0)  # [T, 1, D/2]


@triton.jit
def _weights(p_weight, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    b_first = tl.load(p_weight + o_d, mask=o_d < HALF, other=0.0).to(tl.float32)
    return b_first, tl.load(p_weight + HALF + o_d, mask=o_d < HALF, other=0.0).to(tl.float32)


@triton.jit
def _units(b_first, b_second, eps, HALF: tl.constexpr):
    """Both halves [T, H, D/2] over the root of a head's mean square, and one over that root [T, H, 1]."""
    b_first, b_second = b_first.to(tl.float32), b_second.to(tl.float32)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_first * b_first + b_second * b_second, 2) / (2 * HALF) + eps)
    b_rstd = b_rstd[:, :, None]
    return b_first * b_rstd, b_second * b_rstd, b_rstd


@triton.jit
def qk_norm_rope_fwd_kernel(
    p_q,
    p_k,
    p_q_norm,
    p_k_norm,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    T,
    eps,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_T)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T
    b_cos, b_sin = _angles(p_cos, p_sin, i_t, T, HALF, BLOCK_T, BLOCK_D)
    o_q, m_q = _places(i_t, T, stride_qt, stride_qh, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
    o_k, m_k = _places(i_t, T, stride_kt, stride_kh, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
    p_q += i_b * stride_qb + i_t * stride_qt
    p_k += i_b * stride_kb + i_t * stride_kt
    # All loads before the first store, behind which the compiler would have them wait.
    b_q_first = tl.load(p_q + o_q, mask=m_q, other=0.0)
    b_q_second = tl.load(p_q + o_q + HALF, mask=m_q, other=0.0)
    b_k_first = tl.load(p_k + o_k, mask=m_k, other=0.0)
    b_k_second = tl.load(p_k + o_k + HALF, mask=m_k, other=0.0)
    b_wq_first, b_wq_second = _weights(p_q_norm, HALF, BLOCK_D)
    b_wk_first, b_wk_second = _weights(p_k_norm, HALF, BLOCK_D)
    b_q_first, b_q_second, _ = _units(b_q_first, b_q_second, eps, HALF)
    b_k_first, b_k_second, _ = _units(b_k_first, b_k_second, eps, HALF)
    i_n = i_b * T + i_t
    o_q, m_q = _places(i_t, T, H * 2 * HALF, 2 * HALF, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
    o_k, m_k = _places(i_t, T, KV * 2 * HALF, 2 * HALF, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
    p_q_out += i_n * H * 2 * HALF
    p_k_out += i_n * KV * 2 * HALF
    _store_rotated(p_q_out + o_q, b_q_first * b_wq_first, b_q_second * b_wq_second, b_cos, b_sin, m_q, HALF)
    _store_rotated(p_k_out + o_k, b_k_first * b_wk_first, b_k_second * b_wk_second, b_cos, b_sin, m_k, HALF)


@triton.jit
def _head_gradient(
    p_dy, p_x, p_dx, o_dy, o_x, o_dx, m, b_w_first, b_w_second, b_cos, b_sin, eps, HALF: tl.constexpr
):
    """Stores dx, and gives the parts [T, H, D/2] of both halves of the weight's gradient."""
    b_dy_first = tl.load(p_dy + o_dy, mask=m, other=0.0).to(tl.float32)
    b_dy_second = tl.load(p_dy + o_dy + HALF, mask=m, other=0.0).to(tl.float32)
    b_first = tl.load(p_x + o_x, mask=m, other=0.0)
    b_second = tl.load(p_x + o_x + HALF, mask=m, other=0.0)
    b_g_first = b_dy_first * b_cos + b_dy_second * b_sin
    b_g_second = b_dy_second * b_cos - b_dy_first * b_sin
    b_u_first, b_u_second, b_rstd = _units(b_first, b_second, eps, HALF)
    b_dw_first, b_dw_second = b_g_first * b_u_first, b_g_second * b_u_second
    b_along = (tl.sum(b_dw_first * b_w_first + b_dw_second * b_w_second, 2) / (2 * HALF))[:, :, None]
    b_dx_first = (b_g_first * b_w_first - b_u_first * b_along) * b_rstd
    b_dx_second = (b_g_second * b_w_second - b_u_second * b_along) * b_rstd
    tl.store(p_dx + o_dx, b_dx_first.to(p_dx.dtype.element_ty), mask=m)
    tl.store(p_dx + o_dx + HALF, b_dx_second.to(p_dx.dtype.element_ty), mask=m)
    return b_dw_first, b_dw_second


@triton.jit
def _store_sums(p_partial, b_first, b_second, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    tl.store(p_partial + o_d, tl.sum(tl.sum(b_first, 1), 0), mask=o_d < HALF)
    tl.store(p_partial + HALF + o_d, tl.sum(tl.sum(b_second, 1), 0), mask=o_d < HALF)


@triton.jit
def qk_norm_rope_bwd_kernel(
    p_dq,
    p_dk,
    p_dv,
    p_q,
    p_k,
    p_q_norm,
    p_k_norm,
    p_cos,
    p_sin,
    p_out,
    p_partial,
    B,
    T,
    eps,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dkb,
    stride_dkt,
    stride_dkh,
    stride_dvb,
    stride_dvt,
    stride_dvh,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of q and k, and with JOIN of v, as parts of rows of all their heads; of both weights
    p_partial [programs, 2, D]."""
    ROW: tl.constexpr = (H + (2 * KV if JOIN else KV)) * 2 * HALF
    blocks = tl.cdiv(T, BLOCK_T)
    b_wq_first, b_wq_second = _weights(p_q_norm, HALF, BLOCK_D)
    b_wk_first, b_wk_second = _weights(p_k_norm, HALF, BLOCK_D)
    b_dwq_first = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_D), tl.float32)
    b_dwq_second = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_D), tl.float32)
    b_dwk_first = tl.zeros((BLOCK_T, BLOCK_KV, BLOCK_D), tl.float32)
    b_dwk_second = tl.zeros((BLOCK_T, BLOCK_KV, BLOCK_D), tl.float32)
    for block in range(tl.program_id(0), B * blocks, tl.num_programs(0)):
        i_b = tl.cast(block // blocks, tl.int64)
        i_t = tl.cast(block % blocks, tl.int64) * BLOCK_T
        b_cos, b_sin = _angles(p_cos, p_sin, i_t, T, HALF, BLOCK_T, BLOCK_D)
        p_row = p_out + (i_b * T + i_t) * ROW
        o_dq, m_q = _places(i_t, T, stride_dqt, stride_dqh, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
        o_q, _ = _places(i_t, T, stride_qt, stride_qh, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
        o_dk, m_k = _places(i_t, T, stride_dkt, stride_dkh, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
        o_k, _ = _places(i_t, T, stride_kt, stride_kh, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
        o_q_out, _ = _places(i_t, T, ROW, 2 * HALF, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
        o_k_out, _ = _places(i_t, T, ROW, 2 * HALF, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
        b_first, b_second = _head_gradient(
            p_dq + i_b * stride_dqb + i_t * stride_dqt,
            p_q + i_b * stride_qb + i_t * stride_qt,
            p_row,
            o_dq,
            o_q,
            o_q_out,
            m_q,
            b_wq_first,
            b_wq_second,
            b_cos,
            b_sin,
            eps,
            HALF,
        )
        b_dwq_first += b_first
        b_dwq_second += b_second
        b_first, b_second = _head_gradient(
            p_dk + i_b * stride_dkb + i_t * stride_dkt,
            p_k + i_b * stride_kb + i_t * stride_kt,
            p_row + H * 2 * HALF,
            o_dk,
            o_k,
            o_k_out,
            m_k,
            b_wk_first,
            b_wk_second,
            b_cos,
            b_sin,
            eps,
            HALF,
        )
        b_dwk_first += b_first
        b_dwk_second += b_second
        if JOIN:
            o_dv, _ = _places(i_t, T, stride_dvt, stride_dvh, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
            p_v = p_dv + i_b * stride_dvb + i_t * stride_dvt
            p_v_out = p_row + (H + KV) * 2 * HALF
            tl.store(p_v_out + o_k_out, tl.load(p_v + o_dv, mask=m_k, other=0.0), mask=m_k)
            tl.store(p_v_out + o_k_out + HALF, tl.load(p_v + o_dv + HALF, mask=m_k, other=0.0), mask=m_k)
    p_partial += tl.program_id(0) * 4 * HALF
    _store_sums(p_partial, b_dwq_first, b_dwq_second, HALF, BLOCK_D)
    _store_sums(p_partial + 2 * HALF, b_dwk_first, b_dwk_second, HALF, BLOCK_D)


def _forward(q, k, q_norm, k_norm, eps, cos, sin, q_out, k_out):
    q, k, norms, angles = dense(q), dense(k), (q_norm.contiguous(), k_norm.contiguous()), _dense(cos, sin)
    tile = _tile(q, k, _FORWARD)
    with torch.cuda.device_of(q):
        qk_norm_rope_fwd_kernel[(q.shape[0] * triton.cdiv(q.shape[1], tile["BLOCK_T"]),)](
            q, k, *norms, *angles, q_out, k_out, q.shape[1], eps, *q.stride()[:3], *k.stride()[:3], **tile
        )


def _backward(dq, dk, dv, q, k, q_norm, k_norm, eps, cos, sin, out, dnorms):
    join = dv is not None
    dq, dk, q, k = (dense(x) for x in (dq, dk, q, k))
    dv = dense(dv) if join else dk
    batch, length, _, size = q.shape
    tile = _tile(q, k, _BACKWARD)
    programs = max(1, min(_PROGRAMS, batch * triton.cdiv(length, tile["BLOCK_T"])))
    partial = torch.empty(programs, 2 * size, dtype=torch.float32, device=q.device)
    strides = [stride for x in (dq, dk, dv, q, k) for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        qk_norm_rope_bwd_kernel[(programs,)](
            *(dq, dk, dv, q, k, q_norm.contiguous(), k_norm.contiguous(), *_dense(cos, sin), out, partial),
            *(batch, length, eps, *strides),
            JOIN=join,
            **tile,
        )
        rms_norm_weight_kernel[(triton.cdiv(2 * size, _COLUMNS),)](
            partial, dnorms, programs, 2 * size, triton.next_power_of_2(programs), _COLUMNS
        )


def _dense(cos, sin):
    return cos.contiguous(), sin.contiguous()


def _tile(q, k, pairs: int) -> dict[str, int]:
    heads, kv, half = q.shape[2], k.shape[2], q.shape[3] // 2
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    return {
        "H": heads,
        "KV": kv,
        "HALF": half,
        "BLOCK_T": max(1, pairs // (block_h * block_d)),
        "BLOCK_H": block_h,
        "BLOCK_KV": triton.next_power_of_2(kv),
        "BLOCK_D": block_d,
    }


qk_norm_rope, norm_rope_packed = make_qk_norm_rope("ant5m_triton::qk_norm_rope", _forward, _backward)
