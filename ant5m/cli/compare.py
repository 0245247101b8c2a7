"""`ant5m compare`."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m import torchrun
from ant5m.console import stderr
from ant5m.study.config import CompareConfig


@dataclass
class Compare:
    """Run a controlled experiment: several models on the same text, with several seeds, compared in bits per
    byte.

    Every variant is an ordinary run folder. The table, a picture and a verdict for each published claim are
    updated after each run. Ctrl-C saves; the same command continues.

    Examples:

        ant5m compare --study published --data books/ --tokens 650000000 --seeds 3
        ant5m compare --study head-dim --data books/ --tokens 1000000
        ant5m compare ant-5m my-model.json --data books/ --tokens 20000000
    """

    config: Annotated[CompareConfig, tyro.conf.arg(name="")]

    def run(self) -> None:
        from ant5m.study.experiment import compare
        from ant5m.train.stop import EXIT_CODES

        stopped = compare(self.config)
        console = stderr()
        if stopped:
            console.print(f"{stopped}, saved. Repeat the command to go on.", markup=False)
            sys.exit(EXIT_CODES[stopped])
        if torchrun.rank() > 0:
            return
        values = json.loads((self.config.folder / "study.json").read_text(encoding="utf-8"))
        Console().print(_table(values))
        for one in values["verdicts"]:
            if one["tested"]:
                Console().print(
                    f"{one['claim']}: [bold]{one['verdict']}[/bold] ({_interval(one['interval'])})"
                )
        console.print(f"done. Read {self.config.folder / 'study.md'}", markup=False)


def _table(values: dict[str, Any]) -> Table:
    table = Table(title=f"{values['study']}: {values['controlled']}", title_justify="left", box=box.SIMPLE)
    table.add_column(values["factor"])
    difference = f"minus {values['baseline']}"
    for heading in ("parameters", "MFLOP/token", "bits per byte", difference, "loops", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in values["rows"]:
        table.add_row(
            escape(row["variant"]),
            f"{row['parameters']:,}",
            f"{row['flops_per_token'] / 1e6:.1f}",
            _interval(row["bits_per_byte"]),
            _interval(row["difference"], "+"),
            f"{row['loop_rate']:.0%}",
            f"{row['tokens_per_second']:,.0f}",
        )
    return table


def _interval(value: dict[str, Any] | None, sign: str = "") -> str:
    if value is None:
        return ""
    numbers = [value[key] for key in ("low", "high") if value[key] is not None]
    # A backslash, or rich would read the brackets as markup.
    spread = rf" \[{numbers[0]:{sign}.4f}, {numbers[1]:{sign}.4f}]" if numbers else ""
    return f"{value['mean']:{sign}.4f}{spread}"
