"""The ops in Triton, for NVIDIA GPUs; with TRITON_INTERPRET=1, slowly, on the CPU.

Each op is registered with `torch.library`, so torch.compile and CUDA graphs take it as one node.
"""

import torch

from ant5m.kernels.custom_ops import rope_packed_unsupported_reason
from ant5m.kernels.dispatch import Implementation
from ant5m.kernels.tracing import constant_when_traced

try:
    import triton
except ImportError:  # no wheel for this platform
    triton = None
else:
    from ant5m.kernels.triton import device
    from ant5m.kernels.triton.attention import HEAD_SIZES, attention
    from ant5m.kernels.triton.linear_cross_entropy import linear_cross_entropy
    from ant5m.kernels.triton.mlp import SIZES, mlp
    from ant5m.kernels.triton.qk_norm_rope import norm_rope_packed, qk_norm_rope
    from ant5m.kernels.triton.rms_norm import MAX_SIZE, rms_norm
    from ant5m.kernels.triton.rope import rope, rope_packed
    from ant5m.kernels.triton.swiglu import swiglu

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reason(tensors) -> str | None:
    """These ops take fp16, bf16 (from compute capability 8.0 on) or fp32 on an NVIDIA GPU."""
    if triton is None:
        return "Triton is not installed"
    if not device.interpreted() and (reason := _device_refuses(tensors)) is not None:
        return reason
    for x in tensors:
        if x.dtype not in _DTYPES and x.is_floating_point():
            return f"it takes fp16, bf16 or fp32, not {x.dtype}"
    return None


def _device_refuses(tensors):
    reason = _machine_refuses(_device_of(tensors[0]), any(x.dtype == torch.bfloat16 for x in tensors))
    if reason is None and not _on_gpu(tensors[0]):
        return f"the tensors are on {tensors[0].device.type}"
    return reason


def _on_gpu(x):
    return x.device.type == "cuda"


def _device_of(x):
    return x.device if _on_gpu(x) else None


@constant_when_traced
def _machine_refuses(device: torch.device | None, has_bf16: bool) -> str | None:
    """The device's (None: the current one's) part in `unsupported_reason`."""
    if not (torch.cuda.is_available() and torch.version.cuda):
        return "there is no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if has_bf16 and capability < (8, 0):
        return f"bf16 needs compute capability 8.0, this device has {'.'.join(map(str, capability))}"
    return None


def _tensor_cores_refuse(x):
    return None if device.interpreted() else _no_tensor_cores(_device_of(x))


@constant_when_traced
def _no_tensor_cores(device: torch.device | None) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    name = ".".join(map(str, capability))
    return f"below compute capability 8.0 (this device: {name}) Triton makes no use of tensor cores"


def _attention_refuses(q, *_):
    if q.shape[-1] not in HEAD_SIZES:
        return f"it takes head sizes {', '.join(map(str, HEAD_SIZES))}, not {q.shape[-1]}"
    return _tensor_cores_refuse(q)


def _mlp_refuses(x, *_):
    if x.dtype == torch.float32:
        return "it takes fp16 or bf16, not torch.float32"
    if x.shape[-1] not in SIZES:
        return f"it takes {', '.join(map(str, SIZES))} channels, not {x.shape[-1]}"
    return _tensor_cores_refuse(x)


def _norm_refuses(x, *_):
    return (
        f"it takes rows of up to {MAX_SIZE} elements, not {x.shape[-1]}" if x.shape[-1] > MAX_SIZE else None
    )


def _rope_packed(qkv, cos, sin, heads, norms, eps):
    if norms is None:
        return rope_packed(qkv, cos, sin, heads)
    return norm_rope_packed(qkv, cos, sin, heads, norms, eps)


IMPLEMENTATIONS = (
    {}
    if triton is None
    else {
        "rms_norm": Implementation(rms_norm, _norm_refuses),
        "rope": Implementation(rope),
        "qk_norm_rope": Implementation(qk_norm_rope),
        "rope_packed": Implementation(_rope_packed, rope_packed_unsupported_reason),
        "attention": Implementation(attention, _attention_refuses),
        "swiglu": Implementation(swiglu),
        "mlp": Implementation(mlp, _mlp_refuses, timed=not device.interpreted()),
        "linear_cross_entropy": Implementation(linear_cross_entropy),
    }
)
