"""A model's shape in Hugging Face's words: `config.json` of a `LlamaForCausalLM`, read and written."""

from typing import Any

from ant5m.errors import UserError
from ant5m.model.config import ModelConfig

# What LlamaConfig takes for a key that the file leaves out, where ModelConfig would take something else.
_LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}

# key -> the values that mean "as in a plain Llama"; the first is what a missing key means.
_PLAIN = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "auto_map": (None,),
}


def config_from_huggingface(values: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face `config.json`.

    Reads the layouts of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). What has no
    place in `ModelConfig` and would change a logit (biases, another activation, RoPE scaling, quantized
    weights, own code) raises `UserError`; what only matters elsewhere (token ids, dropout, caching) is
    ignored.
    """
    if values.get("model_type") != "llama":
        raise UserError(f"model_type is {values.get('model_type')!r}: only 'llama' can be read")
    architectures = values.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise UserError(f"architectures is {architectures!r}: only ['LlamaForCausalLM'] can be read")
    for key, plain in _PLAIN.items():
        if values.get(key, plain[0]) not in plain:
            raise UserError(f"{key} is {values[key]!r}: only {plain[0]!r} can be read")
    known = {name: values[name] for name in ModelConfig.__dataclass_fields__ if name in values}
    known = {**_LLAMA_DEFAULTS, **known, "rope_theta": _rope_theta(values)}
    if known.get("num_key_value_heads") is None and "num_attention_heads" in known:
        known["num_key_value_heads"] = known["num_attention_heads"]
    return ModelConfig.from_dict(known)


def _rope_theta(values: dict[str, Any]) -> float:
    """The RoPE base, from whichever of the two layouts is there; `UserError` if RoPE is not the plain one."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{key} must be an object, not {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor") not in (1, None):
            raise UserError(f"{key} is {rope!r}: only plain RoPE can be read, without scaling")
    named = [values.get("rope_theta"), (values.get("rope_parameters") or {}).get("rope_theta")]
    bases = {base for base in named if base is not None}
    if len(bases) > 1:
        raise UserError(
            f"rope_theta is {named[0]!r} but rope_parameters says {named[1]!r}: which one is right?"
        )
    return bases.pop() if bases else 10_000.0


def config_to_huggingface(
    config: ModelConfig, eos_token_id: int, bos_token_id: int | None = None
) -> dict[str, Any]:
    """The `config.json` that transformers 4.56 and later open as a `LlamaForCausalLM`.

    RoPE stands there twice, as transformers 4 and 5 look for it. Without `bos_token_id` the end-of-text id
    also begins a text, as in the packed data. There is no `pad_token_id`: it would exclude that row of the
    table from fine-tuning.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **config.to_dict(),
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "bos_token_id": eos_token_id if bos_token_id is None else bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": "float32",
        "use_cache": True,
    }
