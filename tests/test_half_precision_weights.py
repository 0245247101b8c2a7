"""The half-precision weights of a step: the right numbers, zeros in the padding, gradients in fp32."""

import pytest
import torch

from ant5m.kernels.packed_views import join
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.train.half_precision_weights import half_precision_weights
from ant5m.train.optimizer import is_hidden


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "hidden, width, heads, together",
    [(16, 22, 2, True), (16, 24, 2, True), (6, 5, 3, False)],  # 36 numbers are not whole vectors
)
def test_weights_and_their_gradients(hidden, width, heads, together, dtype):
    torch.manual_seed(0)
    net = Ant(ModelConfig(50, hidden, width, 2, heads, 1, max_position_embeddings=8))
    weights = half_precision_weights(net, dtype)
    matrices = {name: p for name, p in net.named_parameters() if is_hidden(name, p)}
    assert weights.keys() == matrices.keys() and len(weights) == 14
    factors, loss = {}, 0
    for name, weight in weights.items():
        rows, columns = matrices[name].shape
        assert weight.data_ptr() % 16 == 0 and weight.dtype == dtype
        assert torch.equal(weight[:rows, :columns], matrices[name].to(dtype))
        assert weight.count_nonzero() == matrices[name].to(dtype).count_nonzero(), "zeros beside it"
        assert max(weight.shape[0] - rows, weight.shape[1] - columns) == (-width % 8 if "mlp" in name else 0)
        factors[name] = torch.randn(weight.shape).to(dtype)
        loss = loss + (weight * factors[name]).sum()
    for layer in range(2):
        for block, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            parts = [weights[f"model.layers.{layer}.{block}.{name}_proj.weight"] for name in names]
            joined = join(*parts)
            assert torch.equal(joined, torch.cat(parts))
            assert (joined.data_ptr() == parts[0].data_ptr()) == (together or block == "mlp")
    loss.backward()
    for name, p in matrices.items():
        assert p.grad.dtype == torch.float32 and p.grad.is_contiguous()
        assert torch.equal(p.grad, factors[name][: p.shape[0], : p.shape[1]].float())
