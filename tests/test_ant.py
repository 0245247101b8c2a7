"""The forward pass in the ways that only some devices take it."""

from types import SimpleNamespace

import pytest
import torch

from ant5m.errors import UserError
from ant5m.kernels import dispatch, ops
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
    monkeypatch.setattr(dispatch, "_selected", "reference")


HALF_ON_GPU = SimpleNamespace(is_cuda=True, itemsize=2)


def test_products_are_padded_to_whole_16_bytes_on_a_gpu_in_16_bits():
    for width, padded in {516: 520, 384: 384, 1: 8}.items():
        weights = torch.ones(width, 4), torch.ones(width, 4), torch.ones(4, width)
        wide = ops._whole_vectors(HALF_ON_GPU, *weights)
        assert [tuple(w.shape) for w in wide] == [(padded, 4), (padded, 4), (4, padded)]
        assert all(w.sum() == 4 * width for w in wide)
        for elsewhere in (
            SimpleNamespace(is_cuda=False, itemsize=2),
            SimpleNamespace(is_cuda=True, itemsize=4),
        ):
            assert ops._whole_vectors(elsewhere, *weights) == weights


def test_padding_changes_no_number(monkeypatch):
    torch.manual_seed(0)
    net = Ant(SHAPE).double()
    assert SHAPE.intermediate_size % 8
    ids = torch.randint(50, (2, 16))

    def results():
        loss = net(ids, ids)
        return [net(ids), *torch.autograd.grad(loss, list(net.parameters()))]

    plain, widen = results(), ops._whole_vectors
    monkeypatch.setattr(ops, "_whole_vectors", lambda x, *weights: widen(HALF_ON_GPU, *weights))
    for got, expected in zip(results(), plain, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("head_dim", [None, 14])
def test_heads_that_do_not_divide_the_width_are_refused(head_dim):
    with pytest.raises(UserError, match="must divide hidden_size"):
        ModelConfig(hidden_size=40, num_attention_heads=6, num_key_value_heads=3, head_dim=head_dim)
