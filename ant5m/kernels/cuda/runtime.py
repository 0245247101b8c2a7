"""Launching the kernels of csrc/cuda on torch's tensors and torch's stream, through cuda-core.

Nothing waits for the device and nothing is allocated, so CUDA graphs capture launches.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

from ant5m.kernels.cuda import compiler
from ant5m.kernels.cuda.compiler import Defines

try:
    from cuda.core import Device, LaunchConfig, ObjectCode, Stream
    from cuda.core import launch as _launch
except (ImportError, AttributeError):
    ObjectCode = None

Argument = torch.Tensor | int | float
Launcher = Callable[[str, str, Defines, tuple[int, ...], int, tuple[Argument, ...]], None]
_launcher: Launcher


def launch(
    source: str, kernel: str, defines: Defines, grid: tuple[int, ...], threads: int, *arguments: Argument
) -> None:
    """Queue `kernel` of a file of csrc/cuda, compiled with `defines`: `grid` blocks of `threads`.

    Tensors arrive as pointers to their first element, int as int, float as float. Raises `UserError` where
    the source does not compile.
    """
    _launcher(source, kernel, defines, grid, threads, arguments)


def unsupported_reason() -> str | None:
    """What of the software is missing to launch, or None."""
    if ObjectCode is None:
        return "cuda-core is not installed: pip install 'ant5m[cuda]'"
    found = compiler.available()
    if found is None:
        return "there is neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc"
    driver = driver_major()
    if driver and int(found.version.partition(".")[0]) > driver:
        remedy = f"pip install 'cuda-bindings=={driver}.*'"
        return f"{found.name} {found.version} is newer than the driver's CUDA {driver}: {remedy}"
    return None


def driver_major() -> int | None:
    """The major version of CUDA that the driver has, where torch can say."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return ask() // 1_000 if ask and torch.cuda.is_available() else None


@contextlib.contextmanager
def launched_by(launcher: Launcher) -> Iterator[None]:
    """Inside, `launcher` gets what would be launched: an emulated device, or one that only compiles."""
    global _launcher
    before, _launcher = _launcher, launcher
    try:
        yield
    finally:
        _launcher = before


def on_device(source, kernel, defines, grid, threads, arguments):
    """The usual launcher: on the device of the tensors."""
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        # A thread of autograd may not have asked anything of the driver yet.
        Device(device.index).set_current()
        target = compiler.architecture(torch.cuda.get_device_capability(device))
        function = _load(source, tuple(sorted(defines.items())), target).get_kernel(kernel)
        config = LaunchConfig(grid=grid, block=threads)
        _launch(Stream.from_handle(stream), config, function, *map(_value, arguments))


_launcher = on_device


@functools.cache
def _load(source: str, defines: tuple[tuple[str, int], ...], target: str) -> "ObjectCode":
    return ObjectCode.from_cubin(compiler.binary(source, dict(defines), target))


def _value(x: Argument):
    if isinstance(x, torch.Tensor):
        return x.data_ptr()  # cuda-core takes int for a pointer
    if isinstance(x, int):
        if not -(2**31) <= x < 2**31:
            raise ValueError(f"{x} does not fit into 32 bits")
        return ctypes.c_int(x)
    return ctypes.c_float(x)
