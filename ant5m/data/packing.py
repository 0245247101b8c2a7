"""Text to token shards: encode, split by document, write, and be able to stop at any moment.

Only `progress.json` says how far packing came. It is replaced in one step, after the tokens that it counts
are on the disk; what was written after it is cut off when packing goes on. So Ctrl-C, a full disk and a power
cut are one case, and the result is the same, byte for byte, as without them.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import os
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import ant5m
from ant5m.data.builtin import load_builtin
from ant5m.data.contamination import ItemIndex
from ant5m.data.conversations import ChatTemplate, Conversation, Conversations
from ant5m.data.corpus import Corpus, Cursor, Position
from ant5m.data.filters import FILTERS, FilterName, clean
from ant5m.data.shards import COUNTS, FORMAT, META, PROGRESS, TOKEN
from ant5m.data.spelling import check_no_end_of_text, describe_lost, lost_bytes, spells_everything
from ant5m.data.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from ant5m.errors import DISK_FULL, UserError
from ant5m.files import (
    check_json,
    file_sha256,
    fsync,
    is_unused,
    lock,
    read_json,
    remove_asides,
    to_json,
    write_file,
    write_json,
)
from ant5m.manifest import MANIFEST, hash_files, write_manifest

if TYPE_CHECKING:
    from rich.progress import Progress

SHARD_TOKENS = 1 << 26
"""128 MiB a shard file"""
BATCH_BYTES = 1 << 22
"""text that is encoded at once"""
JOURNAL_BYTES = 1 << 25
"""text that is encoded again, at most, after a stop"""
CACHE_BYTES = 1 << 28
"""text after which the encoder starts over: its cache of words has no bound of its own"""
SAMPLES, SAMPLE_CHARACTERS = 8, 2048
"""excerpts of every batch that `tokenizers` encodes too"""
HASHES = 1 << 64
WIDE_SPACES = (
    (2, (0xC2, 0xC2), [0xC285, 0xC2A0]),
    (
        3,
        (0xE1, 0xE3),
        [int.from_bytes(chr(code).encode(), "big") for code in range(0x1000, 0x4000) if chr(code).isspace()],
    ),
)
"""white space outside ASCII: bytes in UTF-8, range of the first byte, all bytes as one number"""
OPTIONS = ("text_column", "validation_fraction", "seed", "shard_tokens", "filters")
HELD_OUT_SHARE, HELD_OUT_TOKENS, LARGEST_SHARE = 0.005, 100_000, 0.05
"""held out for validation when nobody says how much: a share of the documents; tokens at least, unless they
are a larger share of a small text"""
HELD_OUT = "documents"
"""what is held out whole; in a text that is one document only, its pieces"""
COUNTED = (*COUNTS, "lost_bytes")
"""of each split in `meta.json`"""
SHARD_FILES = {"name", "mask"}
"""what names a file, in the entry of a shard"""
PARTS = "part-*"
"""folders of a packing by several processes, which are no part of what comes out"""


def pack(
    corpus: Corpus,
    tokenizer: Tokenizer,
    out: str | Path,
    validation_fraction: float | None = None,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: "Progress | None" = None,
    filters: Sequence[FilterName] = (),
    allow_loss: bool = False,
    exclude: ItemIndex | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Write the folder that `Shards.open` reads, and return its `meta.json`.

    Every document is followed by the end-of-text id. A document is for validation when its seeded hash falls
    into the lowest `validation_fraction` (default: `HELD_OUT_SHARE`, and of a small text so much more that
    about `HELD_OUT_TOKENS` are held out, at most `LARGEST_SHARE`): its neighbors do not matter, and equal
    documents stay together. A document that is too long for one (see `ant5m.data.corpus`) has the hash of its
    first piece, so that all of it is in one split; only where the whole text is one document, each piece has
    its own. Where that leaves validation empty, the document with the lowest hash goes there. Every shard
    file but the last of its split holds `shard_tokens` tokens. `filters` (see `ant5m.data.filters`) change
    the documents of both splits, but not which document is in which. Documents that share 13 words in a row
    with an item of `exclude` are left out. With `max_tokens` the rest of the text is left where so many are
    packed, after the batch (`BATCH_BYTES`) that reaches them.

    Of `Conversations`, each is a document, and a shard's `mask` file says which of its tokens are learned: a
    bit for each, lowest bit first. The copy of the tokenizer has their template.

    A folder with an unfinished packing of the same corpus, tokenizer and options is continued. Raises
    `UserError` when the folder holds anything else, another process is packing into it, the ids do not fit
    uint16, a filter is not known, the text cannot be split, the disk is full, or the tokenizer loses bytes of
    the text (with `allow_loss` they are only counted).

    `meta.json`: `format`, `vocab_size`, `eos_token_id`, `tokenizer_fingerprint`, `sources` (names, and bytes
    on the disk), `options`, `versions`, and `splits`: for train and validation the number of `documents`,
    `tokens` (end-of-text ids included), `bytes` of UTF-8 text and `words` (`str.split`), `lost_bytes` (of
    them, what the tokenizer cannot spell), and the `shards`, each with `name`, `tokens` and `sha256`; with
    filters also `removed`, the counts of `ant5m.data.filters.clean`; with `exclude` also `excluded_items`,
    the tasks whose items it has; `left_out`, the `rows` and `files` that could not be read; `held_out`,
    "documents" or "pieces" of a single one. The folder also gets a copy of the tokenizer in `tokenizer/`, and
    `manifest.json` with the hash of every file.
    """
    out = Path(out)
    task = Task.check(
        corpus, tokenizer, validation_fraction, seed, shard_tokens, progress, filters, allow_loss, exclude
    )
    task = dataclasses.replace(task, plan=task.plan | {"max_tokens": max_tokens})
    refuse_content(out)
    with full_disk_explained(out), lock(out):
        remove_asides(out)
        journal: Journal | None = begin(out, task.plan)
        while journal:
            packed = pack_to_end(journal, task, out, progress)
            journal = start_over(packed)
            (journal or packed).write(out)
        return finish(packed, task, out)


@dataclass(frozen=True)
class Task:
    """What is packed, and how. Make one with `check`."""

    corpus: Corpus
    tokenizer: Tokenizer
    plan: dict[str, Any]
    """what decides the result, in plain values for JSON"""
    allow_loss: bool = False
    exclude: ItemIndex | None = None

    @classmethod
    def check(
        cls,
        corpus: Corpus,
        tokenizer: Tokenizer,
        validation_fraction: float | None,
        seed: int,
        shard_tokens: int,
        progress: "Progress | None",
        filters: Sequence[FilterName],
        allow_loss: bool,
        exclude: ItemIndex | None,
    ) -> "Task":
        """Raises `UserError` for options that `pack` refuses; see there."""
        _check(tokenizer, validation_fraction, seed, shard_tokens, filters)
        chosen = [name for name in FILTERS if name in filters]
        values = (corpus.text_column, validation_fraction, seed, shard_tokens, chosen)
        options = dict(zip(OPTIONS, values, strict=True))
        options["exclude_items"] = exclude.fingerprint if exclude else None
        template = _template(corpus)
        options["chat_template"] = template.text if template else None
        if filters and template:
            raise UserError("the filters are for text, not for conversations: leave out --filters")
        return cls(corpus, tokenizer, _plan(corpus, tokenizer, options, progress), allow_loss, exclude)


@dataclass
class Journal:
    """The content of progress.json."""

    plan: dict[str, Any]
    """what decides the result: only the same plan may go on"""
    limit: int
    """documents with a hash up to here are for validation"""
    trusted: bool = True
    """whether gigatoken agreed with `tokenizers` on every sample"""
    position: tuple[int, int] = (0, 0)
    """of the corpus"""
    lowest: int = HASHES
    """the lowest hash of a document"""
    highest: int = -1
    cut: bool = False
    """whether a document was too long for one"""
    by_piece: bool = False
    """whether pieces of documents are held out: of a text that is one document"""
    splits: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {
            name: {**dict.fromkeys(COUNTED, 0), "shards": []} for name in ("train", "validation")
        }
    )
    """as in meta.json, so far"""
    removed: dict[str, int] = field(default_factory=dict)
    """by the filters"""
    left_out: dict[str, int] = field(default_factory=dict)
    """what could not be read"""
    bytes_read: int = 0
    """of the disk, for progress"""
    notes: list[str] = field(default_factory=list)
    """warnings, of a part only: whoever joins the parts gives them"""
    complete: bool = False
    """of a part: whether its end was reached; of many: whether they are joined"""

    @property
    def packed(self) -> int:
        """Bytes of text."""
        return sum(split["bytes"] for split in self.splits.values())

    def write(self, out: Path) -> None:
        write_json(out / PROGRESS, dataclasses.asdict(self))


@dataclass
class _Split:
    """What is checked of an entry of `splits` in progress.json."""

    documents: int
    tokens: int
    bytes: int
    words: int
    lost_bytes: int
    shards: list[dict[str, Any]]


def _check(
    tokenizer: Tokenizer,
    validation_fraction: float | None,
    seed: int,
    shard_tokens: int,
    filters: Sequence[str],
) -> None:
    for name in filters:
        if name not in FILTERS:
            raise UserError(f"there is no filter '{name}' (there are {', '.join(FILTERS)})")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise UserError(f"the validation fraction must lie between 0 and 1, not {validation_fraction}")
    if abs(seed) >= 2**63:
        raise UserError(f"the seed must fit 64 bits, which {seed} does not")
    if shard_tokens < 1:
        raise UserError(f"a shard must hold at least one token, not {shard_tokens}")
    if tokenizer.vocab_size > MAX_VOCAB_SIZE:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, a shard's uint16 {MAX_VOCAB_SIZE:,}: "
            "take or train a smaller one"
        )


def _template(corpus: Corpus) -> ChatTemplate | None:
    return corpus.template if isinstance(corpus, Conversations) else None


@contextlib.contextmanager
def full_disk_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"no room left on the disk for {out}: free some and repeat the command, it goes on from there"
        ) from None


def _plan(
    corpus: Corpus, tokenizer: Tokenizer, options: dict[str, Any], progress: "Progress | None"
) -> dict[str, Any]:
    inputs = [[source.name, source.size, _version(source.name, progress)] for source in corpus.sources]
    plan = {"format": FORMAT, "inputs": inputs, "tokenizer": tokenizer.fingerprint, **options}
    chosen = {"max_documents": corpus.max_documents, "group_column": corpus.group_column}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return plan | {"held_out": HELD_OUT, "on_error": corpus.on_error, **chosen}


def _version(source: str, progress: "Progress | None") -> int | str | None:
    """Changes when the text of a source does; None for hf:..., which does not tell."""
    if source == "builtin":
        return load_builtin(progress).fingerprint
    return os.stat(source).st_mtime_ns if os.path.exists(source) else None


def refuse_content(out: Path) -> None:
    if (out / META).exists():
        raise UserError(f"{out} is packed already: choose another folder, or remove it")
    if not is_unused(out) and not (out / PROGRESS).exists():
        raise UserError(f"{out} exists with other content: choose another folder")


def begin(out: Path, plan: dict[str, Any]) -> Journal:
    """A new journal in a new or empty folder, or the one of a packing that was stopped."""
    refuse_content(out)  # now that no other process writes into it
    if (out / PROGRESS).exists():
        return _resume(out, plan)
    journal = new_journal(plan)
    journal.write(out)
    return journal


def new_journal(plan: dict[str, Any]) -> Journal:
    share = plan["validation_fraction"]
    return Journal(plan, limit=int((HELD_OUT_SHARE if share is None else share) * HASHES))


def _resume(out: Path, plan: dict[str, Any]) -> Journal:
    journal = read_journal(out)
    changed = [name for name in plan | journal.plan if journal.plan.get(name) != plan.get(name)]
    parts = [part for part in out.glob(PARTS) if (part / PROGRESS).exists()]
    if changed and not any(one.packed for one in (journal, *map(read_journal, parts))):
        remove_parts(out)
        return new_journal(plan)  # nothing was packed yet: an input was broken, and was mended since
    if changed:
        raise UserError(
            f"{out} holds an unfinished packing of other {', '.join(changed)}: "
            "repeat the command that began it, choose another folder, or remove it"
        )
    return journal


def read_journal(folder: Path) -> Journal:
    """The journal of an unfinished packing; `UserError` when it is damaged."""
    try:
        journal = read_json(folder / PROGRESS, Journal)
        for split in journal.splits.values():
            check_json(split, "splits", _Split)
    except UserError as error:
        raise UserError(f"{error}: it is damaged, remove {folder} and pack again") from None
    return journal


def part_folder(out: Path, number: int) -> Path:
    """Where `ant5m.data.joint_packing` packs a part."""
    return out / PARTS.replace("*", f"{number:05d}")


def remove_parts(out: Path) -> None:
    for part in out.glob(PARTS):
        shutil.rmtree(part)


def pack_to_end(journal: Journal, task: Task, out: Path, progress: "Progress | None" = None) -> Journal:
    """Go from the journal's position to the end of the corpus, and return the journal there."""
    if _pack(journal, task, out, progress):
        return journal
    warnings.warn("gigatoken and tokenizers disagree on this text: packing with tokenizers", stacklevel=3)
    journal = dataclasses.replace(
        Journal(journal.plan, journal.limit, trusted=False, by_piece=journal.by_piece), notes=journal.notes
    )
    journal.write(out)
    if not _pack(journal, task, out, progress):
        raise UserError("tokenizers gives this text other ids each time: use another tokenizer")
    return journal


def _pack(journal: Journal, task: Task, out: Path, progress: "Progress | None") -> bool:
    """`pack_to_end`, unless gigatoken is found to be wrong: then False."""
    corpus = task.corpus
    cursor = corpus.documents(Position(*journal.position))
    again = not journal.trusted or journal.by_piece or journal.limit != new_journal(journal.plan).limit
    # By another encoder, or so that a document is held out.
    what = "packing once more" if again else "packing"
    bar = progress.add_task(what, total=corpus.size or None) if progress else None
    unsaved = 0
    with contextlib.ExitStack() as stack:
        template = _template(corpus)
        writers = {
            name: stack.enter_context(
                _Writer(out, name, split, journal.plan["shard_tokens"], masked=template is not None)
            )
            for name, split in journal.splits.items()
        }
        batches = _batches(cursor, journal.plan, journal.by_piece, task.exclude)
        for batch in _encoded(batches, task.tokenizer, journal.trusted, task.allow_loss, template):
            if not batch.verified:
                return False
            _write(batch, journal, writers)
            unsaved += int(batch.counts["bytes"].sum())
            if unsaved >= JOURNAL_BYTES:
                for writer in writers.values():
                    writer.sync()
                journal.write(out)
                unsaved = 0
            if progress and bar is not None:
                progress.update(bar, completed=journal.bytes_read if corpus.size else journal.packed)
            if 0 < (journal.plan.get("max_tokens") or 0) <= _tokens(journal):
                break
        for writer in writers.values():
            writer.end_shard()
    return True


def start_over(journal: Journal) -> Journal | None:
    """What to begin again with, where all of a text was packed and too little of it is held out; else
    None."""
    if journal.lowest == journal.highest and journal.cut and not journal.by_piece:
        warnings.warn(
            "the text is one document: pieces of it are held out, which are easier to predict than another "
            "document. Put <|endoftext|> between its parts, or give more files",
            stacklevel=3,
        )
        return dataclasses.replace(new_journal(journal.plan), trusted=journal.trusted, by_piece=True)
    limit = journal.limit
    if not journal.splits["validation"]["documents"] and journal.lowest != HASHES:
        limit = max(limit, journal.lowest)
    if journal.plan["validation_fraction"] is None:
        limit = max(limit, _limit_of_small_text(journal))
    if limit == journal.limit:
        return None
    return Journal(journal.plan, limit, journal.trusted, by_piece=journal.by_piece)


def _limit_of_small_text(journal: Journal) -> int:
    """With which about `HELD_OUT_TOKENS` are held out, where they are not; 0 where nothing is to be done."""
    total = _tokens(journal)
    wanted = min(HELD_OUT_TOKENS, LARGEST_SHARE * total)
    if journal.splits["validation"]["tokens"] >= wanted:
        return 0
    limit = int(wanted / total * HASHES)
    return limit if limit < journal.highest else 0  # something is left to train on


def _tokens(journal: Journal) -> int:
    return sum(split["tokens"] for split in journal.splits.values())


def finish(journal: Journal, task: Task, out: Path) -> dict[str, Any]:
    """Write what a data set has beside its shards, or say why there is none."""
    for name, split in journal.splits.items():
        if not split["documents"]:
            _remove_shards(out, keep=set())
            (out / PROGRESS).unlink()
            if not any(split["documents"] for split in journal.splits.values()):
                raise UserError("every document was left out: pack without a filter, or give other text")
            raise UserError(
                f"the text is too small: no document is left for {name}. Give more different ones (files, "
                "rows, or <|endoftext|> between the documents of a .txt), or another --validation-fraction"
            )
    # What the journal does not list is the next shard, still empty, or comes from a start that was given up.
    _remove_shards(out, keep=set(_shard_files(journal.splits)))
    tokenizer = task.tokenizer
    if template := _template(task.corpus):
        settings = {**tokenizer.settings, "chat_template": template.text}
        tokenizer = Tokenizer(tokenizer.backend, tokenizer.eos_token, tokenizer.bos_token, settings)
    tokenizer.save(out / "tokenizer")
    meta = {
        "format": FORMAT,
        "vocab_size": task.tokenizer.vocab_size,
        "eos_token_id": task.tokenizer.eos_token_id,
        "tokenizer_fingerprint": task.tokenizer.fingerprint,
        "splits": journal.splits,
        "sources": [{"name": source.name, "size": source.size} for source in task.corpus.sources],
        "options": {name: journal.plan[name] for name in (*OPTIONS, "parts") if name in journal.plan},
        "held_out": "pieces" if journal.by_piece else HELD_OUT,
        "left_out": journal.left_out,
        "manifest": MANIFEST,
        "versions": {
            "ant5m": ant5m.__version__,
            **{name: importlib.metadata.version(name) for name in ("tokenizers", "gigatoken")},
        },
    }
    if journal.plan["filters"] or task.exclude:
        meta["removed"] = journal.removed
    if task.exclude:
        meta["excluded_items"] = task.exclude.describe()
    _write_meta(out, meta)
    (out / PROGRESS).unlink()
    return meta


def _write_meta(out: Path, meta: dict[str, Any]) -> None:
    """The manifest, and last of all `meta.json`, which makes the folder a data set."""
    raw = to_json(meta)
    shards = _shard_files(meta["splits"])
    hashes = {name: shard["sha256"] for name, shard in shards.items() if name == shard["name"]}
    hashes |= hash_files(out, (out / name for name in shards if name not in hashes))
    hashes |= hash_files(out, sorted((out / "tokenizer").iterdir()))
    write_manifest(out, {META: hashlib.sha256(raw).hexdigest(), **hashes})
    write_file(out / META, raw)


def _shard_files(splits: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entry of the shard that each file belongs to, by the file's name."""
    shards = [shard for split in splits.values() for shard in split["shards"]]
    return {shard[name]: shard for shard in shards for name in SHARD_FILES & shard.keys()}


def _remove_shards(out: Path, keep: set[str]) -> None:
    for pattern in ("*.bin", "*.mask", "*.bin.partial", "*.mask.partial"):
        for path in out.glob(pattern):
            if path.name not in keep:
                path.unlink()


@dataclass
class _Batch:
    """Documents on their way; arrays are [documents] unless said otherwise."""

    texts: list[str]
    raw: list[bytes]
    """the texts in UTF-8"""
    hashes: NDArray[np.uint64]
    """of the texts as they were before the filters"""
    removed: Counter[str]
    """by the filters, since the batch before"""
    left_out: Counter[str]
    """what could not be read, since the batch before"""
    cut: bool
    """whether a document was too long for one, and these are pieces of it"""
    end: Position
    """of the corpus, after the last document"""
    bytes_read: int


@dataclass
class _Encoded:
    """What a batch becomes."""

    tokens: NDArray[np.uint16]
    """[tokens], every document with its end-of-text id"""
    mask: NDArray[np.uint8] | None
    """[tokens], of conversations: 1 where a token is learned"""
    counts: dict[str, NDArray[np.int64]]
    """`documents` (ones), `tokens`, `bytes`, `words` and `lost_bytes` of each document"""
    source: _Batch
    verified: bool


def _batches(
    cursor: Cursor, plan: dict[str, Any], by_piece: bool, exclude: ItemIndex | None
) -> Iterator[_Batch]:
    salt = plan["seed"].to_bytes(hashlib.blake2b.SALT_SIZE, "little", signed=True)
    texts: list[str] = []
    raw: list[bytes] = []
    digests: list[bytes] = []
    removed: Counter[str] = Counter()
    size, head, digest, cut = 0, None, b"", False
    left_out_before: Counter[str] = Counter()

    def batch() -> _Batch:
        nonlocal left_out_before
        hashes = np.frombuffer(b"".join(digests), "<u8")
        left_out, left_out_before = cursor.left_out - left_out_before, cursor.left_out.copy()
        return _Batch(texts, raw, hashes, removed, left_out, cut, cursor.position, cursor.bytes_read)

    for text in cursor:
        whole = text.encode()
        if by_piece or cursor.head is text:
            digest = hashlib.blake2b(whole, digest_size=8, salt=salt).digest()
        elif cursor.head is not head:  # packing goes on in the middle of a document
            digest = hashlib.blake2b(cursor.head.encode(), digest_size=8, salt=salt).digest()
        cut |= cursor.head is not text
        head = cursor.head
        if plan["filters"]:
            text, counts = clean(text, plan["filters"])
            removed += counts
        if exclude and text and exclude.has(text):
            removed["documents_with_items"] += 1
            continue
        if not text:
            continue
        texts.append(text)
        raw.append(text.encode() if plan["filters"] else whole)
        digests.append(digest)
        size += len(raw[-1])
        if size >= BATCH_BYTES:
            yield batch()
            texts, raw, digests, removed, size = [], [], [], Counter(), 0
    if texts or removed or cursor.left_out != left_out_before:
        yield batch()


def _encoded(
    batches: Iterator[_Batch],
    tokenizer: Tokenizer,
    trusted: bool,
    allow_loss: bool,
    template: ChatTemplate | None,
) -> Iterator[_Encoded]:
    """Encode each batch while the next one is read."""
    lossless = spells_everything(tokenizer)
    with ThreadPoolExecutor(1) as pool:
        running: Future[_Encoded] | None = None
        encoder, size = _encoder(tokenizer, trusted), 0
        for batch in batches:
            following = pool.submit(_encode, batch, encoder, lossless, allow_loss, template)
            size += sum(map(len, batch.raw))
            if size >= CACHE_BYTES:
                encoder, size = _encoder(tokenizer, trusted), 0
            if running:
                yield running.result()
            running = following
        if running:
            yield running.result()


def _encoder(tokenizer: Tokenizer, trusted: bool) -> Tokenizer:
    """The same tokenizer with an empty cache."""
    encoder = Tokenizer(tokenizer.backend, tokenizer.eos_token)
    if not trusted:
        encoder._gigatoken = None  # so `tokenizers` does the work
    return encoder


def _encode(
    batch: _Batch, tokenizer: Tokenizer, lossless: bool, allow_loss: bool, template: ChatTemplate | None
) -> _Encoded:
    encoded = _encode_conversations(batch, template) if template else _encode_texts(batch, tokenizer)
    if not lossless:
        lost = lost_bytes(tokenizer, batch.texts, tokenizer.encode_batch(batch.texts))
        if lost.any() and not allow_loss:
            raise UserError(
                f"{describe_lost(tokenizer, batch.texts, lost)}: take one that has every byte, as ant5m "
                "tokenizer train makes them, or pack without it (--allow-loss)"
            )
        encoded.counts["lost_bytes"] = lost
    return encoded


def _encode_texts(batch: _Batch, tokenizer: Tokenizer) -> _Encoded:
    ids, lengths = tokenizer.encode_flat(batch.texts)
    check_no_end_of_text(tokenizer, ids)
    lengths = lengths + 1
    ends = np.cumsum(lengths) - 1
    tokens = np.empty(len(ids) + len(ends), TOKEN)
    inside = np.ones(len(tokens), bool)
    inside[ends] = False
    tokens[inside] = ids
    tokens[ends] = tokenizer.eos_token_id
    return _Encoded(tokens, None, _counts(batch, lengths), batch, _verify(batch.texts, tokenizer))


def _encode_conversations(batch: _Batch, template: ChatTemplate) -> _Encoded:
    conversations = [text for text in batch.texts if isinstance(text, Conversation)]
    ids, learned, lengths = template.encode(conversations)
    tokens, mask = np.array(ids, TOKEN), np.array(learned, np.uint8)
    return _Encoded(tokens, mask, _counts(batch, np.array(lengths, np.int64)), batch, verified=True)


def _counts(batch: _Batch, lengths: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    return {
        "documents": np.ones_like(lengths),
        "tokens": lengths,
        "bytes": np.array([len(piece) for piece in batch.raw], np.int64),
        "words": count_words(batch.raw),
        "lost_bytes": np.zeros_like(lengths),
    }


def count_words(raw: list[bytes]) -> NDArray[np.int64]:
    """Words of each UTF-8 text as `len(text.split())` counts them, without building them; int64 [texts]."""
    text = np.frombuffer(b"\n" + b"\n".join(raw) + b"\n\n", np.uint8)  # two more, to look ahead
    space = (text == 32) | (text - np.uint8(9) < 5) | (text - np.uint8(28) < 4)  # what is less wraps around
    for width, (low, high), codes in WIDE_SPACES:
        at = np.flatnonzero((text >= low) & (text <= high))
        code: NDArray[Any] = np.zeros(len(at), np.uint32)
        for place in range(width):
            code = code << 8 | text[at + place]
        found = at[np.isin(code, codes)]
        for place in range(width):
            space[found + place] = True
    begins = np.flatnonzero(space[:-1] & ~space[1:])
    ends = np.cumsum([len(piece) + 1 for piece in raw])
    return np.diff(np.searchsorted(begins, ends), prepend=0)


def _verify(texts: list[str], tokenizer: Tokenizer) -> bool:
    """Whether `tokenizers` itself gives the same ids for excerpts of some documents."""
    chosen = random.Random(len(texts)).sample(texts, min(SAMPLES, len(texts)))
    excerpts = [text[:SAMPLE_CHARACTERS] for text in chosen]
    return all(
        ids.tolist() == tokenizer.encode(text)
        for ids, text in zip(tokenizer.encode_batch(excerpts), excerpts, strict=True)
    )


def _write(batch: _Encoded, journal: Journal, writers: dict[str, "_Writer"]) -> None:
    """Give each split its documents of a batch, and count them."""
    source = batch.source
    for_validation = source.hashes <= np.uint64(journal.limit)
    for name, rows in (("validation", for_validation), ("train", ~for_validation)):
        if rows.any():
            chosen = np.repeat(rows, batch.counts["tokens"])
            writers[name].write(batch.tokens[chosen], None if batch.mask is None else batch.mask[chosen])
        for count in COUNTED:
            journal.splits[name][count] += int(batch.counts[count][rows].sum())
    if len(source.hashes):  # the filters may have left none
        journal.lowest = min(journal.lowest, int(source.hashes.min()))
        journal.highest = max(journal.highest, int(source.hashes.max()))
    journal.cut |= source.cut
    journal.removed = dict(Counter(journal.removed) + source.removed)
    journal.left_out = dict(Counter(journal.left_out) + source.left_out)
    journal.position, journal.bytes_read = source.end, source.bytes_read


class _Writer:
    """The shard files of one split. The one being written is `NAME.partial`, and its length is the journal's
    matter. The mask of a shard is a byte for each token there, and becomes a bit when the shard is ended.

    Keeps the `shards` of the split's entry in the journal.
    """

    def __init__(
        self, folder: Path, name: str, split: dict[str, Any], shard_tokens: int, masked: bool = False
    ) -> None:
        self._folder = folder
        self._name = name
        self._split = split
        self._shard_tokens = shard_tokens
        self._filled = split["tokens"] - sum(shard["tokens"] for shard in split["shards"])
        self._masked = masked
        self._files = self._open()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def _path(self) -> Path:
        return self._folder / shard_name(self._name, len(self._split["shards"]))

    @property
    def _mask(self) -> Path:
        return self._path.with_suffix(".mask")

    def write(self, tokens: NDArray[np.uint16], mask: NDArray[np.uint8] | None = None) -> None:
        while len(tokens):
            room = self._shard_tokens - self._filled
            piece, tokens = tokens[:room], tokens[room:]
            _write_all(self._files[0], piece.tobytes())
            if mask is not None:
                _write_all(self._files[1], mask[:room].tobytes())
                mask = mask[room:]
            self._filled += len(piece)
            if self._filled == self._shard_tokens:
                self.end_shard()

    def sync(self) -> None:
        """Put what was written on the disk, so that the journal may count it."""
        for file in self._files:
            os.fsync(file.fileno())

    def end_shard(self) -> None:
        """Give the files their names, and begin the next ones."""
        if not self._filled:
            return
        self.sync()
        self._close()
        shard: dict[str, Any] = {"name": self._path.name, "tokens": self._filled}
        if self._masked:
            learned = np.fromfile(_partial(self._mask), np.uint8)
            write_file(self._mask, np.packbits(learned, bitorder="little").tobytes())
            shard["mask"] = self._mask.name
        _partial(self._path).replace(self._path)
        fsync(self._folder)
        shard["sha256"] = file_sha256(self._path)
        _partial(self._mask).unlink(missing_ok=True)
        self._split["shards"].append(shard)
        self._filled = 0
        self._files = self._open()

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def _open(self) -> list[io.FileIO]:
        if self._path.exists():  # it was ended after the journal was written
            self._path.replace(_partial(self._path))
        if self._mask.exists() and not _partial(self._mask).exists():
            learned = np.unpackbits(np.fromfile(self._mask, np.uint8), bitorder="little")
            write_file(_partial(self._mask), learned.tobytes())
        sizes = {self._path: TOKEN.itemsize} | ({self._mask: 1} if self._masked else {})
        return [self._reopen(_partial(path), self._filled * size) for path, size in sizes.items()]

    def _reopen(self, path: Path, kept: int) -> io.FileIO:
        file = io.FileIO(path, "ab")
        if os.fstat(file.fileno()).st_size < kept:
            raise UserError(f"{path} is shorter than when packing stopped: remove {self._folder}")
        file.truncate(kept)
        return file


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:  # a nearly full disk takes a part
        view = view[file.write(view) :]
