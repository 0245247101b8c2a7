"""What only a GPU can show, at full size: `pytest -m gpu`. The kernels' own tests are marked so, too.

Run on an H200 (torch 2.11, Triton 3.6) on 2026-11-26.
"""

import copy
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import config, material  # noqa: F401  (fixtures)

from ant5m import kernels
from ant5m.device import choose_precision
from ant5m.kernels import reference
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.model.config import PRESETS
from ant5m.model.costs import fitting_tokens
from ant5m.ranks import Ranks
from ant5m.train import TrainConfig, pretrain
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.losses import make_loop_loss
from ant5m.train.metrics import read_metrics
from ant5m.train.optimizer import Optimizer
from ant5m.train.schedule import Schedule
from ant5m.train.step import WARM_UP, CapturedStep, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("error:.*CUDA graph"),
    pytest.mark.filterwarnings("error:.*failed its check"),
]
LENGTH = 1_024


def native_half():
    """The 16-bit dtype that this device trains in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[choose_precision("auto", torch.device("cuda"))]


def make(
    preset="ant-5m", layers=None, precision="auto", kind="muon", steps=40, rows=4, scale=2.0**13, loop=None
):
    shape = PRESETS[preset]
    shape = dataclasses.replace(shape, num_hidden_layers=layers or shape.num_hidden_layers)
    torch.manual_seed(0)
    net = Ant(shape).to("cuda")
    precision = choose_precision(precision, net.device)
    scaler = LossScaler("cuda", scale) if precision == "fp16" else None
    loop_loss = make_loop_loss(loop, 1.0) if loop else None
    schedule = Schedule(steps)
    return Step(
        net,
        Optimizer(net, kind, precision=precision),
        schedule,
        rows,
        1.0,
        precision,
        scaler,
        loop_loss=loop_loss,
    )


def batches(count, rows, vocab, length=LENGTH):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (count, rows, length + 1), generator=generator).cuda()
    return [(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in ids]


def test_auto_says_what_runs_where_and_triton_passes_its_check(capsys):
    line = kernels.describe("cuda")
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}: {line}")
    table = {op: row["triton"] for op, row in kernels.available().items() if op in kernels.OPS}
    if torch.cuda.get_device_capability() < (8, 0):
        assert "below compute capability 8.0" in table.pop("attention")
    assert set(table.values()) == {"ready"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", (*kernels.OPS, "rope_packed", "mlp"))
def test_every_backend_passes_its_check_at_every_preset(name, preset, dtype):
    op, device = OPS[name], torch.device("cuda", torch.cuda.current_device())
    for backend, arguments in itertools.product(("triton", "cuda"), op.samples(drawn(preset, dtype, device))):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            reason = op.unsupported_reason(backend, *arguments)
        assert reason is None or "failed its check" not in reason, backend


def drawn(preset, dtype, device):
    shape = PRESETS[preset]
    sizes = Sizes(
        hidden=shape.hidden_size,
        intermediate=shape.intermediate_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        head_size=shape.head_size,
        vocab=shape.vocab_size,
    )
    return Draw(sizes, dtype, device)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_swiglu_block_is_used_where_it_is_faster(preset, backend, capsys):
    """And says how long it takes, and what it stands for, where it is not."""
    dtype = torch.float16 if backend == "cuda" else native_half()
    (arguments,) = kernels.mlp.samples(drawn(preset, dtype, "cuda"))
    reason = kernels.mlp.unsupported_reason(backend, *arguments)
    with capsys.disabled():
        print(f"\n{preset}, {backend}: {reason or 'mlp is faster than what it stands for'}")
    assert reason is None or "takes" in reason or "could not be timed" in reason
    assert kernels.mlp(*arguments, backend=backend).shape == arguments[0].shape


@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize(
    "kind, loop", [("adamw", None), ("muon", None), ("muon", "unlikelihood"), ("muon", "ditto")]
)
def test_the_captured_step_is_the_step_and_never_waits(kind, loop, precision):
    """With overflows on the way, where there is a loss scale: 2^28 overflows at first."""
    asked = {"layers": 2, "precision": precision, "kind": kind, "scale": 2.0**28, "loop": loop}
    plain, step = make(**asked), make(**asked)
    captured, pairs = CapturedStep(step), []
    given = batches(30, 8, 16_384, 256)
    for batch in given[: WARM_UP + 2]:  # compilation and capture may wait
        pairs.append((plain(*batch), captured(*batch)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in given[WARM_UP + 2 :]:
            pairs.append((plain(*batch), captured(*batch)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured.captured
    one, other = (torch.stack(numbers).cpu() for numbers in zip(*pairs, strict=True))
    assert torch.equal(one[:, 2:], other[:, 2:]), "both skip the same steps"
    counted = one[:, 2] == 1
    assert counted.all() == (plain.scaler is None) and counted.sum() > 5
    assert (one[counted, 0] - other[counted, 0]).abs().max() < 5e-3
    for a, b in zip(plain.net.parameters(), step.net.parameters(), strict=True):
        assert (a - b).norm() <= 2e-2 * a.norm()


class Twins(Ranks):
    """Two ranks that always have the same sequences."""

    alone = False

    def __init__(self):
        super().__init__(0, 2)

    def sum(self, x):
        x *= 2

    def most(self, *values):
        return list(values)


def test_among_ranks_two_graphs_are_the_step():
    """Gradients and loss leave the first graph in one buffer, are summed, and come back into the second."""
    asked = {"layers": 2, "precision": "fp32", "kind": "muon"}
    one, other = CapturedStep(make(**asked)), make(**asked)
    other.ranks = Twins()
    two = CapturedStep(other)
    pairs = [(one(*batch), two(*batch)) for batch in batches(20, 8, 16_384, 256)]
    assert one.captured and two.captured
    for a, b in pairs:
        assert torch.allclose(a, b, rtol=1e-4)


ALONE_OVER_NCCL = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from test_gpu import batches, make
from ant5m.ranks import Ranks
from ant5m.train.step import CapturedStep

store = dist.HashStore()
dist.init_process_group("nccl", store=store, rank=0, world_size=1)
ranks = Ranks(0, 1, store, dist.new_group(backend="gloo"))
asked = {"layers": 2, "precision": "fp32", "kind": "muon"}
one, other = CapturedStep(make(**asked)), make(**asked)
other.ranks = ranks
two = CapturedStep(other)
pairs = [torch.stack((one(*batch), two(*batch))) for batch in batches(20, 8, 16_384, 256)]
assert one.captured and two.captured
assert all(torch.allclose(a, b, rtol=1e-4) for a, b in pairs)
{"leave": ranks.leave, "fail": lambda: ranks.fail(OSError())}[sys.argv[2]]()
print("left", flush=True)
"""


@pytest.mark.parametrize("end", ["leave", "fail"])
def test_two_graphs_with_nccl_between_are_the_step_and_the_process_ends(end):
    """In a group of one: what is not seen is a second GPU. A captured sum would hang at the end."""
    command = [sys.executable, "-c", ALONE_OVER_NCCL, str(Path(__file__).parent), end]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "left\n", process.communicate(timeout=60)
        assert process.wait(timeout=10) == 0, process.stderr.read()
    finally:
        process.kill()


def test_a_step_of_a_share_of_the_batch_bounds_what_more_gpus_can_gain(capsys):
    """Nothing is demanded of the times: they belong to the device."""
    milliseconds = {}
    for gpus in (1, 2, 8):
        step = make(rows=64 // gpus)
        step.ranks = Twins()
        captured, (batch,) = CapturedStep(step), batches(1, 64 // gpus, 16_384)
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for number in range(WARM_UP + 23):
            if number == WARM_UP + 3:
                ends[0].record()
            captured(*batch)
        ends[1].record()
        ends[1].synchronize()
        assert captured.captured
        milliseconds[gpus] = ends[0].elapsed_time(ends[1]) / 20
    with capsys.disabled():
        for gpus, time in milliseconds.items():
            bound = milliseconds[1] / time
            print(
                f"\n{65_536 // gpus:,} tokens: {time:.2f} ms; {gpus} GPUs have at most {bound:.2f} times one"
            )


def test_a_captured_step_of_the_cuda_backend_learns():
    """In fp16, on whatever device: on a T4 it is what auto takes."""
    table = {op: row["cuda"] for op, row in kernels.available().items() if op in kernels.OPS}
    if set(table.values()) != {"ready"}:
        pytest.skip(str(table))
    selected = kernels.selected()
    kernels.select("cuda")
    try:
        captured, (batch,) = CapturedStep(make(rows=16, precision="fp16")), batches(1, 16, 16_384)
        losses = torch.stack([captured(*batch) for _ in range(20)])[:, 0].tolist()
    finally:
        kernels.select(selected)
    assert captured.captured and losses[-1] < losses[0] - 0.5


def test_a_skipped_step_changes_nothing_in_a_graph():
    step = make(layers=2, precision="fp16")
    captured, given = CapturedStep(step), batches(WARM_UP + 3, 8, 16_384, 256)
    for batch in given[:-1]:
        captured(*batch)
    step.scaler.scale.fill_(2.0**60)
    before = {name: x.clone() for name, x in (step.net.state_dict() | step.optimizer.tensors()).items()}
    assert captured(*given[-1])[2:].tolist() == [0, 2.0**59]
    for name, x in (step.net.state_dict() | step.optimizer.tensors()).items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("preset", ["ant-5m", "ant-5m-fit", "ant-5m-best"])
def test_a_step_of_65536_tokens_fits_and_learns(preset, masked):
    """Captured, in as few micro-batches as the planner would take, within the memory that it counts."""
    shape, memory = PRESETS[preset], torch.cuda.get_device_properties(0).total_memory
    most = fitting_tokens(shape, memory, half=True) // LENGTH
    rows = next(n for n in (64, 32, 16, 8, 4, 2, 1) if n <= most)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    step = make(preset, rows=rows)
    step.eos_token_id = 0 if masked else None
    captured, (batch,) = CapturedStep(step), batches(1, 64, shape.vocab_size)
    losses = torch.stack([captured(*batch) for _ in range(20)])[:, 0].tolist()
    assert captured.captured and losses[-1] < losses[0] - 0.5
    needed = torch.cuda.max_memory_allocated() - base
    assert fitting_tokens(shape, needed, half=True) <= rows * LENGTH or masked, f"{needed / 2**30:.1f} GiB"


@pytest.mark.parametrize("length", [1, 15, 1_023, 1_025])
def test_logits_and_gradients_of_a_whole_model(length):
    """The backends that auto picks, against the reference in float64."""
    torch.manual_seed(0)
    net = Ant(
        dataclasses.replace(PRESETS["ant-5m"], max_position_embeddings=1_025, num_hidden_layers=3)
    ).cuda()
    exact = copy.deepcopy(net).double()
    ids = torch.randint(16_384, (2, length), device="cuda")
    with torch.autocast("cuda", native_half()):
        loss = net(ids, ids)
    loss.backward()
    selected = kernels.selected()
    try:
        kernels.select("reference")
        truth = exact(ids, ids)
        truth.backward()
    finally:
        kernels.select(selected)
    assert abs(loss - truth) < 2e-2
    total = torch.nn.utils.get_total_norm([p.grad for p in exact.parameters()])
    for (name, a), b in zip(net.named_parameters(), exact.parameters(), strict=True):
        # One position attends to itself alone, and the gradients of q and k are 0.
        assert (a.grad - b.grad).norm() < 0.05 * b.grad.norm() + 1e-4 * total, name


def test_the_reference_takes_no_t_by_t_matrix():
    """For grouped queries in fp32 older versions of torch make one: 8 x 8 heads x 4,096^2 x 4 B = 4 GiB."""
    q = torch.randn(8, 4_096, 8, 16, device="cuda", requires_grad=True)
    k = torch.randn(8, 4_096, 2, 16, device="cuda", requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    reference.attention(q, k, k).sum().backward()
    assert torch.cuda.max_memory_allocated() < 1 << 30


def test_a_run_on_the_gpu_stops_resumes_and_ends(config):  # noqa: F811
    chosen = dataclasses.replace(config, device="cuda", steps=30, max_minutes=1e-9)
    assert pretrain(chosen).step == 0
    result = pretrain(TrainConfig(resume=config.out))
    assert (result.step, result.stopped) == (30, None)
    assert latest_checkpoint(config.out).name == "step-00000030"
    lines = [line for line in read_metrics(config.out / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert result.evaluation.loss < lines[0]["loss"] - 0.5
