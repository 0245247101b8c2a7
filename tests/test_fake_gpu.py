"""A step on a GPU takes no tensor from the host and reads none back, whichever kernels it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import COMPILER, needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch knows GPUs itself"),
    pytest.mark.skipif(sys.platform != "linux", reason="it links to torch as on Linux"),
]
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
OPS = {"attention", "attention_backward", "linear_cross_entropy", "rms_norm", "rms_norm_backward"}
ROPE = {"rope", "rope_back"}
QK_NORM = {"qk_norm_rope", "qk_norm_rope_backward"}
BLOCK = {"mlp", "mlp_backward"}
SWIGLU = {"swiglu", "swiglu_backward"}
ALL = {
    "9.0 bf16": ("triton", OPS | ROPE | BLOCK),
    "9.0 bf16 documents": ("triton", OPS | ROPE | BLOCK),
    "9.0 bf16 unlikelihood": ("triton", OPS | ROPE | BLOCK),
    "9.0 bf16 ditto": ("triton", OPS | ROPE | BLOCK),
    "9.0 bf16 ranks": ("triton", OPS | ROPE | BLOCK),
    "9.0 bf16 average": ("triton", OPS | ROPE | BLOCK),
    "9.0 fp16 average": ("triton", OPS | ROPE | BLOCK),
    "9.0 bf16 QK-norm": ("triton", OPS | QK_NORM | BLOCK),
    "9.0 fp16": ("triton", OPS | ROPE | BLOCK),
    "9.0 fp32": ("triton", OPS | ROPE | SWIGLU),
    "7.5 fp16": ("cuda", OPS | ROPE | BLOCK),
    "7.5 fp16 documents": ("cuda", OPS | ROPE | BLOCK),
    # Attention is the reference's: without tensor cores for fp32 nobody has a faster one.
    "7.5 fp32": ("cuda", {op for op in OPS if "attention" not in op} | ROPE | SWIGLU),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    library = tmp_path_factory.mktemp("fake_gpu") / "fake_gpu.so"
    source, include, lib = HERE / "fake_gpu.cpp", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}"
    build = [*COMPILER, "-std=c++20", "-fPIC", "-shared", include, "-o", library, source, lib]
    subprocess.run([*build, "-ltorch_cpu", "-lc10"], check=True)
    run = [sys.executable, "-W", "ignore", HERE / "fake_gpu.py", TORCH, library]
    chosen = ("TRITON_INTERPRET", "ANT5M_KERNELS")  # by a user; a GPU has its own choice
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    return json.loads(subprocess.run(run, check=True, stdout=subprocess.PIPE, env=environment).stdout)


@pytest.mark.parametrize("case", ALL)
def test_a_step_stays_on_the_device(outcomes, case):
    backend, ops = ALL[case]
    assert outcomes[case] == sorted(f"ant5m_{backend}.{op}" for op in ops)


def test_where_cuda_has_no_norm_of_q_and_k_triton_has(outcomes):
    """The kernel of a T4 that nobody could time was not written."""
    expected = [*(f"ant5m_cuda.{op}" for op in OPS | BLOCK), *(f"ant5m_triton.{op}" for op in QK_NORM)]
    assert outcomes["7.5 fp16 QK-norm"] == sorted(expected)


def test_a_tensor_of_the_host_is_refused(outcomes):
    assert outcomes["mixed"] == "AssertionError: aten._to_copy.default made a tensor on the host"
    assert outcomes["mixed average"].endswith("made a tensor on the host")


def test_a_number_that_is_read_back_is_refused(outcomes):
    assert outcomes["reading"].startswith("DataDependentOutputException: aten._local_scalar_dense")
