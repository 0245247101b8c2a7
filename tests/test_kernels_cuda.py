"""The CUDA ops against the reference in float64: small shapes on the emulated device of
csrc/cuda/host_shim.h, or on a GPU, and there at full size too. tests/test_cuda_attention.py tries the kernels
of attention alone.
"""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import (
    DEVICE,
    TOLERANCES,
    big,
    check,
    check_attention,
    check_head,
    check_mlp,
    check_op,
    check_rms_norm,
    check_rope,
    check_rope_packed,
    check_small_probabilities,
    check_swiglu,
    draw,
    error,
    fp16,
    fp32,
    heads_first,
    with_gaps,
)
from cuda_host import HostLibrary, compile_kernels, needs_compiler

from ant5m.kernels import check as check_on_device
from ant5m.kernels import cuda as ops
from ant5m.kernels import dispatch, lm_head_loss, reference
from ant5m.kernels.cuda import compiler, runtime
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [needs_compiler]


def emulate(
    source, kernel, defines, grid, threads, arguments, descending=False, edit=lambda text: text, races=False
):
    text = edit((compiler.SOURCES / source).read_text())
    device = HostLibrary(compile_kernels(text, races, **defines), descending)
    device.launch(kernel, grid, threads, *arguments)


@pytest.fixture(autouse=True, params=["ascending", "descending"] if DEVICE == "cpu" else [""])
def device(request):
    """Where there is no GPU, the emulated one; warps run in either order."""
    if DEVICE == "cuda":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with runtime.launched_by(functools.partial(emulate, descending=request.param == "descending")):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_filled():
    """Memory that an op asks for and does not write shows up as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(  # few on the host: each combination is compiled
    "shape, with_residual, dtype",
    [
        ((1, 3), True, fp16),
        ((3, 7, 128), False, fp16),
        ((3, 7, 128), True, fp32),
        ((2, 9, 129), True, fp16),
        ((17, 516), False, fp32),
        *(
            pytest.param((64, 1_024, 128), with_residual, dtype, marks=big)
            for with_residual in (False, True)
            for dtype in (fp32, fp16)
        ),
    ],
)
def test_rms_norm(shape, with_residual, dtype):
    check_rms_norm(ops.rms_norm, shape, dtype, with_residual)


@pytest.mark.parametrize("device", ["ascending"] if DEVICE == "cpu" else [""], indirect=True)
@pytest.mark.parametrize("name", ops.IMPLEMENTATIONS)
def test_ops(name, monkeypatch):
    """As a training step calls them, by their records; beside the reference in float64."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "_device_refuses", lambda tensors: None)
        monkeypatch.setattr(check_on_device, "unsupported_reason", lambda *_: None)
    draw = Draw(Sizes(2, 33, 64, 36, 8, 2, 16, 1_003), fp16, DEVICE)
    check_op(name, "cuda", draw, samples=[a for a in OPS[name].samples(draw) if not has_z_loss(name, a)])


def has_z_loss(name, arguments):
    """What the backend refuses."""
    return name == "linear_cross_entropy" and bool(arguments[-1])


def test_rms_norm_of_mixed_dtypes():
    """Half-precision activations on an fp32 residual stream, as under autocast; more rows than warps."""
    x, residual, weight = draw(1_300, 40).to(fp16), draw(1_300, 40, seed=1), draw(40)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    with torch.autocast(DEVICE, fp16):
        y, total = ops.rms_norm(x, weight, 1e-5, residual)
    assert (y.dtype, total.dtype) == (fp16, fp32)
    ramp = torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)
    ((y * ramp.half()).sum() + (total * ramp).sum()).backward()
    truth = [t.detach().double().requires_grad_() for t in leaves]
    exact, sums = reference.rms_norm(truth[0], truth[1], 1e-5, truth[2])
    ((exact * ramp).sum() + (sums * ramp).sum()).backward()
    assert error(y, exact) < 1e-3 and error(total, sums) < 1e-6
    assert (x.grad.dtype, residual.grad.dtype) == (fp16, fp32)
    assert all(error(mine.grad, right.grad) < 1e-3 for mine, right in zip(leaves, truth, strict=True))


def test_rms_norm_when_only_the_sum_is_used():
    x, residual, weight = (t.requires_grad_() for t in (draw(2, 8), draw(2, 8, seed=1), draw(8)))
    ops.rms_norm(x, weight, 1e-5, residual)[1].sum().backward()
    assert (x.grad == 1).all() and (residual.grad == 1).all() and not weight.grad.any()


@pytest.mark.parametrize(
    "shape, kv, dtype",
    [
        ((2, 5, 8, 16), 2, fp32),
        ((1, 15, 4, 64), 4, fp16),
        ((2, 33, 3, 6), 1, fp16),
        pytest.param((64, 1_024, 8, 16), 2, fp32, marks=big),
        pytest.param((64, 1_024, 8, 16), 2, fp16, marks=big),
    ],
)
def test_rope(shape, kv, dtype):
    check_rope(ops.rope, shape, kv, dtype)
    check_rope_packed(ops.rope_packed, shape, kv, dtype)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((1, 1), fp16),
        ((3, 5, 516), fp32),
        ((2, 3, 129), fp16),
        pytest.param((64, 1_024, 520), fp32, marks=big),
        pytest.param((64, 1_024, 520), fp16, marks=big),
    ],
)
def test_swiglu(shape, dtype):
    check_swiglu(ops.swiglu, shape, dtype)


def test_swiglu_of_halves_gives_one_gradient():
    """The gradients of gate and up lie side by side, so what made both gets its own without a copy."""
    both = draw(3, 2 * 516).half().requires_grad_()
    gate, up = both.chunk(2, -1)
    truth = reference.swiglu(gate.double(), up.double())
    y = ops.swiglu(gate, up)
    assert error(y, truth) < 1e-3
    first, second = torch.autograd.grad(y.sum(), (gate, up))
    assert second.data_ptr() == first.data_ptr() + 516 * 2 and first.stride() == (1_032, 1)


@pytest.mark.parametrize(
    "shape, kv",
    [
        ((2, 33, 8, 16), 2),
        ((1, 70, 2, 64), 2),
        pytest.param((4, 1_023, 8, 16), 2, marks=big),
        pytest.param((64, 1_024, 8, 16), 2, marks=big),
        pytest.param((4, 1_025, 4, 64), 4, marks=big),
        pytest.param((2, 4_096, 8, 32), 2, marks=big),
        pytest.param((2, 1_024, 8, 64), 2, marks=big),
    ],
)
def test_attention(shape, kv):
    check_attention(ops.attention, shape, kv, fp16)


@pytest.mark.parametrize("layout", [with_gaps, heads_first])
def test_attention_layouts(layout):
    check_attention(ops.attention, (2, 33, 8, 16), 2, fp16, layout=layout)


def check_documents(length, lengths):
    starts = torch.zeros(2, length, dtype=torch.long)
    for row, documents in zip(starts, lengths, strict=True):
        ends = torch.tensor(documents).cumsum(0)
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            row[first:end] = first
    starts = starts.to(DEVICE)
    inputs = [draw(2, length, 8, 16), draw(2, length, 2, 16), draw(2, length, 2, 16, seed=1)]
    check(
        "attention",
        lambda *x: ops.attention(*x, starts),
        lambda *x: reference.attention(*x, starts),
        inputs,
        fp16,
    )


@pytest.mark.parametrize("length, lengths", [(70, [[70], [1, 68, 1]])])
def test_attention_inside_documents(length, lengths):
    check_documents(length, lengths)


@pytest.mark.parametrize("dtype", [fp32, fp16])
@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize(
    "rows, size, vocab",
    [
        (1, 8, 5),
        (37, 16, 1_003),
        pytest.param(8_192, 128, 16_384, marks=big),
        pytest.param(4_097, 256, 4_096, marks=big),
    ],
)
def test_linear_cross_entropy(rows, size, vocab, scale, dtype):
    check_head(ops.linear_cross_entropy, rows, size, vocab, dtype, scale)


@pytest.mark.parametrize("size, scale", [(16, 100.0), (6, 1_000.0)])
def test_linear_cross_entropy_of_peaked_rows(size, scale, monkeypatch):
    """Logits of 300 to 3,000, which halves hold to 1/8 and to 1: no less exact than small ones."""
    monkeypatch.setitem(TOLERANCES, "linear_cross_entropy", {fp16: 5e-4})
    check_head(ops.linear_cross_entropy, 37, size, 1_003, fp16, scale)


@pytest.mark.parametrize("gradient", [False, True])
def test_linear_cross_entropy_of_large_logits_without_a_peak(gradient):
    """All logits of a row near its highest, which is -100 to 700."""
    hidden, weight = draw(9, 8, scale=0.5), draw(40, 8)
    hidden[:, 0], weight[:, 0] = 100 * torch.arange(-1, 8), 1
    hidden, weight = (x.half().requires_grad_(gradient) for x in (hidden, weight))
    targets = torch.arange(9, device=DEVICE)
    truth = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    loss = ops.linear_cross_entropy(hidden, weight, targets)
    assert abs(loss - truth) < 1e-5
    if gradient:
        mine, right = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, truth))
        assert all(error(a, b.double()) < 1e-3 for a, b in zip(mine, right, strict=True))


def test_linear_cross_entropy_of_logits_beyond_fp16():
    hidden, weight = (torch.full((n, 8), 200.0, dtype=fp16, device=DEVICE) for n in (1, 5))
    assert ops.linear_cross_entropy(hidden, weight, torch.zeros(1, dtype=torch.long, device=DEVICE)).isnan()


@pytest.mark.parametrize("scale", [0.1, pytest.param(30.0, marks=big)])
def test_linear_cross_entropy_of_a_large_vocabulary(scale):
    """GPT-2's: a block of 1,024 threads has a row."""
    check_head(ops.linear_cross_entropy, 3 if DEVICE == "cpu" else 4_097, 8, 50_257, fp16, scale)


def test_linear_cross_entropy_in_chunks(monkeypatch):
    monkeypatch.setattr(lm_head_loss, "CHUNK_BYTES", 1_024 * 2 * 10)
    check_head(ops.linear_cross_entropy, 33, 16, 1_003, fp16, layout=with_gaps)


def test_linear_cross_entropy_at_the_edges():
    hidden, weight = draw(4, 8).requires_grad_(), draw(5, 8).requires_grad_()
    nothing = torch.full((4,), -100, device=DEVICE)
    loss = ops.linear_cross_entropy(hidden, weight, nothing)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()
    targets = torch.arange(4, device=DEVICE)
    with torch.no_grad():
        alone = ops.linear_cross_entropy(hidden, weight, targets)
    assert alone == ops.linear_cross_entropy(hidden, weight, targets)
    assert ops.linear_cross_entropy(hidden, weight, targets + 2).isnan(), "5 is no entry of a vocabulary of 5"
    frozen = ops.linear_cross_entropy(hidden.detach(), weight, targets, ignore_index=2)
    (gradient,) = torch.autograd.grad(frozen, weight)
    truth = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.detach().double() @ truth.T, targets, ignore_index=2).backward()
    assert error(gradient, truth.grad) < 1e-5


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_linear_cross_entropy_of_what_is_not_finite(bad):
    """An overflow in fp16 is seen, in the loss and in the gradient of its row alone."""
    hidden, weight = (draw(n, 8).half().requires_grad_() for n in (4, 40))
    with torch.no_grad():
        hidden[1, 2] = bad
    loss = ops.linear_cross_entropy(hidden, weight, torch.arange(4, device=DEVICE))
    loss.backward()
    assert loss.isnan() and hidden.grad[1].isnan().all() and hidden.grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize(
    "tokens, size, width",
    [
        ((2, 17), 64, 36),
        ((1, 1), 128, 8),
        pytest.param((64, 1_024), 128, 516, marks=big),
        pytest.param((257,), 64, 176, marks=big),
    ],
)
def test_mlp(tokens, size, width):
    check_mlp(ops.mlp, tokens, size, width, fp16)


def test_mlp_of_more_than_a_block():
    check_mlp(ops.mlp, (257,), 64, 36, fp16, with_gaps)


def test_scores_and_logits_far_below_zero():
    """-40,000 all of them: the mean of the values, and the logarithm of the vocabulary."""
    v = draw(2, 33, 2, 16).half()
    q, k = torch.full((2, 33, 8, 16), 100.0), torch.full((2, 33, 2, 16), -100.0)
    out = ops.attention(q.to(DEVICE).half(), k.to(DEVICE).half(), v)
    mean = v.double().cumsum(1) / torch.arange(1, 34, device=DEVICE)[:, None, None]
    assert error(out, mean.repeat_interleave(4, 2)) < 2e-3
    hidden, weight = torch.full((37, 16), 100.0), torch.full((1_003, 16), -25.0)
    targets = torch.zeros(37, dtype=torch.long, device=DEVICE)
    loss = ops.linear_cross_entropy(hidden.to(DEVICE).half(), weight.to(DEVICE).half(), targets)
    assert abs(loss - math.log(1_003)) < 5e-3


def test_gradients_of_small_probabilities():
    check_small_probabilities(ops.linear_cross_entropy)


def halves(*shape, seed=0):
    return draw(*shape, seed=seed).half().requires_grad_()


# The shapes are those of tests above, for which the kernels are compiled already.
REGISTERED = {
    "rms_norm": lambda: (draw(3, 7, 128), draw(128), 1e-5, draw(3, 7, 128), fp32),
    "rope": lambda: (halves(1, 15, 4, 64), halves(1, 15, 4, 64), draw(15, 32), draw(15, 32), False),
    "swiglu": lambda: (halves(2, 3, 129), halves(2, 3, 129)),
    "attention": lambda: (halves(2, 33, 8, 16), halves(2, 33, 2, 16), halves(2, 33, 2, 16), None),
    "mlp": lambda: (halves(2, 17, 64), draw(36, 64), draw(36, 64), draw(64, 36)),
    "linear_cross_entropy": lambda: (
        *(draw(37, 16), draw(1_003, 16), torch.arange(37, device=DEVICE), -100, fp32, True, True, 0.0),
    ),
}


@pytest.mark.parametrize("name", REGISTERED)
def test_what_torch_is_told_of_an_op_is_true(name):
    """Shapes and dtypes of fake results, no argument changed or returned, gradients in a traced graph."""
    arguments = tuple(
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in REGISTERED[name]()
    )
    op = getattr(torch.ops.ant5m_cuda, name).default
    tests = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"
    torch.library.opcheck(op, arguments, test_utils=tests)


def test_a_model_in_half_precision(monkeypatch):
    """Norms, residuals, views of one product, the SwiGLU block and the head together, as a step has them."""
    torch.manual_seed(0)
    net = Ant(ModelConfig(97, 64, 36, 2, 4, 2, max_position_embeddings=40)).to(DEVICE)
    exact, tokens = copy.deepcopy(net).double(), torch.arange(80, device=DEVICE).reshape(2, 40)
    monkeypatch.setattr(dispatch, "_selected", "reference")
    truth = exact(tokens, tokens.roll(-1))
    truth.backward()
    monkeypatch.setattr(dispatch, "_selected", "cuda")
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "_device_refuses", lambda tensors: None)
        monkeypatch.setattr(check_on_device, "unsupported_reason", lambda *_: None)
    launched = spy(monkeypatch)
    with torch.autocast(DEVICE, fp16):
        loss = net(tokens, tokens.roll(-1))
    (loss * 64).backward()
    assert {
        "attention_dkdv",
        "mlp_backward",
        "rms_norm_backward",
        "rope",
        "rope_packed_back",
        "softmax_gradient",
    } <= launched
    assert abs(loss - truth) < 1e-2
    for (name, mine), right in zip(net.named_parameters(), exact.parameters(), strict=True):
        assert error(mine.grad / 64, right.grad) < 2e-2, name


def spy(monkeypatch):
    """-> the kernels that are launched from now on."""
    launched, launcher = set(), runtime._launcher

    def note(source, kernel, *rest):
        launched.add(kernel)
        launcher(source, kernel, *rest)

    monkeypatch.setattr(runtime, "_launcher", note)
    return launched


MUTATIONS = {
    "rms_norm.cu": {
        "unit[p][i] * along": "unit[p][i]",
    },
    "rope.cu": {
        "s[j] *= sign;": "",
        "sin + angle, -1)": "sin + angle, 1)",
        "    store(second, to + kHalf);\n": "",
    },
    "swiglu.cu": {"silu * (1 - a)": "silu * (1 + a)"},
    "linear_cross_entropy.cu": {
        "if (first_entry(p) + i < VOCAB) row_sum": "row_sum",
        "  sync_threads();\n  x = shared": "  x = shared",
        "* scale - factor}": "* scale}",
    },
    "mlp.cu": {"    sync_threads();\n": "", "(s + silu * (1 - s))": "s"},
}
CHECKS = {
    "rms_norm.cu": lambda: check_rms_norm(ops.rms_norm, (3, 7, 128), fp32, True),
    "rope.cu": lambda: [
        check(op, (2, 5, 8, 16), 2, fp32)
        for check, op in ((check_rope_packed, ops.rope_packed), (check_rope, ops.rope))
    ],
    "swiglu.cu": lambda: check_swiglu(ops.swiglu, (3, 5, 516), fp32),
    "linear_cross_entropy.cu": lambda: check_head(ops.linear_cross_entropy, 37, 16, 1_003, fp16),
    "mlp.cu": lambda: check_mlp(ops.mlp, (2, 17), 64, 36, fp16),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="changes what the host compiles")
@pytest.mark.parametrize("device", ["ascending"], indirect=True)
@pytest.mark.parametrize(
    "source, line", [(source, line) for source, lines in MUTATIONS.items() for line in lines]
)
def test_the_tests_can_fail(source, line):
    """A wrong formula, a missing barrier: the checks above see it."""
    assert line in (compiler.SOURCES / source).read_text()

    def broken(text):
        return text.replace(line, MUTATIONS[source][line])

    with runtime.launched_by(functools.partial(emulate, edit=broken)), pytest.raises(AssertionError):
        CHECKS[source]()


# Attention and the SwiGLU block: more than two tiles, so that both of their buffers are used again.
RACES = {
    "rms_norm.cu": [test_rms_norm_of_mixed_dtypes],
    "rope.cu": [
        lambda: check_rope(ops.rope, (2, 33, 3, 6), 1, fp16),
        lambda: check_rope_packed(ops.rope_packed, (2, 33, 3, 6), 1, fp16),
    ],
    "swiglu.cu": [lambda: check_swiglu(ops.swiglu, (2, 3, 129), fp16)],
    "linear_cross_entropy.cu": [
        lambda: check_head(ops.linear_cross_entropy, 13, 16, 1_003, fp16, scale=100.0),
        lambda: check_head(ops.linear_cross_entropy, 13, 16, 1_003, fp16),
    ],
    "attention.cu": [
        lambda: check_attention(ops.attention, (1, 150, 4, 16), 1, fp16),
        lambda: check_attention(ops.attention, (1, 150, 3, 32), 1, fp16),
        lambda: check_attention(ops.attention, (1, 100, 1, 64), 1, fp16),
        lambda: check_documents(130, [[130], [1, 63, 20, 46]]),
    ],
    "mlp.cu": [lambda: check_mlp(ops.mlp, (150,), 64, 36, fp16)],
}
BARRIER = "sync_threads();\n"
BARRIERS = [
    (source, i) for source in RACES for i in range((compiler.SOURCES / source).read_text().count(BARRIER))
]
detects_races = pytest.mark.skipif(DEVICE == "cuda", reason="compute-sanitizer does it on a GPU")


def test_every_kernel_is_searched_for_races():
    assert {path.name for path in compiler.SOURCES.glob("*.cu")} == set(RACES)


@detects_races
@pytest.mark.parametrize("device", ["ascending"], indirect=True)
@pytest.mark.parametrize("source, i", [(source, i) for source in RACES for i in range(len(RACES[source]))])
def test_no_races(source, i):
    """Not in shared memory, and not in global memory, where blocks have no order either."""
    with runtime.launched_by(functools.partial(emulate, races=True)):
        RACES[source][i]()


@detects_races
@pytest.mark.parametrize("device", ["ascending"], indirect=True)
@pytest.mark.parametrize("source, i", BARRIERS)
def test_without_any_barrier_there_is_a_race(source, i):
    """So what finds no race can find one, and no barrier is superfluous."""

    def broken(text):
        parts = text.split(BARRIER)
        return BARRIER.join(parts[: i + 1]) + BARRIER.join(parts[i + 1 :])

    launcher = functools.partial(emulate, races=True, edit=broken)
    with runtime.launched_by(launcher), pytest.raises(RuntimeError, match="race: thread"):
        RACES[source][0]()
