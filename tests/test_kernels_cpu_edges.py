"""The C++ ops where a mistake would not show at usual sizes: long sums, ranges, offsets beyond 32 bits."""

import math
import mmap
import sys

import pytest
import torch

from ant5m import _cpu
from ant5m.kernels import cpu, reference


@pytest.fixture(params=[name for name in _cpu.instruction_sets() if name != "bf16_emulated"], autouse=True)
def instruction_set(request):
    best = _cpu.instruction_set()
    assert _cpu.use(request.param)
    yield
    _cpu.use(best)


def test_losses_are_summed_in_double():
    # 40,000 equal losses: a sum in fp32 is off by 1e-5 of itself.
    hidden, weight = torch.zeros(40_000, 1), torch.zeros(5, 1)
    loss = cpu.linear_cross_entropy(hidden, weight, torch.zeros(40_000, dtype=torch.int64))
    assert abs(loss.item() / math.log(5) - 1) < 2e-7


@pytest.mark.parametrize("shift", [-20_000.0, 20_000.0])
def test_logits_far_from_zero(shift):
    # In fp32 logits of this size are off by 1e-3; a maximum that begins at -10,000 would stay there.
    weight = shift + torch.arange(300.0)[:, None] % 7
    hidden, targets = torch.ones(40, 1, requires_grad=True), torch.arange(40)
    loss = cpu.linear_cross_entropy(hidden, weight, targets)
    expected = reference.linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert abs(loss.item() - expected.item()) < 5e-3
    logsumexp, argmax = cpu.logsumexp_argmax(hidden, weight)
    assert (argmax == 6).all()
    torch.testing.assert_close(
        logsumexp.double(), (hidden @ weight.T).double().logsumexp(-1), rtol=1e-6, atol=0
    )


def test_silu_is_small_but_not_zero():
    gate = torch.linspace(-85, 85, 1_001).requires_grad_()
    up = torch.ones_like(gate)
    out = cpu.swiglu(gate, up)
    wide = gate.detach().double().requires_grad_()
    expected = reference.swiglu(wide, up.double())
    assert ((out - expected) / expected)[gate != 0].abs().max() < 1e-5  # x times log2(e) is rounded
    slope, true_slope = torch.autograd.grad(out.sum(), gate)[0], torch.autograd.grad(expected.sum(), wide)[0]
    assert ((slope - true_slope) / true_slope)[true_slope.abs() > 1e-36].abs().max() < 1e-4


@pytest.fixture(scope="module")
def apart():
    """A function that gives a copy of x [3, ...] whose rows lie 2^30 numbers apart: the last one's offset is
    2^31, which 32 bits do not hold. Only the pages that are used take memory."""
    if sys.platform != "linux":
        pytest.skip("needs memory that is reserved and not used")
    no_reserve = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    area = torch.frombuffer(mmap.mmap(-1, 4 * (2**31 + 2**20), flags=flags), dtype=torch.float32)

    def spread(x):
        strides = torch.empty(x.shape[1:]).stride()
        copy = area.as_strided(x.shape, (2**30, *strides))
        return copy.copy_(x)

    return spread


def test_offsets_beyond_32_bits(apart):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, targets = draw(3, 8), torch.arange(3)
    weights = draw(5, 8), draw(5, 8), draw(8, 5)
    norm = draw(8)
    for op in (
        lambda x: cpu.linear(x, weights[0]),
        lambda x: cpu.mlp(x, *weights),
        lambda x: cpu.linear_cross_entropy(x, weights[0], targets),
        lambda x: cpu.linear_cross_entropy(weights[0][:3], x, targets),
        lambda x: cpu.rms_norm(x, norm),
        lambda x: cpu.swiglu(x, x),
        lambda x: cpu.logsumexp_argmax(x, weights[0])[0],
        lambda x: cpu.rms_norm_linear(x, norm, 1e-5, [weights[0]]),
    ):
        assert torch.equal(op(apart(x)), op(x))
    grad = draw(3, 8)
    given = x.clone().requires_grad_()
    out = cpu.mlp(given, *weights)
    near = torch.autograd.grad(out, given, grad, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, given, apart(grad))[0], near)
    # Batches, positions or heads far apart.
    q = draw(3, 3, 3, 4)
    for one, other in ((0, 0), (0, 1), (0, 2)):
        views = q.transpose(one, other), apart(q).transpose(one, other)
        results = [cpu.attention(view, view, view) for view in views]
        assert torch.equal(*results)
