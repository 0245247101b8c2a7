"""The tokenizer: byte-level BPE, trained here or loaded from anyone's `tokenizer.json`.

Hugging Face `tokenizers` is the definition of what a tokenizer does. Text in bulk goes through gigatoken,
which gives the same ids many times faster; where it does not know a foreign tokenizer, or disagrees with it
on the probe below, `tokenizers` itself does the work.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from ant5m.data.special_tokens import read_settings, write_settings
from ant5m.errors import UserError, first_line
from ant5m.files import check_json, read_json, write_file

if TYPE_CHECKING:
    from rich.progress import Progress

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 65_536
"""shards hold ids as uint16"""
MIN_VOCAB_SIZE = 257
"""256 bytes and the end-of-text id"""
MAX_TOKEN_LENGTH = 32
"""characters; a longer token is a ruler of dashes or a line of boilerplate"""

# Qwen2's split: words take their leading space, digits stand alone (a small model learns arithmetic digit by
# digit), line breaks stay together. gigatoken has it hand-written, unlike any pattern of our own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PROBE = (
    "The quick brown fox's 12,345 jumps — over 3.14 lazy dogs; it'll DON'T 'S\r\n\r\n\tif x_1 >= 0:\n    ",
    "naïve café e\u0301 ﬁ Å Å ½ ² ٣ 中文字 ひらがな 한국어 עברית العربية नमस्ते ไทย",
    "👩\u200d👩\u200d👧 🇩🇪 \ufeff\u00a0\u2028\u3000\x00\x1b\x7f\x85 \ue000 \U0010ffff   \t ",
    f"{END_OF_TEXT} <s></s> <|im_start|>  https://example.org/a?b=c&d=%20 -------- ========\n\n\n",
    "",
)
"""text on which a fast encoder must agree with `tokenizers` before it is trusted"""


class Tokenizer:
    """A BPE tokenizer with an end-of-text token. Make one with `load` or `train_tokenizer`.

    `bos_token` is what begins a text for whoever evaluates or exports, by default the end-of-text token;
    packing and generation put none, so a post-processor that would is dropped. `settings` is what else the
    files beside `tokenizer.json` say (`ant5m.data.special_tokens`), for whoever saves it again.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token: str = END_OF_TEXT,
        bos_token: str | None = None,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        eos_token_id = backend.token_to_id(eos_token)
        if eos_token_id is None:
            raise UserError(f"the tokenizer has no end-of-text token '{eos_token}'")
        bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        backend.no_truncation()
        backend.no_padding()
        if not isinstance(backend.post_processor, processors.ByteLevel):  # which changes no id
            backend.post_processor = None
        backend.encode_special_tokens = True  # text that spells a special token stays text
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
        self.eos_token = eos_token
        self.eos_token_id: int = eos_token_id
        self.bos_token = eos_token if bos_token is None or bos_token_id is None else bos_token
        self.bos_token_id: int = eos_token_id if bos_token_id is None else bos_token_id
        self.end_ids: tuple[int, ...] = (eos_token_id,)
        """a generated text ends with any of them; a model's folder may name others than the tokenizer's"""
        self.settings = settings
        self._as_given: str | None = None
        self.backend = backend
        """the `tokenizers.Tokenizer` beneath"""

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which does not know gigatoken's encoder."""
        return _restore, (self.backend.to_str(), self.eos_token, self.bos_token, dict(self.settings))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Open a tokenizer folder, or a `tokenizer.json` by its path.

        The end-of-text token is the `eos_token` that the files beside it name, else `<|endoftext|>`;
        `bos_token` is what they name, else the end-of-text token. Both count as special, so that text never
        becomes them, whether the file marks them so or not. BPE dropout, which is for training, is turned
        off. Raises `UserError` when there is no end-of-text token, or when the file is missing, broken, or
        not a BPE.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        content = read_json(file, dict[str, Any])
        as_given = json.dumps(content)
        settings = read_settings(file.parent)
        eos_token = settings.get("eos_token", END_OF_TEXT)
        _check_is_bpe(content, file)
        _settle(content, {eos_token, settings.get("bos_token")})
        backend = _parse(json.dumps(content), file)
        try:
            tokenizer = cls(backend, eos_token, settings.get("bos_token"), settings)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        tokenizer._as_given = as_given
        return tokenizer

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Whether it is this tokenizer's, or that of its file as an earlier version read it, which kept a
        post-processor, dropout and unmarked special tokens."""
        if fingerprint == self.fingerprint or self._as_given is None:
            return fingerprint == self.fingerprint
        backend = tokenizers.Tokenizer.from_str(self._as_given)
        backend.no_truncation()
        backend.no_padding()
        return fingerprint == _fingerprint(backend)

    def save(self, folder: str | Path, model_max_length: int = 1_024) -> None:
        """Write `tokenizer.json` and the two files with which `transformers.AutoTokenizer` opens the folder.

        `model_max_length` is the context length of the model it belongs to, in tokens.
        """
        folder = Path(folder)
        write_file(folder / "tokenizer.json", self.backend.to_str(pretty=True) + "\n")
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        write_settings(folder, {**self.settings, **special}, self.vocab, model_max_length)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token added.

        Raises `UserError` for half a surrogate pair, which Python makes of input that is not UTF-8.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"the text {text[:40]!a} is not UTF-8: convert it, try iconv") from None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32 arrays: views of one buffer."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end (uint32 [tokens]) and how many each has (int64 [texts])."""
        if self._gigatoken is None:
            rows = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            lengths = np.fromiter((len(row.ids) for row in rows), np.int64, len(rows))
            flat = np.fromiter((i for row in rows for i in row.ids), np.uint32, int(lengths.sum()))
            return flat, lengths
        layout = self._gigatoken.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD.

        An array is taken for text in bulk, which is put together without `tokenizers`, ten times as fast.
        """
        if isinstance(ids, np.ndarray) and self._spelled is not None and (ids < len(self._spelled)).all():
            return b"".join(self._spelled[ids].tolist()).decode(errors="replace")
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def shrunk(self, vocab_size: int) -> "Tokenizer":
        """What `train_tokenizer` would have made of the same text with fewer entries.

        BPE learns its entries one after the other, so the smaller vocabulary is the beginning of this one.
        """
        content = json.loads(self.backend.to_str())
        model = content["model"]
        model["vocab"] = {token: i for token, i in model["vocab"].items() if i < vocab_size}
        model["merges"] = [[left, right] for left, right in model["merges"] if left + right in model["vocab"]]
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
        return Tokenizer(backend, self.eos_token, self.bos_token, self.settings)

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        """token -> id, added tokens included, in the spelling of `tokenizer.json`."""
        return self.backend.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the rows a token table needs."""
        return max(self.vocab.values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the content of `tokenizer.json`, however it is laid out on the disk."""
        return _fingerprint(self.backend)

    @functools.cached_property
    def _spelled(self) -> np.ndarray | None:
        """The bytes of each id, objects [vocab_size], or None where the decoder does more than join them.

        As in the ByteLevel decoder of `tokenizers` a token with any other character (an added one) is text,
        and an id without a token is nothing.
        """
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        byte_of = byte_characters()
        found = np.full(self.vocab_size, b"", object)
        for token, i in self.vocab.items():
            spelled = byte_of.keys() >= set(token)
            found[i] = bytes(map(byte_of.__getitem__, token)) if spelled else token.encode()
        return found

    @functools.cached_property
    def _gigatoken(self) -> Any:
        """gigatoken's encoder of this tokenizer, or None where it cannot stand in."""
        import gigatoken

        content = json.loads(self.backend.to_str())
        # gigatoken parses special tokens in text whenever it knows any.
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        try:
            fast = gigatoken.Tokenizer.from_json(json.dumps(content))
            probe = [*PROBE, *_probes([token["content"] for token in content["added_tokens"]])]
            agrees = fast.encode_batch_list(probe) == [self.encode(text) for text in probe]
        except Exception:  # it raises RuntimeError and ValueError for what it does not support
            return None
        return fast if agrees else None


@functools.cache
def byte_characters() -> dict[str, int]:
    """The characters by which a byte-level vocabulary spells bytes -> the byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    spelled = {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
    assert set(spelled) == set(pre_tokenizers.ByteLevel.alphabet())
    return spelled


def _restore(backend: str, *others: Any) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(backend), *others)


@dataclass
class _Model:
    """What is checked of `model` in a `tokenizer.json`, before `tokenizers` reads it."""

    type: str | None = None
    vocab: Any = None
    merges: Any = None


@dataclass
class _Added:
    content: str


@dataclass
class _Content:
    model: _Model
    added_tokens: list[_Added] | None = None


def _fingerprint(backend: tokenizers.Tokenizer) -> str:
    content = json.loads(backend.to_str())
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_is_bpe(content: dict[str, Any], file: Path) -> None:
    if not isinstance(content.get("model"), dict):
        raise UserError(f"{file} is not a tokenizer.json: it has no model")
    model = check_json(content, str(file), _Content).model
    kind = model.type
    if kind is None and model.vocab is not None and model.merges is not None:
        kind = content["model"]["type"] = "BPE"  # old files, GPT-2's among them, do not name it
    if kind is None:
        raise UserError(f"{file} is not a tokenizer.json: it names no model type")
    if kind != "BPE":
        raise UserError(f"{file} is a {kind} tokenizer: only BPE tokenizers can be used")


def _parse(content: str, file: Path) -> tokenizers.Tokenizer:
    """`UserError` when the library cannot. A few wrong values make it panic: it prints that by itself, and
    raises what is no `Exception`."""
    try:
        with _silent_stderr():
            return tokenizers.Tokenizer.from_str(content)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"{file} is broken ({first_line(error)})") from None


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """For what prints past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _settle(content: dict[str, Any], control: set[str | None]) -> None:
    """Make a `tokenizer.json` give one text one list of ids, and never a `control` token."""
    content["model"]["dropout"] = None
    for token in content.get("added_tokens") or ():
        token["special"] = token.get("special") or token["content"] in control


def _probes(added: Sequence[str], at_once: int = 64) -> Iterator[str]:
    """Text in which added tokens stand alone, inside words, twice, in capitals, beside spaces."""
    spelled = [f"{t} x{t} {t}s {t}{t}  {t.upper()} ({t})\t{t}\n" for t in added]
    for first in range(0, len(spelled), at_once):
        yield "".join(spelled[first : first + at_once])


class VocabularyTooLarge(UserError):
    """A text has too few different words for so many entries; `supported` says how many it has."""

    def __init__(self, asked: int, supported: int):
        super().__init__(
            f"the text supports a vocabulary of only {supported:,} entries, not {asked:,}: "
            f"ask for {supported:,} or fewer, or give more text"
        )
        self.supported = supported


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 16_384,
    sample_bytes: int = 100_000_000,
    progress: "Progress | None" = None,
) -> Tokenizer:
    """Learn a byte-level BPE of exactly `vocab_size` entries, `<|endoftext|>` being the first.

    Reads all of `texts` but learns from an evenly spread sample of at most `sample_bytes` bytes, so memory is
    bounded. The same texts give the same tokenizer. `progress` shows what happens after the reading.
    Raises `UserError` when the size is not possible or the text is too small for it.
    """
    check_vocab_size(vocab_size)
    sample = spread_sample(texts, sample_bytes)
    if not sample:
        raise UserError("there is no text to learn a tokenizer from")
    tokenizer = learn_bpe(sample, vocab_size, progress)
    if tokenizer.vocab_size < vocab_size:
        raise VocabularyTooLarge(vocab_size, tokenizer.vocab_size)
    return tokenizer


def learn_bpe(sample: Sequence[str], vocab_size: int, progress: "Progress | None" = None) -> Tokenizer:
    """As `train_tokenizer`, from all of `sample`; has fewer entries where the text supports no more."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_LENGTH,
        show_progress=False,
    )
    if progress is None:
        backend.train_from_iterator(sample, trainer)
        return Tokenizer(backend)
    counting = progress.add_task("counting words", total=len(sample))
    merging = progress.add_task("learning merges", total=None, start=False)

    def counted() -> Iterator[str]:
        yield from progress.track(sample, task_id=counting)
        progress.start_task(merging)

    backend.train_from_iterator(counted(), trainer)
    progress.update(merging, total=1, completed=1)
    return Tokenizer(backend)


def check_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` unless a byte-level vocabulary of this size can be and its ids fit the shards."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size:,} entries does not fit the shards' uint16: "
            f"at most {MAX_VOCAB_SIZE:,}"
        )
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"a vocabulary of {vocab_size:,} entries is too small: "
            f"256 bytes and the end-of-text token need {MIN_VOCAB_SIZE}"
        )


def spread_sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """At most about `max_bytes` bytes of documents, evenly spread over `texts`, in order and without chance.

    Every n-th document is kept; whenever the kept ones outgrow the bound, n doubles and every other one goes.
    """
    kept: list[str] = []
    sizes: list[int] = []
    total, stride = 0, 1
    for index, text in enumerate(texts):
        if index % stride:
            continue
        kept.append(text)
        sizes.append(len(text.encode()))
        total += sizes[-1]
        while total > max_bytes and len(kept) > 1:
            kept, sizes, stride = kept[::2], sizes[::2], stride * 2
            total = sum(sizes)
    return kept
