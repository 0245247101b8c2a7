"""Whether a backend computes on this device what the reference does, found out before it is used there.

Kernels are tested in an interpreter or an emulator, on devices that somebody had at hand, with the compiler
of that day. So the first use of an op on a given GPU, with given sizes and dtypes, runs it once on a few rows
and compares outputs and gradients with the reference in float64: some milliseconds, beside the compilation
that the first use costs anyway. An implementation that is `timed` is also timed beside the composition of
smaller ops that it stands for. What was chosen so is part of a run: see `choices`.
"""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ant5m.errors import first_line
from ant5m.kernels.registry import OPS, forget, load
from ant5m.kernels.samples import Draw, Sizes, tensors_of, with_tensors
from ant5m.kernels.tracing import constant_when_traced

if TYPE_CHECKING:
    from ant5m.kernels.dispatch import Implementation, Op

# RMS error over RMS of the reference: three times what the tests allow, and in fp32 room for the 10 bits of
# TF32 where a user has switched it on. A kernel that is wrong is off by far more.
_TOLERANCES = {torch.float32: 5e-3, torch.float16: 1.5e-2, torch.bfloat16: 6e-2}
# What is timed: on a GPU a step of `ant-5m`, 65,536 tokens; on a CPU as much as takes a second or so.
_TIMED = {"cuda": {"batch": 64, "length": 1_024}, "cpu": {"batch": 1, "length": 1_024}}

_found: dict[tuple[Any, ...], str | None] = {}
_choices: dict[str, str] = {}

_FASTER = "faster"


def choices() -> dict[str, str]:
    """What was chosen by stopwatch so far: {backend, op, device, dtypes, sizes: "faster", or why not used}.

    Two starts of one run may find different ones, and with them different rounding: whoever continues a run
    gives them to `restore` first.
    """
    return dict(_choices)


def restore(choices: Mapping[str, str]) -> None:
    """Choose as before, without a stopwatch, wherever these say how."""
    _choices.update(choices)
    _found.clear()
    forget()


def unsupported_reason(
    op: "Op",
    backend: str,
    implementation: "Implementation",
    arguments: tuple,
    tensors: Sequence[torch.Tensor],
    by_clock: bool = True,
) -> str | None:
    """Why `backend` should not be used for the op on such arguments, or None. Answers are kept.

    Without `by_clock` an implementation that is `timed` need not be faster.
    """
    device = tensors[0].device
    timed = implementation.timed and by_clock
    if not timed and not _is_checked(device):
        return None
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    dtypes = tuple(x.dtype for x in tensors)
    missing = tuple(x is None for x in arguments)
    sizes = tuple(op.sizes(*arguments).items())
    return _unsupported_reason(timed, op.name, backend, device, dtypes, autocast, missing, sizes)


@constant_when_traced  # it is found out while torch.compile traces, not in what it makes
def _unsupported_reason(
    timed: bool,
    name: str,
    backend: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    autocast: torch.dtype | None,
    missing: tuple[bool, ...],
    sizes: tuple[tuple[str, int], ...],
) -> str | None:
    key = timed, name, backend, device, dtypes, autocast, missing, sizes
    if key not in _found:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return f"{name} was not checked before the capture"
        trial = Trial(OPS[name], load(backend).IMPLEMENTATIONS[name], *key[3:])
        _found[key] = trial.failure() if _is_checked(device) else None
        if _found[key] is not None:
            warnings.warn(f"{backend}: {_found[key]}", stacklevel=2)
        elif timed:
            _found[key] = _choose(_name(*key[1:]), trial)
    return _found[key]


def _is_checked(device: torch.device) -> bool:
    return device.type == "cuda"


def _choose(name: str, trial: "Trial") -> str | None:
    if name not in _choices:
        _choices[name] = trial.too_slow() or _FASTER
    return None if _choices[name] == _FASTER else _choices[name]


def _name(name, backend, device, dtypes, autocast, missing, sizes) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kinds = dict.fromkeys(str(x).removeprefix("torch.") for x in (*dtypes, *([autocast] if autocast else [])))
    return f"{backend} {name} on {where} in {', '.join(kinds)}: " + ", ".join(f"{k} {n}" for k, n in sizes)


@dataclasses.dataclass
class Trial:
    """An implementation on a device, called as with certain arguments."""

    op: "Op"
    implementation: "Implementation"
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    """of the tensors"""
    autocast: torch.dtype | None
    missing: tuple[bool, ...]
    """which arguments are None"""
    sizes: tuple[tuple[str, int], ...]

    def failure(self) -> str | None:
        """Why it should not be used: it fails, or is off from the reference in float64; else None."""
        try:
            arguments = self._arguments()
            with self._as_called():
                got = results(self.implementation.function, arguments)
            with self._as_called(autocast=False):
                wide = [x.double() if x.is_floating_point() else x for x in tensors_of(arguments)]
                expected = results(self._reference, with_tensors(arguments, wide))
        except torch.OutOfMemoryError:
            raise  # of what else is there now, not of the op
        except Exception as error:  # whatever a compiler or a driver says: the next backend is asked
            return f"{self.op.name} failed its check on this device: {_describe(error)}"
        worst = max((_error(*pair) for pair in zip(got, expected, strict=True)), key=lambda x: (x != x, x))
        allowed = max(_TOLERANCES.get(x, 0.0) for x in (*self.dtypes, self.autocast) if x is not None)
        if worst <= allowed:
            return None
        return f"{self.op.name} failed its check on this device: off by {worst:.2g}, {allowed:.2g} allowed"

    def too_slow(self) -> str | None:
        """A reason if it takes longer, forward and backward, than the composition that it stands for."""
        ways = self.implementation.function, self.op.composition
        try:
            with self._as_called():
                arguments = self._arguments(**_TIMED[self.device.type])
                leaves = [x for x in tensors_of(arguments) if x.is_floating_point()]
                dy = torch.ones_like(self.implementation.function(*arguments))
                # In turns, because a GPU's clock rises as it works.
                rounds = [
                    [_milliseconds(way, arguments, leaves, dy, self.device) for way in ways] for _ in range(3)
                ]
        except torch.OutOfMemoryError:
            return None  # it takes less than what it stands for
        except Exception as error:  # at so many tokens something fails that the comparison had no need of
            return f"{self.op.name} could not be timed on this device: {_describe(error)}"
        alone, composed = map(min, zip(*rounds, strict=True))
        if alone < composed:
            return None
        return f"{self.op.name} takes {alone:.3f} ms on this device, what it stands for {composed:.3f}"

    def _arguments(self, **sizes: int) -> tuple:
        """Such arguments, drawn by a generator of their own: the training's is not touched."""
        draw = Draw(dataclasses.replace(Sizes(), **dict(self.sizes), **sizes), self.dtypes[0], self.device)
        with torch.inference_mode(False):
            samples = self.op.samples(draw)
            alike = (x for x in samples if tuple(y is None for y in x) == self.missing)
            arguments = next(alike, samples[-1])
            pairs = zip(tensors_of(arguments), self.dtypes, strict=True)
            tensors = [x.to(dtype).requires_grad_(x.is_floating_point()) for x, dtype in pairs]
            return with_tensors(arguments, tensors)

    def _reference(self, *arguments: Any) -> Any:
        return self.op.composition(*arguments, backend="reference")

    @contextlib.contextmanager
    def _as_called(self, autocast: bool = True) -> Iterator[None]:
        """Gradients are wanted, and autocast is what it was."""
        enabled = autocast and self.autocast is not None
        mixed = torch.autocast(self.device.type, self.autocast, enabled=enabled)
        with torch.inference_mode(False), torch.enable_grad(), mixed:
            yield


def results(function: Callable, arguments: tuple) -> list[torch.Tensor]:
    """Outputs, and the gradients of all floating tensors that have one."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors_of(arguments)]
    outs = function(*with_tensors(arguments, leaves))
    outs = outs if isinstance(outs, tuple) else (outs,)
    # Of each output another, or gradients of outputs of one shape could be taken for one another.
    ramps = [
        torch.linspace(-1, 1 + i, out.numel(), device=out.device).view_as(out) for i, out in enumerate(outs)
    ]
    loss = sum((out * ramp.to(out.dtype)).sum() for out, ramp in zip(outs, ramps, strict=True))
    # A loss alone has no ramp to speak of: -1 is its only weight.
    wanted = [x for x in leaves if x.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)  # none reaches the angles of RoPE
    return [*outs, *(x for x in grads if x is not None)]


def _milliseconds(function, arguments, leaves, dy, device, repeats: int = 10) -> float:
    """Of `function` and its gradients. A GPU waits until all is queued: launches take no part. On a CPU the
    first of several rounds is the one that warms up."""

    def run():
        torch.autograd.grad(function(*arguments), leaves, dy, allow_unused=True)

    if device.type != "cuda":
        before = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - before)
    run()
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(50_000_000)  # clocks: about 30 ms
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / repeats


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    off = (got.double() - expected.double()).square().mean().sqrt()
    return (off / expected.double().square().mean().sqrt()).item()


def _describe(error: Exception) -> str:
    name, line = type(error).__name__, first_line(error)
    return line if line == name else f"{name}: {line}"
