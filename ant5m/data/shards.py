"""Packed tokens on disk: a folder of raw little-endian uint16 files and `meta.json`, read where they lie.

The shard files of a split are one logical sequence of tokens; where one file ends has no meaning.
`ant5m.data.packing` writes the folder, `meta.json` last, so a folder without it is not a data set.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ant5m.errors import UserError
from ant5m.files import check_json, file_sha256, is_plain_name, read_json
from ant5m.manifest import check_file, read_manifest

Split = Literal["train", "validation"]

META = "meta.json"
PROGRESS = "progress.json"
FORMAT = "ant5m-shards-1"
TOKEN = np.dtype("<u2")
COUNTS = ("documents", "tokens", "bytes", "words")
IGNORE = -100
"""The target that no loss counts, as in `torch.nn.functional.cross_entropy`."""

Count = Annotated[int, msgspec.Meta(ge=0)]
Some = Annotated[int, msgspec.Meta(ge=1)]


@dataclass
class Source:
    """What was packed."""

    name: str
    size: Count
    """bytes on the disk; 0 when not known"""


@dataclass
class _Options:
    validation_fraction: float | None = None


@dataclass
class _Shard:
    name: str
    tokens: Some
    sha256: str
    mask: str | None = None
    """file that says which tokens count"""


@dataclass
class _Split:
    documents: Count
    tokens: Count
    bytes: Count
    words: Count
    shards: list[_Shard]
    lost_bytes: Count = 0


@dataclass
class Meta:
    """What is relied upon of `meta.json`; `ant5m.data.packing.pack` says what else is there."""

    format: Literal["ant5m-shards-1"]
    vocab_size: Some
    eos_token_id: Count
    tokenizer_fingerprint: str
    splits: dict[str, _Split]
    manifest: str | None = None
    """not in folders of ant5m 0.1.0"""
    held_out: Literal["documents", "pieces"] = "documents"
    sources: list[Source] = field(default_factory=list)
    options: _Options = field(default_factory=_Options)


class ArrayFile:
    """A file of `length` numbers. `file[i:j]` reads them; nothing is mapped, because a file that is cut while
    it is mapped kills the process (SIGBUS), as does a network drive that goes away."""

    def __init__(self, path: Path, length: int, dtype: np.dtype[Any] = TOKEN) -> None:
        self.path, self.dtype = path, dtype
        self._length = length
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> NDArray[Any]:
        start, stop, _ = window.indices(self._length)
        position, end = start * self.dtype.itemsize, stop * self.dtype.itemsize
        raw = b""
        while position + len(raw) < end:  # one read gives 2 GiB at most
            more = os.pread(self._descriptor, end - position - len(raw), position + len(raw))
            if not more:
                raise UserError(f"{self.path} was cut while it was in use: pack the text again")
            raw = raw + more if raw else more
        return np.frombuffer(raw, self.dtype)


class Tokens:
    """The tokens of one split: parts laid end to end, uint16, read-only, never in memory as a whole unless
    they came from there. `tokens[i:j]` is an array."""

    def __init__(
        self,
        parts: Sequence["NDArray[np.uint16] | ArrayFile"],
        masks: Sequence["NDArray[np.uint8] | ArrayFile"] | None = None,
    ) -> None:
        """`masks`: for each part a bit for every token, lowest bit first: whether it counts as a target."""
        if not all(map(_is_flat_uint16, parts)):
            raise ValueError("tokens are one-dimensional contiguous uint16")
        self._parts, self._masks = parts, masks
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, window: slice) -> NDArray[np.uint16]:
        start, stop, step = window.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read in order: use a step of 1")
        return self._window(start, stop)

    @property
    def masked(self) -> bool:
        """Whether some tokens do not count as targets."""
        return self._masks is not None

    def counted(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each token of [start, stop) counts as a target."""
        if self._masks is None:
            return np.ones(stop - start, bool)
        pieces = [np.empty(0, np.uint8)]
        for part, first, last in self._spans(start, stop):
            bits = self._masks[part][first // 8 : -(-last // 8)]
            skipped = first % 8
            pieces.append(np.unpackbits(bits, bitorder="little")[skipped : skipped + last - first])
        return np.concatenate(pieces).astype(bool)

    def _window(self, start: int, stop: int) -> NDArray[np.uint16]:
        pieces = [self._parts[part][first:last] for part, first, last in self._spans(start, stop)]
        if not pieces:
            return np.empty(0, TOKEN)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The parts in which a window lies: number of the part, first and last + 1 of its tokens."""
        while start < stop:
            part = int(np.searchsorted(self._ends, start, side="right"))
            base = int(self._ends[part]) - len(self._parts[part])
            end = min(stop, int(self._ends[part]))
            yield part, start - base, end - base
            start = end

    @staticmethod
    def join(several: Sequence["Tokens"]) -> "Tokens":
        """One behind the other. Where only some are masked, all tokens of the others count."""
        masks = None
        if any(tokens.masked for tokens in several):
            masks = [mask for tokens in several for mask in tokens._masks or tokens._full_masks()]
        return Tokens([part for tokens in several for part in tokens._parts], masks)

    def _full_masks(self) -> list[NDArray[np.uint8]]:
        return [np.full(-(-len(part) // 8), 255, np.uint8) for part in self._parts]

    def behind(self, token: int) -> "Tokens":
        """The same with one token before the first, which counts."""
        masks = None if self._masks is None else [np.ones(1, np.uint8), *self._masks]
        return Tokens([np.array([token], TOKEN), *self._parts], masks)

    def gather(
        self, starts: NDArray[np.int64], length: int, inputs: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> None:
        """Write the windows [start, start + length] to `inputs` and, shifted by one, to `targets`, which are
        `IGNORE` where a token does not count.

        `starts` is [rows]; `inputs` and `targets` are [rows, length], C-contiguous, int64.
        Raises `IndexError` when a window, with the target of its last token, leaves the tokens.
        """
        _check_gather(starts, length, inputs, targets)
        if len(starts) == 0:
            return
        if length >= len(self) or starts.view(np.uint64).max() >= len(self) - length:  # below 0 is huge there
            raise IndexError(f"a window of {length} + 1 tokens leaves the {len(self)} tokens of the split")
        for row, start in enumerate(starts.tolist()):
            window = self._window(start, start + length + 1)
            inputs[row], targets[row] = window[:-1], window[1:]
            if self.masked:
                targets[row, ~self.counted(start + 1, start + length + 1)] = IGNORE


class Shards:
    """One split of a packed data set, opened read-only."""

    def __init__(self, folder: Path, split: Split, meta: dict[str, Any], tokens: Tokens) -> None:
        self.folder = folder
        self.split = split
        self.meta = meta
        """`meta.json`: see `ant5m.data.packing.pack`"""
        self.tokens = tokens

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def counts(self) -> dict[str, int]:
        """`documents`, `tokens`, `bytes` (of UTF-8 text) and `words` (`str.split`) of this split."""
        return {name: self.meta["splits"][self.split][name] for name in COUNTS}

    @property
    def lost_bytes(self) -> int:
        """Of `counts["bytes"]`, those that the tokenizer cannot spell. A loss per byte means nothing then."""
        return self.meta["splits"][self.split].get("lost_bytes", 0)

    @property
    def holds_out_documents(self) -> bool:
        """False where the text is one document, and validation has pieces of what training had others of."""
        return self.meta.get("held_out", "documents") == "documents"

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def eos_token_id(self) -> int:
        """The id that follows every document."""
        return self.meta["eos_token_id"]

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.meta["tokenizer_fingerprint"]

    @property
    def fingerprint(self) -> str:
        """sha256 of what a training run sees: this split's shards in order and the tokenizer."""
        shards = [[shard["sha256"], shard["tokens"]] for shard in self.meta["splits"][self.split]["shards"]]
        seen = json.dumps([self.tokenizer_fingerprint, shards])
        return hashlib.sha256(seen.encode()).hexdigest()

    def documents(self, block: int = 1 << 20) -> Iterator[NDArray[np.uint16]]:
        """The ids of each document in order, without its end-of-text id, from reads of `block` tokens."""
        pending: list[NDArray[np.uint16]] = []
        for start in range(0, self.num_tokens, block):
            tokens = self.tokens[start : start + block]
            ends = np.flatnonzero(tokens == self.eos_token_id)
            *whole, rest = np.split(tokens, ends + 1)
            for ids in whole:
                yield np.concatenate([*pending, ids[:-1]])
                pending = []
            pending.append(rest)
        if any(map(len, pending)):
            yield np.concatenate(pending)

    @classmethod
    def join(cls, parts: Sequence["Shards"]) -> "Shards":
        """Splits of one tokenizer laid end to end, without a copy; `folder` names all of theirs.

        Raises `UserError` where they were packed with different tokenizers.
        """
        first = parts[0]
        for part in parts[1:]:
            if part.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise UserError(
                    f"{part.folder} was packed with another tokenizer than {first.folder}: pack both with one"
                )
        splits = [part.meta["splits"][part.split] for part in parts]
        counts = {name: sum(split.get(name, 0) for split in splits) for name in (*COUNTS, "lost_bytes")}
        shards = [shard for split in splits for shard in split["shards"]]
        held_out = "documents" if all(part.holds_out_documents for part in parts) else "pieces"
        splits_of_all = {first.split: {**counts, "shards": shards}}
        meta = {**first.meta, "held_out": held_out, "splits": splits_of_all}
        folder = Path(" + ".join(str(part.folder) for part in parts))
        return cls(folder, first.split, meta, Tokens.join([part.tokens for part in parts]))

    @classmethod
    def open(cls, folder: str | Path, split: Split = "train", verify: bool = True) -> "Shards":
        """Open the files of a split. `verify` reads every shard once and compares its sha256; the hashes of
        the other files are compared in any case.

        Raises `UserError` that names the file when it is missing, truncated or edited.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        if split not in meta["splits"]:
            raise UserError(f"{folder} has no {split} split (it has {', '.join(meta['splits'])})")
        shards = meta["splits"][split]["shards"]
        parts = [_open(folder, shard, verify) for shard in shards]
        if not parts:
            raise UserError(f"the {split} split of {folder} is empty: pack more text")
        masks = [_open_mask(folder, shard) for shard in shards] if "mask" in shards[0] else None
        return cls(folder, split, meta, Tokens(parts, masks))


def _read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of shards: make one with `ant5m data pack`")
    if not (folder / META).exists():
        unfinished = (folder / PROGRESS).exists()
        raise UserError(
            f"packing into {folder} was not finished: run the same `ant5m data pack` command again"
            if unfinished
            else f"{folder} has no {META}: it was not made by `ant5m data pack`"
        )
    meta: dict[str, Any] = read_json(folder / META, dict[str, Any])
    if meta.get("format") != FORMAT:
        raise UserError(f"{folder / META} is not a description of {FORMAT}: pack the text again")
    try:
        _check_meta(check_json(meta, str(folder / META), Meta), folder)
    except UserError as error:
        raise UserError(f"{error}. Pack the text again") from None
    return meta


def _check_meta(meta: Meta, folder: Path) -> None:
    """Whether the parts of `meta.json` agree, and are what was written."""
    where = folder / META
    if meta.eos_token_id >= meta.vocab_size:
        raise UserError(f"{where}: eos_token_id is {meta.eos_token_id}, of {meta.vocab_size} entries")
    for name, split in meta.splits.items():
        names = [file for shard in split.shards for file in (shard.name, shard.mask or shard.name)]
        if not all(map(is_plain_name, names)):
            raise UserError(f"{where}: splits.{name} names a shard outside the folder")
        if len({shard.mask is None for shard in split.shards}) > 1:
            raise UserError(f"{where}: splits.{name} has a mask for some shards only")
        if split.tokens != sum(shard.tokens for shard in split.shards) or split.documents > split.tokens:
            raise UserError(f"{where}: splits.{name} counts other tokens than its shards have")
        if max(split.words, split.lost_bytes) > split.bytes:
            raise UserError(f"{where}: splits.{name} has more words or lost bytes than bytes")
    if meta.manifest is None:
        return
    for name, sha256 in read_manifest(folder).items():
        if not name.endswith(".bin"):  # they are large: `_open` reads them where it is asked to
            check_file(folder, name, sha256)


def _open(folder: Path, shard: dict[str, Any], verify: bool) -> ArrayFile:
    path = folder / shard["name"]
    if not path.is_file():
        raise UserError(f"{path} is missing: pack the text again")
    size, expected = path.stat().st_size, shard["tokens"] * TOKEN.itemsize
    if size != expected:
        raise UserError(
            f"{path} has {size:,} bytes instead of {expected:,}: it was cut or edited, pack again"
        )
    if verify and file_sha256(path) != shard["sha256"]:
        raise UserError(f"{path} does not have the sha256 in {META}: it was edited or damaged, pack again")
    return ArrayFile(path, shard["tokens"])


def _open_mask(folder: Path, shard: dict[str, Any]) -> ArrayFile:
    path, length = folder / shard["mask"], -(-shard["tokens"] // 8)
    if not path.is_file() or path.stat().st_size != length:
        raise UserError(f"{path} has not one bit for each token: pack the text again")
    return ArrayFile(path, length, np.dtype(np.uint8))


def _is_flat_uint16(part: NDArray[Any] | ArrayFile) -> bool:
    flat = isinstance(part, ArrayFile) or (part.ndim == 1 and part.flags.c_contiguous)
    return flat and part.dtype == TOKEN


def _check_gather(
    starts: NDArray[np.int64], length: int, inputs: NDArray[np.int64], targets: NDArray[np.int64]
) -> None:
    if length < 1:
        raise ValueError("a window holds at least one token")
    if starts.dtype != np.int64 or starts.ndim != 1:
        raise ValueError("starts must be one-dimensional int64")
    for name, array in (("inputs", inputs), ("targets", targets)):
        if array.dtype != np.int64 or array.shape != (len(starts), length):
            raise ValueError(f"{name} must be int64 of shape {(len(starts), length)}")
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError(f"{name} must be contiguous and writable")
