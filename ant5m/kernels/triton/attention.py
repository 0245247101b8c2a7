"""Causal flash attention with grouped queries.

A tile of query rows holds BQ positions times BG heads of one key/value group, so K and V are read once for
all of them, and the sum of dK and dV over the group is the sum over the rows of a product. Only tiles on the
diagonal are masked. Scores are kept in units of log2: p = exp2(q.k * c - m) with c = log2(e) / sqrt(D).

The backward pass is two kernels without atomics, so it is deterministic: one owns query rows (dQ, and on its
way rowsum(dO * O)), one owns keys (dK and dV). Source: Dao, "FlashAttention-2", 2023.

`starts` [B, T] int32 keeps attention inside documents: position t sees positions starts[b, t]..t. It must not
decrease along T.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ant5m.kernels.arguments import dense
from ant5m.kernels.custom_ops import make_attention
from ant5m.kernels.triton.device import LARGE_SHARED_MEMORY, is_hopper, shared_memory

HEAD_SIZES = (16, 32, 64, 128)
# Heads of a group in one tile; a larger group takes several tiles.
_MAX_GROUP = 8


@triton.jit
def _attend(
    b_acc,
    b_l,
    b_m,
    b_q,
    p_k,
    p_v,
    o_t,
    b_start,
    low,
    high,
    T,
    c,
    stride_kt,
    stride_vt,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    STARTS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys low..high: sum of p v [M, D], sum of p [M], running maximum [M]."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    for n in range(low, high, BN):
        b_k = _rows(p_k, n, o_n, o_d, stride_kt, T, MASKED)  # [N, D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        if MASKED:
            m_s = o_t[:, None] >= n + o_n[None, :]
            if STARTS:
                m_s = m_s & (b_start[:, None] <= n + o_n[None, :])
            b_s = tl.where(m_s, b_s, -float("inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * c)
        b_p = tl.exp2(b_s * c - b_m_new[:, None])
        b_alpha = tl.exp2(b_m - b_m_new)
        b_m = b_m_new
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_v = _rows(p_v, n, o_n, o_d, stride_vt, T, MASKED)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=PRECISION)
    return b_acc, b_l, b_m


@triton.jit
def _rows(p, first, o_n, o_d, stride, T, MASKED: tl.constexpr):
    """Rows first.. of a matrix [T, D]; behind its end 0. `first` may need 64 bits once multiplied."""
    p = p + tl.cast(first, tl.int64) * stride + (o_n[:, None] * stride + o_d[None, :])
    if MASKED:
        return tl.load(p, mask=first + o_n[:, None] < T, other=0.0)
    return tl.load(p)


@triton.jit
def _place(T, GROUP: tl.constexpr, KV: tl.constexpr, BLOCK: tl.constexpr, BG: tl.constexpr):
    """Which block of positions, batch row, key/value head and first head of its group a program has."""
    blocks = tl.cdiv(T, BLOCK)
    i_block = tl.program_id(0) % blocks
    i = tl.program_id(0) // blocks
    TILES: tl.constexpr = (GROUP + BG - 1) // BG
    i = i.to(tl.int64)
    return i_block, i // (TILES * KV), i // TILES % KV, i % TILES * BG


@triton.jit
def attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_starts,
    p_o,
    p_lse,
    T,
    c,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STARTS: tl.constexpr,
    BQ: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_q, i_b, i_kv, i_g = _place(T, GROUP, KV, BQ, BG)
    i_t = (tl.cdiv(T, BQ) - 1 - i_q) * BQ  # the longest rows first
    o_r = tl.arange(0, BQ * BG)
    o_d = tl.arange(0, D)
    o_t = i_t + o_r // BG
    m_r = (o_t < T) & (i_g + o_r % BG < GROUP)
    i_h = i_kv * GROUP + i_g
    p_q += i_b * stride_qb + i_t.to(tl.int64) * stride_qt + i_h * stride_qh
    b_q = tl.load(
        p_q + (o_r // BG * stride_qt + (o_r % BG).to(tl.int64) * stride_qh)[:, None] + o_d[None, :],
        mask=m_r[:, None],
        other=0.0,
    )
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh

    b_acc = tl.zeros((BQ * BG, D), tl.float32)
    b_l = tl.zeros((BQ * BG,), tl.float32)
    b_m = tl.full((BQ * BG,), -1e30, tl.float32)  # finite: a row that sees nothing yet must not make NaN
    diagonal = i_t // BN * BN
    b_start = o_t
    if STARTS:
        b_start = tl.load(p_starts + i_b * T + o_t, mask=o_t < T, other=0)
        diagonal = tl.load(p_starts + i_b * T + i_t) // BN * BN
    else:
        b_acc, b_l, b_m = _attend(
            b_acc, b_l, b_m, b_q, p_k, p_v, o_t, b_start, 0, diagonal, T, c, stride_kt, stride_vt,
            D, False, STARTS, BN, PRECISION,
        )  # fmt: skip
    b_acc, b_l, b_m = _attend(
        b_acc, b_l, b_m, b_q, p_k, p_v, o_t, b_start, diagonal, tl.minimum(i_t + BQ, T), T, c,
        stride_kt, stride_vt, D, True, STARTS, BN, PRECISION,
    )  # fmt: skip

    o_out = (i_b * T + i_t) * (KV * GROUP) + i_h + o_r // BG * (KV * GROUP) + o_r % BG
    tl.store(
        p_o + o_out[:, None] * D + o_d[None, :],
        (b_acc / b_l[:, None]).to(p_o.dtype.element_ty),
        mask=m_r[:, None],
    )
    tl.store(p_lse + o_out, b_m + tl.log2(b_l), mask=m_r)


@triton.jit
def _query_gradient(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    p_k,
    p_v,
    o_t,
    b_start,
    low,
    high,
    T,
    c,
    stride_kt,
    stride_vt,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    STARTS: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ / scale [M, D] of the keys low..high."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    for n in range(low, high, BN):
        b_k = _rows(p_k, n, o_n, o_d, stride_kt, T, MASKED)  # [N, D]
        b_v = _rows(p_v, n, o_n, o_d, stride_vt, T, MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [M, N]
        b_p = tl.exp2(b_s * c - b_lse[:, None])
        if MASKED:
            m_s = o_t[:, None] >= n + o_n[None, :]
            if STARTS:
                m_s = m_s & (b_start[:, None] <= n + o_n[None, :])
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit
def attention_bwd_dq_kernel(
    p_q,
    p_k,
    p_v,
    p_starts,
    p_o,
    p_do,
    p_lse,
    p_delta,
    p_dq,
    T,
    c,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_db,
    stride_dt,
    stride_dh,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STARTS: tl.constexpr,
    BQ: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_q, i_b, i_kv, i_g = _place(T, GROUP, KV, BQ, BG)
    i_t = (tl.cdiv(T, BQ) - 1 - i_q) * BQ
    o_r = tl.arange(0, BQ * BG)
    o_d = tl.arange(0, D)
    o_t = i_t + o_r // BG
    m_r = (o_t < T) & (i_g + o_r % BG < GROUP)
    i_h = i_kv * GROUP + i_g
    p_q += i_b * stride_qb + i_t.to(tl.int64) * stride_qt + i_h * stride_qh
    b_q = tl.load(
        p_q + (o_r // BG * stride_qt + (o_r % BG).to(tl.int64) * stride_qh)[:, None] + o_d[None, :],
        mask=m_r[:, None],
        other=0.0,
    )
    p_do += i_b * stride_db + i_t.to(tl.int64) * stride_dt + i_h * stride_dh
    b_do = tl.load(
        p_do + (o_r // BG * stride_dt + (o_r % BG).to(tl.int64) * stride_dh)[:, None] + o_d[None, :],
        mask=m_r[:, None],
        other=0.0,
    )
    o_out = (i_b * T + i_t) * (KV * GROUP) + i_h + o_r // BG * (KV * GROUP) + o_r % BG
    b_o = tl.load(p_o + o_out[:, None] * D + o_d[None, :], mask=m_r[:, None], other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + o_out, b_delta, mask=m_r)
    b_lse = tl.load(p_lse + o_out, mask=m_r, other=0.0)
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh

    b_dq = tl.zeros((BQ * BG, D), tl.float32)
    diagonal = i_t // BN * BN
    b_start = o_t
    if STARTS:
        b_start = tl.load(p_starts + i_b * T + o_t, mask=o_t < T, other=0)
        diagonal = tl.load(p_starts + i_b * T + i_t) // BN * BN
    else:
        b_dq = _query_gradient(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, o_t, b_start, 0, diagonal, T, c, stride_kt, stride_vt,
            D, False, STARTS, BN, PRECISION,
        )  # fmt: skip
    b_dq = _query_gradient(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, o_t, b_start, diagonal, tl.minimum(i_t + BQ, T), T, c,
        stride_kt, stride_vt, D, True, STARTS, BN, PRECISION,
    )  # fmt: skip
    tl.store(
        p_dq + o_out[:, None] * D + o_d[None, :], (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_r[:, None]
    )


@triton.jit
def _key_gradients(
    b_dk,
    b_dv,
    b_k,
    b_v,
    p_q,
    p_do,
    p_lse,
    p_delta,
    p_starts,
    i_g,
    o_n,
    low,
    high,
    T,
    c,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    STARTS: tl.constexpr,
    BQ: tl.constexpr,
    BG: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK / scale and dV [N, D] of the query positions low..high and the heads i_g.. of the group.

    In fp32 a tile's part is summed by itself: one sum over all of 4,096 positions and 4 heads would err by
    3e-6, 7 times what PyTorch's does. The factor, which is 1, keeps Triton from making one sum of the two.
    """
    one = tl.cast(T > 0, tl.float32)
    o_r = tl.arange(0, BQ * BG)
    o_d = tl.arange(0, D)
    for t in range(low, high, BQ):
        o_t = t + o_r // BG
        m_r = (o_t < T) & (i_g + o_r % BG < GROUP)
        wide = tl.cast(t, tl.int64)
        o_q = (o_r // BG * stride_qt + (o_r % BG).to(tl.int64) * stride_qh)[:, None] + o_d[None, :]
        o_do = (o_r // BG * stride_dt + (o_r % BG).to(tl.int64) * stride_dh)[:, None] + o_d[None, :]
        o_h = wide * H + (o_r // BG * H + o_r % BG)
        b_q = tl.load(p_q + wide * stride_qt + o_q, mask=m_r[:, None], other=0.0)  # [M, D]
        b_lse = tl.load(
            p_lse + o_h, mask=m_r, other=0.0
        )  # without such a row dO is 0, and so is what it adds
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [N, M]
        b_p = tl.exp2(b_s * c - b_lse[None, :])
        if MASKED:
            m_s = o_n[:, None] <= o_t[None, :]
            if STARTS:
                b_start = tl.load(p_starts + o_t, mask=o_t < T, other=0)
                m_s = m_s & (b_start[None, :] <= o_n[:, None])
            b_p = tl.where(m_s, b_p, 0.0)
        b_do = tl.load(p_do + wide * stride_dt + o_do, mask=m_r[:, None], other=0.0)
        if b_q.dtype == tl.float32:
            b_dv += tl.dot(b_p, b_do, input_precision=PRECISION) * one
        else:
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv)
        b_delta = tl.load(p_delta + o_h, mask=m_r, other=0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if b_q.dtype == tl.float32:
            b_dk += tl.dot(b_ds, b_q, input_precision=PRECISION) * one
        else:
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def attention_bwd_dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_starts,
    p_ends,
    p_do,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    T,
    c,
    scale,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_db,
    stride_dt,
    stride_dh,
    KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STARTS: tl.constexpr,
    BQ: tl.constexpr,
    BG: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_n, i_b, i_kv, _ = _place(T, GROUP, KV, BN, GROUP)
    i_n = i_n * BN
    H: tl.constexpr = KV * GROUP
    o_n = i_n + tl.arange(0, BN)
    o_d = tl.arange(0, D)
    b_k = _rows(p_k + i_b * stride_kb + i_kv * stride_kh, i_n, tl.arange(0, BN), o_d, stride_kt, T, True)
    b_v = _rows(p_v + i_b * stride_vb + i_kv * stride_vh, i_n, tl.arange(0, BN), o_d, stride_vt, T, True)
    b_dk = tl.zeros((BN, D), tl.float32)
    b_dv = tl.zeros((BN, D), tl.float32)
    first = i_n // BQ * BQ
    masked = tl.minimum(tl.cdiv(i_n + BN, BQ) * BQ, T)
    if STARTS:
        # The last position that sees the last key of the block; its documents end there.
        masked = tl.load(p_ends + i_b * T + tl.minimum(i_n + BN, T) - 1)
        p_starts += i_b * T
    for i_g in range(0, GROUP, BG):
        i_h = i_kv * GROUP + i_g
        p_qh = p_q + i_b * stride_qb + i_h * stride_qh
        p_doh = p_do + i_b * stride_db + i_h * stride_dh
        p_lseh = p_lse + i_b * T * H + i_h
        p_deltah = p_delta + i_b * T * H + i_h
        b_dk, b_dv = _key_gradients(
            b_dk, b_dv, b_k, b_v, p_qh, p_doh, p_lseh, p_deltah, p_starts, i_g, o_n, first, masked, T, c,
            stride_qt, stride_qh, stride_dt, stride_dh, H, GROUP, D, True, STARTS, BQ, BG, PRECISION,
        )  # fmt: skip
        if not STARTS:
            b_dk, b_dv = _key_gradients(
                b_dk, b_dv, b_k, b_v, p_qh, p_doh, p_lseh, p_deltah, p_starts, i_g, o_n, masked, T, T, c,
                stride_qt, stride_qh, stride_dt, stride_dh, H, GROUP, D, False, STARTS, BQ, BG, PRECISION,
            )  # fmt: skip
    m = (o_n < T)[:, None]
    o_out = ((i_b * T + i_n) * KV + i_kv + tl.arange(0, BN) * KV)[:, None] * D + o_d[None, :]
    tl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=m)


class _Tile(NamedTuple):
    rows: int  # query positions times heads
    keys: int
    warps: int
    stages: int
    registers: int | None = None  # most of a thread; None: as many as the compiler likes


# Of Hopper, by kernel and head size. For 16 and 64, among the fastest of up to 35 on an H200: at 16, three
# blocks an SM with 168 registers a thread make dK and dV in 0.18 ms, where two with 244 take 0.21. For 32 and
# 128, shapes that compile without spills and with few instructions a score.
_TILES = {
    "forward": {
        16: _Tile(128, 64, 4, 3),
        32: _Tile(128, 64, 8, 2),
        64: _Tile(64, 64, 4, 3),
        128: _Tile(128, 64, 8, 2),
    },
    "dq": {
        16: _Tile(128, 32, 4, 2),
        32: _Tile(128, 64, 8, 2),
        64: _Tile(64, 64, 4, 3),
        128: _Tile(128, 64, 8, 2),
    },
    "dkdv": {
        16: _Tile(128, 64, 4, 3, 168),
        32: _Tile(64, 64, 4, 2),
        64: _Tile(32, 64, 4, 2),
        128: _Tile(32, 128, 8, 2),
    },
}
# Devices below this have no room, or keep operands of products in registers, and would spill. Counted in the
# machine code for sm_80 (benchmarks/triton_resources.py): without spills and with the fewest instructions a
# score while two blocks still fit an SM.
_SMALL_TILES = {
    "forward": {size: _Tile(128, 64, 4 if size == 16 else 8, 2) for size in HEAD_SIZES},
    "dq": {size: _Tile(64 if size == 128 else 128, 64, 8, 2) for size in HEAD_SIZES},
    "dkdv": {
        16: _Tile(64, 64, 4, 2),
        32: _Tile(64, 64, 4, 2),
        64: _Tile(32, 128, 8, 2),
        128: _Tile(64, 64, 8, 2),
    },
}
# No tensor cores here: their fp32 products are of 10 bits.
_FP32_TILES = {
    "forward": {size: _Tile(64, 32, 4, 2) if size <= 32 else _Tile(32, 32, 8, 1) for size in HEAD_SIZES},
    "dq": {size: _Tile(64, 32, 4, 1) if size <= 32 else _Tile(32, 32, 8, 1) for size in HEAD_SIZES},
    "dkdv": {
        16: _Tile(32, 32, 4, 1),
        32: _Tile(32, 32, 8, 1, 160),
        64: _Tile(16, 32, 8, 1),
        128: _Tile(16, 32, 8, 1),
    },
}


def _launch(kernel: str, q: torch.Tensor, k: torch.Tensor, starts: torch.Tensor | None):
    """Grid and keyword arguments of a kernel for these shapes, on the current device."""
    batch, length, heads, size = q.shape
    kv = k.shape[2]
    group = heads // kv
    tile = _tile(kernel, size, q.dtype.itemsize)
    heads_a_tile = min(triton.next_power_of_2(group), _MAX_GROUP)
    positions = tile.rows // heads_a_tile
    if kernel == "dkdv":
        grid = batch * kv * triton.cdiv(length, tile.keys)
    else:
        grid = batch * kv * triton.cdiv(group, heads_a_tile) * triton.cdiv(length, positions)
    return (grid,), {
        "KV": kv,
        "GROUP": group,
        "D": size,
        "STARTS": starts is not None,
        "BQ": positions,
        "BG": heads_a_tile,
        "BN": tile.keys,
        "PRECISION": "ieee",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # The masks of documents take more registers than that leaves, and so does a B200.
        **({"maxnreg": tile.registers} if tile.registers and starts is None and is_hopper() else {}),
    }


def _tile(kernel: str, size: int, itemsize: int) -> _Tile:
    if itemsize == 4:
        return _FP32_TILES[kernel][size]
    tiles = _SMALL_TILES if shared_memory() < LARGE_SHARED_MEMORY else _TILES
    return tiles[kernel][size]


def _kept(q, k):
    """log2 of the sum of exp2 of the scores times log2(e) [B, T, H], fp32; nothing else."""
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device), q.new_empty(0)


def _forward(q, k, v, starts, o, lse, _):
    q, k, v = dense(q), dense(k), dense(v)
    with torch.cuda.device_of(q):
        grid, constants = _launch("forward", q, k, starts)
        attention_fwd_kernel[grid](
            q,
            k,
            v,
            q if starts is None else starts,
            o,
            lse,
            q.shape[1],
            math.log2(math.e) / math.sqrt(q.shape[3]),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            **constants,
        )


def _backward(do, q, k, v, starts, o, lse, _, dq, dk, dv):
    do, q, k, v = dense(do), dense(q), dense(k), dense(v)
    length, size = q.shape[1], q.shape[3]
    ends = starts
    if starts is not None:
        positions = (
            torch.arange(length, dtype=starts.dtype, device=q.device).expand(starts.shape).contiguous()
        )
        ends = torch.searchsorted(starts, positions, right=True, out_int32=True)
    delta = torch.empty_like(lse)
    scale = 1 / math.sqrt(size)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    with torch.cuda.device_of(q):
        numbers = (length, math.log2(math.e) * scale, scale, *strides)
        grid, constants = _launch("dq", q, k, starts)
        some = q if starts is None else starts
        attention_bwd_dq_kernel[grid](q, k, v, some, o, do, lse, delta, dq, *numbers, **constants)
        grid, constants = _launch("dkdv", q, k, starts)
        attention_bwd_dkdv_kernel[grid](
            q, k, v, some, some if ends is None else ends, do, lse, delta, dk, dv, *numbers, **constants
        )


attention = make_attention("ant5m_triton::attention", _forward, _backward, _kept)
