"""A model's shape in Hugging Face's words: `config.json` of a `LlamaForCausalLM`, or with QK-norm of a
`Qwen3ForCausalLM`, read and written."""

from dataclasses import dataclass
from typing import Any

import msgspec

from ant5m.errors import UserError
from ant5m.files import what_and_where
from ant5m.model.config import ModelConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""by model type"""

# What transformers takes for a key that the file leaves out, where ModelConfig would take something else.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2_048},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}

# key -> the values that mean "as in a plain Llama or Qwen3"; the first is what a missing key means.
_PLAIN = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
    "use_sliding_window": (False,),
}


@dataclass
class _Rope:
    """What is relied upon of the two objects about RoPE."""

    rope_theta: float | None = None
    rope_type: str = "default"
    type: str = "default"
    """the older name"""
    partial_rotary_factor: float | None = None


@dataclass
class _Config:
    """What is relied upon of a `config.json` beside the fields of `ModelConfig`, which checks its own."""

    model_type: str
    architectures: list[str] | None = None
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None


def config_from_huggingface(values: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`.

    Reads the layouts of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). What has no
    place in `ModelConfig` and would change a logit (biases, another activation, RoPE scaling, quantized
    weights, own code) raises `UserError`; what only matters elsewhere (token ids, dropout, caching) is
    ignored.
    """
    try:
        config = msgspec.convert(values, _Config)
    except msgspec.ValidationError as error:
        raise UserError(what_and_where(error)) from None
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"model_type is {model_type!r}: only {' and '.join(map(repr, ARCHITECTURES))} can be read"
        )
    architecture = ARCHITECTURES[model_type]
    if (config.architectures or [architecture]) != [architecture]:
        raise UserError(f"architectures is {config.architectures!r}: only [{architecture!r}] can be read")
    for key, plain in _PLAIN.items():
        if values.get(key, plain[0]) not in plain:
            raise UserError(f"{key} is {values[key]!r}: only {plain[0]!r} can be read")
    if any(kind != "full_attention" for kind in config.layer_types or ()):
        raise UserError(f"layer_types is {config.layer_types!r}: only layers of full_attention can be read")
    known = {name: values[name] for name in ModelConfig.__dataclass_fields__ if name in values}
    known = {**_DEFAULTS[model_type], **known, "rope_theta": _rope_theta(config, values)}
    known["qk_norm"] = model_type == "qwen3"
    if known.get("num_key_value_heads") is None and "num_attention_heads" in known:
        known["num_key_value_heads"] = known["num_attention_heads"]
    return ModelConfig.from_dict(known)


def _rope_theta(config: _Config, values: dict[str, Any]) -> float:
    """The RoPE base, from wherever it stands; `UserError` if RoPE is not the plain one.

    As in transformers, a `rope_scaling` that is there goes before `rope_parameters`, and its own base before
    the one at the top; two bases that differ are refused all the same.
    """
    named: dict[str, float | None] = {"rope_theta": config.rope_theta}
    for key, rope in (("rope_scaling", config.rope_scaling), ("rope_parameters", config.rope_parameters)):
        if rope is None:
            continue
        kind = rope.rope_type if "rope_type" in values[key] else rope.type
        by_layer = any(isinstance(value, dict) for value in values[key].values())
        if kind != "default" or rope.partial_rotary_factor not in (1, None) or by_layer:
            raise UserError(f"{key} is {values[key]!r}: only plain RoPE can be read, without scaling")
        named[f"the one in {key}"] = rope.rope_theta
    bases = {where: base for where, base in named.items() if base is not None}
    if any(base != other for base in bases.values() for other in bases.values()):
        said = ", ".join(f"{where} {base!r}" for where, base in bases.items())
        raise UserError(f"several bases of RoPE (rope_theta) are given: {said}: which one is right?")
    return next(iter(bases.values()), 10_000.0)


def config_to_huggingface(
    config: ModelConfig, eos_token_id: int | list[int], bos_token_id: int | None = None
) -> dict[str, Any]:
    """The `config.json` that transformers 4.56 and later open as a `LlamaForCausalLM` or `Qwen3ForCausalLM`.

    RoPE stands there twice, as transformers 4 and 5 look for it. Without `bos_token_id` the (first)
    end-of-text id also begins a text, as in the packed data. There is no `pad_token_id`: it would exclude
    that row of the table from fine-tuning.
    """
    first = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
    model_type = "qwen3" if config.qk_norm else "llama"
    shape = {name: value for name, value in config.to_dict().items() if name != "qk_norm"}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **shape,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"use_sliding_window": False} if config.qk_norm else {"mlp_bias": False, "pretraining_tp": 1}),
        "bos_token_id": first if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
        "use_cache": True,
    }
