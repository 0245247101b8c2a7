"""`ant5m eval`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.eval.perplexity import Evaluation


@dataclass
class Evaluate:
    """Measure how well a model predicts text: loss, token and word perplexity, bits per byte.

    Of a run, its newest good checkpoint is evaluated, on the run's own validation shards unless --data names
    other text; the result is also written to the run's eval.json.

    For example:

        ant5m eval runs/my-run
        ant5m eval runs/my-run --data book.txt more.jsonl.gz
        ant5m eval runs/my-run/hf --data data/books --json
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, checkpoint or Hugging Face folder"""
    data: tuple[str, ...] = ()
    """folder of shards (its validation split is used), or texts as for `ant5m data pack`"""
    text_column: str = "text"
    """field of .jsonl, .parquet and hf: rows that holds the text"""
    batch_size: int = 8
    """sequences computed at once"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    json: bool = False
    """print JSON and nothing else"""

    def run(self) -> None:
        from ant5m.eval import perplexity
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve
        from ant5m.train.precision import choose_device

        device = choose_device(self.device)
        run, folder = find_run(self.model), resolve(self.model)
        net, tokenizer = load_with_tokenizer(folder)
        if not self.data and run is None:
            raise UserError(f"{self.model} is not of a run: say with --data on what text to evaluate it")
        names = self.data or (str(perplexity.run_data(run)),) if run else self.data
        shards, text = perplexity.open_data(names, tokenizer, self.text_column)
        with _progress() as progress:
            evaluation = perplexity.evaluate(
                net.to(device), shards, self.batch_size, text=text, progress=progress
            )
        if run:
            perplexity.record(run, folder.name, evaluation)
        if self.json:
            print(json.dumps({**evaluation.to_dict(), "model": str(folder)}, indent=2, ensure_ascii=False))
        else:
            Console().print(_table(evaluation, folder))


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _table(evaluation: "Evaluation", folder: Path) -> Table:
    table = Table(
        title=f"{folder} on {evaluation.text}",
        caption=f"{evaluation.tokens:,} tokens, {evaluation.words:,} words, {evaluation.bytes:,} bytes; "
        f"windows of {evaluation.window:,} tokens that do not overlap",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("measure", style="bold")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_row("loss", f"{evaluation.loss:.4f}", "nats per token")
    table.add_row("token perplexity", f"{evaluation.token_perplexity:,.2f}", "exp(loss); same tokenizer only")
    table.add_row("word perplexity", _number(evaluation.word_perplexity, 2), "exp(nats / words)")
    table.add_row(
        "bits per byte", _number(evaluation.bits_per_byte, 4), "nats / (ln 2 x bytes); any tokenizer"
    )
    return table


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"
