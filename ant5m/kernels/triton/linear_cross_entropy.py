"""The head by chunks (`ant5m.kernels.lm_head_loss`).

In 16 bits on tensor cores, logits live in registers alone, in fp32: one kernel makes the softmax's sum and
the loss of all rows, the other makes the logits of a chunk again and writes their gradients. So the loss is
as exact as the inputs; logits that are stored in bf16 would be rounded by up to 0.4 %. On an H100, 65,536 x
128 x 16,384 take 3.0 ms with both products, where gradients in the place of cuBLAS's logits take 4.0.
Elsewhere (fp32, or below compute capability 8.0, where Triton has no tensor cores) they are made so.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ant5m.kernels.arguments import dense
from ant5m.kernels.lm_head_loss import chunk_buffer, chunks, in_place, make_linear_cross_entropy
from ant5m.kernels.triton.device import LARGE_SHARED_MEMORY, has_tensor_cores, shared_memory

_LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2))
# Entries of a program of the gradient's kernel.
_SPAN = 2_048


@triton.jit
def _logits(
    b_hidden,
    p_hidden,
    p_weight,
    m_n,
    first,
    V,
    stride_weight,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits [N, V] of the entries first.., fp32. `p_hidden` [N, 1] is for rows longer than a block."""
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    p_weight = (
        p_weight + tl.cast(first, tl.int64) * stride_weight + ((o_v * stride_weight)[:, None] + o_d[None, :])
    )
    if D <= BLOCK_D:
        m = (o_d < D)[None, :] if EVEN else (first + o_v < V)[:, None] & (o_d < D)[None, :]
        return tl.dot(b_hidden, tl.trans(tl.load(p_weight, mask=m, other=0.0)))
    b_z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        m_d = (d + o_d < D)[None, :]
        b_x = tl.load(p_hidden + (d + o_d)[None, :], mask=m_n[:, None] & m_d, other=0.0)
        m = m_d if EVEN else (first + o_v < V)[:, None] & m_d
        b_z = tl.dot(b_x, tl.trans(tl.load(p_weight + d, mask=m, other=0.0)), b_z)
    return b_z


@triton.jit
def _hidden(p_hidden, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first block of the rows [N, D]: all of them, where that is enough."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(p_hidden + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def head_loss_kernel(
    p_hidden,
    p_weight,
    p_targets,
    p_losses,
    p_lse,
    N,
    V,
    ignore_index,
    stride_hidden,
    stride_weight,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loss [N], and log2 of the sum of exp2 of the logits times log2(e) [N], of a tile of rows.

    Rows whose target is `ignore_index` have no loss, those whose target is no entry have NaN.
    """
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    p_hidden += (o_n * stride_hidden)[:, None]
    b_hidden = _hidden(p_hidden, m_n, D, BLOCK_D)
    b_m = tl.full((BLOCK_N,), -1e30, tl.float32)
    b_l = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, V, BLOCK_V):
        b_z = _logits(
            b_hidden, p_hidden, p_weight, m_n, first, V, stride_weight, D, EVEN, BLOCK_N, BLOCK_V, BLOCK_D
        )
        if not EVEN:
            b_z = tl.where((first + tl.arange(0, BLOCK_V) < V)[None, :], b_z, -float("inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_z, 1) * _LOG2E)
        b_l = b_l * tl.exp2(b_m - b_m_new) + tl.sum(tl.exp2(b_z * _LOG2E - b_m_new[:, None]), 1)
        b_m = b_m_new
    b_lse = b_m + tl.log2(b_l)
    tl.store(p_lse + o_n, b_lse, mask=m_n)

    b_target = tl.load(p_targets + o_n, mask=m_n, other=ignore_index)
    m_known = (b_target >= 0) & (b_target < V)
    p_weight += (tl.where(m_known, b_target, 0) * stride_weight)[:, None]
    b_at = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_D):
        m = m_n[:, None] & (d + o_d < D)[None, :]
        b_x = tl.load(p_hidden + (d + o_d)[None, :], mask=m, other=0.0).to(tl.float32)
        b_at += tl.sum(b_x * tl.load(p_weight + (d + o_d)[None, :], mask=m, other=0.0).to(tl.float32), 1)
    b_loss = tl.where(m_known, b_lse * _LN2 - b_at, float("nan"))
    tl.store(p_losses + o_n, tl.where(b_target == ignore_index, 0.0, b_loss), mask=m_n)


@triton.jit
def head_gradient_kernel(
    p_hidden,
    p_weight,
    p_targets,
    p_lse,
    p_out,
    N,
    V,
    ignore_index,
    scale,
    z_loss,
    stride_hidden,
    stride_weight,
    stride_out,
    D: tl.constexpr,
    EVEN: tl.constexpr,
    Z: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale * (softmax - one-hot) of a tile of rows and SPAN entries; 0 where a row does not count. With Z
    the softmax is times 1 + 2 z_loss log(sum(exp))."""
    spans = tl.cdiv(V, SPAN)
    low = tl.program_id(0) % spans * SPAN
    o_n = (tl.program_id(0) // spans * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_n = o_n < N
    p_hidden += (o_n * stride_hidden)[:, None]
    o_out = (tl.arange(0, BLOCK_N) * stride_out)[:, None] + tl.arange(0, BLOCK_V)[None, :]
    p_out += tl.cast(tl.program_id(0) // spans * BLOCK_N, tl.int64) * stride_out
    b_hidden = _hidden(p_hidden, m_n, D, BLOCK_D)
    b_target = tl.load(p_targets + o_n, mask=m_n, other=ignore_index)
    b_scale = tl.where(b_target == ignore_index, 0.0, scale)
    b_lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    for first in range(low, tl.minimum(low + SPAN, V), BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        b_z = _logits(
            b_hidden, p_hidden, p_weight, m_n, first, V, stride_weight, D, EVEN, BLOCK_N, BLOCK_V, BLOCK_D
        )
        b_p = tl.exp2(b_z * _LOG2E - b_lse[:, None])
        if Z:
            b_p *= (b_lse * _LN2 * 2.0 * z_loss + 1.0)[:, None]
        b_p = tl.where(b_target[:, None] == o_v[None, :], b_p - 1.0, b_p)
        m = m_n[:, None] & (o_v < stride_out)[None, :]
        tl.store(p_out + first + o_out, (b_p * b_scale[:, None]).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _load(p_row, o, V, stride):
    b_z = tl.load(p_row + o, mask=o < stride, other=0.0).to(tl.float32)
    return tl.where(o < V, b_z, -float("inf"))


@triton.jit
def _store(p_row, o, stride, b_delta):
    tl.store(p_row + o, b_delta.to(p_row.dtype.element_ty), mask=o < stride)


@triton.jit
def softmax_gradient_kernel(
    p_logits,
    p_targets,
    p_losses,
    V,
    stride,
    ignore_index,
    scale,
    z_loss,
    GRADIENT: tl.constexpr,
    Z: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of logits -> its loss, and in its place scale * (softmax - one-hot); 0 where it does not count.

    A row has room for `stride` entries, a multiple of 16, so that vectors of entries are read and written;
    what lies behind entry V is never used. A target that is no entry makes the loss NaN. With Z the softmax
    is times 1 + 2 z_loss log(sum(exp)).
    """
    i_n = tl.program_id(0).to(tl.int64)
    target = tl.load(p_targets + i_n)
    p_row = p_logits + i_n * stride
    o = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(p_losses + i_n, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                _store(p_row, first + o, stride, tl.zeros((BLOCK,), tl.float32))
    else:
        known = (target >= 0) & (target < V)
        # Read before the first reduction: its barrier comes before what other threads write there.
        at_target = tl.load(p_row + target, mask=known, other=float("nan")).to(tl.float32)
        if WHOLE:
            b_z = _load(p_row, o, V, stride)
            row_max = tl.max(b_z, 0)
            b_exp = tl.exp(b_z - row_max)
            row_sum = tl.sum(b_exp, 0)
            if GRADIENT:
                factor = scale / row_sum
                if Z:
                    factor *= 1.0 + 2.0 * z_loss * (row_max + tl.log(row_sum))
                _store(p_row, o, stride, b_exp * factor)
        else:
            b_m = tl.full((BLOCK,), -1e30, tl.float32)
            b_l = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, V, BLOCK):
                b_z = _load(p_row, first + o, V, stride)
                b_m_new = tl.maximum(b_m, b_z)
                b_l = b_l * tl.exp(b_m - b_m_new) + tl.exp(b_z - b_m_new)
                b_m = b_m_new
            row_max = tl.max(b_m, 0)
            row_sum = tl.sum(b_l * tl.exp(b_m - row_max), 0)
            if GRADIENT:
                factor = scale / row_sum
                if Z:
                    factor *= 1.0 + 2.0 * z_loss * (row_max + tl.log(row_sum))
                for first in range(0, V, BLOCK):
                    b_z = _load(p_row, first + o, V, stride)
                    _store(p_row, first + o, stride, tl.exp(b_z - row_max) * factor)
        tl.store(p_losses + i_n, row_max - at_target + tl.log(row_sum))
        if GRADIENT:
            tl.debug_barrier()
            at = tl.exp(at_target - row_max) / row_sum
            if Z:
                at *= 1.0 + 2.0 * z_loss * (row_max + tl.log(row_sum))
            delta = (at - 1.0) * scale
            tl.store(p_row + target, delta.to(p_logits.dtype.element_ty), mask=known)


def softmax_gradient(
    logits: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    vocab: int,
    ignore_index: int,
    scale: float,
    gradient: bool,
    z_loss: float,
) -> None:
    """See `ant5m.kernels.lm_head_loss.SoftmaxGradient`."""
    rows, stride = logits.shape
    with torch.cuda.device_of(logits):
        softmax_gradient_kernel[(rows,)](
            logits,
            targets,
            losses,
            vocab,
            stride,
            ignore_index,
            scale,
            z_loss,
            GRADIENT=gradient,
            Z=z_loss != 0,
            **_tile(stride),
        )


def _tile(padded: int) -> dict[str, int | bool]:
    # 32 entries a thread, so that a row stays in registers; what no block has threads for is read twice.
    if padded <= 32_768:
        block = triton.next_power_of_2(padded)
        return {"WHOLE": True, "BLOCK": block, "num_warps": max(4, block // 1_024)}
    return {"WHOLE": False, "BLOCK": 8_192, "num_warps": 16}


_by_cublas = in_place(softmax_gradient)


def gradients(hidden, weight, targets, losses, ignore_index, scale, gradient, z_loss):
    """See `ant5m.kernels.lm_head_loss.Gradients`."""
    with torch.cuda.device_of(hidden):
        by_cublas = hidden.dtype == torch.float32 or not has_tensor_cores()
    if by_cublas:
        yield from _by_cublas(hidden, weight, targets, losses, ignore_index, scale, gradient, z_loss)
        return
    hidden, weight = dense(hidden), dense(weight)
    (rows, size), vocab = hidden.shape, len(weight)
    strides = hidden.stride(0), weight.stride(0)
    lse = torch.empty_like(losses)
    with torch.cuda.device_of(hidden):
        constants = _product_tile("loss", size, vocab)
        head_loss_kernel[(triton.cdiv(rows, constants["BLOCK_N"]),)](
            hidden, weight, targets, losses, lse, rows, vocab, ignore_index, *strides, **constants
        )
    if not gradient:
        return
    buffer = chunk_buffer(hidden, vocab)
    for part in chunks(rows, len(buffer)):
        x = hidden[part]
        with torch.cuda.device_of(hidden):
            constants = _product_tile("gradient", size, vocab)
            grid = triton.cdiv(len(x), constants["BLOCK_N"]) * triton.cdiv(vocab, _SPAN)
            head_gradient_kernel[(grid,)](
                x, weight, targets[part], lse[part], buffer, len(x), vocab, ignore_index, scale, z_loss,
                *strides, buffer.stride(0), Z=z_loss != 0, SPAN=_SPAN, **constants,
            )  # fmt: skip
        yield part, buffer[: len(x), :vocab]


class _Tile(NamedTuple):
    rows: int
    entries: int
    block: int  # numbers of a row at once; fewer than all: they are read again for each tile of entries
    warps: int
    stages: int


def _product_tile(kernel: str, size: int, vocab: int) -> dict[str, int | bool]:
    tile = _choose(kernel, max(16, triton.next_power_of_2(size)))
    return {
        "D": size,
        "EVEN": vocab % tile.entries == 0,
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.entries,
        "BLOCK_D": tile.block,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _choose(kernel: str, size: int) -> _Tile:
    """Of Hopper: the fastest of 22 or more on an H100, bf16, sizes 128 (16,384 entries), 192 and 256 (4,096).

    Elsewhere there is less shared memory: tiles that compile for sm_80 without spills.
    """
    if shared_memory() < LARGE_SHARED_MEMORY:
        block = size if size <= 128 else 64
        return _Tile(128, 64, block, 8, 2) if kernel == "loss" else _Tile(128, 32, block, 8, 2)
    if kernel == "loss":
        return _Tile(128, 128, size if size <= 128 else 64, 8, 2)
    if size <= 128:
        return _Tile(128, 32, size, 8, 3)
    return _Tile(128, 64, size if size <= 256 else 64, 8, 3)


linear_cross_entropy = make_linear_cross_entropy("ant5m_triton::linear_cross_entropy", gradients)
