"""The C++ ops against the reference in float64: outputs and every gradient, on every instruction set."""

import multiprocessing
import os
import subprocess
import sys

import accuracy
import pytest
import torch

from ant5m import _cpu, kernels
from ant5m.kernels import cpu, dispatch, reference
from ant5m.kernels.cpu import bf16
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

# RMS error over RMS. The worst that these tests meet is about 1e-6, in sums over 1,023 keys.
TOLERANCE = 3e-6
# The same of products in bf16, where each factor is off by up to 2^-9 of itself.
BF16_TOLERANCE = 6e-3


@pytest.fixture(params=[name for name in _cpu.instruction_sets() if name != "bf16_emulated"])
def instruction_set(request):
    best = _cpu.instruction_set()
    assert _cpu.use(request.param)
    yield
    _cpu.use(best)


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """Memory that an op asks for and does not write shows up as NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(float("nan"))
    )
    memory = _cpu.Memory

    def nan_memory(floats):
        kept = memory(floats)
        torch.frombuffer(kept, dtype=torch.float32).fill_(float("nan"))
        return kept

    monkeypatch.setattr(_cpu, "Memory", nan_memory)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).requires_grad_()


def run(op, inputs):
    """The outputs of `op`, and the gradients of what requires one."""
    out = op(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    # Of each output another, or gradients of outputs of one shape could be taken for one another.
    ramps = [torch.linspace(-1, 1 + i, o.numel(), dtype=o.dtype).view(o.shape) for i, o in enumerate(outs)]
    loss = sum((o * ramp).sum() for o, ramp in zip(outs, ramps, strict=True))
    if outs[0].ndim == 0:
        loss = 3 * outs[0]
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return [*outs, *torch.autograd.grad(loss, wanted)]


def composed_mlp(x, gate, up, down):
    return reference.swiglu(x @ gate.T, x @ up.T) @ down.T


def composed_qkv_rope(x, weight, cos, sin, heads):
    q, k, v = (x @ weight.T).unflatten(-1, (sum(heads), -1)).split(heads, 2)
    return *reference.rope(q, k, cos, sin), v


COMPOSED = {
    "mlp": composed_mlp,
    "qkv_rope": composed_qkv_rope,
    "linear": torch.nn.functional.linear,
}


def assert_true(name, *inputs, tolerance=TOLERANCE):
    """The C++ op `name` agrees with the reference in float64."""
    truth_inputs = [
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]
    results = run(getattr(cpu, name), inputs)
    truth = run(COMPOSED.get(name) or getattr(reference, name), truth_inputs)
    for got, expected in zip(results, truth, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == expected.shape
        error = (got - expected).square().mean().sqrt()
        assert error <= tolerance * expected.square().mean().sqrt() + 1e-7, (error, expected.shape)


def assert_close(got, expected):
    assert got.dtype == torch.float32 and got.shape == expected.shape and not got.requires_grad
    error = (got - expected).square().mean().sqrt()
    assert error <= TOLERANCE * expected.square().mean().sqrt(), error


def angles(length, half):
    angle = torch.arange(length)[:, None] * torch.logspace(0, -3, half)
    return angle.cos(), angle.sin()


@pytest.mark.usefixtures("instruction_set")
class TestRMSNorm:
    @pytest.mark.parametrize("shape", [(1, 1, 128), (3, 5, 100), (2, 129, 7), (1, 300, 516)])
    def test_plain_and_with_residual(self, shape):
        x, weight, residual = draw(*shape), draw(shape[-1], seed=1), draw(*shape, seed=2)
        assert_true("rms_norm", x, weight)
        run_with_residual = [x, weight, residual]
        results = run(lambda x, w, r: cpu.rms_norm(x, w, 1e-5, r), run_with_residual)
        doubles = [x.detach().double().requires_grad_() for x in run_with_residual]
        truth = run(lambda x, w, r: reference.rms_norm(x, w, 1e-5, r), doubles)
        for got, expected in zip(results, truth, strict=True):
            assert (got - expected).square().mean().sqrt() <= TOLERANCE * expected.square().mean().sqrt()

    @pytest.mark.parametrize("scale", [1e-8, 1e8])
    def test_tiny_and_huge(self, scale):
        assert_true("rms_norm", draw(4, 33, 128, scale=scale), draw(128, seed=1), tolerance=1e-5)

    def test_only_one_output_used(self):
        x, weight, residual = draw(2, 3, 20), draw(20), draw(2, 3, 20, seed=1)
        normed, total = cpu.rms_norm(x, weight, 1e-5, residual)
        assert torch.equal(torch.autograd.grad(total.sum(), x)[0], torch.ones_like(x))
        normed, total = cpu.rms_norm(x, weight, 1e-5, residual)
        (alone,) = torch.autograd.grad(normed.sum(), x)
        (expected,) = torch.autograd.grad(reference.rms_norm(x, weight, 1e-5, residual)[0].sum(), x)
        torch.testing.assert_close(alone, expected)

    def test_strided_and_misaligned(self):
        wide = draw(2, 5, 202)
        assert_true("rms_norm", wide[..., 1:101], draw(100))
        assert_true("rms_norm", wide[..., ::2], draw(101))
        assert_true("rms_norm", wide.transpose(0, 1), draw(202))


@pytest.mark.usefixtures("instruction_set")
class TestRope:
    @pytest.mark.parametrize(
        "shape", [(1, 1, 1, 1, 2), (2, 17, 8, 2, 16), (1, 70, 3, 1, 10), (2, 15, 4, 4, 64)]
    )
    def test_odd_shapes(self, shape):
        batch, length, heads, kv_heads, dim = shape
        q, k = draw(batch, length, heads, dim), draw(batch, length, kv_heads, dim)
        assert_true("rope", q, k, *angles(length, dim // 2))

    def test_strided_and_misaligned(self):
        fused = draw(2, 9, 12 * 16 + 1)[..., 1:].unflatten(-1, (12, 16))
        assert_true("rope", fused[:, :, :8], fused[:, :, 8:10], *angles(9, 8))
        assert_true(
            "rope", draw(2, 4, 9, 16).transpose(1, 2), draw(2, 2, 9, 16).transpose(1, 2), *angles(9, 8)
        )
        gaps = draw(1, 9, 2, 32)
        assert_true("rope", gaps[..., ::2], gaps[..., 1::2], *angles(9, 8))


def starts_of(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths))]


def forest(size, depth):
    """The parent (-1: none) of each position of a random forest, depth first."""
    generator, path, parents = torch.Generator().manual_seed(depth), list[int](), list[int]()
    for position in range(size):
        # Mostly one step deeper, now and then back to any ancestor.
        if len(path) == depth or torch.rand((), generator=generator) < 0.1:
            path = path[: int(torch.randint(len(path) + 1, (), generator=generator))]
        path = path[: depth - 1]
        parents.append(path[-1] if path else -1)
        path.append(position)
    return parents


def ends_of(parents):
    ends = list(range(1, len(parents) + 1))
    for position in reversed(range(len(parents))):
        if parents[position] >= 0:
            ends[parents[position]] = max(ends[parents[position]], ends[position])
    return torch.tensor(ends)


@pytest.mark.usefixtures("instruction_set")
class TestAttention:
    @pytest.mark.parametrize(
        "shape",
        [
            (2, 1, 2, 2, 16),
            (2, 15, 8, 2, 16),
            (1, 17, 4, 1, 32),
            (2, 33, 4, 4, 64),
            (1, 100, 6, 2, 128),
            (1, 131, 5, 1, 10),
            (1, 65, 3, 3, 7),
            (1, 1023, 4, 2, 16),
        ],
    )
    def test_odd_shapes(self, shape):
        batch, length, heads, kv_heads, dim = shape
        k, v = draw(batch, length, kv_heads, dim), draw(batch, length, kv_heads, dim, seed=1)
        assert_true("attention", draw(batch, length, heads, dim), k, v)

    @pytest.mark.parametrize(("scale", "tolerance"), [(1e-6, TOLERANCE), (30.0, 3e-4)])
    def test_tiny_and_huge_scores(self, scale, tolerance):
        # Scores of about 4,000 in fp32 carry errors of 1e-4, and so do their exponentials.
        q, k, v = (draw(1, 200, 2, 16, scale=s, seed=i) for i, s in enumerate((scale, scale, 1.0)))
        assert_true("attention", q, k, v, tolerance=tolerance)

    def test_a_later_key_of_any_size_changes_nothing(self):
        q, k, v = (draw(1, 70, 2, 16, seed=i).detach() for i in range(3))
        before = cpu.attention(q, k, v)[:, :40]
        k[:, 40:], v[:, 40:] = 1e30, 1e30
        assert torch.equal(cpu.attention(q, k, v)[:, :40], before)

    def test_nothing(self):
        q, k = draw(0, 5, 2, 16), draw(0, 5, 1, 16)
        out, *grads = run(cpu.attention, [q, k, k])
        assert out.shape == q.shape and grads[1].shape == k.shape

    def test_views_of_one_product(self):
        fused = draw(2, 70, 12 * 16).unflatten(-1, (12, 16))
        assert_true("attention", fused[:, :, :8], fused[:, :, 8:10], fused[:, :, 10:])

    def test_strided_and_misaligned(self):
        q, k, v = (draw(2, 3, 40, 16, seed=i).transpose(1, 2) for i in range(3))
        assert_true("attention", q, k, v)
        wide = draw(1, 40, 3, 33)
        assert_true("attention", wide[..., 1:17], wide[..., 17:], wide[..., :32:2])

    @pytest.mark.parametrize(
        ("length", "lengths"),
        [(1, [1]), (100, [1, 99]), (100, [32, 32, 36]), (300, [7, 150, 1, 30, 112]), (200, [1] * 200)],
    )
    def test_inside_documents(self, length, lengths):
        starts = torch.tensor(
            [start for start, n in zip(starts_of(lengths), lengths, strict=True) for _ in range(n)]
        )
        starts = torch.stack((starts, starts // 2))  # the second row: windows that begin anywhere
        q, k, v = draw(2, length, 4, 16), draw(2, length, 2, 16), draw(2, length, 2, 16, seed=1)
        assert_true("attention", q, k, v, starts)

    @pytest.mark.parametrize("size", [1, 3, 40])
    def test_along_the_branches_of_a_forest(self, size):
        parents = forest(333, size)
        q, k, v = (draw(1, 333, heads, 16, seed=i).detach() for i, heads in enumerate((4, 2, 2)))
        expected = torch.empty_like(q, dtype=torch.float64)
        for t in range(333):
            path = [t]
            while parents[path[-1]] >= 0:
                path.append(parents[path[-1]])
            path.reverse()
            branch = reference.attention(*(x[:, path].double() for x in (q, k, v)))
            expected[:, t] = branch[:, -1]
        got = cpu.tree_attention(q, k, v, ends_of(parents)[None])
        assert (got - expected).square().mean().sqrt() <= TOLERANCE * expected.square().mean().sqrt()

    def test_scores_far_below_zero(self):
        # All of them at about -14,000 to -29,000: where they are equal, what is seen is the mean.
        q, v = torch.full((1, 5, 1, 4), -100.0), draw(1, 5, 1, 4).detach()
        k = torch.full((1, 5, 1, 4), 100.0)
        expected = v.double().cumsum(1) / torch.arange(1, 6)[:, None, None]
        torch.testing.assert_close(cpu.attention(q, k, v).double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(cpu.attention(2 * q, k, v).double(), expected, rtol=1e-6, atol=1e-6)

    def test_exp2(self):
        # A second position's weight of itself, where the first key's score is 0 and its own x far below: 2^x.
        q = torch.stack((torch.zeros(20_000), torch.linspace(-80, -20, 20_000)), 1)[..., None, None]
        k, v = torch.tensor([0.0, 1.0]).expand(20_000, 2)[..., None, None], torch.tensor([0.0, 1.0])
        x = q[:, 1, 0, 0] * torch.tensor(1.4426950408889634)  # in fp32, as the op has it
        got = cpu.attention(q, k, v.expand(20_000, 2)[..., None, None])[:, 1, 0, 0]
        error = (got.double() / torch.exp2(x.double()) - 1).abs().max()
        assert error <= 1.7e-7, error

    def test_no_tile_of_another_document_is_read(self):
        # Whatever reads the first document's numbers becomes NaN, even if it multiplies them by 0.
        q, k, v = (draw(1, 256, heads, 16, seed=heads) for heads in (4, 2, 2))
        for x in (q, k, v):
            x.data[:, :128] = float("nan")
        starts = torch.arange(256)[None] // 128 * 128
        results = run(cpu.attention, [q, k, v, starts])
        alone = run(cpu.attention, [x[:, 128:].detach().requires_grad_() for x in (q, k, v)])
        torch.testing.assert_close(results[0][:, 128:], alone[0])
        assert all(torch.isfinite(x[:, 128:]).all() for x in results)

    def test_tiles_are_masked_where_they_must_be(self):
        def tiles(starts, length=1024):
            ends, counts = None, torch.zeros(3, dtype=torch.int64)
            if starts is not None:
                ends = torch.searchsorted(starts, torch.arange(length), right=True).int()
            _cpu.attention_tiles(
                shape=(1, length, 1, 1, 16),
                ends=0 if ends is None else ends.data_ptr(),
                counts=counts.data_ptr(),
            )
            return counts.tolist()

        unmasked, causal, tree = tiles(None)
        panels = causal  # one each: the last
        assert panels in (1024 // 8, 1024 // 16, 1024 // 32) and unmasked > panels and tree == 0
        # Four documents, each a whole number of panels: as many tiles as four sequences have.
        alone = tiles(None, 256)
        assert tiles(torch.arange(1024) // 256 * 256) == [4 * n for n in alone]
        # Elsewhere the mask of ends is needed where a document begins or ends, and in no other tile.
        unmasked, _, tree = tiles(torch.tensor([0] * 500 + [500] * 524))
        assert 0 < tree <= 2 * panels and unmasked > 0

    def test_gradient_of_a_sum(self):
        # Its gradient arrives as one number expanded to the output's shape.
        q, k, v = (draw(1, 40, 2, 16, seed=i) for i in range(3))
        got = torch.autograd.grad(cpu.attention(q, k, v).sum(), (q, k, v))
        expected = torch.autograd.grad(reference.attention(q, k, v).sum(), (q, k, v))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("instruction_set")
class TestQKVRope:
    @pytest.mark.parametrize(
        ("shape", "heads", "dim"),
        [((1, 1, 7), [1, 1, 1], 2), ((2, 17, 100), [8, 2, 2], 16), ((1, 70, 33), [3, 1, 1], 10)],
    )
    def test_odd_shapes(self, shape, heads, dim):
        weight = draw(sum(heads) * dim, shape[-1], seed=1)
        assert_true("qkv_rope", draw(*shape), weight, *angles(shape[1], dim // 2), heads)

    def test_strided_and_misaligned(self):
        wide, weight = draw(2, 9, 202), draw(101, 12 * 16).T
        assert_true("qkv_rope", wide[..., 1:102], weight, *angles(9, 8), [8, 2, 2])
        assert_true("qkv_rope", wide[..., ::2], weight, *angles(9, 8), [8, 2, 2])

    def test_not_under_autocast(self):
        inputs = draw(1, 3, 8), draw(12, 8), *angles(3, 2), [1, 1, 1]
        assert kernels.qkv_rope.unsupported_reason("cpu", *inputs) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in kernels.qkv_rope.unsupported_reason("cpu", *inputs)


@pytest.mark.usefixtures("instruction_set")
class TestSwiGLU:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7, 516), (2, 33, 100), (64,)])
    def test_odd_shapes(self, shape):
        assert_true("swiglu", draw(*shape, scale=3), draw(*shape, seed=1))

    @pytest.mark.parametrize("scale", [1e-6, 1e4, 1e30])
    def test_tiny_and_huge(self, scale):
        assert_true("swiglu", draw(40, 50, scale=scale), draw(40, 50, seed=1))

    def test_halves_of_one_product(self):
        fused = draw(2, 9, 2 * 101)
        gate, up = fused.split(101, -1)
        assert_true("swiglu", gate, up)
        results = torch.autograd.grad(cpu.swiglu(gate, up).sum(), (gate, up))
        assert results[1].data_ptr() - results[0].data_ptr() == 101 * 4


@pytest.mark.usefixtures("instruction_set")
class TestMLP:
    @pytest.mark.parametrize(
        "shape", [(1, 16, 5), (7, 100, 33), (300, 128, 516), (129, 7, 65), (2100, 20, 9), (70, 257, 300)]
    )
    def test_odd_shapes(self, shape):
        tokens, dim, width = shape
        weights = draw(width, dim, seed=1), draw(width, dim, seed=2), draw(dim, width, seed=3)
        assert_true("mlp", draw(tokens, dim), *weights)

    def test_used_where_it_is_faster(self):
        def weights(dim):
            return draw(50, dim, seed=1), draw(50, dim, seed=2), draw(dim, 50, seed=3)

        x = draw(2, 9, 256)
        assert torch.equal(kernels.mlp(x, *weights(256), backend="cpu"), cpu.mlp(x, *weights(256)))
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in kernels.mlp.unsupported_reason("cpu", x, *weights(256))

    def test_strided_and_misaligned(self):
        x, weights = (
            draw(2, 9, 202),
            (draw(30, 101, seed=1), draw(101, 30, seed=2).T, draw(30, 101, seed=3).T),
        )
        assert_true("mlp", x[..., 1:102], *weights)
        assert_true("mlp", x[..., ::2].transpose(0, 1), *weights)

    def test_without_gradients(self):
        inputs = CASES["mlp"]()
        expected = cpu.mlp(*inputs)
        with torch.no_grad():
            assert torch.equal(cpu.mlp(*inputs), expected)


@pytest.mark.usefixtures("instruction_set")
class TestLinearCrossEntropy:
    @pytest.mark.parametrize(
        "shape", [(1, 16, 5), (17, 100, 1003), (33, 64, 128), (300, 128, 257), (600, 7, 130)]
    )
    def test_odd_shapes_and_ignored_targets(self, shape):
        tokens, dim, vocab = shape
        targets = torch.arange(tokens) * 37 % vocab
        hidden, weight = draw(tokens, dim), draw(vocab, dim, scale=0.3, seed=1)
        assert_true("linear_cross_entropy", hidden, weight, targets)
        targets[1::3] = -100
        assert_true("linear_cross_entropy", hidden, weight, targets)

    @pytest.mark.parametrize(("scale", "tolerance"), [(1e-6, TOLERANCE), (300.0, 1e-3)])
    def test_tiny_and_huge_logits(self, scale, tolerance):
        # As for attention: logits of about 10,000 carry errors of 1e-3 in fp32.
        hidden, weight = draw(50, 64, scale=scale), draw(1003, 64, seed=1)
        assert_true("linear_cross_entropy", hidden, weight, torch.arange(50), tolerance=tolerance)

    def test_an_impossible_target_costs_its_logits_difference(self):
        hidden, weight = torch.eye(4, requires_grad=True), torch.diag(torch.tensor([500.0, 500, 500, 500]))
        assert cpu.linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 0])).item() == 500.0

    def test_all_targets_ignored(self):
        hidden, weight = draw(5, 16), draw(30, 16)
        loss = cpu.linear_cross_entropy(hidden, weight, torch.full((5,), 7), ignore_index=7)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0 and not grads[0].any() and not grads[1].any()

    def test_no_tokens(self):
        hidden, weight = draw(0, 16), draw(30, 16)
        loss = cpu.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
        assert loss == 0 and not torch.autograd.grad(loss, weight)[0].any()

    @pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
    def test_only_the_wanted_gradients(self, wanted):
        hidden, weight = draw(40, 32), draw(300, 32, seed=1)
        whole = run(cpu.linear_cross_entropy, [hidden, weight, torch.arange(40)])
        some = [x.detach().requires_grad_(w) for x, w in zip((hidden, weight), wanted, strict=True)]
        loss = cpu.linear_cross_entropy(*some, torch.arange(40))
        assert torch.equal(loss, whole[0]) and loss.requires_grad == any(wanted)
        if any(wanted):
            (grad,) = torch.autograd.grad(3 * loss, [x for x in some if x.requires_grad])
            assert torch.equal(grad, whole[1 + wanted.index(True)])

    def test_without_grad_mode(self, monkeypatch):
        hidden, weight = draw(40, 32), draw(300, 32, seed=1)
        loss = cpu.linear_cross_entropy(hidden, weight, torch.arange(40))
        assert loss.requires_grad
        with torch.no_grad():
            again = cpu.linear_cross_entropy(hidden, weight, torch.arange(40))
        assert torch.equal(loss, again) and not again.requires_grad

    def test_strided_and_misaligned(self):
        wide, targets = draw(9, 201), torch.arange(18)[::2]
        assert_true("linear_cross_entropy", wide[:, 1:101], draw(50, 202)[:, 3:103], targets)
        assert_true("linear_cross_entropy", wide[:, ::2], draw(101, 50).T, targets)


@pytest.mark.usefixtures("instruction_set")
class TestLogsumexpArgmax:
    @pytest.mark.parametrize(
        "shape", [(0, 8, 5), (1, 16, 5), (17, 100, 1003), (300, 128, 257), (600, 7, 130)]
    )
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
    def test_odd_shapes(self, shape, scale):
        tokens, dim, vocab = shape
        hidden, weight = draw(tokens, dim, scale=scale), draw(vocab, dim, seed=1)
        logits = (hidden.double() @ weight.double().T).detach()
        logsumexp, argmax = cpu.logsumexp_argmax(hidden, weight)
        torch.testing.assert_close(logsumexp.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
        assert torch.equal(argmax, logits.argmax(-1)) and not logsumexp.requires_grad

    def test_the_first_of_equals(self):
        hidden, weight = torch.ones(40, 4), torch.zeros(300, 4)
        weight[[7, 8, 290]] = 1.0
        assert (cpu.logsumexp_argmax(hidden, weight)[1] == 7).all()
        weight[[7, 8]] = 0.0
        assert (cpu.logsumexp_argmax(hidden, weight)[1] == 290).all()

    def test_strided_and_misaligned(self):
        hidden, weight = draw(9, 201)[:, 1:101], draw(100, 50).T
        expected = (hidden @ weight.T).detach().logsumexp(-1)
        torch.testing.assert_close(cpu.logsumexp_argmax(hidden, weight)[0], expected)


@pytest.mark.usefixtures("instruction_set")
class TestLinear:
    @pytest.mark.parametrize(
        "shape", [(1, 16, 5), (31, 100, 33), (32, 1, 1), (129, 3, 33), (513, 100, 600), (1023, 256, 768)]
    )
    def test_outputs_and_gradients(self, shape):
        tokens, dim, rows = shape
        assert_true("linear", draw(1, tokens, dim), draw(rows, dim, seed=1))

    def test_strided_and_misaligned(self):
        assert_true("linear", draw(50, 203)[:, 1:102], draw(101, 60).T)
        assert_true("linear", draw(40, 7, 30).transpose(0, 1), draw(60, 30))


@pytest.mark.usefixtures("instruction_set")
class TestWithoutGradients:
    @pytest.mark.parametrize(
        ("tokens", "dim", "rows"),
        [(1, 16, 5), (3, 101, 600), (14, 7, 70), (15, 256, 130), (16, 9, 3), (70, 100, 33), (300, 7, 130)],
    )
    def test_rms_norm_linear(self, tokens, dim, rows):
        x, norm, weight = draw(1, tokens, dim, scale=3), draw(dim, seed=1), draw(rows, dim, seed=2)
        doubles = (t.detach().double() for t in (x, norm, weight))
        expected = (lambda x, norm, weight: reference.rms_norm(x, norm, 1e-5) @ weight.T)(*doubles)
        assert_close(cpu.rms_norm_linear(x, norm, 1e-5, [weight]), expected)

    @pytest.mark.parametrize(
        ("tokens", "dim", "inner", "width"),
        [
            (1, 16, 8, 5),
            (2, 130, 100, 516),
            (7, 5, 3, 70),
            (15, 256, 64, 33),
            (70, 100, 130, 33),
            (300, 7, 20, 65),
        ],
    )
    def test_fused_post_attention(self, tokens, dim, inner, width):
        inputs = [
            draw(1, tokens, dim, scale=3),
            draw(1, tokens, inner),
            draw(dim, inner, seed=1),
            draw(dim, seed=2),
            draw(width, dim, seed=3),
            draw(width, dim, seed=4),
            draw(dim, width, seed=5),
        ]
        residual, attn_out, weight, norm, *mlp = (x.detach().double() for x in inputs)
        total = residual + attn_out @ weight.T
        expected = total + composed_mlp(reference.rms_norm(total, norm, 1e-5), *mlp)
        assert_close(cpu.fused_post_attention(*inputs[:4], 1e-5, *inputs[4:]), expected)

    def test_strided_and_misaligned(self):
        wide, norm, weight = draw(2, 20, 202), draw(101), draw(101, 30).T
        expected = reference.rms_norm(wide[..., ::2], norm, 1e-5) @ weight.T
        assert_close(cpu.rms_norm_linear(wide[..., ::2], norm, 1e-5, [weight]), expected.double())
        assert_close(
            cpu.rms_norm_linear(wide[..., :101].transpose(0, 1), norm, 1e-5, [weight]).transpose(0, 1),
            (reference.rms_norm(wide[..., :101], norm, 1e-5) @ weight.T).double(),
        )

    @pytest.mark.parametrize("tokens", [5, 40])
    def test_rows_with_gaps(self, tokens):
        residual, attn_out, norm, weight = draw(tokens, 103), draw(tokens, 45), draw(100), draw(30, 100)
        layer = draw(100, 40), norm, 1e-5, weight, draw(30, 100, seed=1), draw(100, 30)
        apart = residual[:, 1:101], attn_out[:, 3:43]
        dense = (x.contiguous() for x in apart)
        assert torch.equal(cpu.fused_post_attention(*apart, *layer), cpu.fused_post_attention(*dense, *layer))
        product = cpu.rms_norm_linear(apart[0], norm, 1e-5, [weight])
        assert torch.equal(product, cpu.rms_norm_linear(apart[0].contiguous(), norm, 1e-5, [weight]))

    @pytest.mark.parametrize("tokens", [5, 15, 16, 40])
    def test_several_weights_lie_side_by_side(self, tokens):
        x, norm, *weights = draw(tokens, 50), draw(50), *(draw(rows, 50, seed=rows) for rows in (33, 1, 66))
        alone = [cpu.rms_norm_linear(x, norm, 1e-5, [weight]) for weight in weights]
        assert torch.equal(cpu.rms_norm_linear(x, norm, 1e-5, weights), torch.cat(alone, -1))

    def test_few_tokens_on_any_number_of_threads(self, two_threads):
        x, attn_out, norm, weight = draw(3, 100), draw(3, 40), draw(100), draw(700, 100)
        layer = draw(100, 40), norm, 1e-5, weight, draw(700, 100, seed=1), draw(100, 700)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (cpu.rms_norm_linear(x, norm, 1e-5, [weight]), cpu.fused_post_attention(x, attn_out, *layer))
            )
        assert_equal(found[0], found[1])
        assert_equal(found[0], found[2])

    def test_few_tokens_do_not_see_one_another(self):
        x, attn_out, norm, weight = draw(7, 100), draw(7, 40), draw(100), draw(300, 100)
        layer = draw(100, 40), norm, 1e-5, weight, draw(300, 100, seed=1), draw(100, 300)

        def three(x, attn_out):
            product = cpu.rms_norm_linear(x, norm, 1e-5, [weight])
            with torch.no_grad():
                return (
                    product,
                    cpu.fused_post_attention(x, attn_out, *layer),
                    kernels.linear(x, weight, backend="cpu"),
                )

        together, alone = three(x, attn_out), [three(x[i : i + 1], attn_out[i : i + 1]) for i in range(7)]
        for one, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(one, torch.cat(parts))
        assert_close(together[2], (x.double() @ weight.double().T).detach())

    @pytest.mark.parametrize("rows", [None, [3], list(range(40))])
    @pytest.mark.parametrize("tokens", [5, 45])
    def test_a_model_gives_what_it_gives_with_gradients(self, tokens, rows):
        torch.manual_seed(0)
        net = Ant(ModelConfig(97, 32, 44, 3, 4, 2, max_position_embeddings=64))
        ids = torch.arange(2 * tokens).reshape(2, tokens) % 97
        rows = None if rows is None else torch.tensor(rows).clamp(max=tokens - 1)
        args = ids, net.cos[:tokens], net.sin[:tokens], None, None, rows
        expected = net.model(*args)
        with torch.no_grad():
            got = net.model(*args)
        assert expected.requires_grad and not got.requires_grad
        torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)


CASES = {
    "rms_norm": lambda: [draw(3, 100, 100), draw(100)],
    "rope": lambda: [draw(2, 150, 4, 16), draw(2, 150, 2, 16), *angles(150, 8)],
    "attention": lambda: [draw(2, 150, 4, 16), draw(2, 150, 2, 16), draw(2, 150, 2, 16, seed=1)],
    "qkv_rope": lambda: [draw(2, 150, 24), draw(8 * 4, 24), *angles(150, 4), [2, 1, 1]],
    "linear": lambda: [draw(2, 150, 24), draw(40, 24)],
    "swiglu": lambda: [draw(2, 80, 100), draw(2, 80, 100, seed=1)],
    "mlp": lambda: [draw(2, 300, 24), draw(40, 24), draw(40, 24, seed=1), draw(24, 40)],
    "mlp of many channels": lambda: [
        draw(2, 150, 260),
        draw(300, 260),
        draw(300, 260, seed=1),
        draw(260, 300),
    ],
    "linear of few tokens": lambda: [draw(2, 9, 24), draw(40, 24)],
    "linear_cross_entropy": lambda: [draw(300, 48), draw(500, 48), torch.arange(300)],
}


def op_of(name):
    return getattr(cpu, name.partition(" ")[0])


def assert_equal(results, expected):
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_the_number_of_threads(name, two_threads):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(op_of(name), CASES[name]()))
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


@pytest.mark.parametrize("rows", [3, 3_000])  # in torch's memory, and in ours
def test_results_may_be_changed_in_place(rows):
    x, weight = draw(1, rows, 100), draw(100)
    y = cpu.rms_norm(x, weight)
    expected = torch.autograd.grad((3 * y).sum(), x, retain_graph=True)
    assert_equal(torch.autograd.grad(y.mul_(3).sum(), x), expected)


def test_nothing_of_nothing():
    assert cpu.linear(torch.zeros(2, 0, 5), torch.zeros(7, 5)).shape == (2, 0, 7)
    q, k, v = cpu.qkv_rope(torch.zeros(2, 0, 5), torch.zeros(12, 5), *angles(0, 2), [1, 1, 1])
    assert q.shape == k.shape == v.shape == (2, 0, 1, 4)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer ends without memory")
@pytest.mark.parametrize("openmp", [True, False])
def test_an_error_in_a_thread_is_an_error(openmp):
    code = (
        "import resource, torch\n"
        "from ant5m import _cpu\n"
        "from ant5m.kernels import cpu\n"
        "torch.set_num_threads(2)\n"
        f"{'' if openmp else '_cpu.use_openmp(0)'}\n"
        "inputs = torch.zeros(1, 64, 1 << 18), torch.ones(1 << 18), 1e-5, [torch.zeros(3, 1 << 18)]\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (96 << 20), -1))\n"
        "try:\n    cpu.rms_norm_linear(*inputs)\n"
        "except MemoryError:\n    print('caught')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "caught", done.stderr[-500:]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("name", CASES)
def test_threads_of_its_own(name, two_threads):
    expected = run(op_of(name), CASES[name]())
    _cpu.use_openmp(0)
    try:
        assert_equal(run(op_of(name), CASES[name]()), expected)
    finally:
        cpu.share_threads()


@pytest.mark.usefixtures("instruction_set")
def test_in_a_forked_child(two_threads, monkeypatch):
    # The parent's pool has run; its threads do not exist in the child. There torch's own loops over many
    # numbers, such as those of nan_filled, would wait for them.
    monkeypatch.undo()

    def results(name, inputs, grads):
        out = op_of(name)(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
        grads = grads or [torch.ones_like(o) for o in outs]
        return grads, [
            x.numpy(force=True).tobytes() for x in (*outs, *torch.autograd.grad(outs, wanted, grads))
        ]

    cases = [(name, make()) for name, make in CASES.items()]
    expected = [results(*case, None) for case in cases]

    def child():
        for case, (grads, before) in zip(cases, expected, strict=True):
            assert results(*case, grads)[1] == before, case[0]

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


def test_gradients_of_only_some_inputs():
    q, k, v = CASES["attention"]()
    whole = run(cpu.attention, [q, k, v])
    assert_equal(run(cpu.attention, [q.detach(), k, v.detach()]), [whole[0], whole[2]])
    gate, up = CASES["swiglu"]()
    whole = run(cpu.swiglu, [gate, up])
    assert_equal(run(cpu.swiglu, [gate.detach(), up]), [whole[0], whole[2]])
    x, weight = CASES["rms_norm"]()
    whole = run(cpu.rms_norm, [x, weight])
    assert_equal(run(cpu.rms_norm, [x, weight.detach()]), whole[:2])


def test_it_is_what_auto_picks():
    table = {name: backends["cpu"] for name, backends in kernels.available().items()}
    assert {name for name, reason in table.items() if reason == "ready"} == set(cpu.IMPLEMENTATIONS)
    q, k, v = CASES["attention"]()
    assert torch.equal(kernels.attention(q, k, v, backend="auto"), cpu.attention(q, k, v))


def test_what_it_cannot_run_says_why():
    assert "fp32" in cpu.unsupported_reason([torch.zeros(2, dtype=torch.float64)])
    assert "meta" in cpu.unsupported_reason([torch.zeros(2, device="meta")])


@pytest.mark.parametrize("target", [-1, 30])
def test_a_target_outside_the_vocabulary(target):
    with pytest.raises(IndexError, match=str(target)):
        cpu.linear_cross_entropy(torch.zeros(2, 4), torch.zeros(30, 4), torch.tensor([3, target]))


@pytest.fixture(params=[name for name in _cpu.instruction_sets() if "bf16" in name])
def bf16_products(request):
    """On a processor without bf16 the emulation alone."""
    best = _cpu.instruction_set()
    assert _cpu.use(request.param) and cpu.multiplies_bf16()
    with cpu.bf16_products():
        yield
    _cpu.use(best)


@pytest.mark.usefixtures("bf16_products")
class TestBf16Products:
    @pytest.mark.parametrize(
        "shape", [(2, 17, 3, 1, 9), (2, 77, 2, 2, 20), (1, 1023, 8, 2, 16), (1, 200, 4, 4, 64)]
    )
    def test_attention(self, shape):
        batch, length, heads, kv, dim = shape
        inputs = (draw(batch, length, n, dim, seed=n * i) for i, n in enumerate((heads, kv, kv)))
        assert_true("attention", *inputs, tolerance=BF16_TOLERANCE)

    @pytest.mark.parametrize("lengths", [[5, 30, 1, 64], [33, 66, 1]])
    def test_attention_inside_documents(self, lengths):
        starts = torch.repeat_interleave(
            torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(lengths)
        ).expand(2, -1)
        inputs = (draw(2, sum(lengths), n, 16, seed=n * i) for i, n in enumerate((4, 2, 2)))
        assert_true("attention", *inputs, starts, tolerance=BF16_TOLERANCE)

    @pytest.mark.parametrize(
        "shape", [(1, 16, 5), (7, 100, 33), (300, 128, 516), (129, 7, 65), (2100, 20, 9), (70, 257, 300)]
    )
    def test_mlp(self, shape):
        tokens, dim, width = shape
        weights = draw(width, dim, scale=0.2), draw(width, dim, scale=0.2, seed=1), draw(dim, width, seed=2)
        assert_true("mlp", draw(tokens, dim), *weights, tolerance=2 * BF16_TOLERANCE)

    @pytest.mark.parametrize(
        "shape", [(1, 16, 5), (17, 100, 1003), (33, 64, 128), (300, 128, 257), (600, 7, 130)]
    )
    def test_linear_cross_entropy(self, shape):
        tokens, dim, vocab = shape
        targets = torch.arange(tokens) % vocab
        targets[3::5] = -100
        inputs = draw(tokens, dim), draw(vocab, dim, scale=0.3, seed=1), targets
        assert_true("linear_cross_entropy", *inputs, tolerance=BF16_TOLERANCE)

    def test_gradients_of_attention_keep_rows_that_sum_to_zero(self):
        # The first position sees itself alone, whatever its score: the gradient of its query is 0.
        inputs = draw(2, 1, 4, 16), draw(2, 1, 2, 16, seed=1), draw(2, 1, 2, 16, seed=2)
        _, *gradients = run(cpu.attention, inputs)
        assert max(gradients[0].abs().max(), gradients[1].abs().max()) < 1e-5
        assert_true(
            "attention", *(draw(2, 64, n, 16, seed=n * i) for i, n in enumerate((4, 2, 2))), tolerance=5e-3
        )

    def test_qkv_rope(self):
        inputs = draw(2, 17, 100), draw(12 * 16, 100, seed=1), *angles(17, 8), [8, 2, 2]
        assert_true("qkv_rope", *inputs, tolerance=BF16_TOLERANCE)

    @pytest.mark.parametrize(
        "shape", [(1, 16, 5), (17, 35, 43), (1023, 256, 768), (513, 100, 600), (129, 3, 33)]
    )
    def test_linear_of_numbers_that_bf16_has_is_exact(self, shape):
        tokens, dim, rows = shape
        x, weight, grad = (
            draw(*size).detach().bfloat16().float() for size in ((tokens, dim), (rows, dim), (tokens, rows))
        )
        x, weight = x.requires_grad_(), weight.requires_grad_()
        out = cpu.linear(x, weight)
        results = out, *torch.autograd.grad(out, (x, weight), grad)
        x, weight, grad = x.double(), weight.double(), grad.double()
        for got, expected in zip(results, (x @ weight.T, grad @ weight, grad.T @ x), strict=True):
            error = (got - expected).square().mean().sqrt()
            assert got.shape == expected.shape and error <= TOLERANCE * expected.square().mean().sqrt()

    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_no_worse_than_eager_pytorch_in_bf16(self, scale):
        for length in (1, 2, 70):
            accuracy.check_attention(cpu.attention, (2, length, 4, 16), 2, torch.bfloat16)
        accuracy.check_head(cpu.linear_cross_entropy, 70, 100, 257, torch.bfloat16, scale)

    def test_strided_and_misaligned(self):
        wide = draw(50, 203)
        targets = torch.arange(50)
        assert_true("linear_cross_entropy", wide[:, ::2], draw(102, 60).T, targets, tolerance=BF16_TOLERANCE)
        assert_true("linear", wide[:, 1:102], draw(101, 60, seed=1).T, tolerance=BF16_TOLERANCE)
        q = draw(2, 40, 4, 16).transpose(0, 1).contiguous().transpose(0, 1)
        k, v = draw(2, 40, 2, 33, seed=1)[..., 1:].split(16, -1)
        assert_true("attention", q, k, v, tolerance=BF16_TOLERANCE)

    @pytest.mark.parametrize("name", CASES)
    def test_the_number_of_threads_does_not_matter(self, name, two_threads):
        alone = run(op_of(name), CASES[name]())
        torch.set_num_threads(1)
        assert_equal(run(op_of(name), CASES[name]()), alone)

    @pytest.mark.parametrize("width", [32, 320])  # the wide one has no MLP in one piece
    def test_a_model_leaves_no_product_to_torch(self, width, monkeypatch):
        torch.manual_seed(0)
        net = Ant(ModelConfig(97, width, 44, 2, 4, 2, max_position_embeddings=24))
        tokens, parameters = torch.arange(48).reshape(2, 24) % 97, list(net.parameters())
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", None)
            loss = net(tokens, tokens.roll(-1))
            gradients = torch.autograd.grad(loss, parameters)
        bf16.enabled.set(False)
        exact = net(tokens, tokens.roll(-1))
        assert 0 < abs(loss - exact) < 1e-3
        for got, expected in zip(gradients, torch.autograd.grad(exact, parameters), strict=True):
            assert (got - expected).square().mean().sqrt() <= 2e-2 * expected.square().mean().sqrt()

    @pytest.mark.parametrize("name", ["attention", "linear_cross_entropy", "mlp"])
    def test_bf16_tensors_are_multiplied_as_they_are(self, name):
        floats = [x.detach().bfloat16() if x.is_floating_point() else x for x in CASES[name]()]
        wide = [x.float().requires_grad_() if x.is_floating_point() else x for x in floats]
        op = getattr(cpu, name)
        expected = op(*wide)
        bf16.enabled.set(False)
        got = op(*floats)
        assert torch.equal(got, expected.to(got.dtype)) and not torch.equal(got, op(*wide).to(got.dtype))

    @pytest.mark.parametrize("name", ["attention", "linear_cross_entropy", "mlp"])
    def test_fp32_where_no_gradient_is_wanted(self, name):
        inputs = CASES[name]()
        with torch.no_grad():
            got = op_of(name)(*inputs)
        trained = op_of(name)(*inputs)
        bf16.enabled.set(False)
        assert torch.equal(got, op_of(name)(*inputs)) and not torch.equal(got, trained)


def test_other_instruction_sets_multiply_fp32():
    best = _cpu.instruction_set()
    try:
        assert _cpu.use("portable") and not cpu.multiplies_bf16()
        with cpu.bf16_products():
            assert_true("mlp", draw(70, 20), draw(33, 20), draw(33, 20, seed=1), draw(20, 33))
    finally:
        _cpu.use(best)


BF16 = {
    "rms_norm": lambda: [draw(3, 5, 20), draw(20, seed=1), 1e-5, draw(3, 5, 20, seed=2)],
    "rope": lambda: [draw(2, 7, 4, 16), draw(2, 7, 2, 16), *angles(7, 8)],
    "attention": lambda: [draw(2, 19, 4, 16), draw(2, 19, 2, 16, seed=1), draw(2, 19, 2, 16, seed=2)],
    "swiglu": lambda: [draw(3, 5, 20), draw(3, 5, 20, seed=1)],
    "linear_cross_entropy": lambda: [draw(9, 16), draw(33, 16, seed=1), torch.arange(9)],
}


@pytest.mark.parametrize("name", BF16)
def test_bf16_tensors(name):
    def halve(x):
        floats = isinstance(x, torch.Tensor) and x.requires_grad
        return x.detach().bfloat16().requires_grad_() if floats else x

    def widen(x):
        return x.detach().float().requires_grad_() if isinstance(x, torch.Tensor) and x.requires_grad else x

    inputs = [halve(x) for x in BF16[name]()]
    assert getattr(kernels, name).unsupported_reason("cpu", *inputs) is None
    results = run(getattr(cpu, name), inputs)
    truth = run(getattr(cpu, name), [widen(x) for x in inputs])
    for got, expected in zip(results, truth, strict=True):
        # What goes out is rounded, the gradient that comes in, too, and factors between two products.
        assert got.dtype == (torch.float32 if got.ndim == 0 else torch.bfloat16)
        assert (got - expected).square().mean().sqrt() <= 1e-2 * expected.square().mean().sqrt()


def test_a_model_under_bf16_autocast_runs_on_these_ops(monkeypatch):
    config = ModelConfig(97, 32, 44, 2, 4, 2, max_position_embeddings=24)
    torch.manual_seed(0)
    net, tokens = Ant(config), torch.arange(48).reshape(2, 24) % 97
    monkeypatch.setattr(dispatch, "_selected", "cpu")
    exact = net(tokens, tokens.roll(-1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(tokens, tokens.roll(-1))
    loss.backward()
    assert loss.dtype == torch.float32 and 0 < abs(loss - exact) < 1e-2
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
