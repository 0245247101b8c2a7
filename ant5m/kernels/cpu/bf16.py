"""Products whose factors are rounded to bf16, where the processor multiplies it."""

import contextlib
import contextvars

import torch

from ant5m import _cpu

enabled = contextvars.ContextVar("bf16", default=False)


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 in the instruction set in use."""
    return "bf16" in _cpu.instruction_set()


@contextlib.contextmanager
def bf16_products():
    """Within it, ops with products that are to give gradients multiply in bf16. What comes in and goes out
    stays in fp32, and so do sums, softmax, norms and rotation."""
    token = enabled.set(True)
    try:
        yield
    finally:
        enabled.reset(token)


def in_bf16(*tensors: torch.Tensor) -> bool:
    """Whether an op of these tensors multiplies in bf16."""
    if tensors[0].dtype == torch.bfloat16:
        return multiplies_bf16()
    return enabled.get() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
