"""Causal flash attention with grouped queries, in documents if wanted: csrc/cuda/attention.cu.

Deterministic: the backward pass is two kernels without atomics.
"""

import math

import torch

from ant5m.kernels.cuda.runtime import launch

HEAD_SIZES = (16, 32, 64)
MAX_ROWS = 65_535
"""sequences: the third dimension of a grid"""

_THREADS = 128
_NORM_ROWS = 16


@torch.library.custom_op("ant5m_cuda::attention", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> o; log2 of the sum of exponentials of each row; norms of v that the backward pass scales by."""
    o, lse, v_norm = _outputs(q, k, v, starts)
    q, k, v = (_aligned(x) for x in (q, k, v))
    if o.numel() > 0:
        _launch("attention_forward", _query_grid(q, k), q, k, v, starts, (o, lse, v_norm), ())
    return o, lse, v_norm


@_forward.register_fake
def _outputs(q, k, v, starts):
    batch, length, heads, _ = q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    return o, lse, _norms(k)


@torch.library.custom_op("ant5m_cuda::attention_backward", mutates_args=())
def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: torch.Tensor | None,
    o: torch.Tensor,
    lse: torch.Tensor,
    v_norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> dq, dk, dv."""
    dq, dk, dv = _gradients(do, q, k, v, starts, o, lse, v_norm)
    do, q, k, v = (_aligned(x) for x in (do, q, k, v))
    if o.numel() == 0:
        return dq, dk, dv
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
    return dq, dk, dv


@_backward.register_fake
def _gradients(do, q, k, v, starts, o, lse, v_norm):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


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


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, do, *_):
    return *_backward(do, *ctx.saved_tensors), None


_forward.register_autograd(_differentiate, setup_context=_save)


def attention(q, k, v, starts=None):
    return _forward(q, k, v, None if starts is None else starts.to(torch.int32).contiguous())[0]
