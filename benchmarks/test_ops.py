"""Each op of a training step beside its peers: PyTorch's own, the same compiled, Liger-Kernel's.

Runs on the first GPU in its training precision, else on the CPU in fp32. Every round runs each variant once,
forward and backward, on inputs that rotate through more memory than a cache holds; ratios are medians of the
rounds' own ratios. A variant is compared with the reference before it is timed. GFLOP/s count what
causality asks for; GB/s count each input read once and each output written once.
"""

import gc
import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import peers
import pytest
import torch
from devices import Rates
from rich.console import Console
from rich.table import Table
from stopwatch import Stopwatch
from variant import training_precision

from ant5m import kernels
from ant5m.device import DTYPES
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes
from ant5m.model.config import PRESETS
from ant5m.train.loss_scaler import FIRST_SCALE

GPU = torch.cuda.is_available()
BATCH, LENGTH, ROUNDS = (64, 1_024, 30) if GPU else (8, 1_024, 7)
LIGER = GPU and importlib.util.find_spec("liger_kernel") is not None
OURS = ("reference", "triton", "cuda") if GPU else ("reference", "cpu")
CACHE = 128 << 20
"""bytes of inputs to rotate through: more than an H100's 50 MB of L2 or a CPU's L3 keep"""
MOST_ERROR = 0.03
"""RMS error over RMS against the reference, in bf16 at most 0.01 where all is well"""


@dataclass
class Case:
    """An op of a preset, as a training step calls it."""

    op: str
    sizes: Sizes

    def make(self, device: torch.device, dtype: torch.dtype) -> list:
        """Its arguments, drawn; without those at the end that are no tensors, which peers do not have."""
        draw = Draw(self.sizes, dtype, device, requires_grad=True)
        first, *others = OPS[self.op].samples(draw)
        arguments = list(others[-1] if self.op == "rms_norm" else first)  # with a residual, without documents
        while not isinstance(arguments[-1], torch.Tensor):
            arguments.pop()
        return arguments

    def work(self, inputs: list) -> dict[str, tuple[str, float]]:
        """{direction: ("GFLOP/s" or "GB/s", FLOPs or bytes)}, what it has to do."""
        op = OPS[self.op]
        forward, backward = op.cost(*op.complete(*inputs))
        if self.op == "linear_cross_entropy":
            # All gradients are made in the forward pass, or in the backward pass: together counts.
            return {"both": ("GFLOP/s", forward.flops + backward.flops)}
        pairs = {"forward": forward, "backward": backward}.items()
        return {way: ("GFLOP/s", cost.flops) if cost.flops else ("GB/s", cost.bytes) for way, cost in pairs}


def _cases(preset: str) -> dict[str, Case]:
    config = PRESETS[preset]
    sizes = Sizes(
        batch=BATCH,
        length=LENGTH,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_size,
        vocab=config.vocab_size,
    )
    return {f"{preset} {name}": Case(name, sizes) for name in (*kernels.OPS, "mlp")}


CASES = _cases("ant-5m") | _cases("ant-5m-fit")


def _variants(op: str) -> dict[str, Callable]:
    plain = getattr(peers, op)
    variants = {"pytorch": plain, "compiled": torch.compile(plain, dynamic=False)}
    if LIGER and op in peers.LIGER:
        variants["liger"] = peers.LIGER[op]
    return variants | {name: _ours(op, name) for name in OURS}


def _ours(op: str, backend: str) -> Callable:
    def call(*inputs):
        function = getattr(kernels, op)
        reason = function.unsupported_reason(backend, *inputs)
        if reason is not None:  # an op that a backend need not have, or be fast at
            raise NotImplementedError(reason)
        return function(*inputs, backend=backend)

    return call


@pytest.mark.parametrize("name", CASES)
def test_op(benchmark, capsys, device, rates, name):
    case, dtype = CASES[name], DTYPES[training_precision(device)]
    torch.manual_seed(0)
    sets = [case.make(device, dtype)]
    copies = math.ceil(CACHE / _bytes(sets[0]))
    sets += [case.make(device, dtype) for _ in range(min(16, max(2, copies)) - 1)]
    variants, failed = {}, {}
    for variant, call in _variants(case.op).items():
        reason = _why_wrong(call, case.op, sets[0])
        if reason is None:
            variants[variant] = Timed(call, sets, device)
        elif variant in OURS and reason.startswith("is off"):
            pytest.fail(f"{variant} {reason}: no timing of wrong results")
        else:
            failed[variant] = reason
    plain, (*others, last) = variants.get("pytorch"), variants.values()
    benchmark.group = "ops"  # is read when the timing begins
    benchmark.pedantic(last.run, setup=lambda: [variant.run() for variant in others] and None, rounds=ROUNDS)
    benchmark.extra_info |= {"op": case.op, "batch": [BATCH, LENGTH], "dtype": str(dtype).split(".")[1]}
    figures = {
        variant: _figures(timed, plain, case.work(sets[0]), rates) for variant, timed in variants.items()
    }
    benchmark.extra_info |= {"peers": figures, "failed": failed}
    with capsys.disabled():
        Console(width=130).print(_table(f"{name} {benchmark.extra_info['dtype']}", figures, failed))


class Timed:
    """A variant with its seconds in each direction and the most memory that it took beyond its inputs."""

    def __init__(self, call: Callable, sets: list[list], device: torch.device):
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "both": []}
        self.peak_bytes: int | None = None
        self._call, self._sets, self._device = call, sets, device
        self._watch = Stopwatch(device)
        self._round = 0
        self._grads = [_grad(x) for x in _tuple(call(*sets[0]))]
        for _ in range(3):
            self._once()
        for taken in self.seconds.values():
            taken.clear()

    def run(self) -> None:
        self._once()

    def _once(self) -> None:
        inputs = self._sets[self._round % len(self._sets)]
        self._round += 1
        wanted = _wanted(inputs)
        before = torch.cuda.memory_allocated() if self._device.type == "cuda" else 0
        if before:
            torch.cuda.reset_peak_memory_stats()
        self._watch.start()
        outs = _tuple(self._call(*inputs))
        self._watch.split()
        torch.autograd.grad(outs, wanted, self._grads)
        self._watch.split()
        forward, backward = self._watch.read()
        for direction, value in (("forward", forward), ("backward", backward), ("both", forward + backward)):
            self.seconds[direction].append(value)
        if before:
            self.peak_bytes = torch.cuda.max_memory_allocated() - before


def _why_wrong(call: Callable, op: str, inputs: list) -> str | None:
    """None, or which outputs or gradients are inaccurate, or why the variant cannot run at all."""
    try:
        truth = _all_of(_ours(op, "reference"), [_wide(x) for x in inputs])
        made = _all_of(call, inputs)
        for place, (expected, found) in enumerate(zip(truth, made, strict=True)):
            error = (found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            if not error < MOST_ERROR:
                return f"is off by {error:.1e} in result {place}"
        return None
    except Exception as error:  # a peer may fail in any way
        return f"cannot run: {(str(error).strip() or type(error).__name__).splitlines()[0][:120]}"
    finally:
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def _all_of(call: Callable, inputs: list) -> list[torch.Tensor]:
    outs = _tuple(call(*inputs))
    return [*outs, *torch.autograd.grad(outs, _wanted(inputs), [_grad(x) for x in outs])]


def _wide(x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.detach().float().requires_grad_(x.requires_grad)


def _wanted(inputs: list) -> list[torch.Tensor]:
    return [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]


def _tuple(out) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _grad(x: torch.Tensor) -> torch.Tensor:
    # A loss is scaled, as in a training step: else its gradients are too small for fp16.
    return torch.full_like(x, 1 if x.ndim else FIRST_SCALE)


def _bytes(inputs: list) -> int:
    return sum(x.numel() * x.itemsize for x in inputs if isinstance(x, torch.Tensor))


def _figures(timed: Timed, plain: Timed | None, work: dict, rates: Rates) -> dict:
    """What is kept of a variant; `share_of_device`: of what the device was measured to copy or multiply."""
    found: dict = {"peak_bytes": timed.peak_bytes}
    for direction, seconds in timed.seconds.items():
        ratio = None if plain is None else statistics.median(map(_ratio, plain.seconds[direction], seconds))
        found[direction] = {
            "seconds": dict(zip(("q10", "median", "q90"), _quantiles(seconds), strict=True)),
            "speed_over_pytorch": None if ratio is None else round(ratio, 3),
        }
    for direction, (unit, amount) in work.items():
        rate = amount / statistics.median(timed.seconds[direction])
        most = rates.bytes if unit == "GB/s" else rates.flops
        found[direction] |= {unit: round(rate / 1e9, 1), "share_of_device": round(rate / most, 3)}
    return found


def _quantiles(seconds: list[float]) -> list[float]:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return [float(f"{tenths[place]:.4g}") for place in (0, 4, 8)]


def _ratio(a: float, b: float) -> float:
    return a / b


def _table(title: str, figures: dict, failed: dict) -> Table:
    table = Table(
        "variant", "direction", "q10 ms", "median", "q90", "x pytorch", "rate", "of device", "peak MB"
    )
    table.title = title
    for column in table.columns[2:]:
        column.justify = "right"
    for variant, values in figures.items():
        peak = "" if values["peak_bytes"] is None else f"{values['peak_bytes'] / 1e6:,.0f}"
        for direction in ("forward", "backward", "both"):
            row = values[direction]
            unit = next((key for key in row if key.endswith("/s")), None)
            table.add_row(
                variant if direction == "forward" else "",
                direction,
                *(f"{row['seconds'][key] * 1e3:.3f}" for key in ("q10", "median", "q90")),
                "" if row["speed_over_pytorch"] is None else f"{row['speed_over_pytorch']:.2f}",
                f"{row[unit]:,.1f} {unit}" if unit else "",
                f"{row['share_of_device']:.0%}" if unit else "",
                peak if direction == "both" else "",
            )
    for variant, reason in failed.items():
        table.add_row(variant, reason)
    return table
