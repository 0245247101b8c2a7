"""The C++ ops beside the reference backend (PyTorch, its SDPA and its BLAS), in one run.

Every round lets each arm run once in turn; figures are medians over rounds, ratios medians of the rounds'
own ratios. GFLOP/s count multiplications and additions that causality asks for; GB/s count each input read
once and each output written once.
"""

import statistics
import time

import pytest
import torch

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


def _in_turn(benchmark, op, inputs, rounds):
    """{arm: {"forward": seconds of each round, "backward": ..}}."""
    seconds = {arm: {"forward": [], "backward": []} for arm in ARMS}

    def turn(arm):
        for direction, value in zip(seconds[arm], _step(arm, op, inputs), strict=True):
            seconds[arm][direction].append(value)

    for arm in ARMS:
        _step(arm, op, inputs)
    benchmark.pedantic(turn, args=("cpu",), setup=lambda: turn("reference"), rounds=rounds)
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
