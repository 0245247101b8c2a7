"""Rotary position embedding of q and k in one launch: csrc/cuda/rope.cu.

The gradient of a rotation is the rotation back, so the backward pass is the same kernel with -sin. Where q, k
and v are parts of one product, another kernel also brings their gradients together as that product's.
"""

import math

import torch

from ant5m.kernels.cuda.layout import bits, vector
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.layout import dense
from ant5m.kernels.pieces import turn_parts

_THREADS = 256


@torch.library.custom_op("ant5m_cuda::rope", mutates_args=())
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned by the angles whose cosines and sines are given, or back by them."""
    q_out, k_out = _outputs(q, k, cos, sin, back)
    _launch("rope", (q, k), (cos, sin), (q_out, k_out), (-1.0 if back else 1.0,))
    return q_out, k_out


@_rope.register_fake
def _outputs(q, k, cos, sin, back):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


@torch.library.custom_op("ant5m_cuda::rope_back", mutates_args=())
def _rope_back(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """dq and dk turned back beside dv: [B, T, H + 2 KV, D]."""
    together = _joined(dq, dk, dv, cos, sin)
    _launch("rope_qkv_back", (dq, dk, dv), (cos, sin), (together,), ())
    return together


@_rope_back.register_fake
def _joined(dq, dk, dv, cos, sin):
    batch, length, heads, size = dq.shape
    return torch.empty(batch, length, heads + 2 * dk.shape[2], size, dtype=dq.dtype, device=dq.device)


def _launch(kernel, parts, angles, outputs, numbers):
    parts = [dense(x) for x in parts]
    angles = [x.float().contiguous() for x in angles]
    batch, length, heads, size = parts[0].shape
    half, width = size // 2, vector(size // 2, *parts, *angles)
    work = batch * length * sum(x.shape[2] for x in parts) * (half // width)
    if work == 0:
        return
    strides = [stride for x in parts for stride in x.stride()[:3]]
    launch(
        "rope.cu",
        kernel,
        {"SIZE": size, "HEADS": heads, "KV": parts[1].shape[2], "VECTOR": width, "X": bits(parts[0].dtype)},
        (math.ceil(work / _THREADS),),
        _THREADS,
        *(*parts, *angles, *outputs, batch * length, length, *numbers, *strides),
    )


def _save(ctx, inputs, output):
    _, _, cos, sin, back = inputs
    ctx.back = back
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)


def rope(q, k, cos, sin):
    return _rope(q, k, cos, sin, False)


def rope_qkv(qkv, cos, sin, heads):
    return turn_parts(_rope, _rope_back, qkv, cos, sin, heads)
