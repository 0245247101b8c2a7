"""The ops in CUDA C++ (csrc/cuda), for NVIDIA GPUs of compute capability 7.5 and later.

Written for a T4, whose tensor cores Triton does not use: what has a product uses `mma.sync.m16n8k8`. The
sources are compiled for the device when they are first needed (`compiler`) and launched through cuda-core
(`runtime`). Each op is registered with `torch.library`, so torch.compile and CUDA graphs take it as one
node.
"""

import torch

from ant5m.kernels.arguments import compute_dtype
from ant5m.kernels.cuda import compiler, runtime
from ant5m.kernels.cuda.attention import HEAD_SIZES, MAX_ROWS, attention
from ant5m.kernels.cuda.linear_cross_entropy import MAX_VOCAB, linear_cross_entropy
from ant5m.kernels.cuda.mlp import SIZES, mlp
from ant5m.kernels.cuda.rms_norm import MAX_SIZE, rms_norm
from ant5m.kernels.cuda.rope import rope, rope_packed
from ant5m.kernels.cuda.swiglu import swiglu
from ant5m.kernels.cuda.vectors import DTYPES
from ant5m.kernels.custom_ops import rope_packed_unsupported_reason
from ant5m.kernels.dispatch import Implementation
from ant5m.kernels.tracing import constant_when_traced


def unsupported_reason(tensors) -> str | None:
    """These ops take fp16 or fp32, attention and mlp fp16 only, from compute capability 7.5 on."""
    reason = _device_refuses(tensors)
    if reason is not None:
        return reason
    for x in tensors:
        if x.dtype not in DTYPES and x.is_floating_point():
            return f"it takes fp16 or fp32, not {_name(x.dtype)}"
    dtype = compute_dtype(tensors[0])
    return None if dtype in DTYPES else f"it takes fp16 or fp32, not {_name(dtype)}"


def _device_refuses(tensors):
    x = tensors[0]
    on_gpu = x.device.type == "cuda"
    reason = _machine_refuses(x.device if on_gpu else None)
    return reason if reason is not None or on_gpu else f"the tensors are on {x.device.type}"


@constant_when_traced
def _machine_refuses(device: torch.device | None) -> str | None:
    if not (torch.cuda.is_available() and torch.version.cuda):
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < compiler.OLDEST:
        oldest, name = (".".join(map(str, x)) for x in (compiler.OLDEST, capability))
        return f"it needs compute capability {oldest}, this device has {name}"
    return runtime.unsupported_reason()


def _attention_refuses(q, *_):
    if q.dtype != torch.float16:
        return f"it takes fp16, not {_name(q.dtype)}"
    if q.shape[-1] not in HEAD_SIZES:
        return f"it takes head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}"
    return f"it takes at most {MAX_ROWS:,} sequences, not {len(q):,}" if len(q) > MAX_ROWS else None


def _head_refuses(hidden, weight, targets, ignore_index, z_loss):
    if z_loss:
        return "it has no z-loss"
    most = MAX_VOCAB * 2 // compute_dtype(hidden).itemsize
    return f"it takes up to {most:,} entries, not {len(weight):,}" if len(weight) > most else None


def _mlp_refuses(x, *_):
    if x.dtype != torch.float16:
        return f"it takes fp16, not {_name(x.dtype)}"
    if x.shape[-1] not in SIZES:
        return f"it takes {' or '.join(map(str, SIZES))} channels, not {x.shape[-1]}"
    return None


def _norm_refuses(x, *_):
    if x.shape[-1] > MAX_SIZE:
        return f"it takes rows of up to {MAX_SIZE:,} elements, not {x.shape[-1]:,}"
    return None


def _rope_packed_refuses(qkv, cos, sin, heads, norms, eps):
    return rope_packed_unsupported_reason() if norms is None else "it has no norm of q and k"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


IMPLEMENTATIONS = {
    "rms_norm": Implementation(rms_norm, _norm_refuses),
    "rope": Implementation(rope),
    "rope_packed": Implementation(rope_packed, _rope_packed_refuses),
    "attention": Implementation(attention, _attention_refuses),
    "swiglu": Implementation(swiglu),
    "mlp": Implementation(mlp, _mlp_refuses, timed=True),
    "linear_cross_entropy": Implementation(linear_cross_entropy, _head_refuses),
}
