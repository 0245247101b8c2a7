"""What a tokenizer cannot spell: bytes of a text that are gone once it is ids.

A byte-level BPE whose vocabulary has every byte loses nothing. Others may: bytes that the training text did
not have are dropped, an <unk> swallows what it stands for, a pre-tokenizer or normalizer removes or folds
characters.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ant5m.data.tokenizer import Tokenizer, byte_characters
from ant5m.errors import UserError

NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
EXAMPLE = 20
"""characters in a message"""


def spells_everything(tokenizer: Tokenizer) -> bool:
    """Whether its parts are such that no text can lose a byte, so that nothing need be measured."""
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    stripping = any(token["lstrip"] or token["rstrip"] for token in content["added_tokens"])
    # The decoder takes an added "é" for a byte.
    beyond_ascii = any(not token["content"].isascii() for token in content["added_tokens"])
    if content["normalizer"] or affixes or stripping or beyond_ascii:
        return False
    if not _is_byte_level(content["decoder"], ()):
        return False
    if not _is_byte_level(content["pre_tokenizer"], ("Split", "Digits", "Punctuation")):
        return False
    if len({*model["vocab"].values()}) < len(model["vocab"]):  # two spellings of one id
        return False
    return all(
        character in model["vocab"]
        for character, byte in byte_characters().items()
        if byte not in NEVER_IN_UTF8
    )


def check_no_end_of_text(tokenizer: Tokenizer, ids: NDArray[np.uint32]) -> None:
    """Raise `UserError` when the ids of documents hold the end-of-text id, which ends each of them."""
    if (ids == tokenizer.eos_token_id).any():
        raise UserError(
            f"text of a document becomes the end-of-text token '{tokenizer.eos_token}': "
            'mark it "special" among the added_tokens of tokenizer.json'
        )


def _is_byte_level(part: Any, others: Sequence[str]) -> bool:
    """Whether a part of tokenizer.json is ByteLevel, after none but `others` that remove nothing."""
    if part is None:
        return False
    parts = part.get("pretokenizers") if part["type"] == "Sequence" else [part]
    if not parts or parts[-1]["type"] != "ByteLevel":
        return False
    return all(p["type"] in others and p.get("behavior") != "Removed" for p in parts[:-1])


def lost_bytes(
    tokenizer: Tokenizer, texts: Sequence[str], ids: Sequence[NDArray[np.uint32]]
) -> NDArray[np.int64]:
    """How many bytes of the characters of each text do not come back from its ids; int64 [texts].

    Only what is missing counts, in another order or Unicode normal form it is there; characters are compared
    in NFKC.
    """
    unknown = getattr(tokenizer.backend.model, "unk_token", None)
    unknown_id = None if unknown is None else tokenizer.backend.token_to_id(unknown)
    lost = np.zeros(len(texts), np.int64)
    for number, (text, row) in enumerate(zip(texts, ids, strict=True)):
        missing = missing_characters(
            text, tokenizer.decode(row[row != unknown_id] if unknown_id is not None else row)
        )
        lost[number] = sum(count * len(character.encode()) for character, count in missing.items())
    return lost


def missing_characters(text: str, back: str) -> Counter[str]:
    """The characters of `text`, in NFKC, that `back` has not as often."""
    if text == back:
        return Counter()
    return Counter(unicodedata.normalize("NFKC", text)) - Counter(unicodedata.normalize("NFKC", back))


def describe_lost(tokenizer: Tokenizer, texts: Sequence[str], lost: NDArray[np.int64]) -> str:
    """One line for people: how much of these texts is lost, and of what."""
    worst = texts[int(np.argmax(lost))]
    missing = missing_characters(worst, tokenizer.decode(tokenizer.encode(worst)))
    characters = " ".join(dict(missing.most_common(EXAMPLE))) or "what it turns into its unknown token"
    total = sum(len(text.encode()) for text in texts)
    return (
        f"the tokenizer cannot spell this text: {int(lost.sum()):,} of {total:,} bytes are lost, as in "
        f"{worst[:EXAMPLE]!r} (lost: {characters})"
    )
