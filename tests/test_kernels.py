"""The reference ops against the plainest formulas in float64, and the table that picks a backend."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.kernels import dispatch, reference, registry
from ant5m.kernels.tracing import constant_when_traced
from ant5m.kernels.tree_mask import TreeMask


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """Memory that an op asks for and does not write shows up as NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda x, **kw: poisoned(x.shape, dtype=kw.get("dtype", x.dtype))
    )


def draw(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def assert_same(op, truth, *inputs, tolerance=1e-10):
    """Outputs and every gradient of `op` and `truth` agree, by RMS error over RMS."""
    results = []
    for function in (op, truth):
        out = function(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        ramps = [torch.linspace(-1, 1 + i, o.numel(), dtype=o.dtype).view_as(o) for i, o in enumerate(outs)]
        loss = sum((o * ramp).sum() for o, ramp in zip(outs, ramps, strict=True))
        wanted = [x for x in inputs if x.requires_grad]
        results.append([*outs, *torch.autograd.grad(loss, wanted)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        error = (got - expected).square().mean().sqrt()
        assert error <= tolerance * expected.square().mean().sqrt() + 1e-12, (error, expected.shape)


@pytest.mark.parametrize("shape", [(1, 4), (3, 5, 128), (2, 7, 100)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape, with_residual):
    x, residual, weight = draw(*shape), draw(*shape, seed=1), draw(shape[-1])

    def truth(x, weight, *residual):
        total = x + residual[0] if residual else x
        y = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        return (y, total) if residual else y

    def op(x, weight, *residual):
        return kernels.rms_norm(x, weight, 1e-5, *residual, backend="reference")

    assert_same(op, truth, x, weight, *([residual] if with_residual else []))


@pytest.mark.parametrize("length, heads, kv, size", [(1, 8, 2, 16), (15, 4, 4, 64), (33, 3, 1, 6)])
def test_rope(length, heads, kv, size):
    q, k = draw(2, length, heads, size), draw(2, length, kv, size)
    angle = torch.rand(length, size // 2, dtype=torch.float64)

    def truth(q, k):
        cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))

        def rotate(x):
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        return rotate(q), rotate(k)

    assert_same(lambda q, k: kernels.rope(q, k, angle.cos(), angle.sin(), backend="reference"), truth, q, k)


@pytest.mark.parametrize("length", [1, 15, 130])
@pytest.mark.parametrize("heads, kv, size", [(8, 2, 16), (4, 4, 64), (6, 2, 32), (3, 1, 128)])
def test_attention(length, heads, kv, size):
    q, k, v = draw(2, length, heads, size), draw(2, length, kv, size), draw(2, length, kv, size, seed=1)

    def truth(q, k, v):
        k, v = (x.repeat_interleave(heads // kv, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    assert_same(lambda *x: kernels.attention(*x, backend="reference"), truth, q, k, v)


def test_attention_inside_documents():
    """Each document by itself, whatever else lies in its row."""
    q, k, v = draw(2, 9, 4, 8), draw(2, 9, 2, 8), draw(2, 9, 2, 8, seed=1)
    starts = torch.tensor([[0, 0, 0, 3, 3, 3, 3, 7, 7], [0] * 8 + [8]])

    def truth(*qkv):
        pieces = [(0, 0, 3), (0, 3, 7), (0, 7, 9), (1, 0, 8), (1, 8, 9)]
        mixed = [kernels.attention(*(x[row : row + 1, a:b] for x in qkv)) for row, a, b in pieces]
        return torch.cat((torch.cat(mixed[:3], 1), torch.cat(mixed[3:], 1)))

    assert_same(lambda *x: kernels.attention(*x, starts, backend="reference"), truth, q, k, v)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 516), (2, 3, 7)])
def test_swiglu(shape):
    gate, up = draw(*shape, scale=4), draw(*shape, seed=1)
    assert_same(lambda *x: kernels.swiglu(*x, backend="reference"), lambda g, u: F.silu(g) * u, gate, up)


@pytest.mark.parametrize("rows, size, vocab", [(1, 8, 5), (37, 16, 1_003), (64, 100, 257)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_linear_cross_entropy(rows, size, vocab, scale, monkeypatch):
    monkeypatch.setattr(
        reference, "HEAD_CHUNK_BYTES", 8 * vocab * 10
    )  # 10 rows a chunk: several, and an odd last
    hidden, weight = draw(rows, size, scale=scale), draw(vocab, size)
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0))
    targets[::5] = -100
    targets[0] = 3

    def truth(hidden, weight):
        return F.cross_entropy(hidden @ weight.T, targets)

    assert_same(
        lambda h, w: kernels.linear_cross_entropy(h, w, targets, backend="reference"), truth, hidden, weight
    )


def test_z_loss_is_in_the_gradient_alone(monkeypatch):
    monkeypatch.setattr(reference, "HEAD_CHUNK_BYTES", 8 * 50 * 10)  # several chunks
    hidden, weight = draw(37, 12, scale=2), draw(50, 12)
    targets = torch.arange(37)
    targets[::5] = -100

    def truth(hidden, weight):
        logits = hidden @ weight.T
        z = 0.1 * logits.logsumexp(-1).square()[targets != -100].mean()
        return F.cross_entropy(logits, targets) + z - z.detach()

    def ours(hidden, weight, z_loss=0.1):
        return kernels.linear_cross_entropy(hidden, weight, targets, z_loss=z_loss, backend="reference")

    assert_same(ours, truth, hidden, weight)
    assert ours(hidden, weight) == ours(hidden, weight, None)


def test_linear_cross_entropy_all_ignored():
    hidden, weight = draw(4, 8), draw(5, 8)
    loss = kernels.linear_cross_entropy(hidden, weight, torch.full((4,), -100), backend="reference")
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_linear_cross_entropy_without_gradient_equals_with():
    hidden, weight, targets = draw(9, 8).detach(), draw(50, 8).detach(), torch.arange(9)
    with torch.no_grad():
        alone = kernels.linear_cross_entropy(hidden, weight, targets, backend="reference")
    assert alone == kernels.linear_cross_entropy(
        hidden.requires_grad_(), weight, targets, backend="reference"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float64(dtype):
    """Under autocast the loss and the gradients come out in fp32 and within the rounding of the products."""
    hidden = draw(64, 32).float().detach().requires_grad_()
    weight = draw(500, 32, scale=0.3).float().detach().requires_grad_()
    targets = torch.arange(64)
    with torch.autocast("cpu", dtype):
        loss = kernels.linear_cross_entropy(hidden, weight, targets, backend="reference")
    loss.backward()
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets)
    truth = torch.autograd.grad(exact, (hidden, weight))
    assert loss.dtype == torch.float32 and abs(loss - exact) < 2e-2
    for got, expected in zip((hidden.grad, weight.grad), truth, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 1e-2 * expected.norm()


def test_norms_give_products_their_dtype_under_autocast():
    x, residual, weight = draw(3, 8).float(), draw(3, 8, seed=1).float(), draw(8).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, total = kernels.rms_norm(x.bfloat16(), weight, 1e-5, residual, backend="reference")
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    exact = kernels.rms_norm(x.bfloat16().float(), weight, 1e-5, residual, backend="reference")
    assert torch.equal(total, exact[1]) and torch.equal(y, exact[0].bfloat16())


def test_unknown_backend():
    with pytest.raises(UserError, match="no kernel backend 'fast'"):
        kernels.swiglu(torch.ones(1), torch.ones(1), backend="fast")
    with pytest.raises(UserError, match="no kernel backend"):
        kernels.select("fast")


def test_a_backend_asked_for_by_name_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr(kernels.registry.load("cpu"), "unsupported_reason", lambda tensors: "it is off")
    with pytest.raises(UserError, match="'cpu' cannot run swiglu: it is off"):
        kernels.swiglu(torch.ones(1), torch.ones(1), backend="cpu")
    assert kernels.swiglu(torch.ones(1), torch.ones(1)) > 0


def test_available_names_every_op_and_backend():
    table = kernels.available()
    assert set(table) == set(registry.OPS) > set(kernels.OPS)
    assert table["rope_packed"]["cpu"] == "it has no rope_packed"
    assert all(set(row) == set(kernels.BACKENDS) and row["reference"] == "ready" for row in table.values())


def test_the_mark_for_torch_compile_is_torchs_own():
    def ours(): ...

    def theirs(): ...

    constant_when_traced(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_a_forward_pass_does_not_import_the_compiler():
    code = (
        "import sys, torch; from ant5m.model.ant import Ant; from ant5m.model.config import ModelConfig;"
        "Ant(ModelConfig(97, 32, 44, 2, 4, 2))(torch.zeros(1, 5, dtype=torch.int64));"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_who_runs_an_op_is_decided_once_for_arguments_alike(monkeypatch):
    asked = []
    cpu, gate = registry.load("cpu"), torch.ones(2, 3)
    monkeypatch.setattr(cpu, "unsupported_reason", lambda tensors: asked.append(tensors[0].dtype))
    for _ in range(3):
        kernels.swiglu(gate, gate), kernels.swiglu(gate.bfloat16(), gate.bfloat16())
    assert asked == [torch.float32, torch.bfloat16]
    kernels.swiglu(gate[:1], gate[:1])
    with torch.no_grad():
        kernels.swiglu(gate, gate)
    with torch.autocast("cpu", torch.bfloat16):
        kernels.swiglu(gate, gate)
    kernels.swiglu(gate, gate, backend="cpu")
    assert len(asked) == 6
    kernels.restore({})
    kernels.swiglu(gate, gate)
    assert len(asked) == 7
    with pytest.raises(ValueError, match="do not fit"):
        kernels.swiglu(gate, gate[:1])


def test_choices_of_many_shapes_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(dispatch, "_MOST_CHOSEN", 4)
    for n in range(1, 12):
        kernels.swiglu(torch.ones(n), torch.ones(n))
    assert len(kernels.swiglu.chosen) <= 4


def test_a_tree_mask_of_no_rows_or_positions():
    for shape in ((0, 3), (2, 0)):
        mask = TreeMask(torch.zeros(shape, dtype=torch.int64))
        assert mask.biases(2, torch.zeros(1)) == [None]
