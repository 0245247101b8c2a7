"""What a model looks like: its shape, its presets, and the check that the shape is possible."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ant5m.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """A Llama. Field names and meanings are those of Hugging Face's `LlamaConfig`.

    Raises `UserError` when the values cannot make a model.
    """

    vocab_size: int = 16_384
    """entries of the token table"""
    hidden_size: int = 128
    """width of the residual stream"""
    intermediate_size: int = 516
    """width of the SwiGLU"""
    num_hidden_layers: int = 11
    num_attention_heads: int = 8
    """query heads"""
    num_key_value_heads: int = 2
    """key/value heads; each serves num_attention_heads / num_key_value_heads query heads"""
    head_dim: int | None = None
    """hidden_size / num_attention_heads unless given"""
    max_position_embeddings: int = 1_024
    """context length in tokens"""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    """RoPE base"""
    tie_word_embeddings: bool = True
    """the head uses the token table"""
    initializer_range: float = 0.02
    """standard deviation of the initial weights"""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in _REQUIRED:
            if getattr(self, name) > _LARGEST:
                raise UserError(f"{name} must be at most {_LARGEST:,}, not {getattr(self, name):,}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.hidden_size % self.num_attention_heads:
            # Whatever head_dim says: transformers opens no other Llama.
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must divide "
                f"hidden_size ({self.hidden_size})"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_size % 2:
            raise UserError(f"the head size ({self.head_size}) must be even: RoPE rotates pairs")

    @property
    def head_size(self) -> int:
        """Dimensions of one head, never None."""
        assert self.head_dim is not None
        return self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises `UserError` on an unknown name or when a size is missing."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"unknown in a model config: {', '.join(unknown)} (known: {', '.join(sorted(known))})"
            )
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise UserError(f"missing in a model config: {', '.join(missing)}")
        return cls(**values)


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_LARGEST = 10_000_000
"""of any size: beyond, building the model fails only after minutes"""
_POSITIVE = (*_REQUIRED, "rms_norm_eps", "rope_theta", "initializer_range")


def _check_types(config: ModelConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int | None" or field.type == int | None:
            good = value is None or (type(value) is int and value > 0)
        elif field.type is float:
            good = type(value) in (int, float) and value == value and abs(value) != float("inf")
        else:
            good = type(value) is field.type
        if not good:
            kind = getattr(field.type, "__name__", "int")
            raise UserError(f"{field.name} must be a{'n' if kind == 'int' else ''} {kind}, not {value!r}")


PRESETS = {
    # The published model. Its SwiGLU width is not stated; 516 is the multiple of four that gives the
    # published 4.73M parameters of which 44.3 % are the embedding.
    "ant-5m": ModelConfig(),
    # The published correction as written; its table alone is 4.19M parameters, so it leaves the 5M envelope.
    "ant-5m-wide": ModelConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    # The correction made to fit 5M.
    "ant-5m-fit": ModelConfig(
        vocab_size=4_096,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
    # What the published evidence on models of this size favours (docs/better-model.md): a table of a sixth,
    # 9 layers, few heads of a size that every backend has kernels for, no shared key/value heads.
    "ant-5m-best": ModelConfig(
        vocab_size=4_096,
        hidden_size=192,
        intermediate_size=544,
        num_hidden_layers=9,
        num_attention_heads=3,
        num_key_value_heads=3,
    ),
    # The same author's larger model.
    "archaea-74m": ModelConfig(
        vocab_size=50_257,
        hidden_size=512,
        intermediate_size=1_408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
}
