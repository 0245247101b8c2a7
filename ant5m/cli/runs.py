"""`ant5m runs`."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.train.summary import RunSummary


@dataclass
class Runs:
    """List runs: model, data, tokens, validation loss, state; or draw their training losses in one picture.

    Examples:

        ant5m runs
        ant5m runs runs/books runs/books-2 --plot books.png
        ant5m runs --plot runs.png --by flops
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")] = (
        Path("runs"),
    )
    """run folders, or folders of run folders"""
    plot: Path | None = None
    """file for a picture of the losses of all of them"""
    by: Literal["tokens", "flops", "time"] = "tokens"
    """what stands below that picture; time: without waiting between two sessions"""

    def run(self) -> None:
        from ant5m.train.run import find_runs
        from ant5m.train.summary import plot, summarize

        if self.plot is not None and self.plot.suffix != ".png":
            raise UserError(f"{self.plot} must end with .png")
        runs = []
        for folder in self.folders:
            if not folder.is_dir():
                raise UserError(f"{folder} is not a folder: name one of runs")
            found = [folder] if (folder / "config.json").exists() else find_runs(folder)
            for one in found:
                try:
                    runs.append(summarize(one))
                except UserError as error:
                    if one == folder:
                        raise
                    warnings.warn(f"left out: {error}", stacklevel=2)
        if not runs:
            raise UserError(f"there is no run in {', '.join(map(str, self.folders))}")
        Console().print(_table(runs))
        if self.plot is not None:
            plot(runs, self.by, self.plot)
            Console().print(f"picture: {escape(str(self.plot))}")


def _table(runs: "list[RunSummary]") -> Table:
    table = Table("run", "model", "data", box=box.SIMPLE)
    for heading in ("tokens", "loss", "bits/byte"):
        table.add_column(heading, justify="right")
    table.add_column("state")
    for run in runs:
        share = (
            f" ({run.tokens / run.planned_tokens:.0%})" if run.planned_tokens and run.state != "done" else ""
        )
        table.add_row(
            *(escape(text) for text in (run.folder.name, run.model, run.data)),
            f"{_short(run.tokens)}{share}",
            *("-" if value is None else f"{value:.3f}" for value in (run.loss, run.bits_per_byte)),
            run.state,
        )
    return table


def _short(count: int) -> str:
    """1.2M of 1234567."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
