"""How fast a device is at the few things that a training step is made of: from data sheets, or measured."""

from dataclasses import dataclass

import torch
from stopwatch import seconds

MUFU = 16
"""exponentials per clock and multiprocessor, compute capability 7.5 to 9.0 (CUDA C++ Programming Guide)"""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    name: str
    flops: float
    """in matrix products of the training's dtype"""
    ops: float
    """other fp32 instructions; a multiply-add is one"""
    exps: float
    bytes: float
    """read and written, together"""
    launch: float
    """seconds that the smallest kernel takes of a running queue"""
    units: bool
    """a GPU has separate units for these, which work side by side; a CPU's cores do all but the bytes"""
    backend: str
    """of `ant5m.kernels`, that `auto` takes there"""
    source: str

    def to_dict(self) -> dict[str, float | str | bool]:
        return dict(vars(self))


def _gpu(
    name: str, teraflops: float, gigabytes: float, processors: int, lanes: int, gigahertz: float, source: str
) -> Rates:
    clock = processors * gigahertz * 1e9
    return Rates(
        name,
        teraflops * 1e12,
        lanes * clock,
        MUFU * clock,
        gigabytes * 1e9,
        LAUNCH,
        units=True,
        backend="cuda" if name == "T4" else "triton",
        source=source,
    )


LAUNCH = 2e-6
"""assumed, of a kernel inside a CUDA graph"""

# Products at a sustained rate, not the peak: 24 of a T4's 65 TFLOP/s, which its 70 W do not let it keep, and
# 40 % of the others' peaks, as products with 128 numbers a row have on an H100. Bytes at 83 % of the peak, on
# a T4 at 78 %. Fp32 lanes a multiprocessor: 64 on capability 7.5 and 8.0, 128 on 8.6 to 9.0.
# TFLOP/s, GB/s, multiprocessors, lanes, GHz
DEVICES = {
    rates.name: rates
    for rates in (
        _gpu("T4", 24, 250, 40, 64, 1.15, "data sheet: 65 TFLOP/s, 320 GB/s; public reports of the clock"),
        _gpu("L4", 48, 250, 58, 128, 1.5, "data sheet: 121 TFLOP/s dense, 300 GB/s; clock at 72 W assumed"),
        _gpu("RTX 4090", 66, 840, 128, 128, 2.5, "Ada white paper: 165 TFLOP/s, 1,008 GB/s, 2.52 GHz"),
        _gpu("A100", 125, 1_290, 108, 64, 1.41, "data sheet (40 GB): 312 TFLOP/s, 1,555 GB/s, 1.41 GHz"),
        _gpu("H100", 400, 2_800, 132, 128, 1.7, "data sheet (SXM): 989 TFLOP/s, 3,350 GB/s; clock assumed"),
    )
}


@dataclass(frozen=True)
class Link:
    """What joins the devices of a machine."""

    devices: int
    bytes: tuple[float, float]
    """a second, of a ring all-reduce: the least and the most that is expected"""
    latency: float
    """seconds of the smallest all-reduce"""
    source: str

    def all_reduce(self, size: int) -> tuple[float, float]:
        """Seconds for so many bytes, at the least and at the most: each device sends and gets
        2 (n - 1) / n of them."""
        moved = 2 * (self.devices - 1) / self.devices * size
        slowest, fastest = (moved / rate + self.latency for rate in self.bytes)
        return fastest, slowest


# Nobody here has measured them.
LINKS = {
    "T4": Link(2, (5e9, 10e9), 50e-6, "PCIe 3.0 x16 through the host's memory: 5 to 10 of 16 GB/s assumed"),
    "H100": Link(8, (100e9, 400e9), 50e-6, "NVLink 4: 100 to 400 of 450 GB/s assumed, messages are small"),
}


def measure(device: torch.device | str = "cpu") -> Rates:
    """The rates of this machine, now: the best of some tries each."""
    device = torch.device(device)
    if device.type == "cuda":
        return _measure_gpu(device)
    flops = _measure_flops(device, torch.float32, 1_024)
    return Rates(
        name="cpu",
        flops=flops,
        # Products do a multiply-add an instruction.
        ops=flops / 2,
        exps=_measure_exps(),
        bytes=measure_bytes(device),
        launch=_measure_launch(),
        units=False,
        backend="cpu",
        source=f"measured, {torch.get_num_threads()} threads",
    )


def _measure_gpu(device: torch.device) -> Rates:
    from spin import measure_spin

    properties = torch.cuda.get_device_properties(device)
    native = (properties.major, properties.minor) >= (8, 0)
    dtype = torch.bfloat16 if native else torch.float16
    ops, exps = measure_spin(device)
    return Rates(
        name=properties.name,
        flops=_measure_flops(device, dtype, 4_096),
        ops=ops,
        exps=exps,
        bytes=measure_bytes(device),
        launch=LAUNCH,
        units=True,
        backend="triton" if native else "cuda",
        source="measured",
    )


def _measure_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device)


def measure_bytes(device: torch.device | str) -> float:
    """Bytes a second of a copy, what is read and what is written together, of far more than any cache."""
    device = torch.device(device)
    source = torch.ones(1 << (28 if device.type == "cuda" else 26), device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source), device)


def _measure_exps() -> float:
    x = torch.linspace(-8, 0, 1 << 16)  # with its result in L2
    out = torch.empty_like(x)

    def many():
        for _ in range(16):
            torch.exp(x, out=out)

    return 16 * x.numel() / seconds(many, "cpu")


def _measure_launch() -> float:
    x = torch.zeros(1)

    def many():
        for _ in range(100):
            x.add_(1)

    return seconds(many, "cpu") / 100
