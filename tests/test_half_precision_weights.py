"""The half-precision copies of a step: the right numbers, zeros in the padding, gradients in fp32."""

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
def test_copies_and_their_gradients(hidden, width, heads, together, dtype):
    torch.manual_seed(0)
    net = Ant(ModelConfig(50, hidden, width, 2, heads, 1, max_position_embeddings=8))
    copies = half_precision_weights(net, dtype)
    matrices = {name: p for name, p in net.named_parameters() if is_hidden(name, p)}
    assert copies.keys() == matrices.keys() and len(copies) == 14
    weights, loss = {}, 0
    for name, copy in copies.items():
        rows, columns = matrices[name].shape
        assert copy.data_ptr() % 16 == 0 and copy.dtype == dtype
        assert torch.equal(copy[:rows, :columns], matrices[name].to(dtype))
        assert copy.count_nonzero() == matrices[name].to(dtype).count_nonzero(), "zeros beside it"
        assert max(copy.shape[0] - rows, copy.shape[1] - columns) == (-width % 8 if "mlp" in name else 0)
        weights[name] = torch.randn(copy.shape).to(dtype)
        loss = loss + (copy * weights[name]).sum()
    for layer in range(2):
        for block, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            parts = [copies[f"model.layers.{layer}.{block}.{name}_proj.weight"] for name in names]
            joined = join(*parts)
            assert torch.equal(joined, torch.cat(parts))
            assert (joined.data_ptr() == parts[0].data_ptr()) == (together or block == "mlp")
    loss.backward()
    for name, p in matrices.items():
        assert p.grad.dtype == torch.float32 and p.grad.is_contiguous()
        assert torch.equal(p.grad, weights[name][: p.shape[0], : p.shape[1]].float())
