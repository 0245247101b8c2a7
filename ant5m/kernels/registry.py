"""The ops and the backends, by name."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.kernels.dispatch import Op

BACKENDS = ("reference", "cpu", "triton", "cuda")

OPS: dict[str, "Op"] = {}
"""as they are declared in `ops.py`"""

_modules: dict[str, ModuleType] = {}


def load(backend: str) -> ModuleType:
    """The module of a backend, imported when it is first asked."""
    if backend not in _modules:
        check_name(backend)
        _modules[backend] = importlib.import_module(f"ant5m.kernels.{backend}")
    return _modules[backend]


def forget() -> None:
    """Who runs an op is decided again at its next call: after something else was selected or restored."""
    for op in OPS.values():
        op.chosen.clear()


def check_name(backend: str) -> None:
    """Raises `UserError` where there is no such backend."""
    if backend not in (*BACKENDS, "auto"):
        raise UserError(f"there is no kernel backend '{backend}' (use auto, {', '.join(BACKENDS)})")
