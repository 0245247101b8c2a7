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


MLP = [(10, 8), (12, 8), (12, 8), (8, 12)]


@pytest.fixture
def with_mlp(backend, monkeypatch):
    """A backend with a SwiGLU block, and how long that and what it stands for shall take."""
    backend.mlp = lambda x, gate, up, down: (reference.swiglu(x @ gate.T, x @ up.T)) @ down.T
    took, timed = {"block": [], "products": []}, []

    def milliseconds(way, leaves, dy):
        timed.append(torch.autograd.grad(way(*leaves), leaves, dy))
        return took["block" if way is backend.mlp else "products"].pop(0)

    monkeypatch.setattr(check, "_milliseconds", milliseconds)
    monkeypatch.setattr(check, "_TIMED_TOKENS", 50)
    return took, timed


@pytest.mark.parametrize("block", [[3.0, 1.0, 2.0], [3.0, 1.6, 2.0]])
def test_a_block_is_used_where_it_is_faster_than_what_it_stands_for(block, backend, with_mlp):
    took, timed = with_mlp
    took.update(block=[*block], products=[9.0, 1.5, 1.6])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        reason = check._too_slow(backend, torch.device("cpu"), torch.float32, 12, 8)
    assert reason == (None if 1.0 in block else "mlp takes 1.600 ms on this device, what it stands for 1.500")
    assert len(timed) == 6
    for one, other in zip(timed[0], timed[1], strict=True):
        assert one.shape == other.shape and one.shape[0] in (50, 16, 8)  # 12 columns become 16
        torch.testing.assert_close(one, other)


def test_a_block_that_fits_where_nothing_else_does_is_used(backend, with_mlp, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(check, "_milliseconds", fails)
    assert check._too_slow(backend, torch.device("cpu"), torch.float32, 12, 8) is None


def test_a_block_that_fails_at_full_size_is_not_used(backend, with_mlp, monkeypatch):
    def fails(*_):
        raise RuntimeError("invalid argument\nin a launch")

    monkeypatch.setattr(check, "_milliseconds", fails)
    reason = check._too_slow(backend, torch.device("cpu"), torch.float32, 12, 8)
    assert reason == "mlp could not be timed on this device: RuntimeError: invalid argument"


def test_the_clock_is_asked_on_a_gpu_only_and_once(backend, with_mlp, monkeypatch):
    asked = []
    monkeypatch.setattr(check, "_too_slow", lambda *given: asked.append(given) or "slow")
    tensors = [torch.empty(shape) for shape in MLP]
    assert check.failure(backend, "mlp", *tensors) is None and not asked
    monkeypatch.setattr(check, "_compare", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device = torch.device("cuda", 0)
    for _ in range(2):
        assert check._failure("tried_backend", "mlp", device, torch.float16, (12, 8)) == "slow"
    assert check._failure("tried_backend", "swiglu", device, torch.float16, (12,)) is None
    assert asked == [(backend, device, torch.float16, 12, 8)]


def test_torch_compile_checks_while_it_traces(backend):
    def function(gate, up):
        return gate if check.failure(backend, "swiglu", gate, up) else backend.swiglu(gate, up)

    inputs = [torch.randn(2, 5, 12) for _ in range(2)]
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), reference.swiglu(*inputs)) and len(check._found) == 1
