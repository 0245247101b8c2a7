"""CUDA kernels on the host: csrc/cuda/host_shim.h emulates the device, a C++ compiler builds the kernels."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
COMPILER = (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "").split()
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")


class HostLibrary:
    """The kernels of one file, run on CPU tensors. `descending`: the last warp of a block runs first."""

    def __init__(self, path: Path, descending: bool = False):
        self.descending = descending
        self._library = ctypes.CDLL(str(path))

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *arguments):
        """Runs `kernel` on tensors, int and float: `grid` of up to three dimensions, blocks of `threads`.

        Raises RuntimeError where a device would fail.
        """
        signature = self._function(f"signature_{kernel}")().decode()
        given = "".join(_letter(x) for x in arguments)
        assert given == signature, f"{kernel} takes {signature}, not {given}"
        values = [_value(x) for x in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        sizes = (ctypes.c_size_t * len(values))(*(_bytes_behind(x) for x in arguments))
        blocks = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        run = self._function(f"launch_{kernel}")
        error = run(blocks, ctypes.c_uint(threads), ctypes.c_bool(self.descending), pointers, sizes)
        if error is not None:
            raise RuntimeError(f"{kernel}: {error.decode()}")

    def _function(self, name):
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        return function


def _letter(x) -> str:
    return "p" if isinstance(x, torch.Tensor) else {int: "i", float: "f"}[type(x)]


def _value(x):
    if isinstance(x, torch.Tensor):
        assert x.device.type == "cpu"
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, int):
        assert -(2**31) <= x < 2**31
        return ctypes.c_int(x)
    return ctypes.c_float(x)


def _bytes_behind(x) -> int:
    """Those that a kernel may reach from the first element of a tensor on."""
    if not isinstance(x, torch.Tensor):
        return 0
    return x.untyped_storage().nbytes() - x.storage_offset() * x.element_size()


def compile_kernels(source: Path | str, races: bool = False, **defines: int) -> Path:
    """The shared library of a file of kernels, or of the text of one; built once and kept by content.

    `races`: a race between threads is an error of the launch, see csrc/cuda/host_races.h.
    """
    text = source.read_text() if isinstance(source, Path) else source
    return _compile(text, races, tuple(sorted(defines.items())))


@functools.cache
def _compile(text: str, races: bool, defines: tuple[tuple[str, int], ...]) -> Path:
    sanitize = "" if races else os.environ.get("ANT5M_SANITIZE", "")
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-Wno-clobbered", f"-I{SOURCES}", *(f"-D{name}={value}" for name, value in defines)]
    flags += ["-g", f"-fsanitize={sanitize}"] if sanitize else []
    # host_races.h takes the place of the sanitizer's library.
    flags += ["-fsanitize=thread", "-nodefaultlibs"] if races else []
    libraries = ["-lstdc++", "-lm", "-lc"] if races else []
    headers = "".join(path.read_text() for path in sorted(SOURCES.glob("*.h")))
    digest = hashlib.sha256("\0".join([*COMPILER, *flags, headers, text]).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"ant5m-cuda-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            built = Path(aside) / "kernels.so"
            command = [*COMPILER, *flags, "-x", "c++", "-", *libraries, "-o", str(built)]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            built.rename(library)
    return library
