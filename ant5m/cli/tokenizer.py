"""`ant5m tokenizer train` and `ant5m tokenizer health`."""

import functools
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.table import Table

from ant5m.console import progress_bar
from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.data.health import Health

LARGEST_SAMPLE_MB = 100_000
_STYLE = {"fit": "bold green", "fit with reservations": "bold yellow", "unfit": "bold red"}


@dataclass
class TokenizerTrain:
    """Train a byte-level BPE tokenizer on text.

    Examples:

        ant5m tokenizer train books/ more.jsonl.zst --out tok
        ant5m tokenizer train hf:roneneldan/TinyStories --vocab-size 4096 --out tok
        ant5m tokenizer train builtin --out tok
    """

    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="INPUT...", help_behavior_hint="(required)"),
    ]
    """.txt, .md, .jsonl, .json, .csv, .tar (also .gz, .xz, .zst) and .parquet files, folders or globs of
    them, hf:OWNER/NAME[:SPLIT], or builtin"""
    out: Path
    """folder for tokenizer.json and the files that transformers needs to open it; must not exist yet"""
    vocab_size: int = 16_384
    """number of entries, including the 256 bytes and <|endoftext|>; at most 65,536"""
    sample_mb: int = 100
    """megabytes of text to train on, sampled evenly from the inputs"""
    max_documents: int | None = None
    """read at most this many documents: for a data set that is too large to read to its end"""
    text_column: str = "text"
    """name of the text field in rows"""
    on_error: Literal["stop", "skip"] = "stop"
    """what to do with rows and files that cannot be read: stop there, or leave them out and count them"""

    def run(self) -> None:
        from ant5m.data.corpus import Corpus, tracked
        from ant5m.data.tokenizer import check_vocab_size, train_tokenizer
        from ant5m.files import new_folder

        check_vocab_size(self.vocab_size)
        _check_amounts(self.sample_mb, self.max_documents)
        corpus = Corpus.open(self.inputs, self.text_column, self.on_error)
        with new_folder(self.out) as folder, _bar() as progress:
            texts = itertools.islice(tracked(corpus, progress), self.max_documents)
            train_tokenizer(texts, self.vocab_size, self.sample_mb * 1_000_000, progress).save(folder)
        Console().print(f"learned {self.vocab_size:,} entries; written to {escape(str(self.out))}")


@dataclass
class TokenizerHealth:
    """Check whether a tokenizer suits a text and a model of a given size.

    Examples:

        ant5m tokenizer health books/ --tokenizer tok
        ant5m tokenizer health books/ --tokenizer tok --preset ant-5m-fit
        ant5m tokenizer health books/ --tokenizer gpt2/tokenizer.json --json
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
    preset: str = "ant-5m"
    """model that would use the tokenizer: a preset (ant-5m, ant-5m-wide, ant-5m-fit, ant-5m-best,
    archaea-74m) or a config file"""
    compare: tuple[int, ...] = (2_048, 4_096, 8_192, 16_384)
    """vocabulary sizes to train on the same text for comparison"""
    sample_mb: int = 10
    """megabytes of text to measure on, sampled evenly from the inputs"""
    max_documents: int | None = None
    """read at most this many documents: for a data set that is too large to read to its end"""
    text_column: str = "text"
    """name of the text field in rows"""
    on_error: Literal["stop", "skip"] = "stop"
    """what to do with rows and files that cannot be read: stop there, or leave them out and count them"""
    picture: Path = Path("tokenizer-health.png")
    """file for the picture"""
    json: bool = False
    """print JSON instead of tables"""

    def run(self) -> None:
        from ant5m.data import health
        from ant5m.data.corpus import Corpus, tracked
        from ant5m.data.tokenizer import Tokenizer
        from ant5m.model.config_file import load_config
        from ant5m.model.costs import count_table

        _check_amounts(self.sample_mb, self.max_documents)
        health.picture_kind(self.picture)
        table = functools.partial(count_table, load_config(self.preset))
        tokenizer = Tokenizer.load(self.tokenizer)
        corpus = Corpus.open(self.inputs, self.text_column, self.on_error)
        with _bar() as progress:
            texts = itertools.islice(tracked(corpus, progress), self.max_documents)
            found = health.examine(
                tokenizer, texts, table, self.preset, self.compare, self.sample_mb * 1_000_000, progress
            )
        if self.json:
            json.dump(found.to_dict(), sys.stdout, indent=2, ensure_ascii=False)
            print()
        else:
            _show(found, Console(highlight=False), health.RARE)
        health.draw(found, self.picture)
        if not self.json:
            Console().print(f"picture: {escape(str(self.picture))}")


def _bar() -> Progress:
    return progress_bar(BarColumn(), TaskProgressColumn(), TimeElapsedColumn())


def _check_amounts(sample_mb: int, max_documents: int | None) -> None:
    if sample_mb < 1 or (max_documents is not None and max_documents < 1):
        raise UserError("--sample-mb and --max-documents must be at least 1")
    if sample_mb > LARGEST_SAMPLE_MB or (max_documents or 0) > sys.maxsize:
        raise UserError(f"--sample-mb must be at most {LARGEST_SAMPLE_MB:,}: the sample is held in memory")


def _show(health: "Health", console: Console, rare: int) -> None:
    console.print(_overview(health, rare))
    console.print(_tokens(health))
    repeated = {"Repeated lines": health.repeated_lines, "Repeated fragments": health.repeated_ngrams}
    for title, fragments in repeated.items():
        if fragments:
            table = Table("times", "text", title=title, title_justify="left")
            for fragment in fragments:
                table.add_row(f"{fragment.count:,}", escape(_shortened(fragment.text)))
            console.print(table)
    if health.comparison:
        console.print(_comparison(health))
    console.print(f"[{_STYLE[health.verdict]}]{health.verdict}[/]")
    for reason in health.reasons:
        console.print(f"  - {escape(reason)}")


def _overview(health: "Health", rare: int) -> Table:
    trip = health.round_trip
    changed = f"{len(trip.lost):,} lost, {len(trip.normalized):,} normalized"
    never = " ".join(map(repr, health.unreachable[:5]))
    model = health.model
    rows = {
        "sample": f"{health.documents:,} documents, {health.bytes / 1e6:.1f} MB, {health.words:,} words, "
        f"{health.tokens:,} tokens",
        "bytes per token": f"{health.bytes_per_token:.3f}",
        "tokens per word (fertility)": f"{health.fertility:.3f}",
        "round trip": changed if trip.lost or trip.normalized else "bytes, Unicode and the sample come back",
        "vocabulary never used": f"{health.unused:.1%}",
        "vocabulary hardly used": f"{health.hardly_used:.1%} (fewer than {rare} times)",
        "unreachable entries": f"{len(health.unreachable):,} {never}",
        "URLs": f"{health.url_share:.2%} of the text",
        "repeated lines": f"{health.repeated_line_share:.2%} of the text",
        "repeated fragments": f"{health.repeated_ngram_share:.2%} of the tokens",
        f"table in {model['name']}": f"{model['table_share']:.1%} of {model['parameters']:,} parameters",
    }
    title = f"Tokenizer of {health.vocab_size:,} entries"
    table = Table(show_header=False, title=title, title_justify="left")
    for name, value in rows.items():
        table.add_row(escape(name), escape(value))
    return table


def _tokens(health: "Health", number: int = 10) -> Table:
    table = Table("token", "share", "token", "share", title="Most frequent tokens", title_justify="left")
    top = [(escape(repr(row["token"])), f"{row['share']:.2%}") for row in health.most_frequent[:number]]
    half = (len(top) + 1) // 2
    for left, right in itertools.zip_longest(top[:half], top[half:], fillvalue=("", "")):
        table.add_row(*left, *right)
    return table


def _comparison(health: "Health") -> Table:
    table = Table(
        title=f"Vocabulary sizes learned from this sample, in {escape(health.model['name'])}",
        title_justify="left",
    )
    for heading in ("entries", "bytes per token", "tokens per word", "hardly used", "parameters", "table"):
        table.add_column(heading, justify="right")
    for row in health.comparison:
        table.add_row(
            f"{row['vocab_size']:,}",
            f"{row['bytes_per_token']:.3f}",
            f"{row['fertility']:.3f}",
            f"{row['hardly_used']:.1%}",
            f"{row['parameters']:,}",
            f"{row['table_share']:.1%}",
        )
    return table


def _shortened(text: str, width: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
