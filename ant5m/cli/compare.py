"""`ant5m compare`."""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m import torchrun
from ant5m.console import stderr
from ant5m.files import read_json
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
        study = read_json(self.config.folder / "study.json", _Study)
        Console().print(_table(study))
        for one in study.verdicts:
            if one.tested:
                Console().print(f"{one.claim}: [bold]{one.verdict}[/bold] ({_interval(one.interval)})")
        console.print(f"done. Read {self.config.folder / 'study.md'}", markup=False)


@dataclass
class _Interval:
    mean: float
    low: float | None
    high: float | None


@dataclass
class _Row:
    variant: str
    parameters: int
    flops_per_token: int
    bits_per_byte: _Interval | None
    difference: _Interval | None
    loop_rate: float | None
    tokens_per_second: float | None


@dataclass
class _Verdict:
    claim: str
    verdict: str
    tested: bool
    interval: _Interval | None


@dataclass
class _Study:
    """What is shown of a study.json."""

    study: str
    factor: str
    controlled: str
    baseline: str
    rows: list[_Row]
    verdicts: list[_Verdict]


def _table(study: _Study) -> Table:
    table = Table(title=f"{study.study}: {study.controlled}", title_justify="left", box=box.SIMPLE)
    table.add_column(study.factor)
    difference = f"minus {study.baseline}"
    for heading in ("parameters", "MFLOP per token", "bits per byte", difference, "loops", "tokens/s"):
        table.add_column(heading, justify="right")
    for row in study.rows:
        table.add_row(
            escape(row.variant),
            f"{row.parameters:,}",
            f"{row.flops_per_token / 1e6:.1f}",
            _interval(row.bits_per_byte),
            _interval(row.difference, "+"),
            "" if row.loop_rate is None else f"{row.loop_rate:.0%}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        )
    return table


def _interval(value: _Interval | None, sign: str = "") -> str:
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return f"{value.mean:{sign}.4f}"
    # A backslash, or rich would read the brackets as markup.
    return rf"{value.mean:{sign}.4f} \[{value.low:{sign}.4f}, {value.high:{sign}.4f}]"
