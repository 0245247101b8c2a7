"""Keeps what was measured: JSON in results/ with device, versions and commit, and a table on the terminal."""

import itertools
from pathlib import Path

import pytest
import torch
from bars import draw_file
from devices import Rates, measure
from provenance import RESULTS, provenance
from rich.console import Console
from rich.table import Column, Table
from telemetry import Telemetry

from ant5m.files import write_json


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=RESULTS, help="folder for what is measured")
    text = "sequences of a whole step (default: 64 on a GPU, 8 on a CPU)"
    parser.addoption("--batch-size", type=int, default=64 if torch.cuda.is_available() else 8, help=text)


@pytest.fixture(scope="session")
def results(request) -> Path:
    """The folder for what is measured."""
    folder: Path = request.config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def rates(request, device) -> Rates:
    """What this machine does in a second, measured before the benchmarks that ask for it; kept with them."""
    request.config._ant5m_rates = measure(device)
    return request.config._ant5m_rates


def pytest_sessionstart(session):
    session.config._ant5m_telemetry = Telemetry()


def pytest_sessionfinish(session):
    telemetry = session.config._ant5m_telemetry.stop()
    measured = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    rows = [_row(bench) for bench in measured if bench.stats.rounds]
    if not rows:
        return
    where = provenance()
    name = f"{where['device']}-{where['date'][:10]}-{where['commit'][:9]}".replace(" ", "-").replace("/", "-")
    path = _free(session.config.getoption("--results") / f"{_slug(name)}.json")
    rates = getattr(session.config, "_ant5m_rates", None)
    measured_rates = {} if rates is None else {"rates": rates.to_dict()}
    logged = {"telemetry": telemetry} if telemetry else {}
    write_json(path, {"provenance": where, **logged, **measured_rates, "benchmarks": rows})
    draw_file(path, path.with_suffix(".png"))
    session.config._ant5m_report = (path, rows)


def pytest_terminal_summary(terminalreporter, config):
    if not hasattr(config, "_ant5m_report"):
        return
    path, rows = config._ant5m_report
    names = (Column(name, no_wrap=True) for name in ("preset", "variant"))
    table = Table(
        *names, "tokens/s", "x transformers", "peak MB", "x transformers", "hours for 655.36M tokens"
    )
    for row in rows:
        for variant, figures in row["info"].get("variants", {}).items():
            table.add_row(
                row["info"]["preset"],
                variant,
                f"{figures['tokens_per_second']:,}",
                f"{figures['speed_over_transformers']:.2f}",
                f"{figures['peak_bytes'] / 1e6:,.0f}",
                f"{figures['memory_over_transformers']:.2f}",
                f"{figures['hours_for_655M_tokens']:.1f}",
            )
    if table.row_count:
        Console().print(table)
    terminalreporter.write_line(
        f"results: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}"
    )


def _row(bench) -> dict:
    stats = bench.stats
    return {
        "name": bench.name,
        "group": bench.group,
        "rounds": stats.rounds,
        "seconds": {key: getattr(stats, key) for key in ("min", "q1", "median", "q3", "max")},
        "info": bench.extra_info,
    }


def _free(path: Path) -> Path:
    """`path`, or the first of NAME-2, NAME-3, ... that is not there: another run of that day is kept."""
    numbered = (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2))
    return path if not path.exists() else next(other for other in numbered if not other.exists())


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "" for c in text).lower()
