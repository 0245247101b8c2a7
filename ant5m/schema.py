"""Configs as schemas: the values of a dataclass, checked against the types and limits of its annotations."""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from ant5m.errors import UserError

Count = Annotated[int, Meta(ge=1)]
CountOrZero = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]


def check(config: Any, label: Callable[[str], str] = str) -> None:
    """Raise `UserError` with one line about the first value of the dataclass `config` that its annotation
    does not allow; numbers must be finite, too. `label`: what people call a field.
    """
    cls: Any = type(config)
    for name, kind in _annotations(cls).items():
        value = getattr(config, name)
        try:
            msgspec.convert(value, kind)
            good = _is_finite(value)
        except msgspec.ValidationError:
            good = False
        if not good:
            raise UserError(f"{label(name)} must be {describe(kind)}, not {value!r}")


def check_names(cls: type, values: dict[str, Any], what: str, required: tuple[str, ...] = ()) -> None:
    """Raise `UserError` where `values` names a field that the dataclass `cls` lacks, or lacks one of
    `required`. `what`: what the values are, for people."""
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"unknown in {what}: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"missing in {what}: {', '.join(missing)}")


def flag(name: str) -> str:
    """--micro-batch-size of micro_batch_size."""
    return "--" + name.replace("_", "-")


def describe(kind: Any) -> str:
    """What an annotation allows: "a whole number of at least 1", "one of adamw, muon"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [meta for meta in args[1:] if isinstance(meta, Meta)]
        return describe(args[0]) + "".join(map(_limits, limits))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin in (Union, types.UnionType):
        return describe(next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        count = "values" if args[-1] is ... else f"{len(args)} values"
        return f"{count}, each {describe(args[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a path")


def _limits(meta: Meta) -> str:
    if meta.ge is not None and (meta.le is not None or meta.lt is not None):
        return f" from {meta.ge} to " + (f"below {meta.lt}" if meta.lt is not None else f"{meta.le:,}")
    above = f" above {meta.gt}" if meta.gt is not None else ""
    least = f" of at least {meta.ge}" if meta.ge is not None else ""
    below = f" and below {meta.lt}" if meta.lt is not None else ""
    return above + least + below


def _is_finite(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@functools.cache
def _annotations(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)
