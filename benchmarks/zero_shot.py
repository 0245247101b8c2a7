"""The 0-shot suite beside lm-eval's own `hf` model: same items, same run, and how far scores differ.

    python benchmarks/zero_shot.py runs/my-run/hf benchmark-items --limit 20

takes every task of the table (or of another suite: `--tasks open-slm`) that lm-eval has, from files to
figures, first with lm-eval and its `hf` model, then with `ant5m.eval.tasks`; a third pass, lm-eval with the
registered model `ant5m`, compares item by item (`--compare 100`: this many of each part). Prints a table and
keeps it in benchmarks/results/zero-shot.json.
"""

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from provenance import RESULTS, provenance
from rich.console import Console
from rich.table import Table

from ant5m.eval.benchmarks import BENCHMARKS
from ant5m.eval.harness import AntLM
from ant5m.eval.tasks import evaluate_tasks, known_tasks, lm_eval_tasks
from ant5m.files import write_json
from ant5m.model.checkpoint import load_with_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("data_dir", type=Path, help="folder of items, as for ant5m eval --data-dir")
    parser.add_argument("--tasks", default="all")
    parser.add_argument("--limit", type=int, help="items of each task, and of each part of a group")
    parser.add_argument("--compare", type=int, help="items of each part to compare one by one; default: all")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval's hf model")
    parser.add_argument("--out", type=Path, default=RESULTS / "zero-shot.json")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    net, tokenizer = load_with_tokenizer(arguments.model)
    hf = HFLM(str(arguments.model), device="cpu", dtype="float32", batch_size=arguments.batch_size)
    ant = AntLM(net=net, tokenizer=tokenizer)
    where, limit = arguments.data_dir, arguments.limit

    def by_lm_eval(lm: Any, name: str, limit: int | None = limit) -> dict[str, Any]:
        loaded = {"tasks": lm_eval_tasks([name], where, limit), "groups": {}, "group_map": {}}
        return lm_eval.evaluate(lm, loaded, limit=limit, bootstrap_iters=0)

    names = [name for name in known_tasks([arguments.tasks]) if BENCHMARKS[name].folder]
    lm_eval_tasks(names, where, 1)  # imports, which the one that comes first would pay for both
    rows = []
    for name in names:
        expected, hf_seconds = _timed(lambda name=name: by_lm_eval(hf, name))
        found, seconds = _timed(lambda name=name: evaluate_tasks(net, tokenizer, [name], where, limit))
        rows.append(
            {
                "task": name,
                "items": sum(
                    result.items for result in found if result.task != name or not BENCHMARKS[name].parts
                ),
                "hf": hf_seconds,
                "ant5m": seconds,
                **_agreement(expected, by_lm_eval(ant, name, arguments.compare or limit), found),
            }
        )
        Console(stderr=True).print(rows[-1])
    total = {
        side: {key: sum(row[side][key] for row in rows) for key in ("wall", "cpu")}
        for side in ("hf", "ant5m")
    }
    values = {
        "provenance": {**provenance(), "lm_eval": lm_eval.__version__},
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "context": net.config.max_position_embeddings,
        "limit": limit,
        "hf_batch_size": arguments.batch_size,
        "seconds": total,
        "times_faster": {key: total["hf"][key] / total["ant5m"][key] for key in ("wall", "cpu")},
        "tasks": rows,
    }
    Console(width=120).print(_table(values))
    write_json(arguments.out, values)


def _timed(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Result, and seconds on the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _agreement(hf: dict[str, Any], ant: dict[str, Any], found: list[Any]) -> dict[str, Any]:
    """The largest difference of a log-likelihood of an item, and the accuracies that are not identical."""
    largest, compared = 0.0, 0
    for task, samples in hf["samples"].items():
        for one, other in zip(samples, ant["samples"][task], strict=False):  # the first ones
            compared += 1
            pairs = zip(one["filtered_resps"], other["filtered_resps"], strict=True)
            largest = max(largest, *(float(np.abs(np.subtract(a, b, dtype=float)).max()) for a, b in pairs))
    metrics = {
        (result.task, metric): value
        for result in found
        if not (result.task in BENCHMARKS and BENCHMARKS[result.task].parts)
        for metric, (value, _) in result.metrics.items()
        if metric.startswith("acc") and result.task != "truthfulqa_mc2"  # there a mean of probabilities
    }
    other = [
        f"{task} {metric}"
        for (task, metric), value in metrics.items()
        if hf["results"][task][f"{metric},none"] != value
    ]
    return {
        "compared": compared,
        "largest_difference": largest,
        "accuracies": len(metrics),
        "other_accuracies": other,
    }


def _table(values: dict[str, Any]) -> Table:
    table = Table(
        title=f"seconds for {values['limit'] or 'all'} items of a task or part, of the processor in brackets"
    )
    for heading in (
        "task",
        "items",
        "lm-eval hf",
        "ant5m",
        "times",
        "largest difference",
        "other accuracies",
    ):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for row in values["tasks"]:
        sides = [f"{row[side]['wall']:.1f} ({row[side]['cpu']:.1f})" for side in ("hf", "ant5m")]
        ratio = f"{row['hf']['wall'] / row['ant5m']['wall']:.1f}"
        other = f"{len(row['other_accuracies'])} of {row['accuracies']}"
        table.add_row(
            row["task"], f"{row['items']:,}", *sides, ratio, f"{row['largest_difference']:.1e}", other
        )
    sides = [f"{value['wall']:.1f} ({value['cpu']:.1f})" for value in values["seconds"].values()]
    table.add_row("all", "", *sides, f"{values['times_faster']['wall']:.1f}", "", "")
    return table


if __name__ == "__main__":
    main()
