"""The check that a backend must pass on a device: it sees what is wrong, runs once, and leaves no trace."""

from types import SimpleNamespace

import pytest
import torch

from ant5m import kernels
from ant5m.kernels import check, registry
from ant5m.kernels.dispatch import Implementation
from ant5m.kernels.samples import Draw, Sizes, tensors_of, with_tensors

SMALL = Sizes(batch=2, length=5, hidden=8, intermediate=12, heads=4, kv_heads=2, head_size=8, vocab=30)
CHECKED = (*kernels.OPS, "rope_packed", "mlp")
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16


def composition(name):
    return lambda *arguments: registry.OPS[name].composition(*arguments, backend="reference")


@pytest.fixture
def backend(monkeypatch):
    """The reference under another name, checked on the CPU, in which a test breaks something."""
    module = SimpleNamespace(
        IMPLEMENTATIONS={name: Implementation(composition(name)) for name in CHECKED},
        unsupported_reason=lambda tensors: None,
    )
    monkeypatch.setitem(registry._modules, "tried", module)
    monkeypatch.setattr(check, "_is_checked", lambda device: True)
    monkeypatch.setattr(check, "_found", {})
    monkeypatch.setattr(check, "_choices", {})
    return module


def samples(name, dtype=fp32):
    return registry.OPS[name].samples(Draw(SMALL, dtype))


def ask(name, arguments):
    return registry.OPS[name].unsupported_reason("tried", *arguments)


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16])
@pytest.mark.parametrize("name", CHECKED)
def test_what_is_right_passes(name, dtype, backend):
    state = torch.get_rng_state()
    given = samples(name, dtype)
    with torch.inference_mode(), torch.autocast("cpu", bf16 if dtype == fp32 else dtype):
        assert [ask(name, arguments) for arguments in given] == [None] * len(given)
    assert torch.equal(state, torch.get_rng_state()) and len(check._found) == len(given)


@pytest.mark.parametrize("autocast", [None, fp16, bf16])
@pytest.mark.parametrize("dtype", [fp32, fp16])
@pytest.mark.parametrize("name", ["rms_norm", "linear_cross_entropy"])
def test_an_op_is_tried_as_it_is_called(name, dtype, autocast, backend):
    """In the dtypes of all tensors, and under the autocast that is on: each is another check."""
    seen = []

    def spy(*arguments):
        on = torch.is_autocast_enabled("cpu")
        kinds = [x.dtype for x in tensors_of(arguments)]
        seen.append((kinds, torch.get_autocast_dtype("cpu") if on else None))
        return composition(name)(*arguments)

    backend.IMPLEMENTATIONS[name] = Implementation(spy)
    given = samples(name, dtype)[-1]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        assert ask(name, given) is None
    assert seen == [([x.dtype for x in tensors_of(given)], autocast)]
    assert ask(name, given) is None and len(seen) == (1 if autocast is None else 2)


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
    "NaN": lambda out: out + float("nan"),
}


@pytest.mark.parametrize("dtype", [fp32, fp16, bf16])
@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("name", CHECKED)
def test_what_is_wrong_fails(name, what, dtype, backend):
    def broken(*arguments):
        out = composition(name)(*arguments)
        return (*out[:-1], BROKEN[what](out[-1])) if isinstance(out, tuple) else BROKEN[what](out)

    backend.IMPLEMENTATIONS[name] = Implementation(broken)
    with pytest.warns(UserWarning, match="tried: "):
        reason = ask(name, samples(name, dtype)[-1])
    assert reason.startswith(f"{name} failed its check on this device: off by ")


def test_sixteen_bits_of_autocast_are_no_reason(backend):
    """fp32 tensors whose products autocast rounds are compared as 16 bits are."""
    name, given = "linear_cross_entropy", samples("linear_cross_entropy")[0]
    with torch.autocast("cpu", bf16):
        assert ask(name, given) is None


def test_an_error_is_a_reason_and_the_check_runs_once(backend):
    calls = []

    def fails(gate, up):
        calls.append(gate.shape)
        raise RuntimeError("no kernel image\nis available")

    backend.IMPLEMENTATIONS["swiglu"] = Implementation(fails)
    with pytest.warns(UserWarning, match="no kernel image"):
        reasons = [ask("swiglu", samples("swiglu")[0]) for _ in range(3)]
    assert set(reasons) == {"swiglu failed its check on this device: RuntimeError: no kernel image"}
    assert len(calls) == 1


def test_a_backend_is_asked_before_it_is_tried(backend):
    backend.IMPLEMENTATIONS["swiglu"] = Implementation(None, lambda gate, up: "too narrow")
    assert ask("swiglu", samples("swiglu")[0]) == "too narrow"
    backend.unsupported_reason = lambda tensors: f"not {len(tensors)} tensors"
    assert ask("swiglu", samples("swiglu")[0]) == "not 2 tensors"
    assert not check._found


@pytest.fixture
def clock(backend, monkeypatch):
    """How long the block and what it stands for shall take, and what was timed."""
    block = composition("mlp")
    backend.IMPLEMENTATIONS["mlp"] = Implementation(block, timed=True)
    took, timed = {"block": [], "products": []}, []

    def milliseconds(way, arguments, leaves, dy, device):
        timed.append(torch.autograd.grad(way(*arguments), leaves, dy))
        return took["block" if way is block else "products"].pop(0)

    monkeypatch.setattr(check, "_milliseconds", milliseconds)
    monkeypatch.setattr(check, "_TIMED", {"cpu": {"batch": 5, "length": 10}})
    return took, timed


@pytest.mark.parametrize("block", [[3.0, 1.0, 2.0], [3.0, 1.6, 2.0]])
def test_a_block_is_used_where_it_is_faster_than_what_it_stands_for(block, backend, clock):
    took, timed = clock
    took.update(block=[*block], products=[9.0, 1.5, 1.6])
    with torch.inference_mode():
        reason = ask("mlp", samples("mlp")[0])
    assert reason == (None if 1.0 in block else "mlp takes 1.600 ms on this device, what it stands for 1.500")
    assert len(timed) == 6
    for one, other in zip(timed[0], timed[1], strict=True):
        assert one.shape == other.shape and one.shape[0] in (5, 12, 8)
        torch.testing.assert_close(one, other)


def test_a_choice_by_stopwatch_is_kept(backend, clock, monkeypatch):
    """For every later call, and for whoever goes on with the run, whatever a clock would say then."""
    took, timed = clock
    took.update(block=[1.0] * 3, products=[2.0] * 3)
    given = samples("mlp")[0]
    assert ask("mlp", given) is None and ask("mlp", given) is None and len(timed) == 6
    kept = kernels.choices()
    assert kept == {"tried mlp on cpu in float32: hidden 8, intermediate 12": "faster"}
    monkeypatch.setattr(check, "_choices", {})
    monkeypatch.setattr(check, "_found", {})
    took.update(block=[2.0] * 3, products=[1.0] * 3)
    kernels.restore(kept)
    assert ask("mlp", given) is None and len(timed) == 6
    kernels.restore(dict.fromkeys(kept, "mlp takes too long"))
    assert ask("mlp", given) == "mlp takes too long" and len(timed) == 6
    wide = with_tensors(given, [x.half() for x in tensors_of(given)])
    assert ask("mlp", wide).startswith("mlp takes 2.000 ms") and len(timed) == 12


def test_a_block_that_fits_where_nothing_else_does_is_used(backend, clock, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(check, "_milliseconds", fails)
    assert ask("mlp", samples("mlp")[0]) is None


def test_a_block_that_fails_at_full_size_is_not_used(backend, clock, monkeypatch):
    def fails(*_):
        raise RuntimeError("invalid argument\nin a launch")

    monkeypatch.setattr(check, "_milliseconds", fails)
    reason = ask("mlp", samples("mlp")[0])
    assert reason == "mlp could not be timed on this device: RuntimeError: invalid argument"


def test_only_what_is_timed_asks_the_clock(backend, clock):
    assert ask("swiglu", samples("swiglu")[0]) is None
    assert not clock[1] and not kernels.choices()


@pytest.mark.parametrize("faster", [True, False])
def test_on_apple_products_are_timed_beside_torchs_before_their_first_use(faster, monkeypatch):
    """Whose library, Accelerate, may use units that no instruction set shows."""
    cpu, timed = registry.load("cpu"), []
    monkeypatch.setattr(cpu, "IMPLEMENTATIONS", cpu.implementations("darwin"))
    monkeypatch.setattr(check, "_found", {})
    monkeypatch.setattr(check, "_choices", {})
    own = [cpu.mlp, cpu.linear, cpu.linear_cross_entropy]

    def milliseconds(way, arguments, leaves, dy, device):
        timed.append(way)
        return 1.0 if (way in own) == faster else 2.0

    monkeypatch.setattr(check, "_milliseconds", milliseconds)
    for name in ("linear", "mlp", "linear_cross_entropy", "linear_cross_entropy"):
        arguments = samples(name)[-1]
        op = registry.OPS[name]
        expected = getattr(cpu, name) if faster else composition(name)
        assert torch.equal(op(*arguments), expected(*arguments)) or not faster
        assert list(op.chosen.values())[-1] is (getattr(cpu, name) if faster else None)
    kept = kernels.choices()
    assert {
        "cpu linear on cpu in float32: hidden 8, intermediate 12",
        "cpu mlp on cpu in float32: hidden 8, intermediate 12",
        "cpu linear_cross_entropy on cpu in float32, int64: hidden 8, vocab 30",
    } <= set(kept)
    # The block's composition has two products of its own.
    assert len(kept) == (3 if faster else 5) and len(timed) == 6 * len(kept)
    assert all((reason == "faster") == faster for reason in kept.values())
    # By name it is used, however fast.
    arguments = samples("linear_cross_entropy")[-1]
    assert torch.equal(
        kernels.linear_cross_entropy(*arguments, backend="cpu"), cpu.linear_cross_entropy(*arguments)
    )
    assert not any(x.timed for x in cpu.implementations("linux").values())


def test_on_a_cpu_nothing_is_checked(backend, monkeypatch):
    monkeypatch.undo()
    assert kernels.swiglu.unsupported_reason("cpu", *samples("swiglu")[0]) is None and not check._found


def test_torch_compile_checks_while_it_traces(backend):
    def function(gate, up):
        return gate if ask("swiglu", (gate, up)) else composition("swiglu")(gate, up)

    inputs = [torch.randn(2, 5, 12) for _ in range(2)]
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), composition("swiglu")(*inputs)) and len(check._found) == 1
