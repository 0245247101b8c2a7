"""The forward pass in the ways that only some devices take it."""

from types import SimpleNamespace

import pytest
import torch

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.model import ant
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig

SHAPE = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
)


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setattr(kernels, "_selected", "reference")


def test_products_are_padded_to_whole_16_bytes_on_a_gpu_in_16_bits():
    sizes = {516: 520, 384: 384, 1: 8}
    assert [ant._product_size(size, SimpleNamespace(is_cuda=True, itemsize=2)) for size in sizes] == [
        *sizes.values()
    ]
    for elsewhere in (SimpleNamespace(is_cuda=False, itemsize=2), SimpleNamespace(is_cuda=True, itemsize=4)):
        assert ant._product_size(516, elsewhere) == 516


def test_padding_changes_no_number(monkeypatch):
    torch.manual_seed(0)
    net = Ant(SHAPE).double()
    ids = torch.randint(50, (2, 16))

    def results():
        loss = net(ids, ids)
        return [net(ids), *torch.autograd.grad(loss, list(net.parameters()))]

    plain = results()
    monkeypatch.setattr(ant, "_product_size", lambda size, x: size + 4)
    for got, expected in zip(results(), plain, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("head_dim", [None, 14])
def test_heads_that_do_not_divide_the_width_are_refused(head_dim):
    with pytest.raises(UserError, match="must divide hidden_size"):
        ModelConfig(hidden_size=40, num_attention_heads=6, num_key_value_heads=3, head_dim=head_dim)
