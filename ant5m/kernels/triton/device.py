"""Where the kernels run: the interpreter, or how much memory is on the chip."""

import functools

import triton
from triton.runtime import driver

# The interpreter stands for a device of compute capability 9.0.
_INTERPRETED_SHARED_MEMORY = 227 << 10

# Devices below this have smaller tiles.
LARGE_SHARED_MEMORY = 200 << 10


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET was 1 when this was imported."""
    return _INTERPRETED


def shared_memory() -> int:
    """Bytes of shared memory that a block may use on the current device."""
    if interpreted():
        return _INTERPRETED_SHARED_MEMORY
    return _shared_memory(driver.active.get_current_device())


def has_tensor_cores() -> bool:
    """Whether Triton's products of 16-bit numbers use tensor cores on the current device."""
    return interpreted() or driver.active.get_current_target().arch >= 80


def is_hopper() -> bool:
    """Whether the current device has compute capability 9.x."""
    return not interpreted() and driver.active.get_current_target().arch // 10 == 9


@functools.cache
def _shared_memory(device: int) -> int:
    return driver.active.utils.get_device_properties(device)["max_shared_mem"]


@triton.jit
def _probe():
    pass


_INTERPRETED = not isinstance(_probe, triton.JITFunction)
