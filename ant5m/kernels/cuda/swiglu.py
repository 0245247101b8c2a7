"""SwiGLU: silu(gate) * up in one pass, and both gradients in another: csrc/cuda/swiglu.cu."""

import math

import torch

from ant5m.kernels.arguments import rows
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.cuda.vectors import bits, vector
from ant5m.kernels.custom_ops import make_swiglu

_THREADS = 256


def _forward(gate, up, y):
    _launch("swiglu_forward", y, rows(gate), rows(up))


def _backward(dy, gate, up, dboth):
    _launch("swiglu_backward", dboth, rows(dy), rows(gate), rows(up))


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


swiglu = make_swiglu("ant5m_cuda::swiglu", _forward, _backward)
