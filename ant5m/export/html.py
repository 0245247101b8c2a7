"""One HTML page with the model inside: it opens by double click and writes text without a network.

The engine (`page/engine.js`) is ours: a tokenizer, a Llama and the sampling of `ant5m.model.generation` in
plain JavaScript. Weights lie in the page as base64, in int8 with one scale a row, f16 or f32; norms stay in
f32.
"""

import base64
import html
import json
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ant5m.data.tokenizer import Tokenizer
from ant5m.export.card import shape_of
from ant5m.export.split import split_name
from ant5m.files import write_file
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import check_tokenizer
from ant5m.model.config import ModelConfig
from ant5m.model.generation import REPETITION_PENALTY, TEMPERATURE

LARGE = 50_000_000
"""parameters above which a page is slow to open and to write"""
DEFAULT_LENGTH = 200
"""tokens that the page writes unless told otherwise"""


def export_html(
    net: Ant, tokenizer: Tokenizer, path: Path, name: str, type: str = "int8", prompt: str = "The"
) -> None:
    """Write the page; `type` (int8, f16, f32) is of the matrices, `prompt` what stands in the page at first.

    Raises `UserError` when the page could not make the tokenizer's ids. Warns above 50M parameters.
    """
    check_tokenizer(tokenizer, net.config)
    parameters = sum(weight.numel() for weight in net.parameters())
    if parameters > LARGE:
        size = parameters * {"int8": 1, "f16": 2, "f32": 4}[type] * 4 / 3e6
        warnings.warn(
            f"{path} will be about {size:,.0f} MB and slow: a page suits models up to about 50M parameters",
            stacklevel=2,
        )
    tensors, weights = _pack(net, type)
    model = {
        "config": _config(net.config),
        "tokenizer": _tokenizer(tokenizer),
        "tensors": tensors,
        "begin": tokenizer.eos_token_id,
        "ends": list(tokenizer.end_ids),
    }
    about = f"A language model of {parameters:,} parameters: {shape_of(net.config)}."
    context = net.config.max_position_embeddings
    page = _source("page.html")
    for key, value in {
        "TITLE": html.escape(name),
        "ABOUT": html.escape(about),
        "PROMPT": html.escape(prompt),
        "TEMPERATURE": str(TEMPERATURE),
        "PENALTY": str(REPETITION_PENALTY),
        "CONTEXT": str(context),
        "LENGTH": str(min(DEFAULT_LENGTH, context)),
        "ENGINE": _source("engine.js"),
        "PAGE": _source("page.js"),
        # A token may spell the end of the script that it stands in.
        "MODEL": json.dumps(model, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "WEIGHTS": base64.b64encode(weights).decode(),
    }.items():
        page = page.replace(f"@{key}@", value)
    write_file(path, page)


def _source(name: str) -> str:
    return files("ant5m.export").joinpath("page", name).read_text(encoding="utf-8")


def _config(config: ModelConfig) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kvHeads": config.num_key_value_heads,
        "qkNorm": config.qk_norm,
        "headSize": config.head_size,
        "context": config.max_position_embeddings,
        "vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
        "ropeTheta": config.rope_theta,
    }


def _tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    content = json.loads(tokenizer.backend.to_str())
    tokens = [""] * tokenizer.vocab_size
    for token, i in tokenizer.vocab.items():
        tokens[i] = token
    added = tokenizer.backend.get_added_tokens_decoder()
    return {
        "split": split_name(content),
        "whole_words": bool(content["model"].get("ignore_merges")),
        "tokens": tokens,
        "merges": content["model"]["merges"],
        "added": list(added),
        "parsed": [i for i, token in added.items() if not token.special],
    }


def _pack(net: Ant, type: str) -> tuple[list[dict[str, Any]], bytes]:
    """Where each tensor lies in the bytes that come with it; offsets are multiples of 4."""
    described: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    length = 0

    def add(values: np.ndarray) -> int:
        nonlocal length
        raw = values.tobytes()
        raw += bytes(-len(raw) % 4)
        pieces.append(raw)
        start, length = length, length + len(raw)
        return start

    for name, weight in net.state_dict().items():
        values = weight.detach().float().cpu().numpy()
        kind = "f32" if values.ndim == 1 else type
        entry: dict[str, Any] = {"name": name, "shape": values.shape, "type": kind}
        if kind == "int8":
            scales = np.abs(values).max(axis=1) / 127
            safe = np.where(scales > 0, scales, 1)[:, None]
            entry |= {"scales": add(scales.astype("<f4")), "offset": add(np.rint(values / safe).astype("i1"))}
        else:
            entry["offset"] = add(values.astype("<f2" if kind == "f16" else "<f4"))
        described.append(entry)
    return described, b"".join(pieces)
