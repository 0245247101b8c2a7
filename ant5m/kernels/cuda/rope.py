"""Rotary position embedding of q and k in one launch: csrc/cuda/rope.cu.

The gradient of a rotation is the rotation back, so the backward pass is the same kernel with -sin.
"""

import math

import torch

from ant5m.kernels.cuda.layout import bits, vector
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.layout import dense

_THREADS = 256


@torch.library.custom_op("ant5m_cuda::rope", mutates_args=())
def _rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k turned by the angles whose cosines and sines are given, or back by them."""
    q_out, k_out = _outputs(q, k, cos, sin, back)
    q, k = dense(q), dense(k)
    batch, length, heads, size = q.shape
    kv, half = k.shape[2], size // 2
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    width = vector(half, q, k, cos, sin)
    work = batch * length * (heads + kv) * (half // width)
    if work > 0:
        launch(
            "rope.cu",
            "rope",
            {"SIZE": size, "HEADS": heads, "KV": kv, "VECTOR": width, "X": bits(q.dtype)},
            (math.ceil(work / _THREADS),),
            _THREADS,
            *(q, k, cos, sin, q_out, k_out),
            *(batch * length, length, -1.0 if back else 1.0, *q.stride()[:3], *k.stride()[:3]),
        )
    return q_out, k_out


@_rope.register_fake
def _outputs(q, k, cos, sin, back):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))


def _save(ctx, inputs, output):
    _, _, cos, sin, back = inputs
    ctx.back = back
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx, dq, dk):
    return *_rope(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None


_rope.register_autograd(_differentiate, setup_context=_save)


def rope(q, k, cos, sin):
    return _rope(q, k, cos, sin, False)
