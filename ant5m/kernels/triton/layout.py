"""What the kernels take for granted about memory: rows without gaps, and the room a device has on chip."""

import functools

import torch
import triton
from triton.runtime import driver

# Compute capability 8.0 and 9.0 have more; what the interpreter is asked to stand for.
_LARGE_SHARED_MEMORY = 227 << 10


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension has no gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [N, D] without gaps inside a row; a view where the strides allow it."""
    return dense(x.reshape(-1, x.shape[-1]))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""
    return not isinstance(_probe, triton.JITFunction)


def shared_memory() -> int:
    """Bytes of shared memory that a block may use on the current device."""
    return _LARGE_SHARED_MEMORY if interpreted() else _shared_memory(driver.active.get_current_device())


@functools.cache
def _shared_memory(device: int) -> int:
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


@triton.jit
def _probe():
    pass
