"""AdamW and Muon: against torch's own, which parameter goes where, and the state."""

import copy

import pytest
import torch

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.train import optimizer as module
from ant5m.train.optimizer import Muon, Optimizer, clip

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Ant(TINY)


def fill_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def distance(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def test_muon_is_torchs_when_the_products_have_the_same_dtype():
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (24, 16), (16, 24), (8, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.02, "weight_decay": 0.3}
    one, other = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    one.product_dtype = torch.bfloat16
    for seed in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(seed))
            b.grad = a.grad.clone()
        one.step()
        other.step()
    # The order of the products' sums may differ: bfloat16 has 8 bits, and 3 steps of 0.02 are at stake.
    assert distance(ours, theirs) < 2e-3
    assert distance(ours, [torch.zeros_like(p) for p in ours]) > 1
    momenta = [[part.state[p]["momentum_buffer"] for p in ps] for part, ps in ((one, ours), (other, theirs))]
    assert distance(*momenta) < 1e-6


def test_newton_schulz_makes_singular_values_nearly_one():
    matrices = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    for x in (matrices, matrices.mT):
        values = torch.linalg.svdvals(module.newton_schulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
        assert values.min() > 0.4 and values.max() < 1.4


def test_adamw_is_torchs_and_norms_do_not_decay(net):
    twin = copy.deepcopy(net)
    ours = Optimizer(net, "adamw", learning_rate=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.5)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    vectors = [p for p in twin.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.005, betas=(0.8, 0.95), eps=1e-6)
    for seed in range(3):
        for one in (net, twin):
            fill_gradients(one, seed)
        ours.step(factor=0.5)
        theirs.step()
    assert distance(net.parameters(), twin.parameters()) < 1e-6


@pytest.mark.parametrize(
    ("precision", "multiplies", "dtype"),
    [
        ("fp32", True, torch.float32),
        ("bf16", True, torch.bfloat16),
        ("fp16", True, torch.bfloat16),
        ("fp16", False, torch.float32),
    ],
)
def test_muon_multiplies_in_bf16_only_where_the_training_may_and_the_device_does(
    net, monkeypatch, precision, multiplies, dtype
):
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda device: multiplies)
    seen = []
    monkeypatch.setattr(module, "newton_schulz", lambda x, *rest: seen.append(x.dtype) or x)
    optimizer = Optimizer(net, "muon", precision=precision)
    fill_gradients(net, 0)
    optimizer.step()
    assert set(seen) == {dtype}


def test_muon_takes_the_matrices_of_the_layers_only(net):
    optimizer = Optimizer(net, "muon")
    fill_gradients(net, 0)
    optimizer.step()
    muon = {name.split("/")[0] for name in optimizer.tensors() if name.endswith("momentum_buffer")}
    assert muon == {name for name, p in net.named_parameters() if "proj" in name}
    adamw = {name.split("/")[0] for name in optimizer.tensors() if name.endswith("exp_avg_sq")}
    assert muon | adamw == {name for name, _ in net.named_parameters()} and not muon & adamw
    assert all(tensor.dtype == torch.float32 for tensor in optimizer.tensors().values())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_round(net, kind):
    first = Optimizer(net, kind)
    fill_gradients(net, 0)
    first.step()
    twin = copy.deepcopy(net)
    second = Optimizer(twin, kind)
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    for one, optimizer in ((net, first), (twin, second)):
        fill_gradients(one, 1)
        optimizer.step()
    assert distance(net.parameters(), twin.parameters()) == 0


def test_foreign_state_is_refused(net):
    optimizer = Optimizer(net, "muon")
    fill_gradients(net, 0)
    optimizer.step()
    state = optimizer.tensors()
    with pytest.raises(UserError, match="does not fit"):
        Optimizer(net, "adamw").load_tensors(state)
    with pytest.raises(UserError, match="unknown"):
        Optimizer(net, "muon").load_tensors({**state, "other/exp_avg": torch.zeros(1)})
    name = next(name for name in state if name.endswith("momentum_buffer"))
    with pytest.raises(UserError, match="does not fit"):
        Optimizer(net, "muon").load_tensors({**state, name: torch.zeros(3, 3)})


def test_clip_limits_the_joint_norm(net):
    fill_gradients(net, 0)
    parameters = list(net.parameters())
    before = torch.cat([p.grad.flatten() for p in parameters]).norm()
    assert torch.allclose(clip(parameters, 0.0), before)
    assert torch.allclose(torch.cat([p.grad.flatten() for p in parameters]).norm(), before)
    assert torch.allclose(clip(parameters, 1.0), before)
    assert torch.allclose(torch.cat([p.grad.flatten() for p in parameters]).norm(), torch.tensor(1.0))
