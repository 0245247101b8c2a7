"""Tensors as the C++ takes them: addresses, strides, shapes, and the memory of results.

`address` and `heads` give away an address only: their argument must be a variable that outlives the call.
"""

import math

import torch

from ant5m import _cpu

LARGE = _cpu.LARGE
"""numbers of a tensor for which memory is kept"""


def empty(like, *shape):
    """`like.new_empty(shape)`; a large one from memory that the ops use again (csrc/cpu/memory.h)."""
    size = math.prod(shape)
    if size < LARGE:
        return like.new_empty(shape)
    # `data`, because autograd refuses to change a view that an op returns, as `mul_` would.
    return torch.frombuffer(_cpu.Memory(size), dtype=torch.float32).view(shape).data


def matrix(x):
    """x [..., D] as [rows, D] with gapless rows: a view where that is possible, else a copy."""
    return gapless(x.reshape(-1, x.shape[-1]))


def dense(weight):
    """`weight` in fp32 without gaps and without a gradient."""
    return weight.detach().float().contiguous()


def gapless(x):
    """x, or a copy of it whose last dimension has no gaps."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def address(x):
    return 0 if x is None else x.data_ptr()


def stride(x):
    """From one row of a matrix to the next."""
    return 0 if x is None else x.stride(0)


def heads(x):
    """x [B, T, H, D] as (address, strides of B, T and H)."""
    return x.data_ptr(), *x.stride()[:3]


def attention_shape(q, k):
    """(B, T, H, KV, D)."""
    return *q.shape[:3], k.shape[2], q.shape[3]
