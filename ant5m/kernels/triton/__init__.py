"""The ops in Triton, for NVIDIA GPUs; with TRITON_INTERPRET=1, slowly, on the CPU.

Each op is registered with `torch.library`, so torch.compile and CUDA graphs take it as one node.
"""

import sys

import torch

from ant5m.kernels import check
from ant5m.kernels.tracing import constant_when_traced

try:
    import triton
except ImportError:  # no wheel for this platform
    triton = None
else:
    from ant5m.kernels.triton import layout
    from ant5m.kernels.triton.attention import HEAD_SIZES, attention
    from ant5m.kernels.triton.linear_cross_entropy import linear_cross_entropy
    from ant5m.kernels.triton.mlp import SIZES, mlp
    from ant5m.kernels.triton.rms_norm import MAX_SIZE, rms_norm
    from ant5m.kernels.triton.rope import rope, rope_qkv
    from ant5m.kernels.triton.swiglu import swiglu

__all__ = ["attention", "linear_cross_entropy", "mlp", "rms_norm", "rope", "rope_qkv", "swiglu", "why_not"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """These ops take fp16, bf16 or fp32 on an NVIDIA GPU; attention and bf16 need compute capability 8.0.

    What a device never ran before is compared with the reference there first.
    """
    if triton is None:
        return "Triton is not installed"
    if layout.interpreted():
        return _tensors_refuse(op, *tensors)
    reason = _device_refuses(op, *tensors) or _tensors_refuse(op, *tensors)
    return reason or check.failure(sys.modules[__name__], op, *tensors)


def _device_refuses(op, *tensors):
    for x in tensors:
        if not _on_gpu(x):
            return f"the tensors are on {x.device.type}"
    has_bf16 = any(x.dtype == torch.bfloat16 for x in tensors)
    return _machine_refuses(op, tensors[0].device if tensors else None, has_bf16)


@constant_when_traced
def _machine_refuses(op: str, device: torch.device | None, has_bf16: bool) -> str | None:
    """The device's (None: the current one's) part in `why_not`; `has_bf16`: some tensor is bf16."""
    if not (torch.cuda.is_available() and torch.version.cuda):
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    name = ".".join(map(str, capability))
    if op in ("attention", "mlp"):
        return f"below compute capability 8.0 (this device: {name}) Triton makes no use of tensor cores"
    return f"bf16 needs compute capability 8.0, this device has {name}" if has_bf16 else None


def _on_gpu(x):
    return x.device.type == "cuda"


def _tensors_refuse(op, *tensors):
    if not tensors:
        return None
    if op == "attention":
        tensors = tensors[:3]  # the starts of documents may be of any integer dtype
    for x in tensors:
        if x.dtype not in _DTYPES:
            return f"it takes fp16, bf16 or fp32, not {x.dtype}"
    x = tensors[0]
    if op == "attention":
        if x.shape[-1] not in HEAD_SIZES:
            return f"it takes head sizes {', '.join(map(str, HEAD_SIZES))}, not {x.shape[-1]}"
        if any(y.dtype != x.dtype for y in tensors):
            return f"q, k and v differ in dtype: {', '.join(str(y.dtype) for y in tensors)}"
        if any(y.shape[1] != x.shape[1] for y in tensors):
            return "queries and keys differ in length"
    if op == "swiglu" and tensors[1].dtype != x.dtype:
        return f"gate is {x.dtype}, up {tensors[1].dtype}"
    if op == "mlp" and x.dtype == torch.float32:
        return "it takes fp16 or bf16, not torch.float32"
    if op == "mlp" and x.shape[-1] not in SIZES:
        return f"it takes {', '.join(map(str, SIZES))} channels, not {x.shape[-1]}"
    if op == "rms_norm" and x.shape[-1] > MAX_SIZE:
        return f"it takes rows of up to {MAX_SIZE} elements, not {x.shape[-1]}"
    return None
