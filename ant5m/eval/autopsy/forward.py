"""The model's forward pass in plain PyTorch, open where heads look back: to watch them and to change them.

Gives the logits of `Ant` itself (a test holds it to that); slower, and without gradients.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ant5m.model.ant import Ant, Layer, RMSNorm
from ant5m.model.config import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, T, H, D], k, v [B, T, KV, D], normed but not rotated) -> what the heads read, [B, T, H, D]"""


def angles(config: ModelConfig, positions: Tensor) -> Tensor:
    """Angles of RoPE, fp64 [T, D / 2], at any integer positions [T], beyond the context too."""
    exponent = torch.arange(0, config.head_size, 2, dtype=torch.float64, device=positions.device)
    return positions.double()[:, None] * config.rope_theta ** (-exponent / config.head_size)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """x [B, T, heads, D] by angle [T, D / 2], in Llama's half-rotated layout."""
    cos, sin = (part[:, None].to(x.dtype) for part in (angle.cos(), angle.sin()))
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@dataclass(frozen=True)
class Attention:
    """Causal attention of every layer, with what can be changed about it.

    `attention(layer, q, k, v)` is an `Attend`.
    """

    angle: Tensor
    """of RoPE, [T, D / 2]"""
    reads: Tensor
    """int64 [H]: the KV head that each query head reads"""
    pairs: Tensor
    """[D / 2]: factor on each rotation pair's part of the scores; 0 takes the pair away"""

    @classmethod
    def of(cls, net: Ant, length: int) -> "Attention":
        """As the model does it, over `length` positions."""
        config, device = net.config, net.device
        group = config.num_attention_heads // config.num_key_value_heads
        return cls(
            angle=angles(config, torch.arange(length, device=device)),
            reads=torch.arange(config.num_attention_heads, device=device) // group,
            pairs=torch.ones(config.head_size // 2, device=device),
        )

    def changed(self, **values: Tensor) -> "Attention":
        """The same but for `values`."""
        return dataclasses.replace(self, **values)

    def queries_and_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both rotated and [B, H, T, D], each query head with the keys that it reads."""
        q = rotate(q, self.angle) * self.pairs.repeat(2).to(q.dtype)
        return q.transpose(1, 2), rotate(k, self.angle)[:, :, self.reads].transpose(1, 2)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.queries_and_keys(q, k)
        v = v[:, :, self.reads].transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def scores(q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """Scores [B, H, R, T] of the query positions `rows` [R]; -inf where they cannot look.

    q, k: [B, H, T, D], as `Attention.queries_and_keys` gives them.
    """
    values = q[:, :, rows] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return values.masked_fill(~seen(rows, k.shape[2]), -torch.inf)


def seen(rows: Tensor, length: int) -> Tensor:
    """bool [R, T]: which positions the query positions `rows` [R] can look at."""
    return torch.arange(length, device=rows.device) <= rows[:, None]


def layers(net: Ant) -> list[Layer]:
    return cast(list[Layer], list(net.model.layers))


def residuals(net: Ant, start: Tensor, attend: Attend, first: int = 0) -> Iterator[Tensor]:
    """The residual stream [B, T, C] after each layer from `first` on, given that before layer `first`."""
    stream, size = start, net.config.head_size
    for index, layer in enumerate(layers(net)[first:], first):
        x, own = normed(layer.input_layernorm, stream), layer.self_attn
        q, k, v = (project(x).unflatten(-1, (-1, size)) for project in (own.q_proj, own.k_proj, own.v_proj))
        if own.qk_norm:
            q, k = normed(own.q_norm, q), normed(own.k_norm, k)
        stream = stream + own.o_proj(attend(index, q, k, v).flatten(-2))
        x, mlp = normed(layer.post_attention_layernorm, stream), layer.mlp
        stream = stream + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        yield stream


def hidden(net: Ant, start: Tensor, attend: Attend, first: int = 0) -> Tensor:
    """What the head reads [B, T, C], given the stream before layer `first` (for 0: the token rows)."""
    *_, last = residuals(net, start, attend, first)
    return normed(net.model.norm, last)


def token_losses(net: Ant, read: Tensor, targets: Tensor) -> Tensor:
    """Nats [B, T] for every target, of what the head reads, [B, T, C]; a row at a time."""
    rows = zip(read, targets, strict=True)
    return torch.stack([F.cross_entropy(F.linear(x, net.head_weight), y, reduction="none") for x, y in rows])


def normed(module: RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps) * module.weight
