"""Rotary position embedding of q and k in one launch, half-rotate layout: j is rotated with j + D/2.

The gradient of a rotation is the rotation back, so the backward pass is the same kernel with -sin. Where q, k
and v are parts of one product, it also brings their gradients together as that product's.
"""

import torch
import triton
import triton.language as tl

from ant5m.kernels.arguments import dense
from ant5m.kernels.custom_ops import make_rope


@triton.jit
def _places(
    i_t,
    T,
    stride_t,
    stride_h,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of the first halves [T, H, D/2] of a block of positions from i_t on: offsets, and which are there."""
    o_t = tl.arange(0, BLOCK_T)[:, None, None]
    o_h = tl.arange(0, BLOCK_H)[None, :, None].to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    m = (i_t + o_t < T) & (o_h < H) & (o_d < HALF)
    return o_t * stride_t + o_h * stride_h + o_d, m


@triton.jit
def _store_rotated(p_first, b_first, b_second, b_cos, b_sin, m, HALF: tl.constexpr):
    b_first, b_second = b_first.to(tl.float32), b_second.to(tl.float32)
    dtype = p_first.dtype.element_ty
    tl.store(p_first, (b_first * b_cos - b_second * b_sin).to(dtype), mask=m)
    tl.store(p_first + HALF, (b_second * b_cos + b_first * b_sin).to(dtype), mask=m)


@triton.jit
def rope_kernel(
    p_q,
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_q_out,
    p_k_out,
    p_v_out,
    T,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    H: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """JOIN: the results, and v as it is, become parts of rows of H + 2 KV heads; else v is not touched."""
    blocks = tl.cdiv(T, BLOCK_T)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_t = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T
    o_t = tl.arange(0, BLOCK_T)[:, None, None]
    o_d = tl.arange(0, BLOCK_D)[None, None, :]
    m = (i_t + o_t < T) & (o_d < HALF)
    o = i_t * HALF + (o_t * HALF + o_d)
    b_cos = tl.load(p_cos + o, mask=m, other=0.0)  # [T, 1, D/2]
    b_sin = tl.load(p_sin + o, mask=m, other=0.0)
    if BACK:
        b_sin = -b_sin
    o_q, m_q = _places(i_t, T, stride_qt, stride_qh, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
    o_k, m_k = _places(i_t, T, stride_kt, stride_kh, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
    p_q += i_b * stride_qb + i_t * stride_qt
    p_k += i_b * stride_kb + i_t * stride_kt
    # All loads before the first store, behind which the compiler would have them wait. Cosines and sines come
    # first: with q and k before them Triton 3.7 moves q through shared memory, two bytes at a time.
    b_q_first = tl.load(p_q + o_q, mask=m_q, other=0.0)
    b_q_second = tl.load(p_q + o_q + HALF, mask=m_q, other=0.0)
    b_k_first = tl.load(p_k + o_k, mask=m_k, other=0.0)
    b_k_second = tl.load(p_k + o_k + HALF, mask=m_k, other=0.0)
    i_n = i_b * T + i_t
    Q_ROW: tl.constexpr = (H + 2 * KV if JOIN else H) * 2 * HALF
    KV_ROW: tl.constexpr = (H + 2 * KV if JOIN else KV) * 2 * HALF
    o_q, m_q = _places(i_t, T, Q_ROW, 2 * HALF, H, HALF, BLOCK_T, BLOCK_H, BLOCK_D)
    o_kv, m_kv = _places(i_t, T, KV_ROW, 2 * HALF, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
    if JOIN:
        o_v, m_v = _places(i_t, T, stride_vt, stride_vh, KV, HALF, BLOCK_T, BLOCK_KV, BLOCK_D)
        p_v += i_b * stride_vb + i_t * stride_vt
        b_v_first = tl.load(p_v + o_v, mask=m_v, other=0.0)
        b_v_second = tl.load(p_v + o_v + HALF, mask=m_v, other=0.0)
        p_v_out += i_n * KV_ROW
        tl.store(p_v_out + o_kv, b_v_first, mask=m_kv)
        tl.store(p_v_out + o_kv + HALF, b_v_second, mask=m_kv)
    _store_rotated(p_q_out + i_n * Q_ROW + o_q, b_q_first, b_q_second, b_cos, b_sin, m_q, HALF)
    _store_rotated(p_k_out + i_n * KV_ROW + o_kv, b_k_first, b_k_second, b_cos, b_sin, m_kv, HALF)


def _rotate(q, k, cos, sin, back, q_out, k_out):
    _launch(q, k, None, cos, sin, (q_out, k_out, k_out), back)


def _rotate_back(dq, dk, dv, cos, sin, out):
    _launch(dq, dk, dv, cos, sin, out.split([dq.shape[2], dk.shape[2], dv.shape[2]], 2), True)


def _launch(q, k, v, cos, sin, outputs, back):
    join = v is not None
    q, k, v, cos, sin = dense(q), dense(k), dense(v if join else k), cos.contiguous(), sin.contiguous()
    batch, length, heads, size = q.shape
    kv, half = k.shape[2], size // 2
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    block_t = max(1, 1_024 // (block_h * block_d))
    with torch.cuda.device_of(q):
        rope_kernel[(batch * triton.cdiv(length, block_t),)](
            q,
            k,
            v,
            cos,
            sin,
            *outputs,
            length,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            H=heads,
            KV=kv,
            HALF=half,
            BACK=back,
            JOIN=join,
            BLOCK_T=block_t,
            BLOCK_H=block_h,
            BLOCK_KV=triton.next_power_of_2(kv),
            BLOCK_D=block_d,
        )


rope, rope_packed = make_rope("ant5m_triton::rope", _rotate, _rotate_back)
