"""The emulation of a processor's products of bf16 pairs is that processor, bit for bit."""

import pytest
import torch

from ant5m import _cpu
from ant5m.kernels.cpu.linear import product, product_gradients


@pytest.fixture(autouse=True)
def restored():
    best = _cpu.instruction_set()
    yield
    _cpu.use(best)


def any_bits(generator, shape):
    """Numbers of any bits: infinite ones, NaN and denormals among them."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)


def small(generator, shape):
    """Numbers whose products and sums lie around the smallest normal number."""
    exponents = torch.randint(40, 100, shape, generator=generator).int() << 23
    return ((any_bits(generator, shape).view(torch.int32) & ~0x7F800000) | exponents).view(torch.float32)


def halves(generator, shape):
    """Numbers half way between two in bf16, and their neighbors."""
    bits = torch.randn(shape, generator=generator).view(torch.int32) & ~0xFFFF | 0x8000
    return (bits + torch.randint(-1, 2, shape, generator=generator).int()).view(torch.float32)


KINDS = {
    "usual": lambda generator, shape: torch.randn(shape, generator=generator),
    "any_bits": any_bits,
    "small": small,
    "halves": halves,
}


def products(a, b):
    """a [N, D] @ b [R, D]^T in bf16, by each of the three ways that the C++ has."""
    across = b.T.contiguous()
    by_columns = product_gradients(torch.empty(len(a), len(b)), across, a, True)[0]
    over_rows = product_gradients(across, torch.empty(len(a), len(b)), a.T.contiguous(), True)[1]
    return torch.stack((product(a, b, True), by_columns, over_rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(17, 1, 33), (257, 7, 130), (70, 64, 9)])
def test_as_the_processor_has_it(kind, shape):
    if not _cpu.use("avx512_bf16"):
        pytest.skip("this processor does not multiply bf16 as AVX-512 does")
    generator = torch.Generator().manual_seed(sum(shape))
    a, b = (KINDS[kind](generator, (rows, shape[1])) for rows in (shape[0], shape[2]))
    expected = products(a, b)
    assert _cpu.use("bf16_emulated")
    found = products(a, b)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(torch.int32)[~nan], expected.view(torch.int32)[~nan])


def test_by_hand():
    assert _cpu.use("bf16_emulated")
    rounded = [(1 + 2**-8, 1.0), (1 + 3 * 2**-8, 1 + 2**-6), (1 + 2**-8 + 2**-20, 1 + 2**-7), (1e-39, 0.0)]
    for number, expected in rounded:
        assert (products(torch.tensor([[number]]), torch.ones(1, 1)) == expected).all()
    # The second product of a pair is added first, and 2^24 + 1 is 2^24.
    a, ones = torch.tensor([[1.0, 2.0**24, -(2.0**24), 0.0]]), torch.ones(1, 4)
    assert (products(a, ones) == 0).all()
    assert (products(a.flip(1), ones) == 1).all()
