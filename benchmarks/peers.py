"""What stands beside us in the benchmarks, each as its users would have it."""

from typing import Any

from torch import nn

from ant5m.model.config import ModelConfig


def transformers_llama(config: ModelConfig, expand_keys: bool = False) -> nn.Module:
    """`LlamaForCausalLM` of `config`'s shape over PyTorch's fused attention.

    Args:
        expand_keys: give every query head its own copy of keys and values. Below compute capability 8.0
            PyTorch has no fused attention for grouped queries, and would make a T x T matrix.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, masking_utils
    from transformers.integrations import sdpa_attention

    # A row is one sequence here. transformers looks for several in it, which it cannot while it is compiled:
    # it would make a T x T mask then, and lose the fused attention.
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    if expand_keys:
        sdpa_attention.use_gqa_in_sdpa = lambda *inputs: False
    return LlamaForCausalLM(LlamaConfig(**config.to_dict(), attn_implementation="sdpa", use_cache=False))


def transformers_loss(net: Any, inputs, targets):
    """The mean loss; our targets are shifted already, so transformers need not do it again."""
    return net(input_ids=inputs, labels=targets, shift_labels=targets).loss
