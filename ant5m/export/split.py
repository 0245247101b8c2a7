"""How a tokenizer splits text before its merges: other programs have a few ways built in, under names."""

from typing import Any

from ant5m.data.tokenizer import SPLIT
from ant5m.errors import UserError

# llama.cpp's names of the splits that it knows.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {SPLIT: "qwen2", _GPT2: "gpt-2", _LLAMA3: "llama-bpe"}


def split_name(content: dict[str, Any]) -> str:
    """llama.cpp's name for how the tokenizer of a `tokenizer.json` splits text.

    Raises `UserError`, which names what stands in the way, when its ids cannot be made elsewhere.
    """
    model = content["model"]
    steps = content.get("pre_tokenizer") or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if content.get("normalizer") is not None:
        raise _foreign(f"its normalizer {content['normalizer'].get('type')}")
    if model.get("byte_fallback") or steps[-1]["type"] != "ByteLevel":
        raise _foreign("a vocabulary that is not byte-level")
    if steps[-1].get("add_prefix_space"):
        raise _foreign("a space put before every text (add_prefix_space)")
    pattern: Any = None
    if len(steps) == 1 and steps[0].get("use_regex", True):
        pattern = _GPT2
    elif len(steps) == 2 and steps[0]["type"] == "Split" and not steps[1].get("use_regex", True):
        inverted = steps[0].get("invert") or steps[0].get("behavior") != "Isolated"
        pattern = None if inverted else steps[0]["pattern"].get("Regex")
    if pattern not in _SPLITS:
        raise _foreign(f"its split {pattern!r}" if pattern else f"its split ({steps[0]['type']})")
    name = _SPLITS[pattern]
    if bool(model.get("ignore_merges")) is not (name == "llama-bpe"):
        raise _foreign(f"ignore_merges being {bool(model.get('ignore_merges'))}")
    for token in content.get("added_tokens", []):
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        if flags and not token.get("special"):
            raise _foreign(f"the added token {token['content']!r} with {flags[0]}")
    return name


def _foreign(what: str) -> UserError:
    return UserError(
        f"this tokenizer has no equal outside of tokenizers: {what}; text would get other ids there"
    )
