"""The model: Hugging Face's Llama, or with QK-norm its Qwen3, number for number, over the ops of
`ant5m.kernels`.

Parameters carry the names of `LlamaForCausalLM` (`Qwen3ForCausalLM`), so a state dict moves between the two
as it is. The matrices stay separate (an optimizer such as Muon must see them one by one); the forward pass
multiplies by q, k, v together and by gate, up together, because at these sizes reading the activations once
is what counts.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.kernels.packed_views import join
from ant5m.model.config import ModelConfig

NOT_FINITE = "the model computes NaN or infinity: its training diverged, or its file is damaged"
"""what whoever uses its numbers says; weights may be finite and their products not"""


class KVCache:
    """Keys and values of past positions, for generation.

    Args:
        batch_size: rows B. max_length: positions to make room for.

    `keys` and `values` are [layers, B, max_length, KV, head dim]; `length` positions are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        shape = (
            config.num_hidden_layers,
            batch_size,
            max_length,
            config.num_key_value_heads,
            config.head_size,
        )
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_length(self) -> int:
        return self.keys.shape[2]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v [B, T, KV, D] behind the filled positions and return all of them."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`append` k and v, and let the queries q [B, T, H, D] of the same positions see all before them."""
        return _attention_over_cache(q, *self.append(layer, k, v))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return kernels.rms_norm(x, self.weight, self.eps, residual)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        queries = config.num_attention_heads * self.head_size
        keys = config.num_key_value_heads * self.head_size
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.eps = config.rms_norm_eps
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_size, self.eps)
            self.k_norm = RMSNorm(self.head_size, self.eps)
        self.qk_norm = config.qk_norm

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        q, k, v = kernels.qkv_rope(x, join(*self.weights), cos, sin, self.heads, self.norms, self.eps)
        return kernels.linear(self.attend(q, k, v, cache, starts), self.o_proj.weight)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the product that makes q, k and v."""
        return self.q_proj.weight, self.k_proj.weight, self.v_proj.weight

    @property
    def norms(self) -> list[Tensor] | None:
        """Weights of the norms of q and k, where the model has them."""
        return [self.q_norm.weight, self.k_norm.weight] if self.qk_norm else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None = None, starts: Tensor | None = None
    ) -> Tensor:
        """What the heads see, beside one another: [B, T, heads * head size]."""
        attn_out = kernels.attention(q, k, v, starts) if cache is None else cache.attend(self.layer, q, k, v)
        return attn_out.flatten(-2)


def _attention_over_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of the S positions of k, v [B, S, KV, D]."""
    new, total = q.shape[1], k.shape[1]
    seen = None  # one position sees all before it
    if new > 1:
        seen = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=grouped).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.mlp(x, *self.weights)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        pending: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        starts: Tensor | None = None,
        rows: Tensor | slice | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """`pending` [B, T, D], by the layer before, is yet to be added to `residual`; so is what is returned.

        With `rows` only these positions are returned.
        """
        if not torch.is_grad_enabled():
            return None, self._infer(residual, cos, sin, cache, starts, rows)
        x, residual = _add_and_norm(self.input_layernorm, pending, residual)
        attn_out = self.self_attn(x, cos, sin, cache, starts)
        if rows is not None:
            attn_out, residual = attn_out[:, rows], residual[:, rows]
        x, residual = self.post_attention_layernorm(attn_out, residual)
        return self.mlp(x), residual

    def _infer(
        self,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None,
        starts: Tensor | None,
        rows: Tensor | slice | None,
    ) -> Tensor:
        """The residual stream behind the layer, in ops that need no gradients."""
        attention, first, second = self.self_attn, self.input_layernorm, self.post_attention_layernorm
        qkv = kernels.rms_norm_linear(residual, first.weight, first.eps, attention.weights)
        q, k, v = kernels.rope_packed(qkv, cos, sin, attention.heads, attention.norms, attention.eps)
        attn_out = attention.attend(q, k, v, cache, starts)
        if rows is not None:
            attn_out, residual = attn_out[:, rows], residual[:, rows]
        return kernels.fused_post_attention(
            residual, attn_out, attention.o_proj.weight, second.weight, second.eps, *self.mlp.weights
        )


class Body(nn.Module):
    """Everything between token ids and the head.

    Whoever gives a `cache` decides what sees what: its `attend(layer, q, k, v)` stands in for the attention.
    `rows` are the positions whose result is wanted; None: all.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        starts: Tensor | None = None,
        rows: Tensor | slice | None = None,
    ) -> Tensor:
        # Each norm also adds what the block before it made to the residual stream.
        residual = self.embed_tokens(input_ids)
        pending = None
        for layer in self.layers[:-1]:
            pending, residual = layer(pending, residual, cos, sin, cache, starts)
        # Whatever attends to other positions is behind them now.
        pending, residual = self.layers[-1](pending, residual, cos, sin, cache, starts, rows)
        return _add_and_norm(self.norm, pending, residual)[0]


def _add_and_norm(norm: RMSNorm, pending: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
    return (norm(residual), residual) if pending is None else norm(pending, residual)


class Ant(nn.Module):
    """A Llama, or with `qk_norm` a Qwen3, of `config`'s shape with freshly drawn weights (torch's global
    generator decides them).

    `net(input_ids)` gives the logits [B, T, V] of input_ids [B, T] int64; `net(input_ids, targets)` the mean
    loss in nats over targets [B, T] (-100: not counted); `net(input_ids, cache=cache)` the logits of new
    positions, whose keys and values are added to the cache. With `starts` [B, T] int64 (without a cache)
    position t attends to positions starts[b, t]..t only, so that documents in one row do not see each other.
    `z_loss` is that of `kernels.linear_cross_entropy`: it changes the gradient of the loss, not the loss.
    With `head` it gives head(hidden [B, T, D], head weight [V, D]), for other losses than the usual one.
    Raises `UserError` when T is above the context length.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """The head's matrix [V, D]: the token table itself when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: KVCache | None = None,
        starts: torch.Tensor | None = None,
        head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        z_loss: float | None = None,
    ) -> torch.Tensor:
        past = 0 if cache is None else cache.length
        end = past + input_ids.shape[1]
        if end > self.config.max_position_embeddings:
            raise UserError(
                f"{end} tokens do not fit into the model's context of {self.config.max_position_embeddings}"
            )
        hidden = self.model(input_ids, self.cos[past:end], self.sin[past:end], cache, starts)
        if cache is not None:
            cache.length = end
        if head is not None:
            return head(hidden, self.head_weight)
        if targets is None:
            # The logits of many positions are large: not for memory that a backend keeps.
            product = kernels.linear if hidden.shape[1] == 1 else F.linear
            return product(hidden, self.head_weight)
        return kernels.linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, targets.flatten(), z_loss=z_loss
        )


def rope_table(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [context, head dim / 2], of position * base^(-2j / head dim)."""
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
    frequency = 1.0 / config.rope_theta**exponent
    angle = torch.arange(config.max_position_embeddings).float()[:, None] * frequency
    return angle.cos(), angle.sin()
