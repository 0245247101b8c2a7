"""The settings beside `tokenizer.json`: special tokens and chat template, in transformers' files."""

import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ant5m.errors import UserError
from ant5m.files import read_object, write_json

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SIDES = ("padding_side", "truncation_side")


def read_settings(folder: Path) -> dict[str, Any]:
    """What the files of `folder` say and an export has to keep, special tokens in their spelling.

    `special_tokens_map.json` counts, and goes first, only where `tokenizer_config.json` has no
    `added_tokens_decoder`; a `chat_template.jinja` goes before a template in the JSON.
    """
    settings = _read_object(folder / CONFIG)
    if "added_tokens_decoder" not in settings:
        settings |= _read_object(folder / MAP)
    kept: dict[str, Any] = {name: token for name in _TOKENS if (token := _spelling(settings.get(name)))}
    for name in _LISTS:
        tokens = settings.get(name) or []
        if isinstance(tokens, dict):
            spelled: Any = {role: text for role, token in tokens.items() if (text := _spelling(token))}
        else:
            spelled = [text for text in map(_spelling, tokens) if text]
        if spelled:
            kept[name] = spelled
    kept |= {name: settings[name] for name in _SIDES if settings.get(name) in ("left", "right")}
    template = _read_template(folder) or settings.get("chat_template")
    return kept | ({"chat_template": template} if template else {})


def write_settings(
    folder: Path, settings: dict[str, Any], vocab: Collection[str], model_max_length: int
) -> None:
    """Write the two files with which `transformers.AutoTokenizer` opens a folder with a `tokenizer.json`.

    `settings` as `read_settings` gives them, with `eos_token` and `bos_token`. Nothing is added to a text, as
    in training; padding is done with the end-of-text token where no other is named, and on the left, as
    generation needs it. Tokens that the vocabulary has not are left out with a warning: transformers would
    give them ids that the model has no row for.
    """
    named = {name: settings[name] for name in _TOKENS if name in settings}
    lists = {name: settings[name] for name in _LISTS if name in settings}
    every = {*named.values(), *(token for tokens in lists.values() for token in _each(tokens))}
    missing = sorted(token for token in every if token not in vocab)
    if missing:
        warnings.warn(
            f"left out of {CONFIG}: {', '.join(missing)}, which the vocabulary does not have", stacklevel=2
        )
    special = {name: token for name, token in named.items() if token in vocab}
    special.setdefault("pad_token", special["eos_token"])
    others = {name: _within(tokens, vocab) for name, tokens in lists.items()}
    write_json(folder / MAP, special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        **others,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model_max_length,
        "padding_side": settings.get("padding_side", "left"),
        "truncation_side": settings.get("truncation_side", "right"),
    }
    template = {"chat_template": settings["chat_template"]} if "chat_template" in settings else {}
    write_json(folder / CONFIG, config | template)


@dataclass
class _Token:
    content: str


_Spelled = str | _Token | None


@dataclass
class _Template:
    name: str
    template: str


@dataclass
class _Settings:
    """What is relied upon of a tokenizer_config.json or special_tokens_map.json."""

    bos_token: _Spelled = None
    eos_token: _Spelled = None
    pad_token: _Spelled = None
    unk_token: _Spelled = None
    cls_token: _Spelled = None
    sep_token: _Spelled = None
    mask_token: _Spelled = None
    additional_special_tokens: list[_Spelled] | None = None
    extra_special_tokens: list[_Spelled] | dict[str, _Spelled] | None = None
    """a list, or each token by what it is for"""
    chat_template: str | list[_Template] | None = None


def _read_object(path: Path) -> dict[str, Any]:
    return read_object(path, _Settings) if path.exists() else {}


def _spelling(token: Any) -> str | None:
    """Of a token given by itself or as an object."""
    return (token["content"] if isinstance(token, dict) else token) or None


def _each(tokens: dict[str, str] | list[str]) -> Iterable[str]:
    return tokens.values() if isinstance(tokens, dict) else tokens


def _within(tokens: dict[str, str] | list[str], vocab: Collection[str]) -> dict[str, str] | list[str]:
    if isinstance(tokens, dict):
        return {role: token for role, token in tokens.items() if token in vocab}
    return [token for token in tokens if token in vocab]


def _read_template(folder: Path) -> Any:
    """The chat template that lies in a file of its own, or the list of several with their names."""
    more = sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    named = {"default": folder / TEMPLATE} if (folder / TEMPLATE).exists() else {}
    named |= {file.stem: file for file in more}
    try:
        texts = {name: file.read_text(encoding="utf-8") for name, file in named.items()}
    except UnicodeDecodeError:
        raise UserError(f"a chat template (.jinja) in {folder} is not UTF-8") from None
    if list(texts) == ["default"]:
        return texts["default"]
    return [{"name": name, "template": text} for name, text in texts.items()]
