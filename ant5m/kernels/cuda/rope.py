"""Rotary position embedding of q and k in one launch: csrc/cuda/rope.cu.

The gradient of a rotation is the rotation back, so the backward pass is the same kernel with -sin. Where q, k
and v are parts of one product, another kernel also brings their gradients together as that product's.
"""

import math

from ant5m.kernels.arguments import dense
from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.cuda.vectors import bits, vector
from ant5m.kernels.custom_ops import make_rope

_THREADS = 256


def _rotate(q, k, cos, sin, back, q_out, k_out):
    _launch("rope", (q, k), (cos, sin), (q_out, k_out), (-1.0 if back else 1.0,))


def _rotate_back(dq, dk, dv, cos, sin, out):
    _launch("rope_packed_back", (dq, dk, dv), (cos, sin), (out,), ())


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


rope, rope_packed = make_rope("ant5m_cuda::rope", _rotate, _rotate_back)
