"""What the kernels take for granted about memory: rows without gaps, and how much of it is on the chip."""

import functools

import torch
import triton
from triton.runtime import driver

# The interpreter stands for a device of compute capability 9.0.
_INTERPRETED_SHARED_MEMORY = 227 << 10


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension has no gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [N, D] without gaps inside a row; a view where the strides allow it."""
    return dense(x.reshape(-1, x.shape[-1]))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """x's, or that of an autocast, which does not reach into an op of our own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET was 1 when this was imported."""
    return _INTERPRETED


def shared_memory() -> int:
    """Bytes of shared memory that a block may use on the current device."""
    if interpreted():
        return _INTERPRETED_SHARED_MEMORY
    return _shared_memory(driver.active.get_current_device())


@functools.cache
def _shared_memory(device: int) -> int:
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


@triton.jit
def _probe():
    pass


_INTERPRETED = not isinstance(_probe, triton.JITFunction)
