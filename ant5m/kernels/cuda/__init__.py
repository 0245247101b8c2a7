"""The ops in CUDA C++ (csrc/cuda), for NVIDIA GPUs of compute capability 7.5 and later.

Written for a T4, whose tensor cores Triton does not use: what has a product uses `mma.sync.m16n8k8`. The
sources are compiled for the device when they are first needed (`compiler`) and launched through cuda-core
(`runtime`). Each op is registered with `torch.library`, so torch.compile and CUDA graphs take it as one
node.
"""

import sys

import torch

from ant5m.kernels import check
from ant5m.kernels.cuda import compiler, runtime
from ant5m.kernels.cuda.attention import HEAD_SIZES, MAX_ROWS, attention
from ant5m.kernels.cuda.layout import DTYPES
from ant5m.kernels.cuda.linear_cross_entropy import MAX_VOCAB, linear_cross_entropy
from ant5m.kernels.cuda.mlp import SIZES, mlp
from ant5m.kernels.cuda.rms_norm import MAX_SIZE, rms_norm
from ant5m.kernels.cuda.rope import rope, rope_qkv
from ant5m.kernels.cuda.swiglu import swiglu
from ant5m.kernels.layout import compute_dtype
from ant5m.kernels.tracing import constant_when_traced

__all__ = ["attention", "linear_cross_entropy", "mlp", "rms_norm", "rope", "rope_qkv", "swiglu", "why_not"]


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """These ops take fp16 or fp32, attention and mlp fp16 only, from compute capability 7.5 on.

    What a device never ran before is compared with the reference there first.
    """
    reason = _device_refuses(*tensors) or _tensors_refuse(op, *tensors)
    return reason or check.failure(sys.modules[__name__], op, *tensors, dtype=torch.float16)


def _device_refuses(*tensors):
    for x in tensors:
        if x.device.type != "cuda":
            return f"the tensors are on {x.device.type}"
    return _machine_refuses(tensors[0].device if tensors else None)


@constant_when_traced
def _machine_refuses(device: torch.device | None) -> str | None:
    if not (torch.cuda.is_available() and torch.version.cuda):
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < compiler.OLDEST:
        oldest, name = (".".join(map(str, x)) for x in (compiler.OLDEST, capability))
        return f"it needs compute capability {oldest}, this device has {name}"
    return runtime.why_not()


def _tensors_refuse(op, *tensors):
    if not tensors:
        return None
    x = tensors[0]
    numbers = tensors[:3] if op == "attention" else tensors  # the starts of documents are integers
    for dtype in (*(t.dtype for t in numbers), compute_dtype(x)):
        if dtype not in DTYPES:
            return f"it takes fp16 or fp32, not {_name(dtype)}"
    if op in ("attention", "mlp") and x.dtype != torch.float16:
        return f"it takes fp16, not {_name(x.dtype)}"
    if op in ("attention", "rope", "rope_qkv", "swiglu") and any(t.dtype != x.dtype for t in numbers):
        return f"its inputs differ in dtype: {', '.join(_name(t.dtype) for t in numbers)}"
    return _SIZES_REFUSE[op](*tensors) if op in _SIZES_REFUSE else None


def _attention_refuses(q, k, *others):
    if q.shape[-1] not in HEAD_SIZES:
        return f"it takes head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}"
    if len(q) > MAX_ROWS:
        return f"it takes at most {MAX_ROWS:,} sequences, not {len(q):,}"
    return "queries and keys differ in length" if q.shape[1] != k.shape[1] else None


def _head_refuses(hidden, weight):
    most = MAX_VOCAB * 2 // compute_dtype(hidden).itemsize
    return f"it takes up to {most:,} entries, not {len(weight):,}" if len(weight) > most else None


def _mlp_refuses(x, *weights):
    return (
        None
        if x.shape[-1] in SIZES
        else f"it takes {' or '.join(map(str, SIZES))} channels, not {x.shape[-1]}"
    )


def _norm_refuses(x, weight):
    return (
        f"it takes rows of up to {MAX_SIZE:,} elements, not {x.shape[-1]:,}"
        if x.shape[-1] > MAX_SIZE
        else None
    )


_SIZES_REFUSE = {
    "attention": _attention_refuses,
    "linear_cross_entropy": _head_refuses,
    "mlp": _mlp_refuses,
    "rms_norm": _norm_refuses,
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
