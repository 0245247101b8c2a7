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

from ant5m.kernels.arguments import rows
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.cuda.vectors import vector
from ant5m.kernels.custom_ops import make_mlp
from ant5m.kernels.lm_head_loss import product

SIZES = (64, 128)

_SOURCE = "mlp.cu"
_THREADS = 256
_FORWARD_TOKENS, _BACKWARD_TOKENS = 256, 128  # a block's


def _forward(x, gate, up, down, y):
    x, weights = _even(rows(x)), _columns(gate, up, down)
    if len(x) > 0:
        _launch("mlp_forward", _FORWARD_TOKENS, (x,), weights, (y,))


def _backward(dy, x, gate, up, down, dx, dboth_weight, ddown):
    dy, x, weights = _even(rows(dy)), _even(rows(x)), _columns(gate, up, down)
    width = len(weights[0])
    hidden, dboth = x.new_empty(len(x), width), x.new_empty(len(x), 2 * width)
    if len(x) > 0:
        _launch("mlp_backward", _BACKWARD_TOKENS, (dy, x), weights, (hidden, dboth, dx))
    product(dboth.T, x, out=dboth_weight)
    product(dy.T, hidden, out=ddown)


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


mlp = make_mlp("ant5m_cuda::mlp", _forward, _backward, gradient_dtype=torch.float32)
