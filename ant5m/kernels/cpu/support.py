"""What the ops can run, and the checks of what they are given."""

import torch

FUSED_CHANNELS = 256
"""the most that a layer in one piece takes: above, its weights leave L2, and products of whole matrices are
faster"""


def unsupported_reason(tensors) -> str | None:
    """None where ops can run on these tensors, else the reason."""
    for x in tensors:
        if not x.is_cpu:
            return f"the tensors are on {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16) and x.is_floating_point():
            return f"it takes fp32 and bf16, not {str(x.dtype).removeprefix('torch.')}"
    return None


# What else an op cannot run, of its arguments.


def needs_fp32_products(*_) -> str | None:
    return "its products are in fp32, whatever autocast says" if torch.is_autocast_enabled("cpu") else None


def needs_no_gradients(x, *_) -> str | None:
    if torch.is_grad_enabled():
        return "it gives no gradients"
    if x.shape[-1] > FUSED_CHANNELS:
        return f"it takes up to {FUSED_CHANNELS} channels, not {x.shape[-1]}"
    return needs_fp32_products()
