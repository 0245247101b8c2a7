"""Whether a backend computes on this device what the reference does, found out before it is used there.

Kernels are tested in an interpreter or an emulator, on devices that somebody had at hand, with the compiler
of that day. So the first use of an op, at given sizes and dtype, on a given device runs it once on a few rows
and compares outputs and gradients with the reference in float64: some milliseconds, beside the compilation
that the first use costs anyway. An op that stands for several others is also timed beside them.
"""

import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from ant5m.kernels import reference
from ant5m.kernels.pieces import join, split
from ant5m.kernels.tracing import constant_when_traced

# RMS error over RMS of the reference: three times what the tests allow, and in fp32 room for the 10 bits of
# TF32 where a user has switched it on. A kernel that is wrong is off by far more.
_TOLERANCES = {torch.float32: 5e-3, torch.float16: 1.5e-2, torch.bfloat16: 6e-2}
# More than one tile, and not a whole number of them; a multiple of 16 as usual lengths are, because Triton
# compiles for that.
_LENGTH = 144

# Where a machine is asked about, and no tensors are there yet: those of `ant-5m`.
_USUAL = {
    "rms_norm": (128,),
    "rope": (8, 2, 16),
    "rope_qkv": (8, 2, 16),
    "attention": (8, 2, 16, False),
    "swiglu": (516,),
    "linear_cross_entropy": (16_384, 128),
    "mlp": (516, 128),
}

# Of a step of `ant-5m`.
_TIMED_TOKENS = 65_536

_found: dict[tuple[Any, ...], str | None] = {}


def failure(
    module: ModuleType, op: str, *tensors: torch.Tensor, dtype: torch.dtype | None = None
) -> str | None:
    """Why `module`'s `op` should not be used on such tensors, or None. With none: on the current GPU, in
    `dtype` (None: the one that it trains in), at usual sizes. Answers are kept.
    """
    if tensors:
        return _failure(module.__name__, op, tensors[0].device, tensors[0].dtype, _sizes(op, *tensors))
    device = torch.device("cuda", torch.cuda.current_device())
    native = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return _failure(module.__name__, op, device, dtype or native, _USUAL[op])


@constant_when_traced  # it is found out while torch.compile traces, not in what it makes
def _failure(
    name: str, op: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]
) -> str | None:
    key = (name, op, device, dtype, sizes)
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return f"{op} was not checked before the capture"
        _found[key] = _compare(sys.modules[name], op, device, dtype, sizes)
        if _found[key] is not None:
            warnings.warn(f"{name}: {_found[key]}", stacklevel=2)
        elif op == "mlp" and device.type == "cuda":
            _found[key] = _too_slow(sys.modules[name], device, dtype, *sizes)
    return _found[key]


def _sizes(op: str, *tensors: torch.Tensor) -> tuple[int, ...]:
    """[D] of a norm and a SwiGLU, [H, KV, D] of RoPE, the same and whether there are documents of attention,
    [V, D] of the head, [W, D] of a SwiGLU block."""
    if op in ("rope", "rope_qkv", "attention"):
        q, k, *others = tensors
        sizes = q.shape[2], k.shape[2], q.shape[3]
        return (*sizes, len(others) > 1) if op == "attention" else sizes
    return tuple(tensors[1].shape) if op in ("linear_cross_entropy", "mlp") else (tensors[0].shape[-1],)


def _compare(module, op, device, dtype, sizes):
    try:
        # As in training, where a norm reads what a product in 16 bits made, and the rest of it is in fp32.
        mixed = op == "rms_norm" and dtype.itemsize == 2
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            first, *others = _inputs(op, sizes)
            inputs = [
                first.to(device, dtype),
                *(x.to(device, torch.float32 if mixed else dtype) for x in others),
            ]
            with torch.autocast(device.type, dtype, enabled=mixed):
                got = _results(_call(module, op, device, sizes), inputs)
            expected = _results(_call(reference, op, device, sizes), [x.double() for x in inputs])
    except torch.OutOfMemoryError:
        raise  # of what else is there now, not of the op
    except Exception as error:  # whatever a compiler or a driver says: the next backend is asked
        return f"{op} failed its check on this device: {_first_line(error)}"
    worst = max((_error(*pair) for pair in zip(got, expected, strict=True)), key=lambda x: (x != x, x))
    if worst <= _TOLERANCES[dtype]:
        return None
    return f"{op} failed its check on this device: off by {worst:.2g}, {_TOLERANCES[dtype]:.2g} allowed"


def _inputs(op: str, sizes: tuple[int, ...]) -> list[torch.Tensor]:
    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(0)  # one of its own: the training's is not touched
    if op == "rms_norm":
        return [draw(2, _LENGTH, *sizes), draw(*sizes), draw(2, _LENGTH, *sizes)]
    if op == "swiglu":
        return [draw(2, _LENGTH, *sizes), draw(2, _LENGTH, *sizes)]
    if op == "linear_cross_entropy":
        vocab, size = sizes
        return [draw(_LENGTH, size), draw(vocab, size) * 0.3]
    if op == "mlp":
        width, size = sizes
        shapes = (2, _LENGTH, size), (width, size), (width, size), (size, width)
        return [draw(*shape) * scale for shape, scale in zip(shapes, (1, 0.1, 0.1, 0.1), strict=True)]
    heads, kv, size = sizes[:3]
    return [draw(2, _LENGTH, n, size) for n in ((heads, kv) if op == "rope" else (heads, kv, kv))]


def _call(module: ModuleType, op: str, device: torch.device, sizes: tuple[int, ...]) -> Callable:
    if op == "mlp" and module is reference:  # which has none of its own
        return _three_products(reference)
    if op == "rope_qkv":
        return lambda *qkv: _rope_qkv(module, *qkv)
    function = getattr(module, op)
    if op == "rms_norm":
        return lambda x, weight, residual: function(x, weight, 1e-5, residual)
    if op == "rope":
        return lambda q, k: function(q, k, *_angles(q))
    if op == "linear_cross_entropy":

        def head(hidden, weight):
            targets = torch.arange(_LENGTH, device=device) * 7 % len(weight)
            targets[::5] = -100
            return function(hidden, weight, targets, -100)

        return head
    if op == "attention" and sizes[3]:
        starts = torch.arange(_LENGTH, device=device).expand(2, -1) // 50 * 50
        return lambda q, k, v: function(q, k, v, starts)
    return function


def _three_products(module: ModuleType) -> Callable:
    """What `mlp` stands for, as a model computes it."""

    def mlp(x, gate, up, down):
        both = F.linear(x, join(gate, up))
        return F.linear(module.swiglu(*split(both, [len(gate)] * 2)), down)

    return mlp


def _too_slow(
    module: ModuleType, device: torch.device, dtype: torch.dtype, width: int, size: int
) -> str | None:
    """A reason if `mlp`, forward and backward, takes longer than three products around `swiglu`."""
    width += -width % 8  # as a model widens it for those
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    ways = module.mlp, _three_products(module)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            x, down = draw(_TIMED_TOKENS, size), 0.1 * draw(size, width)
            gate, up = (0.1 * draw(2 * width, size)).split(width)
            leaves = [leaf.requires_grad_() for leaf in (x, gate, up, down)]
            dy = draw(_TIMED_TOKENS, size)
            with torch.cuda.device_of(x):
                # In turns, because a GPU's clock rises as it works.
                rounds = [[_milliseconds(way, leaves, dy) for way in ways] for _ in range(3)]
    except torch.OutOfMemoryError:
        return None  # the block takes less than what it stands for
    except Exception as error:  # at so many tokens something fails that the comparison had no need of
        return f"mlp could not be timed on this device: {_first_line(error)}"
    block, products = map(min, zip(*rounds, strict=True))
    if block < products:
        return None
    return f"mlp takes {block:.3f} ms on this device, what it stands for {products:.3f}"


def _milliseconds(function, leaves, dy, repeats: int = 10) -> float:
    """Of `function` and its gradients on the GPU, which waits until all is queued: launches take no part."""

    def run():
        torch.autograd.grad(function(*leaves), leaves, dy)

    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # clocks: about 30 ms
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def _angles(q):
    angle = torch.arange(_LENGTH * q.shape[3] // 2, device=q.device).view(_LENGTH, -1) * 0.01
    return angle.cos(), angle.sin()


def _rope_qkv(module, q, k, v):
    if module is reference:  # which has none of its own
        return *reference.rope(q, k, *_angles(q)), v
    heads = [x.shape[2] for x in (q, k, v)]
    return module.rope_qkv(torch.cat((q, k, v), 2).flatten(-2), *_angles(q), heads)


def _results(function, inputs):
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    # Of each output another, or gradients of outputs of one shape could be taken for one another.
    ramps = [
        torch.linspace(-1, 1 + i, out.numel(), device=out.device).view_as(out) for i, out in enumerate(outs)
    ]
    loss = sum((out * ramp.to(out.dtype)).sum() for out, ramp in zip(outs, ramps, strict=True))
    # A loss alone has no ramp to speak of: -1 is its only weight.
    return [*outs, *torch.autograd.grad(loss, leaves)]


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    off = (got.double() - expected.double()).square().mean().sqrt()
    return (off / expected.double().square().mean().sqrt()).item()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
