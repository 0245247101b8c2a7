"""The threads and the memory of the C++ ops, by a program of its own: what Python cannot see of them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="the program is for Linux")
def test_a_second_thread_takes_part_and_a_forked_child_has_memory(tmp_path):
    sources = [ROOT / "csrc" / "cpu" / name for name in ("memory.cpp", "parallel.cpp")]
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O1", "-fopenmp"]
    command += [f"-I{ROOT / 'csrc' / 'cpu'}", str(ROOT / "tests" / "runtime_driver.cpp"), *map(str, sources)]
    subprocess.run([*command, "-o", str(tmp_path / "driver")], check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
