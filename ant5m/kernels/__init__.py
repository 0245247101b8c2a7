"""The ops of a Llama's training and inference, each with the same signature in every backend.

`reference` (plain PyTorch) is their specification, `cpu` is C++, `triton` and `cuda` are for NVIDIA GPUs. A
backend asked for by name that cannot run an op raises; `auto` takes the fastest that can. `ops.py` declares
the ops, `dispatch.py` decides who runs them.
"""

import contextlib

import torch

from ant5m.kernels import dispatch
from ant5m.kernels.check import choices, restore
from ant5m.kernels.dispatch import available, describe, multiplies_bf16, select, selected
from ant5m.kernels.ops import *  # noqa: F403
from ant5m.kernels.registry import BACKENDS, load
from ant5m.kernels.registry import OPS as _OPS
from ant5m.kernels.tree_mask import TreeMask

OPS = tuple(name for name, op in _OPS.items() if op.core)
"""those that every backend has"""

__all__ = [
    "BACKENDS",
    "OPS",
    "TreeMask",
    "available",
    "bf16_products",
    "choices",
    "describe",
    "multiplies_bf16",
    "release_memory",
    "restore",
    "select",
    "selected",
    *_OPS,
]


def bf16_products(device: torch.device) -> contextlib.AbstractContextManager | None:
    """A context in which the ops that train multiply in bf16 and sum in fp32, while tensors stay in fp32.

    None where the backend in use has no such products: then autocast is the way to bf16.
    """
    module = load(dispatch.in_use(device))
    has = hasattr(module, "bf16_products") and multiplies_bf16(device)
    return module.bf16_products() if has else None


def release_memory() -> int:
    """Give the memory that the `cpu` backend keeps for the next step back to the system; returns its bytes.

    At most what its ops once had in use at the same time, and 32 MiB. A system that refuses memory to an op
    gets it back without being asked; other programs, and torch, need this call.
    """
    return load("cpu").release_memory()
