"""The other implementations in the benchmarks, each set up as its users would."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ant5m.model.config import ModelConfig


def transformers_llama(config: ModelConfig, expand_keys: bool = False) -> nn.Module:
    """`LlamaForCausalLM`, with QK-norm `Qwen3ForCausalLM`, of `config`'s shape over PyTorch's attention.

    Args:
        expand_keys: give every query head its own copy of keys and values. Below compute capability 8.0
            PyTorch has no fused attention for grouped queries, and would make a T x T matrix.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, masking_utils
    from transformers.integrations import sdpa_attention

    # A row is one sequence here. transformers looks for several in it, which it cannot while it is compiled:
    # it would make a T x T mask then, and lose the fused attention.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if expand_keys:
        sdpa_attention.use_gqa_in_sdpa = lambda *inputs: False
    shape = {name: value for name, value in config.to_dict().items() if name != "qk_norm"}
    settings = {**shape, "attn_implementation": "sdpa", "use_cache": False}
    if config.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def transformers_loss(net: Any, inputs, targets):
    """The mean loss; our targets are shifted already, so transformers need not do it again."""
    return net(input_ids=inputs, labels=targets, shift_labels=targets).loss


# PyTorch's own ops, with the signatures of `ant5m.kernels`.


def rms_norm(x, weight, eps, residual):
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def rope(q, k, cos, sin):
    cos, sin = (torch.cat((part, part), -1).to(q.dtype)[:, None] for part in (cos, sin))
    return q * cos + _turned(q) * sin, k * cos + _turned(k) * sin


def _turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def attention(q, k, v):
    grouped = q.shape[2] != k.shape[2]
    if grouped and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        # No fused kernel there takes grouped queries.
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        grouped = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


def swiglu(gate, up):
    return F.silu(gate) * up


def mlp(x, gate, up, down):
    return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)


def linear_cross_entropy(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


# Liger-Kernel's, which need a GPU. Its RoPE takes [B, H, T, D] in the memory order of [B, T, H, D].


def _liger_rms_norm(x, weight, eps, residual):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def _liger_rope(q, k, cos, sin):
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (torch.cat((part, part), -1)[None] for part in (cos, sin))
    q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _liger_swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_linear_cross_entropy(hidden, weight, targets):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    loss = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)
    return loss[0] if isinstance(loss, tuple) else loss


LIGER = {
    "rms_norm": _liger_rms_norm,
    "rope": _liger_rope,
    "swiglu": _liger_swiglu,
    "linear_cross_entropy": _liger_linear_cross_entropy,
}
