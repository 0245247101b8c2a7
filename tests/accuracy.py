"""How far an op of a backend is from the reference in float64: outputs and every gradient."""

import os

import pytest
import torch
import torch.nn.functional as F

from ant5m.kernels import reference
from ant5m.kernels.check import results as results_of
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import tensors_of, with_tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
big = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]

fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
# RMS error over RMS of the float64 result.
TOLERANCES = {
    "rms_norm": {fp32: 1e-5, fp16: 1e-3, bf16: 4e-3},
    "rope": {fp32: 1e-5, fp16: 1e-3, bf16: 4e-3},
    "swiglu": {fp32: 1e-5, fp16: 1e-3, bf16: 4e-3},
    "attention": {fp32: 1e-5, fp16: 5e-3, bf16: 2e-2},
    "linear_cross_entropy": {fp32: 1e-5, fp16: 5e-3, bf16: 2e-2},
    "mlp": {fp16: 2e-3, bf16: 1.6e-2},
}


def draw(*shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)


def results(op, inputs, dtype, layout=lambda x: x):
    """Outputs and gradients of `op` in `dtype` at `inputs`, each laid out in memory by `layout`."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    outs = op(*(layout(x) for x in leaves))
    outs = outs if isinstance(outs, tuple) else (outs,)
    # Of each output another, or gradients of outputs of one shape could be taken for one another.
    ramps = [
        torch.linspace(-1, 1 + i, o.numel(), device=DEVICE).view_as(o).to(o.dtype) for i, o in enumerate(outs)
    ]
    loss = sum((o * ramp).sum() for o, ramp in zip(outs, ramps, strict=True))
    return [*outs, *torch.autograd.grad(loss, leaves)]


def error(got, truth):
    assert got.shape == truth.shape
    return (
        (got.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-9)
    ).item()


class BeyondTolerance(AssertionError):
    """Off by more than the tolerance, and by no more than eager PyTorch is, give or take a fifth of it."""


def check(name, op, truth, inputs, dtype, eager=None, layout=lambda x: x):
    """The error of no output or gradient exceeds the tolerance, nor eager PyTorch's error by much."""
    inputs = [x.to(dtype) for x in inputs]
    tolerance = TOLERANCES[name][dtype]
    exact = results(truth, inputs, torch.float64)
    plain = results(eager or truth, inputs, dtype)
    found = [
        (error(got, right), error(same, right))
        for got, same, right in zip(results(op, inputs, dtype, layout), plain, exact, strict=True)
    ]
    for i, (off, usual) in enumerate(found):
        assert off <= usual + tolerance / 5, (name, i, off, usual)
    for i, (off, usual) in enumerate(found):
        if not off <= tolerance:
            raise BeyondTolerance(name, i, off, usual)


def check_rms_norm(op, shape, dtype, with_residual, layout=lambda x: x):
    inputs = [draw(*shape), draw(shape[-1]), *([draw(*shape, seed=1)] if with_residual else [])]
    check(
        "rms_norm",
        lambda x, weight, *residual: op(x, weight, 1e-5, *residual),
        lambda x, weight, *residual: reference.rms_norm(x, weight, 1e-5, *residual),
        inputs,
        dtype,
        layout=layout,
    )


def check_rope(op, shape, kv, dtype, layout=lambda x: x):
    length, size = shape[1], shape[3]
    angle = draw(length, size // 2).abs()
    cos, sin = angle.cos(), angle.sin()
    q, k = draw(*shape), draw(shape[0], length, kv, size)
    check(
        "rope",
        lambda q, k: op(q, k, cos, sin),
        lambda q, k: reference.rope(q, k, cos, sin),
        [q, k],
        dtype,
        None,
        layout,
    )


def check_rope_packed(op, shape, kv, dtype, layout=lambda x: x):
    batch, length, heads, size = shape
    angle = draw(length, size // 2).abs()
    cos, sin = angle.cos(), angle.sin()

    def expected(qkv):
        q, k, v = qkv.unflatten(-1, (-1, size)).split([heads, kv, kv], 2)
        return *reference.rope(q, k, cos, sin), v

    check(
        "rope",
        lambda qkv: tuple(layout(x) for x in op(qkv, cos, sin, [heads, kv, kv])),
        expected,
        [draw(batch, length, (heads + 2 * kv) * size)],
        dtype,
    )


def check_qk_norm_rope(op, packed, shape, kv, dtype, layout=lambda x: x):
    """`qk_norm_rope`, and `rope_packed` with norms, which has all gradients of its input in one piece."""
    batch, length, heads, size = shape
    angle = draw(length, size // 2).abs()
    angles = angle.cos(), angle.sin()
    counts = [heads, kv, kv]
    norms = [draw(size), draw(size, seed=1)]

    def expected(q, k, *norms):
        normed = (reference.rms_norm(x, norm, 1e-5) for x, norm in zip((q, k), norms, strict=True))
        return reference.rope(*normed, *angles)

    def expected_packed(qkv, *norms):
        q, k, v = qkv.unflatten(-1, (-1, size)).split(counts, 2)
        return *expected(q, k, *norms), v

    inputs = [draw(*shape), draw(batch, length, kv, size), *norms]

    def alone(q, k, *norms):
        return op(q, k, *angles, norms, 1e-5)

    check("rope", alone, expected, inputs, dtype, None, lambda x: x if x.ndim == 1 else layout(x))
    qkv = draw(batch, length, sum(counts) * size)

    def whole(qkv, *norms):
        return tuple(layout(x) for x in packed(qkv, *angles, counts, norms, 1e-5))

    check("rope", whole, expected_packed, [qkv, *norms], dtype)


def check_swiglu(op, shape, dtype, layout=lambda x: x):
    check("swiglu", op, reference.swiglu, [draw(*shape, scale=3), draw(*shape, seed=1)], dtype, None, layout)


def check_mlp(op, tokens, size, width, dtype, layout=lambda x: x):
    def expected(x, gate, up, down):
        return F.linear(reference.swiglu(F.linear(x, gate), F.linear(x, up)), down)

    weights = draw(width, size), draw(width, size, seed=1), draw(size, width, seed=2)
    inputs = [draw(*tokens, size), *(w * size**-0.5 for w in weights)]
    check("mlp", op, expected, inputs, dtype, layout=layout)


def check_attention(op, shape, kv, dtype, scale=1.0, layout=lambda x: x):
    """One tensor holds q, k and v, as in the model: the op sees views with gaps."""
    batch, length, heads, size = shape

    def parts(qkv):
        return (part.unflatten(-1, (-1, size)) for part in qkv.split([n * size for n in (heads, kv, kv)], -1))

    qkv = draw(batch, length, (heads + 2 * kv) * size)
    qkv[..., : heads * size] *= scale
    check(
        "attention",
        lambda x: op(*(layout(part) for part in parts(x))),
        lambda x: reference.attention(*parts(x)),
        [qkv],
        dtype,
    )


def check_head(op, rows, size, vocab, dtype, scale=1.0, layout=lambda x: x, z_loss=None):
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[::5] = -100
    targets[-1] = vocab - 1
    check(
        "linear_cross_entropy",
        lambda hidden, weight: op(hidden, weight, targets, z_loss=z_loss),
        lambda hidden, weight: plain_head(hidden, weight, targets, z_loss),
        [draw(rows, size, scale=scale), draw(vocab, size, scale=0.3)],
        dtype,
        lambda hidden, weight: reference.linear_cross_entropy(hidden, weight, targets, z_loss=z_loss),
        layout,
    )


def plain_head(hidden, weight, targets, z_loss=None):
    """Cross-entropy in float64, with z_loss * log(sum(exp))^2 in its gradient alone."""
    logits = hidden.double() @ weight.double().T
    z = (z_loss or 0.0) * logits.logsumexp(-1).square()[targets != -100].mean()
    return F.cross_entropy(logits, targets) + z - z.detach()


def check_small_probabilities(op):
    """Gradients in fp16 of rows in which each entry but the target has a probability of e^-18, which is less
    than any half."""
    hidden, weight = torch.zeros(4, 8), torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    hidden[:, 0], weight[:, 0], weight[0] = 18, 0, 0
    weight[0, 0] = 1
    inputs = [x.to(DEVICE, fp16).requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    targets = torch.zeros(4, dtype=torch.long, device=DEVICE)
    loss = op(*inputs, targets) * 2.0**16  # as a loss scale does
    exact = F.cross_entropy(wide[0] @ wide[1].T, targets) * 2.0**16
    got, right = (torch.autograd.grad(x, leaves) for x, leaves in ((loss, inputs), (exact, wide)))
    assert error(got[0][:, 1:], right[0][:, 1:]) < 1e-2 and error(got[1][1:], right[1][1:]) < 1e-2


def with_gaps(x):
    """x's values where no two of them are neighbors in the last dimension."""
    return torch.stack((x, x), -1)[..., 0]


def heads_first(x):
    """x [B, T, H, D] in the memory order [B, H, T, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check_op(name, backend, draw, layout=lambda x: x, tolerance=None, samples=None):
    """The op `name` of a backend, called as a training step calls it, beside its composition in float64:
    outputs and every gradient; where its backend cannot run it, its own parts do. `samples`: instead of all
    that the op's record has.

    Where rounding is all there is, as in the gradient of an RMSNorm over one channel, which is 0 but for
    epsilon, it may be off by twice what the reference in the same dtype is."""
    op = OPS[name]
    tolerance = tolerance or {fp32: 1e-5, fp16: 6e-3, bf16: 3e-2}[draw.dtype]

    def mine(*arguments):
        return op(*arguments, backend=backend)

    def truth(*arguments):
        return op.composition(*arguments, backend="reference")

    for arguments in op.samples(draw) if samples is None else samples:
        tensors = tensors_of(arguments)
        given = with_tensors(arguments, [layout(x) for x in tensors])
        wide = with_tensors(arguments, [x.double() if x.is_floating_point() else x for x in tensors])
        exact = _outcome(op, truth, wide)
        for i, (got, expected) in enumerate(zip(_outcome(op, mine, given), exact, strict=True)):
            assert got.shape == expected.shape, (name, i)
            if not got.is_floating_point():
                assert draw.dtype != fp32 or torch.equal(got, expected), (name, i)
            elif got.numel():
                off, size = _rms(got.double() - expected), _rms(expected)
                if off > tolerance * (size + 1e-2):
                    usual = _rms(_outcome(op, truth, arguments)[i].double() - expected)
                    assert backend != "reference" and off <= 2 * usual, (name, i, off, size, usual)


def _outcome(op, function, arguments):
    """Outputs, and gradients where there are any."""
    if op.differentiable:
        return results_of(function, arguments)
    with torch.no_grad():
        outs = function(*arguments)
    return outs if isinstance(outs, tuple) else (outs,)


def _rms(x):
    return x.square().mean().sqrt()
