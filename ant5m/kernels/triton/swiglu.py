"""SwiGLU: silu(gate) * up in one pass, and both gradients in another, from the inputs alone.

With a = sigmoid(gate): dup = dy * gate * a, dgate = dy * up * a * (1 + gate * (1 - a)).
Elements are taken in one flat order over rows, so a width such as 516 wastes no lanes.
"""

import math

import torch
import triton
import triton.language as tl

from ant5m.kernels.arguments import rows
from ant5m.kernels.custom_ops import make_swiglu

_BLOCK = 1_024


@triton.jit
def _offsets(N, D: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Row and column of the program's elements, and which of them exist. ALIGN divides D and BLOCK.

    Strides are constants and ALIGN is given, because only then does Triton find that vectors can be read.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = tl.multiple_of((first % D).to(tl.int32), ALIGN) + tl.arange(0, BLOCK)
    o_n = first // D + o // D
    return o_n, o % D, o_n < N


@triton.jit
def swiglu_fwd_kernel(
    p_gate,
    p_up,
    p_y,
    N,
    stride_gate: tl.constexpr,
    stride_up: tl.constexpr,
    UP: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_n, o_d, m = _offsets(N, D, ALIGN, BLOCK)
    b_gate = tl.load(p_gate + o_n * stride_gate + o_d, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + UP + o_n * stride_up + o_d, mask=m, other=0.0).to(tl.float32)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(p_y + o_n * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def swiglu_bwd_kernel(
    p_dy,
    p_gate,
    p_up,
    p_dboth,
    N,
    stride_dy: tl.constexpr,
    stride_gate: tl.constexpr,
    stride_up: tl.constexpr,
    UP: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_n, o_d, m = _offsets(N, D, ALIGN, BLOCK)
    b_dy = tl.load(p_dy + o_n * stride_dy + o_d, mask=m, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_n * stride_gate + o_d, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + UP + o_n * stride_up + o_d, mask=m, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_dgate = b_dy * b_up * (b_sigmoid + b_silu * (1.0 - b_sigmoid))
    p_dgate = p_dboth + o_n * 2 * D + o_d
    tl.store(p_dgate, b_dgate.to(p_dboth.dtype.element_ty), mask=m)
    tl.store(p_dgate + D, (b_dy * b_silu).to(p_dboth.dtype.element_ty), mask=m)


def _forward(gate, up, y):
    gate, (up, behind) = rows(gate), _from_boundary(rows(up))
    with torch.cuda.device_of(y):
        swiglu_fwd_kernel[(triton.cdiv(y.numel(), _BLOCK),)](
            gate, up, y, len(gate), gate.stride(0), up.stride(0), UP=behind, **_tile(gate.shape[1])
        )


def _backward(dy, gate, up, dboth):
    dy, gate, (up, behind) = rows(dy), rows(gate), _from_boundary(rows(up))
    with torch.cuda.device_of(dy):
        swiglu_bwd_kernel[(triton.cdiv(gate.numel(), _BLOCK),)](
            dy,
            gate,
            up,
            dboth,
            len(gate),
            dy.stride(0),
            gate.stride(0),
            up.stride(0),
            UP=behind,
            **_tile(gate.shape[1]),
        )


def _from_boundary(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x's memory from the 16-byte boundary before it, and how many elements x lies behind that.

    All that Triton knows of a pointer is whether it is at such a boundary. The second half of a row of
    2 * 516 is not, and would be read an element at a time.
    """
    behind = min(x.data_ptr() % 16 // x.itemsize, int(x.storage_offset()))
    return x.as_strided(x.shape, x.stride(), x.storage_offset() - behind), behind


def _tile(size: int) -> dict[str, int]:
    return {"D": size, "ALIGN": math.gcd(size, _BLOCK), "BLOCK": _BLOCK}


swiglu = make_swiglu("ant5m_triton::swiglu", _forward, _backward)
