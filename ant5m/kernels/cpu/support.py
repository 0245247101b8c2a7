"""What the ops can run, and the checks of what they are given."""

import torch

from ant5m.kernels.cpu.arguments import count_tokens

FUSED_CHANNELS = 256
"""the most that a fused MLP takes; above, the weights and their gradients leave L2, and products of whole
matrices are faster"""

FEW_TOKENS = 32
"""what vectors hold at once; for fewer torch's products are faster"""

_FUSED = ("mlp", "rms_norm_linear", "fused_post_attention")
_FP32_PRODUCTS = (*_FUSED, "qkv_rope", "linear")


def why_not(op: str, *tensors: torch.Tensor) -> str | None:
    """None when `op` can run on these tensors, else the reason."""
    for x in tensors[:3] if op == "attention" else tensors:
        if x.device.type != "cpu":
            return f"the tensors are on {x.device.type}"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes fp32 and bf16, not {str(x.dtype).removeprefix('torch.')}"
    if op in _FUSED and tensors and tensors[0].shape[-1] > FUSED_CHANNELS:
        return f"it takes up to {FUSED_CHANNELS} channels, not {tensors[0].shape[-1]}"
    if op == "linear" and tensors and count_tokens(tensors[0]) < FEW_TOKENS and torch.is_grad_enabled():
        return f"for fewer than {FEW_TOKENS} tokens torch's products are faster"
    if op in _FP32_PRODUCTS and torch.is_autocast_enabled("cpu"):
        return "its products are in fp32, whatever autocast says"
    if op == "attention" and tensors and tensors[0].shape[1] != tensors[1].shape[1]:
        return f"it takes as many keys as queries, not {tensors[1].shape[1]} and {tensors[0].shape[1]}"
    return None


def check(good, message, *tensors):
    """Raise `ValueError` with the tensors' shapes put into the message unless `good`."""
    if not good:
        raise ValueError(message.format(*(list(x.shape) for x in tensors)))


def check_dtypes(*tensors):
    for x in tensors:
        reason = why_not("", x)
        check(reason is None, reason)


def check_heads(q, k):
    fit = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    check(fit, "q {} and k {} do not fit", q, k)


def check_angles(cos, sin, length, dim):
    shape = [length, dim // 2]
    check(list(cos.shape) == list(sin.shape) == shape, f"cos {{}} and sin {{}} must be {shape}", cos, sin)
