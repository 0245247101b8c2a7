"""SwiGLU: silu(gate) * up in one pass, and both gradients in another: csrc/cuda/swiglu.cu."""

import math

import torch

from ant5m.kernels.cuda.layout import bits, vector
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.layout import rows

_THREADS = 256


@torch.library.custom_op("ant5m_cuda::swiglu", mutates_args=())
def _forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y = _output(gate, up)
    gate, up = rows(gate), rows(up)
    _launch("swiglu_forward", y, gate, up)
    return y


@_forward.register_fake
def _output(gate, up):
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("ant5m_cuda::swiglu_backward", mutates_args=())
def _backward(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """-> both gradients side by side [..., 2 D]: the product that made gate and up gets its own whole."""
    dboth = _gradients(dy, gate, up)
    _launch("swiglu_backward", dboth, rows(dy), rows(gate), rows(up))
    return dboth


@_backward.register_fake
def _gradients(dy, gate, up):
    return torch.empty((*gate.shape[:-1], 2 * gate.shape[-1]), dtype=gate.dtype, device=gate.device)


def _launch(kernel: str, out: torch.Tensor, *inputs: torch.Tensor) -> None:
    count, size = inputs[0].shape
    width = vector(size, *inputs)
    if count > 0:
        launch(
            "swiglu.cu",
            kernel,
            {"SIZE": size, "VECTOR": width, "X": bits(out.dtype)},
            (math.ceil(count * (size // width) / _THREADS),),
            _THREADS,
            *inputs,
            out,
            count,
            *(x.stride(0) for x in inputs),
        )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return _backward(dy, *ctx.saved_tensors).chunk(2, -1)


_forward.register_autograd(_differentiate, setup_context=_save)


def swiglu(gate, up):
    return _forward(gate, up)
