"""The losses against loops: the formulas in float64, every gradient, the memory, and when they set in."""

import dataclasses

import pytest
import torch
from test_step import NoWaiting, batches, make
from test_train import config, material, of_kind  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

from ant5m.kernels import dispatch
from ant5m.train import losses, plan, pretrain
from ant5m.train.losses import (
    DAMPING,
    LONGEST,
    SHORTEST,
    ditto,
    make_loop_loss,
    pseudo_repetition,
    unlikelihood,
)

ROWS, LENGTH, WIDTH, VOCAB = 3, 17, 5, 11


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * VOCAB * 7)  # 7 rows of logits; 51 = 7 * 7 + 2


@pytest.fixture
def inputs():
    """hidden and weight, float64 with gradients, sharp enough for probabilities near 0 and near 1; tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
    return hidden, weight, ids[:, :-1], ids[:, 1:].clone()


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def plain_unlikelihood(hidden, weight, input_ids, targets):
    total = torch.zeros((), dtype=hidden.dtype)
    for row, place in ((r, t) for r in range(ROWS) for t in range(LENGTH) if targets[r, t] >= 0):
        p = (weight @ hidden[row, place]).softmax(0)
        for candidate in set(input_ids[row, : place + 1].tolist()) - {targets[row, place].item()}:
            total = total - torch.log(1 - p[candidate])
    return total / (targets >= 0).sum()


def plain_ditto(hidden, weight, targets, periods):
    terms = []
    for row, period in enumerate(periods[:, 0].tolist()):
        p = (hidden[row] @ weight.T).softmax(-1)[torch.arange(LENGTH), targets[row]]
        terms += [
            -torch.log(1 - (p[i] - DAMPING * p[i - period].detach()).abs()) for i in range(period, LENGTH)
        ]
    return torch.stack(terms).mean()


def test_unlikelihood_is_the_formula(inputs):
    hidden, weight, _, targets = inputs
    targets[0, 3:9] = -100
    ours, plain = unlikelihood(*inputs), plain_unlikelihood(*inputs)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for one, other in zip(gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_ditto_is_the_formula(inputs):
    hidden, weight, _, targets = inputs
    periods = torch.tensor([[2], [5], [9]])
    ours, plain = ditto(hidden, weight, targets, periods), plain_ditto(hidden, weight, targets, periods)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for one, other in zip(gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_unlikelihood_passes_gradcheck(inputs):
    hidden, weight, input_ids, targets = inputs
    assert torch.autograd.gradcheck(
        lambda h, w: unlikelihood(h, w, input_ids, targets), (hidden, weight), fast_mode=True
    )


def test_a_certain_repeat_costs_a_finite_amount():
    hidden = torch.full((1, 4, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    loss = unlikelihood(
        hidden, weight, torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    )
    assert loss.item() == pytest.approx(-torch.tensor(losses.LEAST_REST).log().item())
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, hidden, weight))


@pytest.mark.parametrize("length", [1, 2, 7, 33, 512])
def test_a_pseudo_repetition_says_a_phrase_of_the_row_again_and_again(length):
    ids = torch.randint(1_000, (40, length), generator=torch.Generator().manual_seed(length))
    repeated, periods = pseudo_repetition(ids)
    assert repeated.shape == (40, length + 1) and periods.shape == (40, 1)
    for row, out, period in zip(ids.tolist(), repeated.tolist(), periods.flatten().tolist(), strict=True):
        assert all(out[i] == out[i - period] for i in range(period, length + 1))
        assert any(row[start : start + period] == out[:period] for start in range(length - period + 1))
    if length == 512:
        assert periods.min() == SHORTEST and periods.max() == LONGEST
        again, same = pseudo_repetition(ids.flip(0))
        assert torch.equal(again, repeated.flip(0)) and torch.equal(same, periods.flip(0))


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("kind", ["unlikelihood", "ditto"])
def test_the_logits_never_exist_as_a_whole(kind):
    rows, length, width, vocab = 4, 64, 8, 512
    hidden = torch.randn(rows, length, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    ids = torch.randint(vocab, (rows, length + 1))
    with Largest() as seen:
        if kind == "ditto":
            loss = ditto(hidden, weight, ids[:, 1:], torch.full((rows, 1), 5))
        else:
            loss = unlikelihood(hidden, weight, ids[:, :-1], ids[:, 1:])
        loss.backward()
    assert 0 < seen.elements <= vocab * max(width, rows)  # the weight's gradient, and `first`


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["unlikelihood", "ditto"])
def test_a_step_tells_the_cross_entropy_follows_both_and_waits_for_nothing(kind, precision, monkeypatch):
    monkeypatch.setattr(dispatch, "_selected", "reference")
    plain, steered = make(precision=precision), make(precision=precision)
    steered.loop_loss = make_loop_loss(kind, 1.0)
    batch = batches(1)[0]
    with NoWaiting():
        told, also = plain(*batch), steered(*batch)
    torch.testing.assert_close(told[0], also[0], rtol=1e-5, atol=0)
    assert told[2] == also[2] == 1 and not torch.isclose(told[1], also[1], rtol=1e-3)


@pytest.mark.parametrize("kind", ["unlikelihood", "ditto"])
def test_it_sets_in_with_the_last_part(kind, config):  # noqa: F811
    plain = dataclasses.replace(config, out=config.out.with_name("plain"))
    steered = dataclasses.replace(config, loop_loss=kind, loop_loss_share=0.4)  # of 8 steps: from the 6th on
    one, other = (of_kind(pretrain(asked).run, "train") for asked in (plain, steered))
    same = [
        a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"] for a, b in zip(one, other, strict=True)
    ]
    assert same == [True] * 5 + [False] * 3


def test_a_second_pass_halves_what_a_gpu_computes_at_once(monkeypatch):
    monkeypatch.setattr(plan, "_memory", lambda device: 4 << 30)
    shape, gpu = plan.ModelConfig(), torch.device("cuda")
    fits = [plan.micro_batch(shape, 64, 1_024, gpu, "fp16", 0, kind) for kind in ("none", "ditto")]
    assert fits[1] <= fits[0] / 2
