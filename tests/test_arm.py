"""The C++ ops on ARM: cross-compiled, and run under qemu's user mode. Numbers and instructions, no speed.

Skipped without these tools; Debian and Ubuntu have them as g++-aarch64-linux-gnu and qemu-user.
"""

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = (COMPILER, "aarch64-linux-gnu-objdump", "qemu-aarch64")

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)), reason="needs a cross compiler for ARM and qemu-user"
)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A folder with every object and, linked from them, the program `driver`."""
    specification = importlib.util.spec_from_file_location("setup_of_ant5m", ROOT / "setup.py")
    assert specification and specification.loader
    setup = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(setup)
    sets = setup.instruction_sets("aarch64", COMPILER)
    assert list(sets) == ["neon_bf16", "neon", "bf16_emulated"]
    del sets["bf16_emulated"]  # tested elsewhere, and slow to compile
    folder, sources = tmp_path_factory.mktemp("arm"), ROOT / "csrc" / "cpu"
    table = f"-DANT5M_FOR_EACH_SET(X)={' '.join(f'X({name})' for name in sets)}"
    common = [
        COMPILER,
        "-std=c++17",
        "-fno-math-errno",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{sources}",
        table,
    ]
    jobs = [(ROOT / "tests" / "kernels_driver.cpp", "driver.o", "")]
    for source in sources.glob("*.cpp"):
        if source.stem in setup.ONCE - {"bindings"}:
            jobs.append((source, f"{source.stem}.o", ""))
        elif source.stem != "bindings":
            jobs += [(source, f"{source.stem}.{name}.o", f"{sets[name]} -DANT5M_ISA={name}") for name in sets]

    def compile_one(job):
        source, target, flags = job
        # Only of `product` instructions are counted, and -O1 takes two thirds of the time.
        speed = "-O2" if source.stem == "product" else "-O1"
        subprocess.run(
            [*common, speed, *flags.split(), "-c", str(source), "-o", str(folder / target)], check=True
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, jobs))
    objects = [str(folder / target) for _, target, _ in jobs]
    subprocess.run([COMPILER, "-static", *objects, "-o", str(folder / "driver"), "-pthread"], check=True)
    return folder


@pytest.mark.parametrize(
    ("processor", "sets"), [("max", {"neon", "neon_bf16"}), ("cortex-a72", {"neon"})], ids=["bf16", "without"]
)
def test_results_against_double(build, processor, sets):
    command = ["qemu-aarch64", "-cpu", processor, str(build / "driver")]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300
    ).stdout.splitlines()
    found = [line.split() for line in lines]
    assert {name for name, *_ in found} == sets
    assert {name for name, kind, *_ in found if kind == "bf16"} == sets - {"neon"}
    for name, kind, result, error in found:
        assert float(error) <= (8e-3 if kind == "bf16" else 2e-6), (name, kind, result, error)
    results = {result for _, kind, result, _ in found if kind == "fp32"}
    assert len(results) == 15


@pytest.mark.parametrize(
    ("name", "instruction", "function", "loads"),
    [
        ("neon", "fmla", "microkernel.*Fp32ELi8ELi2", 10),  # 8 numbers of A, 2 vectors of B
        # Of twice the depth, and of a pair two numbers: BFDOT would take 32 of itself and 20 loads.
        ("neon_bf16", "bfmmla", "matrix_microkernelILb1ELi8ELi2", 12),  # 8 halves of A, 4 vectors of B
        ("neon_bf16", "bfmmla", "matrix_microkernelILb0ELi8ELi2", 8),  # A by columns: 4 vectors
    ],
)
def test_the_microkernel_keeps_16_sums_in_registers(build, name, instruction, function, loads):
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(build / f"product.{name}.o")]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops = [
        loop
        for body in text.split("\n\n")
        if re.search(rf"<\S*{function}\S*>:", body)
        for loop in loops_of(body)
        if any(line.startswith(instruction) for line in loop)
    ]
    assert loops
    for loop in loops:
        assert sum(line.startswith(instruction) for line in loop) == 16
        assert not any("[sp" in line for line in loop)
        assert sum(2 if line.startswith("ldp") else line.startswith("ld") for line in loop) <= loads


def loops_of(function):
    """The instructions of each loop: from where a branch goes back to, to the branch."""
    lines = [
        (int(at, 16), text) for at, text in re.findall(r"^\s+([0-9a-f]+):\t(.*)$", function, re.MULTILINE)
    ]
    for end, text in lines:
        target = re.match(r"(?:b\.\w+|cbn?z|tbn?z)\t(?:\w+, )*([0-9a-f]+) ", text)
        if target and int(target.group(1), 16) < end:
            yield [line for at, line in lines if int(target.group(1), 16) <= at <= end]
