"""Machine code of csrc/cuda for a device, compiled when it is first needed and kept on disk.

NVRTC compiles, which comes with torch's CUDA builds (else: pip install nvidia-cuda-nvrtc); cuda-core calls
it. Where there is none, a toolkit's nvcc does. Neither needs a GPU, a driver or a header of torch.

The cache is a folder of plain binaries: $XDG_CACHE_HOME/ant5m/cuda, or ~/.cache/ant5m/cuda. A file's name
is the hash of all that its content depends on: sources, options, architecture, and the compiler's name and
version. What nvcc made ahead of time (benchmarks/cuda_resources.py) is taken before anything is compiled.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ant5m.errors import UserError
from ant5m.files import write_file

try:
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions
except (ImportError, AttributeError):  # not installed, or cuda-core without bindings, or too old
    Program = None

# Where setup.py puts the sources into a wheel, or where they lie in a checkout.
_PACKAGED, _CHECKOUT = Path(__file__).parent / "csrc", Path(__file__).parents[3] / "csrc" / "cuda"
SOURCES = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT

OLDEST = (7, 5)
"""compute capability from which on the kernels run"""

Defines = Mapping[str, int]
"""constants of a source by name: its -DNAME=value"""


@dataclass(frozen=True)
class Compiler:
    """One that is there: "NVRTC" or "nvcc", and its version."""

    name: str
    version: str

    def __call__(self, source: str, defines: Defines, architecture: str) -> bytes:
        """Machine code of a file of csrc/cuda for an "sm_75". Raises `UserError` if it does not compile."""
        compile_ = _by_nvrtc if self.name == "NVRTC" else _by_nvcc
        try:
            return compile_(SOURCES / source, defines, architecture)
        except _CompileError as error:
            raise UserError(
                f"{self.name} {self.version} cannot compile {source} for {architecture}: {error}"
            ) from None


class _CompileError(Exception):
    """A compiler's log; as text its first line that speaks of an error."""

    def __str__(self) -> str:
        lines = [line.strip() for line in str(self.args[0]).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]
        return (errors or lines or ["it gives no reason"])[0]


def architecture(capability: tuple[int, int]) -> str:
    """The name of a device's machine code: "sm_75" for a compute capability of 7.5."""
    return "sm_{}{}".format(*capability)


def binary(source: str, defines: Defines, architecture: str) -> bytes:
    """The code of a source for `architecture`: of nvcc if kept from before, else of the compiler there is."""
    content = _content(source, defines, architecture)
    for path in sorted(folder().glob(f"{content}-nvcc-*")):
        return path.read_bytes()
    compiler = available()
    if compiler is None:
        raise UserError(
            "there is neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc to compile CUDA kernels"
        )
    return compile_and_keep(compiler, source, defines, architecture)


def compile_and_keep(compiler: Compiler, source: str, defines: Defines, architecture: str) -> bytes:
    """The code that `compiler` makes of a source, from the cache if it is there."""
    content = _content(source, defines, architecture)
    path = folder() / f"{content}-{compiler.name.lower()}-{compiler.version}"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code = compiler(source, defines, architecture)
    with contextlib.suppress(OSError):  # a cache that cannot be written is no cache
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, code)
    return code


def folder() -> Path:
    """Where compiled kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "ant5m" / "cuda"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"ant5m-{os.getuid()}" / "cuda"


def available() -> Compiler | None:
    """NVRTC if it is there, else nvcc, else None."""
    return nvrtc_compiler() or nvcc_compiler()


@functools.cache
def nvrtc_compiler() -> Compiler | None:
    """NVRTC through cuda-core, or None."""
    if Program is None:
        return None
    try:
        _prefer_torchs_nvrtc()
        error, *version = nvrtc.nvrtcVersion()
    except Exception:  # whatever the search for the library ends with
        return None
    return None if error else Compiler("NVRTC", ".".join(map(str, version)))


@functools.cache
def nvcc_compiler() -> Compiler | None:
    """The nvcc of the PATH, or None."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", text)
    return Compiler("nvcc", version[1]) if version else None


def _prefer_torchs_nvrtc() -> None:
    """Where NVRTC 13 lies beside the 12 of torch's own CUDA, load the latter: the driver may be as old."""
    if torch.version.cuda is None or not torch.version.cuda.startswith("12."):
        return
    for path in (Path(torch.__file__).parents[1] / "nvidia" / "cuda_nvrtc" / "lib").glob("libnvrtc.so.12"):
        ctypes.CDLL(str(path), os.RTLD_NOW | os.RTLD_GLOBAL)


def _by_nvrtc(source: Path, defines: Defines, architecture: str) -> bytes:
    options = ProgramOptions(
        name=source.name,
        std="c++17",
        arch=architecture,
        include_path=str(source.parent),
        define_macro=[(name, str(value)) for name, value in sorted(defines.items())],
    )
    try:
        program = Program(source.read_text(), "c++", options)
        return bytes(program.compile("cubin").code)
    except Exception as error:  # cuda-core's own classes move between its versions
        raise _CompileError(str(error).partition("compilation log:")[2] or str(error)) from None


def _by_nvcc(source: Path, defines: Defines, architecture: str) -> bytes:
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    with tempfile.TemporaryDirectory() as aside:
        out = Path(aside) / "code"
        command = ["nvcc", "-std=c++17", f"-arch={architecture}", "-cubin", *macros]
        done = subprocess.run([*command, str(source), "-o", str(out)], capture_output=True, text=True)
        if done.returncode != 0:
            raise _CompileError(done.stderr)
        return out.read_bytes()


def _content(source: str, defines: Defines, architecture: str) -> str:
    parts = [source, architecture, *(f"{name}={value}" for name, value in sorted(defines.items()))]
    return hashlib.sha256("\0".join([*parts, *_texts(SOURCES / source)]).encode()).hexdigest()[:32]


def _texts(path: Path) -> Iterator[str]:
    """The text of a source and of what it includes."""
    text = path.read_text()
    yield text
    for name in re.findall(r'^#include "(\w+\.h)"', text, re.MULTILINE):
        yield from _texts(path.parent / name)
