"""What a model looks like: its shape, its presets, and the check that the shape is possible."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from ant5m.errors import UserError
from ant5m.schema import Positive, check, check_names

Size = Annotated[int, Meta(ge=1, le=10_000_000)]
"""beyond, building the model fails only after minutes"""
Layers = Annotated[int, Meta(ge=1, le=1_000)]
"""each costs milliseconds to build, whatever its size"""


@dataclass(frozen=True)
class ModelConfig:
    """A Llama, or with `qk_norm` a Qwen3. All other field names and meanings are those of Hugging Face's
    `LlamaConfig` and `Qwen3Config`.

    Raises `UserError` when the values cannot make a model.
    """

    vocab_size: Size = 16_384
    """entries of the token table"""
    hidden_size: Size = 128
    """width of the residual stream"""
    intermediate_size: Size = 516
    """width of the SwiGLU"""
    num_hidden_layers: Layers = 11
    num_attention_heads: Size = 8
    """query heads"""
    num_key_value_heads: Size = 2
    """key/value heads; each serves num_attention_heads / num_key_value_heads query heads"""
    head_dim: Size | None = None
    """hidden_size / num_attention_heads unless given"""
    max_position_embeddings: Size = 1_024
    """context length in tokens"""
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 10_000.0
    """RoPE base"""
    tie_word_embeddings: bool = True
    """the head uses the token table"""
    initializer_range: Positive = 0.02
    """standard deviation of the initial weights"""
    qk_norm: bool = False
    """an RMSNorm over each query head and each key head, before RoPE"""

    def __post_init__(self) -> None:
        check(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        free = self.qk_norm and self.head_dim is not None
        if self.hidden_size % self.num_attention_heads and not free:
            # Whatever head_dim says: transformers opens no other Llama.
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) must divide "
                f"hidden_size ({self.hidden_size}){', or head_dim be given' if self.qk_norm else ''}"
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
        """Plain values, as `from_dict` takes them.

        `qk_norm` is left out where it is false, so that runs and studies from before it was there go on.
        """
        values = dataclasses.asdict(self)
        if not self.qk_norm:
            del values["qk_norm"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises `UserError` on an unknown name or when a size is missing."""
        check_names(cls, values, "a model config", _REQUIRED)
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
    # What the published evidence on models of this size favors (docs/better-model.md): a table of a sixth,
    # 9 layers, few heads of a size that every backend has kernels for, no shared key/value heads.
    "ant-5m-best": ModelConfig(
        vocab_size=4_096,
        hidden_size=192,
        intermediate_size=544,
        num_hidden_layers=9,
        num_attention_heads=3,
        num_key_value_heads=3,
    ),
    # For larger budgets; docs/reference/presets.md has the reasons. Heads of 64, two to a key/value head,
    # widths that are multiples of 64 and vocabularies of 128.
    "ant-10m": ModelConfig(
        vocab_size=8_192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "ant-25m": ModelConfig(
        vocab_size=12_288,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=3,
    ),
    "ant-50m": ModelConfig(
        vocab_size=16_384,
        hidden_size=512,
        intermediate_size=1_408,
        num_hidden_layers=14,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "ant-100m": ModelConfig(
        vocab_size=24_576,
        hidden_size=640,
        intermediate_size=1_792,
        num_hidden_layers=18,
        num_attention_heads=10,
        num_key_value_heads=5,
    ),
    # The author of the published model's larger one.
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
