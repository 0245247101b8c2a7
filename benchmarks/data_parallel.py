"""Two processes of one thread against one process of two, training the same model on the CPU, interleaved.

    python benchmarks/data_parallel.py [--rounds 3] [--steps 8]

Prints tokens per second of each round, the ratio, and the share of a step that the sum of the gradients
takes. Writes a file in results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, provenance

from ant5m.data.corpus import Corpus
from ant5m.data.packing import pack
from ant5m.data.tokenizer import train_tokenizer
from ant5m.files import write_json
from ant5m.train.metrics import read_metrics

RUN = {"steps": 1_000, "batch-size": 8, "micro-batch-size": 4, "sample-every": 0, "eval-every": 1_000}
SUM = """
import time, torch
from ant5m.ranks import join
ranks = join()
x = torch.ones(4_730_241)
ranks.sum(x)
times = []
for _ in range(20):
    ranks.most(0)
    start = time.perf_counter()
    ranks.sum(x)
    times.append(time.perf_counter() - start)
if ranks.is_first:
    print(sorted(times)[10])
ranks.leave()
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(Path(folder), number, asked.steps) for number in range(asked.rounds)]
    seconds = float(in_torchrun(SUM).stdout)
    step = 8 * 1_024 / statistics.median(row["two processes"] for row in rows)
    ratio = statistics.median(row["two processes"] / row["one process"] for row in rows)
    print(f"two processes have {ratio:.3f} of the speed of one; the sum takes {seconds / step:.2%} of a step")
    result = {"provenance": provenance(), "tokens_per_second": rows, "ratio": ratio}
    write_json(RESULTS / "data-parallel.json", {**result, "sum_seconds": seconds, "step_seconds": step})


def compare(folder: Path, number: int, steps: int) -> dict[str, float]:
    """Tokens per second of both, one after the other."""
    shards = folder / "shards"
    if not shards.exists():
        tokenizer = train_tokenizer(Corpus.open(["builtin"]).documents(), 16_384)
        pack(Corpus.open(["builtin"]), tokenizer, shards)
    row = {}
    for name, processes, threads in (("one process", 1, 2), ("two processes", 2, 1)):
        out = folder / f"{name}-{number}"
        asked = {"data": shards, "out": out, "device": "cpu", "processes": processes, **RUN}
        words = [str(word) for flag, value in asked.items() for word in (f"--{flag}", value)]
        lines = train_steps([sys.executable, "-m", "ant5m", "train", *words], out, threads, steps)
        spent = lines[-1]["seconds"] - lines[1]["seconds"]
        row[name] = (lines[-1]["tokens"] - lines[1]["tokens"]) / spent
    print(json.dumps(row), flush=True)
    return row


def train_steps(command: list[str], out: Path, threads: int, steps: int) -> list[dict[str, Any]]:
    """The metrics of about so many steps of a run that is stopped before it evaluates and exports."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment)
    lines: list[dict[str, Any]] = []
    while len(lines) < steps:
        time.sleep(0.5)  # of no core's time
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        lines = [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]
    process.terminate()
    process.wait()
    return [line for line in read_metrics(out / "metrics.jsonl") if line["kind"] == "train"]


def in_torchrun(code: str) -> "subprocess.CompletedProcess[str]":
    """Run it in two processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, script.name], check=True, capture_output=True, text=True, env=environment
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
