"""The 0-shot suite beside lm-eval's own `hf` model: same items, same run, and how far scores differ.

    python benchmarks/zero_shot.py runs/my-run/hf benchmark-items --limit 20

takes every task of the table (or of another suite: `--tasks open-slm`) that lm-eval has, from files to
figures, first with lm-eval and its `hf` model, then with `ant5m.eval.tasks`; a third pass, lm-eval with the
registered model `ant5m`, compares item by item (`--compare 100`: this many of each part). ArithMark, which
lm-eval does not have, is defined here for it; where the folder has no items of it, some of its form are made.
`--exact 50` scores so many items of each part in fp64, too, and says how far both are from it. Prints a table
and keeps it in benchmarks/results/zero-shot.json.
"""

import argparse
import contextlib
import json
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from provenance import RESULTS, provenance
from rich.console import Console
from rich.table import Table

from ant5m.eval import items
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
    parser.add_argument("--exact", type=int, default=0, help="items of each part to score in fp64, too")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with _with_arithmark(arguments.data_dir) as where:
        values = measure(arguments, where)
    Console(width=120).print(_table(values))
    write_json(arguments.out, values)


def measure(arguments: argparse.Namespace, where: Path) -> dict[str, Any]:
    """All passes over all tasks, with items from `where`."""
    net, tokenizer = load_with_tokenizer(arguments.model)
    hf, exact = (
        HFLM(str(arguments.model), device="cpu", dtype=dtype, batch_size=arguments.batch_size)
        for dtype in ("float32", "float64")
    )
    ant = AntLM(net=net, tokenizer=tokenizer)
    limit = arguments.limit

    def by_lm_eval(lm: Any, name: str, limit: int | None = limit) -> dict[str, Any]:
        tasks = lm_eval_tasks([name], where, limit) if BENCHMARKS[name].folder else _arithmark(name, where)
        loaded = {"tasks": tasks, "groups": {}, "group_map": {}}
        return lm_eval.evaluate(lm, loaded, limit=limit, bootstrap_iters=0)

    names = [
        name
        for name in known_tasks([arguments.tasks])
        if BENCHMARKS[name].folder or name.startswith("ArithMark")
    ]
    # Imports, which the one that comes first would pay for both.
    lm_eval_tasks([name for name in names if BENCHMARKS[name].folder], where, 1)
    rows = []
    for name in names:
        expected, hf_seconds = _timed(lambda name=name: by_lm_eval(hf, name))
        found, seconds = _timed(lambda name=name: evaluate_tasks(net, tokenizer, [name], where, limit))
        again = by_lm_eval(ant, name, arguments.compare or limit)
        rows.append(
            {
                "task": name,
                "items": sum(
                    result.items for result in found if result.task != name or not BENCHMARKS[name].parts
                ),
                "hf": hf_seconds,
                "ant5m": seconds,
                **_agreement(expected, again, found),
            }
        )
        if arguments.exact:
            rows[-1]["from_fp64"] = _errors(
                by_lm_eval(exact, name, arguments.exact), hf=expected, ant5m=again
            )
        Console(stderr=True).print(rows[-1])
    total = {
        side: {key: sum(row[side][key] for row in rows) for key in ("wall", "cpu")}
        for side in ("hf", "ant5m")
    }
    return {
        "provenance": {**provenance(), "lm_eval": lm_eval.__version__},
        "parameters": sum(weight.numel() for weight in net.parameters()),
        "context": net.config.max_position_embeddings,
        "limit": limit,
        "hf_batch_size": arguments.batch_size,
        "seconds": total,
        "times_faster": {key: total["hf"][key] / total["ant5m"][key] for key in ("wall", "cpu")},
        "tasks": rows,
    }


@contextlib.contextmanager
def _with_arithmark(data_dir: Path) -> Iterator[Path]:
    """A folder with all of `data_dir`, and made items of ArithMark where it has none."""
    there = items.find_files(data_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in data_dir.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        for name in ("ArithMark-3.0", "ArithMark-2.0"):
            if not items.choose_files(there, data_dir, BENCHMARKS[name].files, "train"):
                rows = [json.dumps(_sum(random.Random(f"{name} {i}"))) + "\n" for i in range(1_000)]
                (folder / f"{BENCHMARKS[name].files[0]}_made.jsonl").write_text("".join(rows))
        yield folder


def _sum(chance: random.Random) -> dict[str, Any]:
    """An item of one to three operations, with wrong answers around the right one."""
    numbers = [chance.randint(1, 99) for _ in range(chance.randint(2, 4))]
    text = str(numbers[0]) + "".join(f" {chance.choice('+-*')} {number}" for number in numbers[1:])
    right = eval(text)  # of our own numbers
    answers = [right, *(right + chance.choice([-1, 1]) * step for step in chance.sample(range(1, 30), 3))]
    chance.shuffle(answers)
    endings = [f" {answer}" for answer in answers]
    return {"ctx": f"{text} =", "endings": endings, "label": answers.index(right)}


def _arithmark(name: str, where: Path) -> dict[str, Any]:
    """ArithMark for lm-eval: the largest sum over the ending's tokens."""
    (path,) = items.choose_files(items.find_files(where), where, BENCHMARKS[name].files, "train")
    rows = datasets.Dataset.from_list(items.read_rows(path, BENCHMARKS[name].schema))
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"train": rows},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["ctx"],
        "doc_to_choice": lambda row: row["endings"],
        "doc_to_target": lambda row: int(row["label"]),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    return {name: ConfigurableTask(config=config)}


def _errors(exact: dict[str, Any], **others: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far log-likelihoods of items are from those in fp64: nats at most, and as a share of them."""
    found = {}
    for side, results in others.items():
        nats, shares = [0.0], [0.0]
        for task, samples in exact["samples"].items():
            for one, other in zip(samples, results["samples"][task], strict=False):
                assert one["doc_id"] == other["doc_id"]
                for a, b in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                    wanted = a[0] if isinstance(a, tuple | list) else a
                    nats.append(abs(wanted - (b[0] if isinstance(b, tuple | list) else b)))
                    shares.append(nats[-1] / abs(wanted))
        found[side] = {"nats": max(nats), "share": max(shares)}
    return found


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
        if metric.startswith("acc")
        and result.task != "truthfulqa_mc2"  # there a mean of probabilities
        and f"{metric},none" in hf["results"][result.task]  # per token in ArithMark, which lm-eval lacks
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
