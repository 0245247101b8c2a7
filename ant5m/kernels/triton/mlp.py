"""The SwiGLU block, down (silu(gate x) * (up x)), as one kernel, with a backward pass that computes it again.

A program has a block of tokens, whose rows stay on the chip, and goes through the columns of gate and up.

Counted for an H100 (2.8 TB/s) and one layer of `ant-5m`: 65,536 tokens, 128 channels, 520 columns, 16 bits.

    forward    in three launches: gate and up written and read, as is what becomes of them: 442 MB, 158 us
               in one: 34 MB; 26 GFLOP, 65 us at 400 TFLOP/s
    backward   in three launches, without those for the weights: 578 MB, 207 us
               in one: 255 MB; 44 GFLOP, two products of five being computed again, 110 us

And 204 MB a layer need not be kept. Not timed on any device yet: on each, `check` times it beside three
products around `swiglu` before its first use, and where it is not faster it is not used.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ant5m.kernels.arguments import rows
from ant5m.kernels.custom_ops import make_mlp
from ant5m.kernels.triton.device import LARGE_SHARED_MEMORY, is_hopper, shared_memory

SIZES = (64, 128, 256)


@triton.jit
def _sigmoid(b):
    """With the square of rsqrt for a division, which takes four instructions more."""
    b_root = tl.rsqrt(1.0 + tl.exp2(b * -1.4426950408889634))
    return b_root * b_root


@triton.jit
def _tokens(p, i_n, o_n, o_d, stride, m):
    """Rows i_n + o_n; 0 where m says that there is none."""
    return tl.load(p + i_n * stride + (o_n[:, None] * stride + o_d[None, :]), mask=m, other=0.0)


@triton.jit
def _weights(p_gate, p_up, p_down, first, W: tl.constexpr, D: tl.constexpr, BW: tl.constexpr):
    """Columns first.. of gate and up [BW, D] and of down [D, BW]; behind the last one 0."""
    o_w = first + tl.arange(0, BW)
    o_d = tl.arange(0, D)
    o = o_w[:, None] * D + o_d[None, :]
    m = (o_w < W)[:, None]
    b_gate = tl.load(p_gate + o, mask=m, other=0.0)
    b_up = tl.load(p_up + o, mask=m, other=0.0)
    b_down = tl.load(p_down + o_d[:, None] * W + o_w[None, :], mask=(o_w < W)[None, :], other=0.0)
    return b_gate, b_up, b_down


@triton.jit
def mlp_fwd_kernel(
    p_x,
    p_gate,
    p_up,
    p_down,
    p_y,
    N,
    stride_x,
    W: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    m = (i_n + o_n < N)[:, None]
    b_x = _tokens(p_x, i_n, o_n, o_d, stride_x, m)
    b_y = tl.zeros((BN, D), tl.float32)
    for w in range(0, W, BW):
        b_gate, b_up, b_down = _weights(p_gate, p_up, p_down, w, W, D, BW)
        b_g = tl.dot(b_x, tl.trans(b_gate))  # [N, W]
        b_u = tl.dot(b_x, tl.trans(b_up))
        b_hidden = (b_g * _sigmoid(b_g) * b_u).to(b_x.dtype)
        b_y = tl.dot(b_hidden, tl.trans(b_down), b_y)
    tl.store(p_y + i_n * D + (o_n[:, None] * D + o_d[None, :]), b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def mlp_bwd_kernel(
    p_dy,
    p_x,
    p_gate,
    p_up,
    p_down,
    p_hidden,
    p_dboth,
    p_dx,
    N,
    stride_dy,
    stride_x,
    W: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """dx, and what the products for the weights' gradients take: silu(gate) * up, and dgate beside dup."""
    i_n = tl.program_id(0).to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    m = (i_n + o_n < N)[:, None]
    b_x = _tokens(p_x, i_n, o_n, o_d, stride_x, m)
    b_dy = _tokens(p_dy, i_n, o_n, o_d, stride_dy, m)
    b_dx = tl.zeros((BN, D), tl.float32)
    p_hidden += i_n * W
    p_dboth += i_n * (2 * W)
    for w in range(0, W, BW):
        b_gate, b_up, b_down = _weights(p_gate, p_up, p_down, w, W, D, BW)
        b_g = tl.dot(b_x, tl.trans(b_gate))  # [N, W]
        b_u = tl.dot(b_x, tl.trans(b_up))
        b_dhidden = tl.dot(b_dy, b_down)
        b_sigmoid = _sigmoid(b_g)
        b_silu = b_g * b_sigmoid
        b_dgate = (b_dhidden * b_u * (b_sigmoid + b_silu * (1.0 - b_sigmoid))).to(b_x.dtype)
        b_dup = (b_dhidden * b_silu).to(b_x.dtype)
        o_w = w + tl.arange(0, BW)
        m_w = m & (o_w < W)[None, :]
        tl.store(p_hidden + o_n[:, None] * W + o_w[None, :], (b_silu * b_u).to(b_x.dtype), mask=m_w)
        p_dgate = p_dboth + o_n[:, None] * (2 * W) + o_w[None, :]
        tl.store(p_dgate, b_dgate, mask=m_w)
        tl.store(p_dgate + W, b_dup, mask=m_w)
        b_dx = tl.dot(b_dgate, b_gate, b_dx)
        b_dx = tl.dot(b_dup, b_up, b_dx)
    tl.store(p_dx + i_n * D + (o_n[:, None] * D + o_d[None, :]), b_dx.to(p_dx.dtype.element_ty), mask=m)


class _Tile(NamedTuple):
    tokens: int
    columns: int
    stages: int
    registers: int | None = None  # most of a thread, on Hopper; None: as many as the compiler likes


_WARPS = 8
# By channels: without spills, and with few instructions for each element of gate
# (benchmarks/triton_resources.py).
# A block of 128 tokens reads the weights from L2 half as often as one of 64. With 128 registers a thread, two
# blocks share a multiprocessor.
_TILES = {
    "forward": {64: _Tile(128, 32, 3), 128: _Tile(128, 32, 2, 128), 256: _Tile(128, 32, 3)},
    "backward": {64: _Tile(128, 32, 2), 128: _Tile(128, 32, 2), 256: _Tile(128, 16, 2)},
}
# With less than 200 KB of shared memory.
_SMALL_TILES = {
    "forward": {64: _Tile(128, 32, 2), 128: _Tile(128, 32, 2), 256: _Tile(64, 32, 2)},
    "backward": {64: _Tile(128, 16, 2), 128: _Tile(64, 32, 2), 256: _Tile(64, 16, 2)},
}


def _launch(way: str, x: torch.Tensor, width: int):
    """Grid and keyword arguments of a kernel for these shapes, on the current device."""
    count, size = x.shape
    tile = (_SMALL_TILES if shared_memory() < LARGE_SHARED_MEMORY else _TILES)[way][size]
    return (triton.cdiv(count, tile.tokens),), {
        "W": width,
        "D": size,
        "BN": tile.tokens,
        "BW": tile.columns,
        "num_warps": _WARPS,
        "num_stages": tile.stages,
        **({"maxnreg": tile.registers} if tile.registers and is_hopper() else {}),
    }


def _forward(x, gate, up, down, y):
    x, weights = rows(x), _padded(x, gate, up, down)
    if len(x) == 0:
        return
    with torch.cuda.device_of(x):
        grid, constants = _launch("forward", x, len(weights[0]))
        mlp_fwd_kernel[grid](x, *weights, y, len(x), x.stride(0), **constants)


def _backward(dy, x, gate, up, down, dx, dboth_weight, ddown):
    dy, x, weights = rows(dy), rows(x), _padded(x, gate, up, down)
    width = len(weights[0])
    if len(x) == 0:
        dboth_weight.zero_(), ddown.zero_()
        return
    hidden, dboth = x.new_empty(len(x), width), x.new_empty(len(x), 2 * width)
    with torch.cuda.device_of(x):
        grid, constants = _launch("backward", x, width)
        strides = dy.stride(0), x.stride(0)
        mlp_bwd_kernel[grid](dy, x, *weights, hidden, dboth, dx, len(x), *strides, **constants)
    torch.mm(dboth.T, x, out=dboth_weight)
    torch.mm(dy.T, hidden, out=ddown)


def _padded(x, gate, up, down):
    """The weights in x's dtype, without gaps. Zeros make their width a multiple of 8, so that rows of 16-bit
    numbers are whole vectors: silu(0) * 0 is 0, and so are all its gradients."""
    more = -len(gate) % 8
    gate, up, down = (w.to(x.dtype) for w in (gate, up, down))
    if more:
        gate, up, down = F.pad(gate, (0, 0, 0, more)), F.pad(up, (0, 0, 0, more)), F.pad(down, (0, more))
    return gate.contiguous(), up.contiguous(), down.contiguous()


mlp = make_mlp("ant5m_triton::mlp", _forward, _backward)
