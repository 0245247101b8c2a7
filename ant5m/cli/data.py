"""`ant5m data pack`."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from ant5m.console import progress_bar
from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.data.corpus import Corpus
    from ant5m.data.tokenizer import Tokenizer

FEW_DOCUMENTS, FEW_TOKENS = 20, 20_000
"""fewer held out say little about the loss"""
LARGE_SHARE = 0.1
"""of the tokens held out, above which it is worth a warning"""


@dataclass
class DataPack:
    """Turn text into token shards: files of uint16, split into train and validation by document.

    It can be stopped at any time (Ctrl-C). The same command continues it, with the same result.

    Examples:

        ant5m data pack books/ more.jsonl.zst --tokenizer tok --out data/books
        ant5m data pack hf:roneneldan/TinyStories --tokenizer tok --out data/stories
        ant5m data pack web.jsonl --tokenizer tok --out web --filters repeats
        ant5m data pack web.jsonl --tokenizer tok --out web --exclude-items items/
        ant5m data pack web/ --tokenizer my-tokenizer --out data/web --parts 64
        ant5m data pack builtin --tokenizer tok --out std --validation-fraction 0.02
        ant5m data pack chats.jsonl --tokenizer base/tokenizer --out chat --chat
    """

    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="INPUT...", help_behavior_hint="(required)"),
    ]
    """.txt, .md, .jsonl, .json, .csv, .tar (also .gz, .xz, .zst) and .parquet files, folders or globs of
    them, hf:OWNER/NAME[:SPLIT], or builtin"""
    tokenizer: Path
    """tokenizer folder, or a tokenizer.json"""
    out: Path
    """folder for the shards: a new one, or one that the same command left unfinished"""
    validation_fraction: float | None = None
    """share of the documents that is held out for validation; default: 0.005, of a small text so much more
    that it is about 100,000 tokens, at most 0.05"""
    text_column: str = "text"
    """name of the text field in rows"""
    group_column: str | None = None
    """field of what rows belong to, as chapters to a book: all rows of it are held out, or none"""
    chat: bool = False
    """the rows are conversations: their messages (in --text-column, by default "messages") are written with
    the tokenizer's chat template, and training learns only what the assistant says"""
    max_documents: int | None = None
    """read only so many documents of each file or hf: data set, its first ones"""
    max_tokens: int | None = None
    """stop when so many tokens are packed (and up to 4 MB of text more); the rest is not read"""
    shard_tokens: int = 1 << 26
    """tokens in one shard file"""
    seed: int = 0
    """seed of the split into train and validation"""
    on_error: Literal["stop", "skip"] = "stop"
    """what to do with rows and files that cannot be read: stop there, or leave them out and count them"""
    allow_loss: bool = False
    """pack also where the tokenizer cannot spell all of the text; there will be no bits per byte"""
    filters: tuple[Literal["repeats", "boilerplate"], ...] = ()
    """repeats: remove lines that already occurred in the same document, and documents that mostly repeat
    themselves; boilerplate: remove URLs, e-mail addresses, and lines about cookies, policies and copyright"""

    exclude_items: Path | None = None
    """folder of benchmark items, as for `ant5m eval --data-dir`: leave out documents that share 13 words in a
    row with one of them"""

    parts: int = 1
    """cut the text into so many parts, which processes pack at the same time, also those of torchrun; the
    shard files depend on their number, not on who packs them"""
    workers: int | None = None
    """processes at a time, with --parts (default: one for each core)"""

    def run(self) -> None:
        from ant5m.data.contamination import ItemIndex
        from ant5m.data.corpus import describe_left_out
        from ant5m.data.joint_packing import pack_jointly
        from ant5m.data.tokenizer import Tokenizer
        from ant5m.eval.items import texts_by_task
        from ant5m.ranks import join

        ranks = join()
        for flag, limit in (("--max-documents", self.max_documents), ("--max-tokens", self.max_tokens)):
            if limit is not None and limit < 1:
                raise UserError(f"{flag} must be at least 1, not {limit}")
        tokenizer = Tokenizer.load(self.tokenizer)
        corpus = dataclasses.replace(
            self._open(tokenizer), max_documents=self.max_documents, group_column=self.group_column
        )
        remaining = TimeRemainingColumn(elapsed_when_finished=True)
        with progress_bar(BarColumn(), DownloadColumn(), TransferSpeedColumn(), remaining) as progress:
            meta = pack_jointly(
                corpus,
                tokenizer,
                self.out,
                self.parts,
                self.workers,
                validation_fraction=self.validation_fraction,
                max_tokens=self.max_tokens,
                seed=self.seed,
                shard_tokens=self.shard_tokens,
                progress=progress,
                filters=self.filters,
                allow_loss=self.allow_loss,
                exclude=ItemIndex(texts_by_task(self.exclude_items)) if self.exclude_items else None,
                ranks=ranks,
            )
        ranks.leave()
        if not ranks.is_first:
            return
        removed = _removed(meta.get("removed", {}))
        Console().print(_table(meta["splits"]), f"{removed}packed into {escape(str(self.out))}")
        if meta["left_out"]:
            warnings.warn(describe_left_out(meta["left_out"]), stacklevel=2)
        self._warn_about_loss(meta["splits"])
        self._warn_about_validation(meta["splits"])

    def _open(self, tokenizer: "Tokenizer") -> "Corpus":
        from ant5m.data.conversations import MESSAGES, PLAIN_TEMPLATE, ChatTemplate, Conversations
        from ant5m.data.corpus import Corpus

        if not self.chat:
            return Corpus.open(self.inputs, self.text_column, self.on_error)
        column = MESSAGES if self.text_column == "text" else self.text_column
        return Conversations.find(self.inputs, ChatTemplate(tokenizer, PLAIN_TEMPLATE), column, self.on_error)

    def _warn_about_loss(self, splits: dict[str, Any]) -> None:
        lost, size = (sum(split[key] for split in splits.values()) for key in ("lost_bytes", "bytes"))
        if lost:
            warnings.warn(f"the tokenizer lost {lost:,} of {size:,} bytes ({lost / size:.2%})", stacklevel=2)

    def _warn_about_validation(self, splits: dict[str, Any]) -> None:
        held_out = splits["validation"]
        share = held_out["tokens"] / sum(split["tokens"] for split in splits.values())
        if share > max(LARGE_SHARE, 2 * (self.validation_fraction or 0.0)):
            warnings.warn(
                f"{share:.0%} of the text is held out: whole documents are, and this text has few long ones. "
                "Put <|endoftext|> between the parts of a .txt, or give more text",
                stacklevel=2,
            )
        if held_out["documents"] < FEW_DOCUMENTS or held_out["tokens"] < FEW_TOKENS:
            documents = f"{held_out['documents']:,} document{'s' * (held_out['documents'] != 1)}"
            size = f"{documents}, {held_out['tokens']:,} tokens"
            warnings.warn(
                f"validation has only {size}: its loss will be rough. Give more text, or hold out more of it "
                "(--validation-fraction 0.05)",
                stacklevel=2,
            )


def _table(splits: dict) -> Table:
    table = Table("split", "documents", "tokens", "words", "kB of text", "bytes/token", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in splits.items():
        counts = [f"{split[key]:,}" for key in ("documents", "tokens", "words")]
        table.add_row(
            name, *counts, f"{split['bytes'] / 1e3:,.0f}", f"{split['bytes'] / split['tokens']:.2f}"
        )
    return table


def _removed(counts: dict[str, int]) -> str:
    if not counts:
        return ""
    listed = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items())
    return f"left out: {listed}\n"
