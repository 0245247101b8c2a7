"""`ant5m data contamination`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m.console import progress_bar
from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.data.contamination import Contamination


@dataclass
class DataContamination:
    """Count the benchmark items that stand in a training text: those that share 13 words in a row with it.

    Words are compared in lower case and without punctuation (Brown et al. 2020, appendix C). Items with fewer
    words in a row cannot be checked, and are counted. Of a folder of shards the training split is read, and
    the result is kept in its contamination.json, from where the tables of `ant5m eval` take it.

    Examples:

        ant5m data contamination data/books --against items/
        ant5m data contamination books/ more.jsonl.zst --against items/ --json
    """

    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="TEXT_OR_SHARDS...", help_behavior_hint="(required)"),
    ]
    """a folder of shards, or texts as for `ant5m data pack`"""
    against: Path
    """folder of benchmark items, as for `ant5m eval --data-dir`"""
    text_column: str = "text"
    """name of the text field in .jsonl, .parquet and hf: data"""
    json: bool = False
    """print JSON and nothing else"""

    def run(self) -> None:
        from ant5m.data.contamination import REPORT, ItemIndex
        from ant5m.data.shards import META
        from ant5m.eval.items import texts_by_task
        from ant5m.files import write_json

        packed = [Path(name) for name in self.inputs if (Path(name) / META).exists()]
        if packed and len(self.inputs) > 1:
            raise UserError(f"{packed[0]} is a folder of shards: check it alone")
        with progress_bar() as progress:
            bar = progress.add_task("reading the items")
            index = ItemIndex(texts_by_task(self.against))
            progress.update(bar, description="reading the text")
            found = index.check(self._documents(packed), str(self.against), ", ".join(self.inputs))
        if packed:
            write_json(packed[0] / REPORT, found.to_dict())
        if self.json:
            print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        else:
            _show(found)

    def _documents(self, packed: list[Path]) -> Iterator[tuple[str, str]]:
        """(name, document) of the whole text."""
        if packed:
            from ant5m.data.shards import Shards
            from ant5m.data.tokenizer import Tokenizer

            shards = Shards.open(packed[0])
            tokenizer = Tokenizer.load(packed[0] / "tokenizer")
            for number, ids in enumerate(shards.documents(), 1):
                yield f"document {number:,} of the training split", tokenizer.decode(ids)
            return
        from ant5m.data.corpus import Corpus

        corpus = Corpus.open(self.inputs, self.text_column)
        cursor = corpus.documents()
        source = 0
        for text in cursor:
            source = min(cursor.position.source, len(corpus.sources) - 1)
            yield f"{corpus.sources[source].name}, document {cursor.position.record:,}", text


def _show(found: "Contamination") -> None:
    table = Table(
        "task",
        "items",
        "too short",
        "contaminated",
        "share",
        title=f"items of {found.against} in {found.text}",
        caption="contaminated: 13 words in a row stand in the text; too short: no 13 words in a row; "
        "share: of the items that are not too short",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, one in found.tasks.items():
        counts = [f"{count:,}" for count in (one.items, one.too_short, one.contaminated)]
        table.add_row(name, *counts, f"{one.share:.2%}", style="bold" if one.contaminated else None)
    console = Console()
    console.print(table)
    documents = f"{found.contaminated_documents:,} of {found.documents:,} documents"
    console.print(f"{documents} have items in them", highlight=False)
    for worst in found.worst:
        line = f'  {worst["items"]:,} items: {worst["document"]}: "{worst["excerpt"]} ..."'
        console.print(escape(line), highlight=False)
