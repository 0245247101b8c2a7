"""The check that a backend must pass on a device: it sees what is wrong, runs once, and leaves no trace."""

import sys
from types import ModuleType

import pytest
import torch

from ant5m import kernels
from ant5m.kernels import check, reference

SIZES = {
    "rms_norm": [(2, 5, 8), (8,)],
    "rope": [(2, 5, 4, 8), (2, 5, 2, 8)],
    "rope_qkv": [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)],
    "attention": [(2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)],
    "swiglu": [(2, 5, 12), (2, 5, 12)],
    "linear_cross_entropy": [(10, 8), (30, 8)],
}


def rope_qkv(qkv, cos, sin, heads):
    q, k, v = qkv.unflatten(-1, (sum(heads), -1)).split(heads, 2)
    return *reference.rope(q, k, cos, sin), v


@pytest.fixture
def backend(monkeypatch):
    """The reference under another name, in which a test breaks something."""
    module = ModuleType("tried_backend")
    for op in kernels.OPS:
        setattr(module, op, getattr(reference, op))
    module.rope_qkv = rope_qkv
    monkeypatch.setitem(sys.modules, "tried_backend", module)
    monkeypatch.setattr(check, "_found", {})
    return module


def tensors(op, dtype=torch.float32):
    return [torch.empty(shape, dtype=dtype) for shape in SIZES[op]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", SIZES)
def test_what_is_right_passes(op, dtype, backend):
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert check.failure(backend, op, *tensors(op, dtype)) is None
    assert torch.equal(state, torch.get_rng_state())
    if op == "attention":
        assert check.failure(backend, op, *tensors(op, dtype), torch.zeros(2, 5)) is None
        assert len(check._found) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_is_tried_in_the_dtypes_of_training(dtype, backend):
    seen = []

    def rms_norm(x, weight, eps, residual):
        seen.append((x.dtype, weight.dtype, residual.dtype, torch.get_autocast_dtype("cpu")))
        assert torch.is_autocast_enabled("cpu")
        return reference.rms_norm(x, weight, eps, residual)

    backend.rms_norm = rms_norm
    assert check.failure(backend, "rms_norm", *tensors("rms_norm", dtype)) is None
    assert seen == [(dtype, torch.float32, torch.float32, dtype)]


class Halved(torch.autograd.Function):
    """Right values, wrong gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


BROKEN = {
    "an output": lambda out: out * 1.1,
    "a gradient": Halved.apply,
    "no number": lambda out: out + float("nan"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("op", kernels.OPS)
def test_what_is_wrong_fails(op, what, backend):
    def broken(*inputs):
        out = getattr(reference, op)(*inputs)
        return (*out[:-1], BROKEN[what](out[-1])) if isinstance(out, tuple) else BROKEN[what](out)

    setattr(backend, op, broken)
    with pytest.warns(UserWarning, match="tried_backend"):
        reason = check.failure(backend, op, *tensors(op))
    assert reason.startswith(f"{op} failed its check on this device: off by ")


def test_an_error_is_a_reason_and_the_check_runs_once(backend):
    calls = []

    def fails(gate, up):
        calls.append(gate.shape)
        raise RuntimeError("no kernel image\nis available")

    backend.swiglu = fails
    with pytest.warns(UserWarning, match="no kernel image"):
        reasons = [check.failure(backend, "swiglu", *tensors("swiglu")) for _ in range(3)]
    assert set(reasons) == {"swiglu failed its check on this device: RuntimeError: no kernel image"}
    assert len(calls) == 1


def test_torch_compile_checks_while_it_traces(backend):
    def function(gate, up):
        return gate if check.failure(backend, "swiglu", gate, up) else backend.swiglu(gate, up)

    inputs = [torch.randn(2, 5, 12) for _ in range(2)]
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), reference.swiglu(*inputs)) and len(check._found) == 1
