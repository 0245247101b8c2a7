"""The threads that the C++ runs on."""

import ctypes
from pathlib import Path

import torch

from ant5m import _cpu


def share_threads():
    """Have C++ run on torch's own OpenMP pool: a second one would fight with it for the same cores.

    Where torch has none (some macOS wheels), C++ starts threads for each call.
    """
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        library = Path(torch.__file__).parent / "lib" / name
        if library.exists():
            # A symbol of a library is also looked for in the libraries that it was linked to.
            entry = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None)
            if entry is not None:
                _cpu.use_openmp(ctypes.cast(entry, ctypes.c_void_p).value)
