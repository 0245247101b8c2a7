"""What an op is, and which backend runs it.

An `Op` is declared once, in `ops.py`. A backend is a module of this package with

    unsupported_reason(tensors) -> str | None       of the machine, devices and dtypes: None where it can run
    IMPLEMENTATIONS: dict[str, Implementation]      {op: its function, and what else that cannot run}

A backend asked for by name that cannot run one of the `core` ops raises; "auto" takes the first of
`_PREFERENCE` that can. Where no backend has an implementation that can run, the op's own composition of plain
PyTorch and of smaller ops does. That is also the backend "reference".
"""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from ant5m.errors import UserError
from ant5m.kernels import check
from ant5m.kernels.registry import BACKENDS, OPS, check_name, forget, load
from ant5m.kernels.samples import Draw, tensors_of
from ant5m.kernels.tracing import constant_when_traced

P = ParamSpec("P")
R = TypeVar("R")

# Fastest first, by kind of device and, for a GPU, by the compute capability from which on it holds. On 7.5
# Triton has no tensor cores, and so no attention; the kernels of `cuda` are written for it.
_PREFERENCE = (
    ("cpu", (0, 0), ("cpu", "reference")),
    ("cuda", (8, 0), ("triton", "cuda", "reference")),
    ("cuda", (7, 5), ("cuda", "triton", "reference")),
    ("cuda", (0, 0), ("triton", "reference")),
    ("any", (0, 0), ("reference",)),
)

_selected = os.environ.get("ANT5M_KERNELS") or "auto"

_MOST_CHOSEN = 1_024
"""of an op: who runs it, kept by the shapes and dtypes of its arguments"""


@dataclass(frozen=True)
class Implementation:
    """An op in a backend."""

    function: Callable[..., Any]
    """takes all arguments of the op, by position; their shapes fit"""
    unsupported_reason: Callable[..., str | None] = lambda *arguments: None
    """(the same arguments) -> None where `function` can run on them, else why not, in a few words"""
    timed: bool = False
    """used only where it is timed to be faster than the op's composition, before its first use"""


class Cost(NamedTuple):
    """What one direction of an op asks for."""

    flops: float
    """in matrix products; a multiply-add is 2"""
    bytes: float
    """read or written, each number once"""


class Op(Generic[P, R]):
    """An op of the model, called like a function; `backend=None` means the selected one."""

    def __init__(
        self,
        composition: Callable[P, R],
        shapes: str,
        fits: Callable[..., bool],
        samples: Callable[[Draw], list[tuple]],
        sizes: Callable[..., dict[str, int]],
        cost: Callable[..., tuple[Cost, Cost]],
        core: bool,
        differentiable: bool,
    ):
        functools.update_wrapper(self, composition)
        self.name = composition.__name__
        self.composition = composition
        """in plain PyTorch and smaller ops, which it hands `backend` on to: its last argument"""
        self.shapes = shapes
        """in words, for messages"""
        self.fits = fits
        """(arguments) -> whether shapes and dtypes are those of the op; nothing is broadcast"""
        self.samples = samples
        """arguments as a training step has them, one tuple for each way in which it calls the op"""
        self.sizes = sizes
        """(arguments) -> the `Sizes` that decide which code runs"""
        self.cost = cost
        """(arguments) -> of the forward pass, of the backward pass"""
        self.core = core
        """whether every backend has it: one asked for by name that cannot run it raises"""
        self.differentiable = differentiable
        *parameters, _ = inspect.signature(composition).parameters.values()
        self._parameters = [parameter.name for parameter in parameters]
        self._defaults = tuple(parameter.default for parameter in parameters)
        self.chosen: dict[tuple, Callable[..., Any] | None] = {}
        """{what decides who runs it (`_key`): the function, or None for the composition}"""
        OPS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        backend: Any = kwargs.pop("backend", None)
        arguments: tuple = args
        if kwargs or len(args) < len(self._parameters):
            arguments = self._complete(args, kwargs)
        # Asking all again takes up to 15 microseconds, as long as an op itself in generation.
        key = None if torch.compiler.is_compiling() else _key(backend or _selected, arguments)
        function = self._choose(backend, arguments, key) if key not in self.chosen else self.chosen[key]
        if function is None:
            return self.composition(*arguments, backend=backend)
        return function(*arguments)

    def _choose(self, backend: str | None, arguments: tuple, key: tuple | None) -> Callable[..., Any] | None:
        tensors = tensors_of(arguments)
        device = tensors[0].device
        if not self.fits(*arguments) or any(x.device != device for x in tensors):
            raise ValueError(self._misfit(arguments))
        implementation = self._find(backend or _selected, arguments, tensors)
        function = None if implementation is None else implementation.function
        # What a capture refuses may run later.
        if key is not None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            if len(self.chosen) >= _MOST_CHOSEN:
                self.chosen.clear()
            self.chosen[key] = function
        return function

    def complete(self, *arguments: Any) -> tuple:
        """The arguments, with the defaults of those that are missing at the end."""
        return self._complete(arguments, {})

    def unsupported_reason(self, backend: str, *arguments: Any, by_clock: bool = True) -> str | None:
        """Why this backend cannot run the op on these arguments, in a few words; None where it can.

        Without `by_clock` what is used only where it is faster is not timed.
        """
        arguments = self.complete(*arguments)
        return self._unsupported_reason(backend, arguments, tensors_of(arguments), by_clock)

    def _unsupported_reason(
        self, backend: str, arguments: tuple, tensors: Sequence[torch.Tensor], by_clock: bool
    ) -> str | None:
        if backend == "reference":
            return None
        module = load(backend)
        implementation = module.IMPLEMENTATIONS.get(self.name)
        if implementation is None:
            return f"it has no {self.name}"
        return (
            module.unsupported_reason(tensors)
            or implementation.unsupported_reason(*arguments)
            or check.unsupported_reason(self, backend, implementation, arguments, tensors, by_clock)
        )

    def _find(self, name: str, arguments: tuple, tensors: Sequence[torch.Tensor]) -> Implementation | None:
        if name != "auto":
            check_name(name)
        for backend in order(tensors[0].device) if name == "auto" else (name,):
            if backend == "reference":
                return None
            must = self.core and name != "auto"
            reason = self._unsupported_reason(backend, arguments, tensors, by_clock=not must)
            if reason is None:
                return load(backend).IMPLEMENTATIONS[self.name]
            if must:
                raise UserError(f"the kernel backend '{name}' cannot run {self.name}: {reason}")
        return None

    def _complete(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """All arguments, by position."""
        if kwargs:
            named = dict(zip(self._parameters, self._defaults, strict=True)) | kwargs
            args = *args, *(named[name] for name in self._parameters[len(args) :])
        return args + self._defaults[len(args) :]

    def _misfit(self, arguments: tuple) -> str:
        pairs = zip(self._parameters, arguments, strict=True)
        given = [f"{name} {_describe(x)}" for name, x in pairs if tensors_of((x,))]
        return f"{self.name} takes {self.shapes}, all on one device; given {', '.join(given)} do not fit"


def _key(backend: str, arguments: tuple) -> tuple | None:
    """All that decides whether arguments fit and who runs the op on them; None where it cannot be told."""
    found: list[Any] = [backend, torch.is_grad_enabled(), *_autocast_dtypes()]
    for x in arguments:
        if isinstance(x, list | tuple):
            for y in x:
                found += (y.shape, y.dtype, y.device) if isinstance(y, torch.Tensor) else (y,)
        elif isinstance(x, torch.Tensor):
            found += x.shape, x.dtype, x.device
        elif x is None or isinstance(x, int | float):
            found.append(x)
        else:
            return None
    return tuple(found)


def _autocast_dtypes() -> tuple:
    return tuple(
        torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    )


def op(
    shapes: str,
    fits: Callable[..., bool],
    samples: Callable[[Draw], list[tuple]],
    sizes: Callable[..., dict[str, int]],
    cost: Callable[..., tuple[Cost, Cost]],
    core: bool = False,
    differentiable: bool = True,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Makes an `Op` of a function, its composition, whose last argument is `backend`."""

    def declare(composition: Callable[P, R]) -> Op[P, R]:
        return Op(composition, shapes, fits, samples, sizes, cost, core, differentiable)

    return declare


def _describe(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return f"[{', '.join(map(_describe, x))}]"


def select(backend: str) -> None:
    """Make `backend` (or "auto") what `backend=None` means from now on; first set by ANT5M_KERNELS."""
    global _selected
    check_name(backend)
    if backend != "auto":
        for op in _core():
            if (reason := _ready(op, backend)) is not None:
                raise UserError(f"the kernel backend '{backend}' cannot run {op.name}: {reason}")
    _selected = backend
    forget()


def selected() -> str:
    """The backend that `backend=None` means now: a name, or "auto"."""
    return _selected


def available() -> dict[str, dict[str, str]]:
    """{op: {backend: "ready" or the reason why not}} on this machine. What is used only where it is faster is
    ready where it can run."""
    return {
        name: {backend: _ready(op, backend) or "ready" for backend in BACKENDS} for name, op in OPS.items()
    }


def describe(device: torch.device | str) -> str:
    """One line for people: which op runs where on this device, and why not where it would be faster."""
    asked = order(torch.device(device)) if _selected == "auto" else (_selected,)
    places: dict[str, list[str]] = {}
    reasons = set()
    for name, op in OPS.items():
        for place in asked:
            if place == "reference" or (reason := _ready(op, place)) is None or (op.core and len(asked) == 1):
                break
            if name in load(place).IMPLEMENTATIONS:
                reasons.add(reason)
        else:
            place = "reference"
        # An op that stands for several is made of them, wherever these run.
        places.setdefault(place if op.core or place != "reference" else "composed", []).append(name)
    composed = places.pop("composed", [])
    if len(places) == 1:
        where = f"all on {next(iter(places))}"
    else:
        where = "; ".join(f"{', '.join(names)} on {place}" for place, names in places.items())
    if composed and set(places) != {"reference"}:
        where += f", but {', '.join(composed)} made of smaller ops"
    return f"kernels ({_selected}): {where}" + (f" ({'; '.join(sorted(reasons))})" if reasons else "")


def _core() -> list[Op]:
    return [op for op in OPS.values() if op.core]


def _ready(op: Op, backend: str) -> str | None:
    """Why `backend` cannot run the op on its own kind of device, in any dtype of training and usual sizes."""
    if backend != "reference" and op.name not in load(backend).IMPLEMENTATIONS:
        return f"it has no {op.name}"
    reasons = []
    for dtype in _training_dtypes(backend):
        device = "cpu" if dtype == torch.float32 else torch.device("cuda", torch.cuda.current_device())
        arguments = op.samples(Draw(dtype=dtype, device=device))[-1]
        mixed = torch.autocast("cuda", dtype, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(op.differentiable), mixed:
            reason = op.unsupported_reason(backend, *arguments, by_clock=False)
        if reason is None:
            return None
        reasons.append(reason)
    return reasons[0]


def _training_dtypes(backend: str) -> tuple[torch.dtype, ...]:
    if backend in ("reference", "cpu") or not torch.cuda.is_available():
        return (torch.float32,)
    return (torch.bfloat16, torch.float16) if _capability(None) >= (8, 0) else (torch.float16,)


def in_use(device: torch.device) -> str:
    """The backend that is asked first on a device."""
    return order(device)[0] if _selected == "auto" else _selected


def order(device: torch.device) -> tuple[str, ...]:
    """The backends that "auto" asks on a device, the fastest first."""
    return _PREFERENCE[_place(device)][2]


@constant_when_traced  # a number, because torch.compile cannot compare such a tuple
def _place(device: torch.device) -> int:
    """Of the line of `_PREFERENCE` that holds for a device."""
    capability = _capability(device)
    lines = enumerate(_PREFERENCE)
    return next(i for i, (kind, oldest, _) in lines if kind in (device.type, "any") and capability >= oldest)


def _capability(device: torch.device | None) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU (None: the current one); (0, 0) of anything else."""
    is_gpu = device is None or device.type == "cuda"
    if not (is_gpu and torch.cuda.is_available() and torch.version.cuda):
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether its products in bf16 are faster than those in fp32: compute capability 8.0, or AVX512-BF16."""
    if device.type == "cpu":
        return load("cpu").multiplies_bf16()
    return device.type == "cuda" and _capability(device) >= (8, 0)
