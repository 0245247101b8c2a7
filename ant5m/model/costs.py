"""What a model costs, by arithmetic: parameters, FLOPs, memory, and what fits into a device."""

import dataclasses

from ant5m.model.config import ModelConfig

# A training step's peak above weights, optimizer and process, in units of the kept activations: gradients in
# flight and the allocator's slack. Measured on CPU at batches of 1-8 x 1,024: 1.22 (ant-5m) and 1.33
# (ant-5m-fit).
TRANSIENT = 1.35

# The process itself: torch's libraries, a CUDA context, the logits of one chunk of the head.
RUNTIME = 512 << 20


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters of each component; the sum is what `Ant(config)` has."""
    queries = config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    layers, width = config.num_hidden_layers, config.hidden_size
    return {
        "embedding": config.vocab_size * width,
        "attention": layers * width * 2 * (queries + keys),
        "mlp": layers * width * 3 * config.intermediate_size,
        "norms": (2 * layers + 1) * width + (2 * layers * config.head_size if config.qk_norm else 0),
        "head": 0 if config.tie_word_embeddings else config.vocab_size * width,
    }


def count_table(config: ModelConfig, vocab_size: int) -> dict[str, float]:
    """`parameters` of the model with another vocabulary, those of its token tables, and their share."""
    parameters = count_parameters(dataclasses.replace(config, vocab_size=vocab_size))
    total, tables = sum(parameters.values()), parameters["embedding"] + parameters["head"]
    return {"parameters": total, "table_parameters": tables, "table_share": tables / total}


def count_flops(config: ModelConfig, sequence_length: int | None = None) -> dict[str, int]:
    """Forward FLOPs per token, mean over a sequence (default: the full context); the backward pass costs
    twice that.

    A multiply-add is 2. Matrix products only: a weight costs 2, and a position attends to (T + 1) / 2 others
    on average, each for 2 products of a head's size. Recomputation does not count, nor do norms, RoPE and
    softmax.
    """
    length = sequence_length or config.max_position_embeddings
    parameters = count_parameters(config)
    queries = config.num_attention_heads * config.head_size
    return {
        "linears": 2 * (parameters["attention"] + parameters["mlp"]),
        "attention": 2 * config.num_hidden_layers * queries * (length + 1),
        "head": 2 * config.vocab_size * config.hidden_size,
    }


def count_activations(config: ModelConfig, half: bool = False) -> int:
    """Bytes per token that a training step keeps for the backward pass; `half`: fp16 or bf16 autocast.

    Per layer: the residual stream twice and one statistic a norm, in fp32; the input of each of the two fused
    products, q, k, v before RoPE, q and k after it, the mixed heads, gate, up and their product, in the
    compute dtype; the log-sum-exp of each head in fp32. Once: the token id, the last residual stream with its
    statistic and the gradient of the head's input. The logits are never kept.
    """
    queries = config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    width, compute = config.hidden_size, 2 if half else 4
    wide = 2 * width + 2 + config.num_attention_heads
    narrow = 2 * width + 3 * queries + 3 * keys + 3 * config.intermediate_size
    once = 8 + 4 * (width + 1) + compute * width
    return config.num_hidden_layers * (4 * wide + compute * narrow) + once


def fitting_tokens(config: ModelConfig, device_memory: int, half: bool = False) -> int:
    """Tokens of a micro-batch (whole sequences of the full context) that train in `device_memory` bytes; may
    be 0.

    Counts the process, fp32 weights, gradients and AdamW's moments, the copies of the weights that a step
    makes (16 + 4 bytes a parameter), and the kept activations with what comes and goes beside them. An
    estimate.
    """
    free = device_memory - RUNTIME - 20 * sum(count_parameters(config).values())
    sequence = TRANSIENT * count_activations(config, half) * config.max_position_embeddings
    return max(0, int(free // sequence)) * config.max_position_embeddings
