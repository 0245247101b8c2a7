"""From csrc/cuda to machine code: NVRTC itself, what is kept on disk, and what happens where it fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.kernels import check, cuda, dispatch, reference, registry
from ant5m.kernels.cuda import compiler, runtime
from ant5m.kernels.cuda.compiler import Compiler

needs_nvrtc = pytest.mark.skipif(compiler.nvrtc_compiler() is None, reason="there is no NVRTC")
SWIGLU = "swiglu.cu", {"SIZE": 520, "VECTOR": 8, "X": 16}
ELF = b"\x7fELF"


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return compiler.folder()


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of csrc/cuda to break."""
    copy = tmp_path / "sources"
    shutil.copytree(compiler.SOURCES, copy)
    monkeypatch.setattr(compiler, "SOURCES", copy)
    return copy


@needs_nvrtc
@pytest.mark.parametrize(
    "source, defines",
    [
        SWIGLU,
        ("rope.cu", {"SIZE": 16, "HEADS": 8, "KV": 2, "VECTOR": 8, "X": 16}),
        ("rms_norm.cu", {"SIZE": 129, "VECTOR": 1, "X": 16, "RESIDUAL": 32, "Y": 16, "DIRECT": 1}),
        (
            "linear_cross_entropy.cu",
            {"VOCAB": 999, "STRIDE": 1024, "THREADS": 256, "X": 32, "GRADIENT": 1, "SIZE": 129, "VECTOR": 1},
        ),
    ],
)
def test_nvrtc_compiles_for_newer_devices(source, defines):
    """test_cuda_resources.py compiles what a step needs for 7.5."""
    for capability in ((8, 0), (9, 0), (12, 0)):
        assert compiler.binary(source, defines, compiler.architecture(capability)).startswith(ELF)


@needs_nvrtc
def test_a_compiled_source_is_kept(folder, sources, monkeypatch):
    code = compiler.binary(*SWIGLU, "sm_75")
    (kept,) = folder.iterdir()
    assert kept.read_bytes() == code and folder.stat().st_mode & 0o777 == 0o700
    calls = []
    monkeypatch.setattr(Compiler, "__call__", lambda self, *what: calls.append(what) or b"new")
    assert compiler.binary(*SWIGLU, "sm_75") == code and not calls
    header = sources / "vector.h"
    header.write_text(header.read_text() + "// another\n")
    assert compiler.binary(*SWIGLU, "sm_75") == b"new"
    compiler.binary(SWIGLU[0], {**SWIGLU[1], "SIZE": 128}, "sm_75")
    compiler.binary(*SWIGLU, "sm_80")
    monkeypatch.setattr(compiler, "available", lambda: Compiler("NVRTC", "99.0"))
    compiler.binary(*SWIGLU, "sm_75")
    assert len(calls) == 4 and len(list(folder.iterdir())) == 5


def test_what_nvcc_made_before_is_taken(folder, monkeypatch):
    monkeypatch.setattr(Compiler, "__call__", lambda self, *what: self.name.encode())
    compiler.compile_and_keep(Compiler("nvcc", "12.8"), *SWIGLU, "sm_75")
    monkeypatch.setattr(compiler, "available", lambda: Compiler("NVRTC", "13.0"))
    assert compiler.binary(*SWIGLU, "sm_75") == b"nvcc" and compiler.binary(*SWIGLU, "sm_80") == b"NVRTC"


def test_a_cache_that_cannot_be_written_is_no_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(Compiler, "__call__", lambda self, *what: b"code")
    assert compiler.compile_and_keep(Compiler("NVRTC", "13.0"), *SWIGLU, "sm_75") == b"code"


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiler, "available", lambda: None)
    with pytest.raises(UserError, match=r"neither NVRTC \(pip install nvidia-cuda-nvrtc\) nor nvcc"):
        compiler.binary(*SWIGLU, "sm_75")
    assert "neither NVRTC" in runtime.unsupported_reason()
    monkeypatch.setattr(runtime, "ObjectCode", None)
    assert "pip install 'ant5m[cuda]'" in runtime.unsupported_reason()


@needs_nvrtc
def test_a_source_that_does_not_compile_is_one_line_and_the_next_backend(sources, monkeypatch):
    """As on a T4, but for the launch."""
    broken = sources / "swiglu.cu"
    broken.write_text(broken.read_text().replace("kChunks", "kChonks", 1))
    with pytest.raises(UserError) as error:
        compiler.binary(*SWIGLU, "sm_75")
    message = str(error.value)
    assert message.startswith("NVRTC ") and "cannot compile swiglu.cu for sm_75" in message
    assert "\n" not in message and "kChunks" in message

    def compile_only(source, kernel, defines, grid, threads, arguments):
        compiler.binary(source, defines, "sm_75")

    monkeypatch.setattr(check, "_found", {})
    monkeypatch.setattr(cuda, "_device_refuses", lambda *tensors: None)
    monkeypatch.setattr(dispatch, "order", lambda device: ("cuda", "reference"))
    monkeypatch.setattr(check, "_is_checked", lambda device: True)
    x = torch.randn(3, 520).half()
    with runtime.launched_by(compile_only), pytest.warns(UserWarning, match="cannot compile swiglu.cu"):
        assert torch.equal(kernels.swiglu(x, x), reference.swiglu(x, x))
        with pytest.raises(UserError, match=r"'cuda' cannot run swiglu: .*cannot compile swiglu.cu"):
            kernels.swiglu(x, x, backend="cuda")


def test_a_wheel_has_the_sources(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, capture_output=True, check=True)
    packaged = tmp_path / compiler._PACKAGED.relative_to(root)
    assert {p.name for p in packaged.iterdir()} == {p.name for p in compiler._CHECKOUT.iterdir()}


@pytest.mark.parametrize(
    "capability, order",
    [
        ((0, 0), ("triton", "reference")),
        ((7, 0), ("triton", "reference")),
        ((7, 5), ("cuda", "triton", "reference")),
        ((8, 0), ("triton", "cuda", "reference")),
        ((12, 0), ("triton", "cuda", "reference")),
    ],
)
def test_which_backend_comes_first_on_a_gpu(capability, order, monkeypatch):
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    assert dispatch.order(torch.device("cuda")) == order
    assert dispatch.order(torch.device("cpu"))[0] == "cpu"
    assert dispatch.order(torch.device("meta")) == ("reference",)


def test_the_line_for_people_asks_no_further_than_it_must(monkeypatch):
    """What is asked compiles kernels and tries them."""
    missing = set(registry.OPS) - set(registry.load("triton").IMPLEMENTATIONS)
    reasons = {"triton": {"attention": "no tensor cores", **dict.fromkeys(missing, "it has none")}}
    monkeypatch.setattr(dispatch, "_selected", "auto")
    monkeypatch.setattr(dispatch, "order", lambda device: ("triton", "reference", "cuda"))
    monkeypatch.setattr(dispatch, "_ready", lambda op, name: reasons[name].get(op.name))
    line = kernels.describe("cuda")
    assert "; attention on reference" in line and line.endswith("(no tensor cores)")
    assert "linear_cross_entropy on triton" in line and "but qkv_rope, tree_attention, linear," in line


def test_what_the_ops_refuse(monkeypatch):
    """A reason for each: device, dtype, sizes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    half, full, bf16 = (torch.zeros(1, 4, 2, 16, dtype=t) for t in (torch.half, torch.float, torch.bfloat16))

    def refuses(op, *arguments):
        return getattr(kernels, op).unsupported_reason("cuda", *arguments)

    assert refuses("swiglu", full, full) == "it needs compute capability 7.5, this device has 7.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(runtime, "unsupported_reason", lambda: None)
    assert refuses("swiglu", full, full) == "the tensors are on cpu"
    monkeypatch.setattr(cuda, "_device_refuses", lambda tensors: None)
    assert refuses("attention", half, half, half, torch.zeros(1, 4, dtype=torch.long)) is None
    assert refuses("attention", full, full, full) == "it takes fp16, not float32"
    assert refuses("rope", bf16, bf16, full, full) == "it takes fp16 or fp32, not bfloat16"
    wide = torch.zeros(1, 4, 2, 128).half()
    assert refuses("attention", wide, wide, wide) == "it takes head sizes 16, 32, 64, not 128"
    assert "up to 1,024 elements" in refuses("rms_norm", torch.zeros(1, 1_025), torch.zeros(1_025))
    hidden, vocabulary = torch.zeros(1, 8).half(), torch.zeros(65_537, 8).half()
    targets = torch.zeros(1, dtype=torch.long)
    assert "up to 65,536 entries" in refuses("linear_cross_entropy", hidden, vocabulary, targets)
    few = torch.zeros(9, 8).half()
    assert refuses("linear_cross_entropy", hidden, few, targets, -100, None) is None
    assert refuses("linear_cross_entropy", hidden, few, targets, -100, 1e-4) == "it has no z-loss"
    weight = torch.zeros(512, 256)
    assert "64 or 128 channels" in refuses("mlp", torch.zeros(1, 256).half(), weight, weight, weight.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert refuses("swiglu", half, half) == "it takes fp16 or fp32, not bfloat16"
    assert refuses("linear", full, full) == "it has no linear"
