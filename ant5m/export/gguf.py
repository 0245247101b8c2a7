"""GGUF for llama.cpp, Ollama and LM Studio: one file with weights and tokenizer, and a Modelfile beside it.

The writer is ours because llama.cpp's converter knows a tokenizer by a hash of its ids, so no tokenizer that
was trained here. What counts is how text is split before the merges, and that is in the tokenizer.json.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.export.split import split_name
from ant5m.files import new_folder
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import check_tokenizer
from ant5m.model.config import ModelConfig
from ant5m.model.generation import REPETITION_PENALTY, TEMPERATURE

PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""the messages' contents one after the other: without a template llama.cpp wraps a chat in ChatML's tokens,
which a base model has never seen"""

_BLOCK = 32
"""numbers of a row that share a scale in q8_0"""

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def export_gguf(net: Ant, tokenizer: Tokenizer, folder: Path, name: str, type: str = "f16") -> Path:
    """Write a new folder with `NAME-F16.gguf` (or -F32, -Q8_0) and a Modelfile for Ollama; returns the file.
    `type` is f32, f16 or q8_0.

    Norms stay in f32. In q8_0, rows that are no multiple of 32 numbers stay in f16. Raises `UserError` when
    the package gguf is missing, when `folder` exists, when llama.cpp would make other ids of a text, or when
    a weight is too large for f16.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the package gguf: pip install 'ant5m[gguf]'") from None
    check_tokenizer(tokenizer, net.config)
    file_name = f"{name}-{type.upper()}.gguf"
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    vocabulary = _vocabulary(tokenizer, net.config.vocab_size)
    with new_folder(folder) as aside:
        writer = gguf.GGUFWriter(aside / file_name, "qwen3" if net.config.qk_norm else "llama")
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType[kinds[type]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, net.config)
        _add_tokenizer(writer, tokenizer, vocabulary)
        writer.add_sampling_temp(TEMPERATURE)
        writer.add_sampling_penalty_repeat(REPETITION_PENALTY)
        writer.add_sampling_penalty_last_n(-1)  # over the whole context, as in transformers
        for tensor_name, values, dtype in _tensors(net, type):
            writer.add_tensor(tensor_name, gguf.quantize(values, dtype), raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (aside / "Modelfile").write_text(_modelfile(file_name, tokenizer, net.config), encoding="utf-8")
    return folder / file_name


def _add_shape(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, vocabulary: tuple[list[str], list[int]]) -> None:
    content = json.loads(tokenizer.backend.to_str())
    tokens, types = vocabulary
    writer.add_tokenizer_model("gpt2")  # any byte-level BPE
    writer.add_tokenizer_pre(split_name(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    ends = dict.fromkeys(tokenizer.end_ids)
    if len(ends) > len(adders):
        raise UserError(f"GGUF has room for {len(adders)} ids that end a text, the model has {len(ends)}")
    for add, end in zip(adders, ends, strict=False):
        add(end)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.settings.get("chat_template", PLAIN_TEMPLATE))


def _vocabulary(tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Every row's token and its type in llama.cpp; rows without a token are unused."""
    normal, control, user_defined, unused = 1, 3, 4, 5
    tokens, types = [f"[UNUSED{i}]" for i in range(rows)], [unused] * rows
    for token, i in tokenizer.vocab.items():
        tokens[i], types[i] = token, normal
    for i, added in tokenizer.backend.get_added_tokens_decoder().items():
        types[i] = control if added.special else user_defined
    return tokens, types


def _tensors(net: Ant, type: str) -> Iterator[tuple[str, np.ndarray, Any]]:
    """(name, values in f32, type) of every tensor, under llama.cpp's names."""
    from gguf import GGMLQuantizationType as Kind

    config = net.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if config.qk_norm:
        heads = {}  # of Qwen3 llama.cpp rotates halves
    for long_name, weight in net.state_dict().items():
        name, part = _tensor_name(long_name)
        values = weight.detach().float().cpu()
        if part in heads:
            values = _interleaved(values, heads[part])
        kind = Kind.F32 if values.dim() == 1 else Kind[type.upper()]
        if kind == Kind.Q8_0 and values.shape[-1] % _BLOCK:
            kind = Kind.F16
        if kind != Kind.F32 and values.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{long_name} holds a number too large for {type}: export it with --type f32")
        yield name, values.contiguous().numpy(), kind


def _tensor_name(name: str) -> tuple[str, str]:
    """llama.cpp's name of a weight, and its part without the layer."""
    stem = name.removesuffix(".weight")
    if stem in _OTHERS:
        return f"{_OTHERS[stem]}.weight", _OTHERS[stem]
    _, _, layer, *rest = stem.split(".")
    part = _LAYER[".".join(rest)]
    return f"blk.{layer}.{part}.weight", part


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k [heads * d, in] in llama.cpp's order: RoPE rotates neighbors there, halves here."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _modelfile(file_name: str, tokenizer: Tokenizer, config: ModelConfig) -> str:
    # A chat template would have to be translated to Ollama's language: it then reads the GGUF's own.
    template = "" if "chat_template" in tokenizer.settings else 'TEMPLATE "{{ .Prompt }}"\n'
    return (
        f"FROM ./{file_name}\n{template}PARAMETER temperature {TEMPERATURE}\n"
        f"PARAMETER repeat_penalty {REPETITION_PENALTY}\nPARAMETER repeat_last_n -1\n"
        f"PARAMETER num_ctx {config.max_position_embeddings}\n"
    )
