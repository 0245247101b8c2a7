"""The SwiGLU block as one kernel, with a backward pass that computes it again: csrc/cuda/mlp.cu.

Counted for a T4 (24 TFLOP/s, 250 GB/s) and the 11 layers of a step of `ant-5m`: 65,536 tokens, 128 channels,
520 columns. Products move fewer bytes than they have time for, so what counts is SwiGLU's own pass.

    forward    in three launches: products 12 ms, SwiGLU 3.1 KB a token and layer or 9 ms
               in one: 12 ms
    backward   in three launches: products 12 ms, SwiGLU 5.2 KB or 15 ms
               in one: products 20 ms, two of five being computed again
    the products for the weights' gradients are the same in both

And 3.1 KB a token and layer need not be kept: 2.1 GiB. At 256 channels a warp has registers for half as many
tokens, and products grow faster than SwiGLU's pass: that is left to cuBLAS.
"""

import math

import torch
import torch.nn.functional as F

from ant5m.kernels.cuda.layout import vector
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.head import product
from ant5m.kernels.layout import rows

SIZES = (64, 128)

_SOURCE = "mlp.cu"
_THREADS = 256
_FORWARD_TOKENS, _BACKWARD_TOKENS = 256, 128  # a block's


@torch.library.custom_op("ant5m_cuda::mlp", mutates_args=())
def _forward(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    out = _output(x, gate, up, down)
    x, weights = _even(rows(x)), _columns(gate, up, down)
    if len(x) > 0:
        _launch("mlp_forward", _FORWARD_TOKENS, (x,), weights, (out,))
    return out


@_forward.register_fake
def _output(x, gate, up, down):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("ant5m_cuda::mlp_backward", mutates_args=())
def _backward(
    dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of x, gate, up, down."""
    dx, *dweights = _gradients(dy, x, gate, up, down)
    dy, x, weights = _even(rows(dy)), _even(rows(x)), _columns(gate, up, down)
    width = len(weights[0])
    hidden, dboth = x.new_empty(len(x), width), x.new_empty(len(x), 2 * width)
    if len(x) > 0:
        _launch("mlp_backward", _BACKWARD_TOKENS, (dy, x), weights, (hidden, dboth, dx))
    by_both = product(dboth.T, x)
    parts = by_both[:width], by_both[width:], product(dy.T, hidden)
    for dweight, part in zip(dweights, parts, strict=True):
        dweight.copy_(part[: dweight.shape[0], : dweight.shape[1]])
    return dx, *dweights


@_backward.register_fake
def _gradients(dy, x, gate, up, down):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate, up, down))


def _launch(kernel, tokens, inputs, weights, outputs):
    count, size = inputs[0].shape
    launch(
        _SOURCE,
        kernel,
        {"SIZE": size, "WIDTH": len(weights[0])},
        (math.ceil(count / tokens),),
        _THREADS,
        *(*inputs, *weights, *outputs, count, *(x.stride(0) for x in inputs)),
    )


def _columns(gate, up, down):
    """The weights in fp16 as the kernels read them, [W, D] each. Zeros make W a multiple of 8: silu(0) * 0 is
    0, and so are all its gradients."""
    more = -len(gate) % 8
    weights = (w.half() for w in (gate, up, down.T))
    # A pad of nothing would be a copy.
    return tuple(F.pad(w, (0, 0, 0, more)) if more else w.contiguous() for w in weights)


def _even(x):
    return x if vector(2, x) == 2 else x.clone(memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _backward(dy, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def mlp(x, gate, up, down):
    """down (silu(gate x) * (up x)) of x [..., D] fp16 with gate, up [W, D] and down [D, W]: [..., D] fp16."""
    return _forward(x, gate, up, down)
