"""Pieces of one tensor are joined without a copy where they lie as they should, and copied where not."""

import pytest
import torch

from ant5m.kernels.packed_views import join, split


def test_matrices_that_lie_above_one_another_are_joined_without_a_copy():
    memory = torch.arange(40.0, requires_grad=True)
    one, two, three = memory[:8].view(2, 4), memory[8:20].view(3, 4), memory[20:32].view(3, 4)
    whole = join(one, two, three)
    assert whole.data_ptr() == memory.data_ptr()
    assert torch.equal(whole, memory[:32].view(8, 4))
    factors = torch.randn(8, 4)
    (whole * factors).sum().backward()
    assert torch.equal(memory.grad, torch.cat((factors.flatten(), torch.zeros(8))))
    others = (two, one), (one, three), (one, two.clone()), (one, memory[8:18].view(2, 5)[:, :4])
    for matrices in (*others, (one, memory[8:24].view(4, 4).T)):
        joined = join(*matrices)
        assert joined.data_ptr() != memory.data_ptr()
        assert torch.equal(joined, torch.cat(matrices))


@pytest.mark.parametrize("together", [True, False])
def test_gradients_that_lie_beside_one_another_are_not_joined_again(together):
    """Those of gate and up, which `swiglu` makes side by side; or two that are made apart."""
    given = torch.randn(3, 10)
    one, two = given.split([4, 6], -1)
    seen = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.data_ptr() == given.data_ptr())
            return grad

    class Uses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return a.sum() + b.sum()

        @staticmethod
        def backward(ctx, grad):
            return (one, two) if together else (one.clone(), two)

    x = torch.randn(3, 10, requires_grad=True)
    Uses.apply(*split(Looks.apply(x), [4, 6])).backward()
    assert torch.equal(x.grad, given) and seen == [together]
