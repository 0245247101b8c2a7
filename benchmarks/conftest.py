"""Keeps what was measured: JSON in results/ with device, versions and commit, and a table on the terminal."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ant5m.files import write_json

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "gigatoken")


def pytest_sessionfinish(session):
    measured = getattr(getattr(session.config, "_benchmarksession", None), "benchmarks", [])
    rows = [_row(bench) for bench in measured if bench.stats.rounds]
    if not rows:
        return
    where = provenance()
    name = f"{where['device']}-{where['date'][:10]}-{where['commit'][:9]}".replace(" ", "-").replace("/", "-")
    path = RESULTS / f"{_slug(name)}.json"
    write_json(path, {"provenance": where, "benchmarks": rows})
    session.config._ant5m_report = (path, rows)


def pytest_terminal_summary(terminalreporter, config):
    if not hasattr(config, "_ant5m_report"):
        return
    path, rows = config._ant5m_report
    table = Table(
        "preset", "arm", "tokens/s", "x transformers", "peak MB", "x transformers", "hours for 655.36M tokens"
    )
    for row in rows:
        for arm, figures in row["info"].get("arms", {}).items():
            table.add_row(
                row["info"]["preset"],
                arm,
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


def provenance() -> dict:
    """Where, when and with what the figures of this run were measured."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def _row(bench) -> dict:
    stats = bench.stats
    return {
        "name": bench.name,
        "group": bench.group,
        "rounds": stats.rounds,
        "seconds": {key: getattr(stats, key) for key in ("min", "q1", "median", "q3", "max")},
        "info": bench.extra_info,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "" for c in text).lower()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()
