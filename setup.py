"""Builds `ant5m._cpu` from csrc/cpu with ninja; torch is not needed, and no torch header is included. The
CUDA sources, which are compiled where they run, go along as they are.

The files of `ONCE` are compiled once. Every other file is an op: it is compiled once for each of
`instruction_sets`, and `dispatch.cpp` picks one at run time by what the processor
has. The environment variable ANT5M_SANITIZE=address,undefined makes a build for the sanitizers.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from ninja import BIN_DIR
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES, CUDA_SOURCES = Path("csrc/cpu"), Path("csrc/cuda")
ONCE = {"bindings", "dispatch", "memory", "ngrams", "parallel"}
COMPILER = os.environ.get("CXX", "c++")


_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
_X86 = {
    "avx512_bf16": f"{_AVX512} -mavx512bf16",  # from GCC 10 and Clang 9 on
    "avx512": _AVX512,
    "avx2": "-mavx2 -mfma",
    "portable": "",
}
_ARM = {"neon_bf16": "-march=armv8.2-a+bf16", "neon": ""}
# The kernels of bf16 for tests on processors without it: never chosen by itself.
_EMULATED = {"bf16_emulated": "-DANT5M_EMULATE_BF16"}


def instruction_sets(machine: str, compiler: str) -> dict[str, str]:
    """Name and flags of each that the compiler knows for this architecture, best first."""
    known = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(machine, {"portable": ""})
    return {name: flags for name, flags in known.items() if _compiles(compiler, flags)} | _EMULATED


def _compiles(compiler: str, flags: str) -> bool:
    probe = [*shlex.split(compiler), *flags.split(), "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


class NinjaBuild(build_ext):
    """Writes one build.ninja and lets ninja do the rest, in parallel and only what changed."""

    def build_extension(self, extension: Extension) -> None:
        build = Path(self.build_temp).absolute()
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with (build / "build.ninja").open("w") as file:
            write_ninja(Writer(file), target)
        self.spawn([str(Path(BIN_DIR) / "ninja"), "-C", str(build)])


def write_ninja(ninja: Writer, target: Path) -> None:
    """One compile edge for each (source, instruction set), one link edge."""
    import sysconfig

    folders = (pybind11.get_include(), sysconfig.get_path("include"), SOURCES.absolute())
    includes = " ".join(shlex.quote(f"-I{folder}") for folder in folders)
    sanitize = os.environ.get("ANT5M_SANITIZE", "")
    sanitizer = f"-O1 -fsanitize={sanitize} -fno-omit-frame-pointer -g1" if sanitize else ""
    sets = instruction_sets(platform.machine(), COMPILER)
    table = shlex.quote(f"-DANT5M_FOR_EACH_SET(X)={' '.join(f'X({name})' for name in sets)}")
    ninja.variable("cxx", COMPILER)
    usual = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra"
    ninja.variable("flags", f"{usual} {sanitizer} {includes} {table}")
    ninja.rule("compile", "$cxx $flags $isa -MD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc")
    apple = "-undefined dynamic_lookup" if sys.platform == "darwin" else ""
    ninja.rule("link", f"$cxx -shared $in -o $out {sanitizer} {apple} -pthread")
    objects = []
    for source in sorted(SOURCES.absolute().glob("*.cpp")):
        if source.stem in ONCE:
            objects += ninja.build(f"{source.stem}.o", "compile", str(source))
            continue
        for name, flags in sets.items():
            isa = {"isa": f"{flags} -DANT5M_ISA={name}"}
            objects += ninja.build(f"{source.stem}.{name}.o", "compile", str(source), variables=isa)
    ninja.build(str(target), "link", objects)


class WithSources(build_py):
    """Puts csrc/cuda where ant5m.kernels.cuda.compiler finds it in an installed wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib) / "ant5m" / "kernels" / "cuda" / "csrc"
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(CUDA_SOURCES.glob("*.cu")) + sorted(CUDA_SOURCES.glob("*.h")):
            self.copy_file(str(source), str(folder))


if __name__ == "__main__":  # tests/test_arm.py reads the list of instruction sets
    setup(
        ext_modules=[Extension("ant5m._cpu", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "build_py": WithSources},
    )
