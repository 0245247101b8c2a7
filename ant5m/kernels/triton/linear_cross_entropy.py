"""The head by chunks (`ant5m.kernels.head`) around one kernel, from logits to their gradient in place."""

import torch
import triton
import triton.language as tl

from ant5m.kernels.head import make_linear_cross_entropy


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
    GRADIENT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of logits -> its loss, and in its place scale * (softmax - one-hot); 0 where it does not count.

    A row has room for `stride` entries, a multiple of 16, so that vectors of entries are read and written;
    what lies behind entry V is never used. A target that is no entry makes the loss NaN.
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
            highest = tl.max(b_z, 0)
            b_exp = tl.exp(b_z - highest)
            total = tl.sum(b_exp, 0)
            if GRADIENT:
                _store(p_row, o, stride, b_exp * (scale / total))
        else:
            b_max = tl.full((BLOCK,), -1e30, tl.float32)
            b_sum = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, V, BLOCK):
                b_z = _load(p_row, first + o, V, stride)
                b_new = tl.maximum(b_max, b_z)
                b_sum = b_sum * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)
                b_max = b_new
            highest = tl.max(b_max, 0)
            total = tl.sum(b_sum * tl.exp(b_max - highest), 0)
            if GRADIENT:
                for first in range(0, V, BLOCK):
                    b_z = _load(p_row, first + o, V, stride)
                    _store(p_row, first + o, stride, tl.exp(b_z - highest) * (scale / total))
        tl.store(p_losses + i_n, highest - at_target + tl.log(total))
        if GRADIENT:
            tl.debug_barrier()
            delta = (tl.exp(at_target - highest) / total - 1.0) * scale
            tl.store(p_row + target, delta.to(p_logits.dtype.element_ty), mask=known)


def softmax_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    vocab: int,
    ignore_index: int,
    scale: float,
    gradient: bool,
) -> None:
    """See `ant5m.kernels.head.SoftmaxGradient`."""
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
            GRADIENT=gradient,
            **_tile(stride),
        )


linear_cross_entropy = make_linear_cross_entropy("ant5m_triton::linear_cross_entropy", softmax_gradient)


def _tile(padded: int) -> dict[str, int | bool]:
    # 32 entries a thread, so that a row stays in registers; what no block has threads for is read twice.
    if padded <= 32_768:
        block = triton.next_power_of_2(padded)
        return {"WHOLE": True, "BLOCK": block, "num_warps": max(4, block // 1_024)}
    return {"WHOLE": False, "BLOCK": 8_192, "num_warps": 16}
