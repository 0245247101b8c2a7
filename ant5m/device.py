"""Where a model computes and in which precision.

Weights, gradients and optimizer states are fp32 everywhere; the precision is that of the products (autocast).
"""

import contextlib
import os
import warnings
from pathlib import Path

import torch

from ant5m import kernels
from ant5m.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """From auto, cpu, cuda, cuda:1 or mps to a device that is there, else `UserError`.

    Of several processes on one machine each takes the GPU of its number (`local_rank`), or the only one that
    it can see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank and name == "cuda" and torch.cuda.device_count() != 1:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device '{name}' (use auto, cpu, cuda, cuda:1 or mps)") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"the device '{name}' is not supported (use auto, cpu, cuda, cuda:1 or mps)")
    if device.type == "mps":
        return _apple_gpu()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"the device '{name}' is not there: {count or 'no'} GPU{'s' * (count != 1)} found")
    return device


def _apple_gpu() -> torch.device:
    if not torch.backends.mps.is_available():
        raise UserError("the device 'mps' is not there: it is the GPU of an Apple computer")
    warnings.warn(
        "nobody has tried the device 'mps' yet: it runs the reference ops in plain PyTorch", stacklevel=3
    )
    return torch.device("mps")


def choose_precision(name: str, device: torch.device) -> str:
    """auto: on a GPU bf16 from compute capability 8.0 on, fp16 below; on a CPU bf16 where the kernels in use
    multiply it and keep everything else in fp32, else fp32, as on anything else. A name is checked and kept.

    Capability decides, because `torch.cuda.is_bf16_supported()` is also True where bf16 is emulated.
    """
    native = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        if device.type != "cuda":
            return "fp32" if casts("bf16", device) else "bf16"
        return "bf16" if native else "fp16"
    if name not in DTYPES:
        raise UserError(f"there is no precision '{name}' (use auto, {', '.join(DTYPES)})")
    if name == "bf16" and not native:
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16: use --precision fp16")
    return name


def casts(precision: str, device: torch.device) -> bool:
    """Whether tensors are cast to the precision's dtype. Where kernels round as they multiply, none is."""
    return precision != "fp32" and (precision != "bf16" or kernels.bf16_products(device) is None)


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context in which the forward pass runs."""
    if casts(precision, device):
        return torch.autocast(device.type, DTYPES[precision])
    inside = kernels.bf16_products(device) if precision == "bf16" else None
    return inside or contextlib.nullcontext()


def detect_memory() -> tuple[str, int]:
    """(name, bytes of memory) of the device that training would use: the first GPU, else the CPU."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.name, device.total_memory
    return "CPU", installed_memory()


def installed_memory() -> int:
    """Bytes of main memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_device(device: torch.device, precision: str) -> str:
    """For people: the GPU's name or the processor's with its threads, and the precision."""
    if device.type == "mps":
        return f"Apple GPU (mps), {precision}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {precision}"


def _processor() -> str:
    """The processor's name where the system tells it, and the threads in use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(
            line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


# Dense fp16/bf16 tensor-core peaks with fp32 accumulation, in TFLOP/s, by the device's exact name, from
# NVIDIA's data sheets and white papers. A device that is not here has no known peak, and so no MFU.
PEAKS = {
    "Tesla T4": 65.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H200": 989.4,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s at this precision, or None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    peak = PEAKS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * 1e12
