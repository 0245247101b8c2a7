"""The C++ ops beside the reference backend (PyTorch, its SDPA and its BLAS), in one run.

Every round lets each arm run once in turn; figures are medians over rounds, ratios medians of the rounds'
own ratios. GFLOP/s count multiplications and additions that causality asks for; GB/s count each input read
once and each output written once.
"""

import ctypes
import statistics
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from ant5m import _cpu
from ant5m.kernels import cpu, reference

ARMS = {"cpu": cpu, "reference": reference}
TOKENS = 8 * 1_024


def attention_case(batch, length, heads, kv_heads, dim):
    q, k, v = (torch.randn(batch, length, n, dim, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    flops = batch * heads * dim * length * (length + 1) * 2
    return "attention", [q, k, v], {"forward": ("GFLOP/s", flops), "backward": ("GFLOP/s", 2.5 * flops)}


def head_case(tokens, dim, vocab):
    hidden, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocab, dim) * 0.02
    inputs = [hidden, weight.requires_grad_(), torch.randint(vocab, (tokens,))]
    # Both gradients are made in the forward pass.
    return "linear_cross_entropy", inputs, {"forward": ("GFLOP/s", 6 * tokens * dim * vocab)}


def rms_norm_case(tokens, dim):
    x, residual = (torch.randn(tokens, dim, requires_grad=True) for _ in range(2))
    inputs = [x, torch.ones(dim, requires_grad=True), 1e-5, residual]
    passes = 4 * tokens * dim * 4
    return "rms_norm", inputs, {"forward": ("GB/s", passes), "backward": ("GB/s", passes)}


def rope_case(batch, length, heads, kv_heads, dim):
    q, k = (torch.randn(batch, length, n, dim, requires_grad=True) for n in (heads, kv_heads))
    angle = torch.rand(length, dim // 2)
    passes = 2 * 4 * (q.numel() + k.numel())
    return (
        "rope",
        [q, k, angle.cos(), angle.sin()],
        {"forward": ("GB/s", passes), "backward": ("GB/s", passes)},
    )


def swiglu_case(tokens, width):
    # Halves of one product, as in the model.
    gate, up = torch.randn(tokens, 2 * width, requires_grad=True).split(width, -1)
    values = 4 * tokens * width
    return "swiglu", [gate, up], {"forward": ("GB/s", 3 * values), "backward": ("GB/s", 5 * values)}


CASES = {
    "ant-5m attention": (attention_case, (8, 1_024, 8, 2, 16)),
    "ant-5m-fit attention": (attention_case, (8, 1_024, 4, 4, 64)),
    "ant-5m head": (head_case, (TOKENS, 128, 16_384)),
    "ant-5m-fit head": (head_case, (TOKENS, 256, 4_096)),
    "ant-5m rms_norm": (rms_norm_case, (TOKENS, 128)),
    "ant-5m rope": (rope_case, (8, 1_024, 8, 2, 16)),
    "ant-5m swiglu": (swiglu_case, (TOKENS, 516)),
}


@pytest.mark.parametrize("name", CASES)
def test_op(benchmark, capsys, name, rounds=7):
    make, shape = CASES[name]
    op, inputs, work = make(*shape)
    seconds = _in_turn(benchmark, op, inputs, rounds)
    benchmark.group = "cpu kernels"
    benchmark.extra_info |= {"op": op, "shape": shape, "instruction_set": _cpu.instruction_set()}
    with capsys.disabled():
        print(f"\n{name} {list(shape)}")
        for direction, (unit, amount) in work.items():
            ratio = statistics.median(map(_ratio, seconds["reference"][direction], seconds["cpu"][direction]))
            for arm in ARMS:
                median = statistics.median(seconds[arm][direction])
                benchmark.extra_info[f"{arm} {direction}"] = {
                    "milliseconds": round(median * 1e3, 3),
                    unit: round(amount / median / 1e9, 1),
                }
                print(f"  {direction:8} {arm:10} {median * 1e3:9.2f} ms {amount / median / 1e9:8.1f} {unit}")
            benchmark.extra_info[f"{direction} times as fast"] = round(ratio, 2)
            print(f"  {direction:8} cpu is {ratio:.2f} times as fast")


GROWTH = {
    "batch": [(attention_case, (n, 1_024, 8, 2, 16), n) for n in (1, 2, 4, 8, 16)],
    "context": [(attention_case, (2, n, 8, 2, 16), n) for n in (256, 512, 1_024, 2_048, 4_096)],
    "vocabulary": [(head_case, (2_048, 128, n), n) for n in (1_024, 4_096, 16_384, 65_536)],
}


@pytest.mark.parametrize("axis", GROWTH)
def test_growth(benchmark, capsys, axis, rounds=3):
    """Time and additional memory, forward and backward together, as one size grows."""
    rows = []
    for make, shape, size in GROWTH[axis]:
        op, inputs, _ = make(*shape)
        seconds = _in_turn(None, op, inputs, rounds)
        for arm in ARMS:
            both = [sum(pair) for pair in zip(*seconds[arm].values(), strict=True)]
            memory = _memory(lambda arm=arm, op=op, inputs=inputs: _step(arm, op, inputs))
            rows.append({"arm": arm, axis: size, "seconds": statistics.median(both), "bytes": memory})
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are in extra_info
    benchmark.group = "cpu kernels: growth"
    benchmark.extra_info |= {"op": op, "axis": axis, "rows": rows}
    _draw(axis, op, rows)
    with capsys.disabled():
        print(f"\n{op} by {axis}")
        for row in rows:
            milliseconds, megabytes = row["seconds"] * 1e3, row["bytes"] / 1e6
            print(f"  {row[axis]:6} {row['arm']:10} {milliseconds:9.2f} ms {megabytes:9.1f} MB")


def _in_turn(benchmark, op, inputs, rounds):
    """{arm: {"forward": seconds of each round, "backward": ..}}; without `benchmark` just that."""
    seconds = {arm: {"forward": [], "backward": []} for arm in ARMS}

    def turn(arm):
        for direction, value in zip(seconds[arm], _step(arm, op, inputs), strict=True):
            seconds[arm][direction].append(value)

    for arm in ARMS:
        _step(arm, op, inputs)
    if benchmark:
        benchmark.pedantic(turn, args=("cpu",), setup=lambda: turn("reference"), rounds=rounds)
    else:
        for _ in range(rounds):
            for arm in ARMS:
                turn(arm)
    return seconds


def _step(arm, op, inputs):
    start = time.perf_counter()
    out = getattr(ARMS[arm], op)(*inputs)
    middle = time.perf_counter()
    outs = out if isinstance(out, tuple) else (out,)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = [torch.ones_like(x) for x in outs]
    begin = time.perf_counter()
    torch.autograd.grad(outs, wanted, grads)
    return middle - start, time.perf_counter() - begin


def _ratio(a, b):
    return a / b


def _memory(action):
    """Bytes of resident memory that `action` adds at its peak; 0 where that is not known."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # makes the peak what is resident now
    before = _status(status, "VmRSS")
    action()
    return _status(status, "VmHWM") - before


def _status(path, field):
    line = next(line for line in path.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _draw(axis, op, rows):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (key, scale, label) in enumerate((("seconds", 1e3, "ms"), ("bytes", 1e-6, "MB")), 1):
        axes = figure.add_subplot(1, 2, place)
        for arm in ARMS:
            points = [(row[axis], row[key] * scale) for row in rows if row["arm"] == arm]
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        axes.set_xticks([x for x, _ in points], [str(x) for x, _ in points])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{op}, forward and backward, {torch.get_num_threads()} threads")
    figure.savefig(Path(__file__).parent / "results" / f"cpu-{op}-by-{axis}.png", dpi=120)
