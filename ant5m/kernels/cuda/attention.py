"""Causal flash attention with grouped queries, in documents if wanted: csrc/cuda/attention.cu.

Deterministic: the backward pass is two kernels without atomics.
"""

import math

import torch

from ant5m.kernels.cuda.runtime import launch
from ant5m.kernels.custom_ops import make_attention

HEAD_SIZES = (16, 32, 64)
MAX_ROWS = 65_535
"""sequences: the third dimension of a grid"""

_THREADS = 128
_NORM_ROWS = 16


def _kept(q, k):
    """log2 of the sum of exponentials of each row, [B, H, T]; norms of v that the backward pass scales by."""
    batch, length, heads, _ = q.shape
    return torch.empty(batch, heads, length, dtype=torch.float32, device=q.device), _norms(k)


def _forward(q, k, v, starts, o, lse, v_norm):
    q, k, v = (_aligned(x) for x in (q, k, v))
    if o.numel() > 0:
        _launch("attention_forward", _query_grid(q, k), q, k, v, starts, (o, lse, v_norm), ())


def _backward(do, q, k, v, starts, o, lse, v_norm, dq, dk, dv):
    do, q, k, v = (_aligned(x) for x in (do, q, k, v))
    if o.numel() == 0:
        return
    # Of each row what both kernels need; it has room for two numbers.
    rows, do_norm = lse.new_empty(*lse.shape, 2), _norms(q)
    _launch(
        "attention_dq",
        _query_grid(q, k),
        *(q, k, v, starts, (o, do, lse, v_norm, rows, do_norm, dq), (do, dq)),
    )
    batch, length, kv, size = k.shape
    _launch(
        "attention_dkdv",
        (math.ceil(length / (64 if size == 64 else 128)), kv, batch),
        *(q, k, v, starts, (do, rows, v_norm, do_norm, dk, dv), (do, dk, dv)),
    )


def _launch(kernel, grid, q, k, v, starts, tensors, strided):
    """`strided`: those of `tensors` whose strides the kernel takes, behind those of q, k and v."""
    (_, length, heads, size), kv = q.shape, k.shape[2]
    strides = (stride for x in (q, k, v, *strided) for stride in x.stride()[:3])
    launch(
        "attention.cu",
        kernel,
        {"HEAD_SIZE": size, "GROUP": heads // kv, "STARTS": int(starts is not None)},
        grid,
        _THREADS,
        *(q, k, v, q if starts is None else starts, *tensors, length, 1 / math.sqrt(size), *strides),
    )


def _query_grid(q, k):
    batch, length, heads, _ = q.shape
    together = next(n for n in (4, 3, 2, 1) if heads // k.shape[2] % n == 0)
    return math.ceil(length / (4 // together * 32)), heads // together, batch


def _norms(x):
    batch, length, heads, _ = x.shape
    count = math.ceil(length / _NORM_ROWS)
    return torch.empty(batch, heads, count, dtype=torch.float32, device=x.device)


def _aligned(x):
    """x, or a copy where its rows do not start at multiples of 16 bytes."""
    strides = [stride for stride, count in zip(x.stride()[:-1], x.shape[:-1], strict=True) if count > 1]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


attention = make_attention("ant5m_cuda::attention", _forward, _backward, _kept)
