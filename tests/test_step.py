"""A step waits for nothing, a skipped one changes nothing, and the captured one is the step as it is."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from test_resume import fingerprint
from test_train import config, material  # noqa: F401  (fixtures)
from torch.utils._python_dispatch import TorchDispatchMode

from ant5m.data.loader import Loader, document_starts
from ant5m.data.resident import ResidentTokens, fits
from ant5m.data.shards import Tokens
from ant5m.kernels import dispatch
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.ranks import Ranks
from ant5m.train import data, pretrain, trainer
from ant5m.train import step as module
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.optimizer import Optimizer
from ant5m.train.schedule import Schedule
from ant5m.train.step import WARM_UP, CapturedStep, Step

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=16,
    intermediate_size=22,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
NAMES = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
# On a GPU these bring a number over from the device or to it: the host waits, and a capture fails.
WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.lift_fresh.default,
}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """The kernels of the CPU may ask about values; what a GPU runs may not."""
    monkeypatch.setattr(dispatch, "_selected", "reference")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in WAITING, f"{func} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


def make(kind="muon", precision="fp16", scale=2.0**13, steps=12, rows=2, position=None):
    torch.manual_seed(0)
    net = Ant(TINY)
    scaler = LossScaler("cpu", scale) if precision == "fp16" else None
    return Step(net, Optimizer(net, kind), Schedule(steps), rows, 1.0, precision, scaler, position=position)


def batches(count, rows=4):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (count, rows, 33), generator=generator)
    return [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids]


def state(step):
    scaler = step.scaler.state_dict() if step.scaler else {}
    return {**step.net.state_dict(), **step.optimizer.tensors(), **scaler}


def same(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(np.asarray(one[name]), np.asarray(other[name])) for name in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_never_waits_for_the_device(kind, precision):
    step = make(kind, precision)
    step.eos_token_id = 0
    with NoWaiting():
        numbers = [step(*batch) for batch in batches(1) * 3]
    losses = [loss for loss, _, counted, _ in torch.stack(numbers).tolist() if counted]
    assert len(losses) == 3 and losses[2] < losses[0]


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.nonzero, lambda x: torch.tensor(1.0) + x])
def test_waiting_is_seen(wait, monkeypatch):
    step = make()
    loss = step._loss
    monkeypatch.setattr(step, "_loss", lambda *args: (out := loss(*args), wait(out.detach()))[0])
    with NoWaiting(), pytest.raises(AssertionError, match="makes the host wait"):
        step(*batches(1)[0])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_an_overflow_halves_the_scale_and_changes_nothing_else(kind):
    step = make(kind)
    first, second = batches(2)
    step(*first)
    step.scaler.scale.fill_(2.0**60)
    before = {name: copy.deepcopy(value) for name, value in state(step).items()}
    loss, norm, counted, scale = step(*second).tolist()
    assert (counted, scale) == (0, 2.0**59) and loss > 0 and not np.isfinite(norm)
    after = state(step)
    assert after.pop("scale") == before.pop("scale") / 2
    assert (after.pop("good_steps"), before.pop("good_steps")) == (0, 1)
    assert same(before, after)


def test_skipped_steps_do_not_count_in_the_schedule():
    """The same weights as without the steps that were skipped: no rate of the schedule was used up."""
    plain, skipping = make("adamw"), make("adamw")
    for i, batch in enumerate(batches(6)):
        plain(*batch)
        if i in (0, 3):
            skipping.scaler.scale.fill_(2.0**60)
            assert not skipping(*batch)[2]
            skipping.scaler.scale.fill_(2.0**13)
        assert skipping(*batch)[2]
    one, other = state(plain), state(skipping)
    assert (one.pop("good_steps"), other.pop("good_steps")) == (6, 3)
    assert same(one, other)


def test_products_read_copies_and_gradients_come_in_fp32():
    step = make(precision="bf16")
    seen = {}
    loss = step._loss

    def look(weights, *batch):
        seen.update(weights)
        out = loss(weights, *batch)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(out, step.net(*batch), rtol=1e-6, atol=0)
        return out

    step._loss = look
    step.optimizer.zero_grad = lambda: None
    step(*batches(1)[0])
    assert seen and all(copy.dtype == torch.bfloat16 and "proj" in name for name, copy in seen.items())
    for layer in ("model.layers.0.", "model.layers.1."):
        q, k, v, gate, up, down = (seen[f"{layer}{name}_proj.weight"] for name in NAMES)
        for before, behind in ((q, k), (k, v), (gate, up)):
            assert behind.data_ptr() == before.data_ptr() + 2 * before.numel()
        assert gate.shape == up.shape == (24, 16) and down.shape == (16, 24) and not down[:, 22:].any()
    gradients = {name: p.grad.clone() for name, p in step.net.named_parameters()}
    twin = make(precision="bf16").net
    for part, targets in zip(*(x.split(2) for x in batches(1)[0]), strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            (twin(part, targets) / 2).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in twin.parameters()]).clamp(min=1)
    for name, p in twin.named_parameters():
        assert gradients[name].dtype == torch.float32
        torch.testing.assert_close(gradients[name], p.grad / norm, rtol=2e-2, atol=2e-3)


class Joined(TorchDispatchMode):
    """Counts the matrices that are joined or padded."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.constant_pad_nd):
            first = args[0][0] if isinstance(args[0], list) else args[0]
            self.count += first.ndim == 2
        return func(*args, **(kwargs or {}))


def test_no_weight_is_joined_or_padded_in_a_layer():
    step = make(precision="bf16")
    ids, targets = (x[:2] for x in batches(1)[0])
    weights = step._half_precision_weights()
    with Joined() as joined:
        step._loss(weights, ids, targets).backward()
    assert joined.count == 0
    with Joined() as joined, torch.autocast("cpu", torch.bfloat16):
        step.net(ids, targets)
    assert joined.count == 2 * len(step.net.model.layers)


def test_a_step_that_is_aborted_changes_nothing():
    step = make()
    first, second = batches(2)
    step(*first)
    before = {name: copy.deepcopy(value) for name, value in state(step).items()}
    asked = iter((False, True))
    assert step(*second, should_abort=lambda: next(asked)) is None
    assert same(before, state(step)) and all(p.grad is None for p in step.net.parameters())


def rows_of_documents(*lengths):
    """One row of documents of those lengths with ends of text (0), then the starts that it must have."""
    generator = torch.Generator().manual_seed(sum(lengths))
    documents = [torch.randint(1, 97, (length,), generator=generator) for length in lengths]
    for document in documents:
        document[-1] = 0
    starts = [torch.full_like(document, sum(lengths[:i])) for i, document in enumerate(documents)]
    return torch.cat(documents)[None], torch.cat(starts)[None]


def test_documents_start_behind_ends_of_text():
    rows = [rows_of_documents(*lengths) for lengths in [(9,), (1, 1, 7), (4, 5), (8, 1)]]
    ids, starts = (torch.cat(parts) for parts in zip(*rows, strict=True))
    assert torch.equal(document_starts(ids, 0), starts) and starts.dtype == torch.int64
    assert not document_starts(ids, 99).any()


def test_with_a_mask_a_document_does_not_see_the_ones_before():
    torch.manual_seed(0)
    net = Ant(TINY)
    ids, starts = rows_of_documents(7, 5, 8)
    other = ids.clone()
    other[0, :11] = torch.arange(40, 51)  # all before the last document but its end of text
    for masked in (True, False):
        options = {"starts": starts} if masked else {}
        before, after = (net(x, **options)[0, 12:] for x in (ids, other))
        assert torch.equal(before, after) == masked
    alone = net(ids[:, 12:])[0]  # elsewhere in the row, but rotated by the same angles from one another
    torch.testing.assert_close(net(ids, starts=starts)[0, 12:], alone)


def test_the_step_masks_documents_when_asked():
    ids, starts = rows_of_documents(7, 5, 21)
    batch = ids[:, :-1], ids[:, 1:]
    plain, masked = make(precision="fp32", rows=1), make(precision="fp32", rows=1)
    masked.eos_token_id = 0
    torch.testing.assert_close(masked(*batch)[0], make().net(*batch, starts=starts[:, :-1]).detach())
    assert not torch.allclose(plain(*batch)[0], masked(*batch)[0])


class Device:
    """Stands for a GPU in `CapturedStep`: a capture keeps the function, a replay calls it."""

    def __init__(self, monkeypatch, fails=False):
        self.log = []
        for name in ("Stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        device = self

        class Graph:
            def __init__(self, run, stream, errors):
                device.log.append("capture")
                if fails:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")
                self.run = run

            def __call__(self):
                device.log.append("replay")
                with NoWaiting():
                    self.result = self.run()
                return self.result

        monkeypatch.setattr(module, "_Graph", Graph)

    def wait_stream(self, other): ...

    def synchronize(self):
        self.log.append("wait")

    def record(self, stream): ...


def test_the_captured_step_is_the_step(monkeypatch):
    device = Device(monkeypatch)
    plain, captured = make(scale=2.0**24), CapturedStep(make(scale=2.0**24))
    numbers = []
    for batch in batches(10):
        numbers.append(captured(*batch))
        torch.testing.assert_close(plain(*batch), numbers[-1], rtol=0, atol=0, equal_nan=True)
    assert captured.captured and device.log.count("capture") == 1
    assert device.log.count("replay") == 10 - WARM_UP
    counted = torch.stack(numbers)[:, 2]
    assert 0 < counted.sum() < 10, "some steps overflow, some do not"
    assert same(state(plain), state(captured.step))


class Twins(Ranks):
    """Two ranks that always have the same sequences."""

    def __init__(self):
        super().__init__(0, 2)

    alone = False

    def sum(self, x):
        x *= 2

    def most(self, *values):
        return list(values)


def test_among_ranks_two_graphs_are_the_step(monkeypatch):
    """What is exchanged is exchanged between them: gradients and loss, in one sum a step."""
    device = Device(monkeypatch)
    plain, twin = make(precision="fp32"), make(precision="fp32")  # halves of fp16 may vanish, of fp32 not
    twin.ranks = Twins()
    captured = CapturedStep(twin)
    for batch in batches(10):
        torch.testing.assert_close(plain(*batch), captured(*batch), rtol=0, atol=0, equal_nan=True)
    assert captured.captured and device.log.count("capture") == 2
    assert device.log.count("replay") == 2 * (10 - WARM_UP)
    assert same(state(plain), state(twin))


@pytest.mark.parametrize(
    "late, captures",  # a step of its own for a part of the run, captured again
    [
        ({}, 1),
        ({"loop_loss": "unlikelihood", "loop_loss_share": 0.5}, 2),
        ({"short_context": 8, "short_share": 0.5}, 2),
    ],
)
def test_a_run_on_a_device_that_captures_is_the_run(
    late,
    captures,
    config,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Tokens on the device, a captured step, and steps that are read long after they were taken."""
    high = {"scale": 2.0**24}
    monkeypatch.setattr(trainer, "LossScaler", lambda device, **state: LossScaler(device, **(state or high)))
    every = {"eval_every": 3, "checkpoint_every": 5, "sample_every": 0}
    chosen = dataclasses.replace(config, steps=12, precision="fp16", **every, **late)
    plain = pretrain(dataclasses.replace(chosen, out=tmp_path / "plain")).run
    device = Device(monkeypatch)
    monkeypatch.setattr(trainer, "make_step", CapturedStep)
    monkeypatch.setattr(data, "keeps_tokens", lambda *_: True)
    monkeypatch.setattr(trainer, "READ_SECONDS", 1e9)
    captured = pretrain(dataclasses.replace(chosen, out=tmp_path / "captured")).run
    assert device.log.count("replay") > 12 - captures * WARM_UP - 1
    assert device.log.count("capture") == captures
    assert fingerprint(plain) == fingerprint(captured)
    assert fingerprint(plain)[0]["skipped"] > 0


def test_a_capture_that_fails_is_said_and_the_training_goes_on(monkeypatch):
    Device(monkeypatch, fails=True)
    plain, captured = make(), CapturedStep(make())
    with pytest.warns(UserWarning, match="could not be captured as a CUDA graph: operation not permitted$"):
        for batch in batches(6):
            plain(*batch), captured(*batch)
    assert not captured.captured and same(state(plain), state(captured.step))


def tokens_in_parts(count):
    tokens = np.random.default_rng(0).integers(0, 65_536, count).astype("<u2")
    return Tokens([tokens[:100], tokens[100:103], tokens[103:]])


def test_resident_tokens_are_the_tokens(monkeypatch):
    monkeypatch.setattr("ant5m.data.resident._CHUNK", 64)
    tokens = tokens_in_parts(1_000)
    resident = ResidentTokens(tokens, torch.device("cpu"))
    starts = np.array([0, 97, 983, 500])
    input_ids, targets = resident.gather(starts, 16)
    for row, start in enumerate(starts):
        assert input_ids[row].tolist() == tokens[start : start + 16].tolist()
        assert targets[row].tolist() == tokens[start + 1 : start + 17].tolist()
    assert input_ids.max() > 32_767 and input_ids.dtype == targets.dtype == torch.int64
    for outside in (-1, 984):
        with pytest.raises(IndexError, match="leaves the 1000 of the split"):
            resident.gather(np.array([outside]), 16)
    assert fits(1_000_000_000, 16 << 30) and not fits(2_000_000_000, 16 << 30)


class Split:
    """A split of packed data, in memory."""

    split, folder, fingerprint = "train", "memory", "known"
    tokens = tokens_in_parts(1_000)
    num_tokens = 1_000


def test_batches_made_on_the_device_are_those_of_the_host():
    host, device = Loader(Split, 4, 16, 7), Loader(Split, 4, 16, 7, resident=torch.device("cpu"))
    for _ in range(40):  # over the end of an epoch
        for one, other in zip(host.next(), device.next(), strict=True):
            assert torch.equal(one, other)
        assert host.state_dict() == device.state_dict()
    device.load_state_dict({**host.state_dict(), "position": 8})
    host.load_state_dict(device.state_dict())
    assert torch.equal(host.next()[0], device.next()[0])
