"""`ant5m eval`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ant5m.console import progress_bar
from ant5m.errors import UserError
from ant5m.files import real_path, write_json

if TYPE_CHECKING:
    import torch

    from ant5m.eval.boards import BoardScore
    from ant5m.eval.comparison import Difference
    from ant5m.eval.perplexity import Evaluation, LmEvalPerplexity
    from ant5m.eval.results import Contaminated, TaskResult


@dataclass
class Evaluate:
    """Measure how well a model predicts text (loss, token and word perplexity, bits per byte) or, with
    --tasks, its 0-shot scores by lm-eval's definitions (needs the extra: pip install 'ant5m[eval]').

    For a run folder, the newest intact checkpoint is evaluated, on the run's own validation shards unless
    --data names other text. Results are stored in the run's eval.json, and the table of tasks in its
    report.md and model card. An evaluation that was stopped continues where it was.

    Examples:

        ant5m eval runs/my-run
        ant5m eval runs/my-run --data book.txt more.jsonl.gz
        ant5m eval runs/my-run/hf --data data/books --json
        ant5m eval runs/my-run --tasks all
        ant5m eval runs/my-run --tasks blimp,piqa --data-dir items/ --limit 100
        ant5m eval runs/my-run --tasks open-slm --repository me/ants
        ant5m eval runs/one runs/other --tasks blimp,sciq --data-dir items/
    """

    models: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")] = ()
    """run folder, checkpoint or Hugging Face folder; with --tasks several: each is compared with the first"""
    data: tuple[str, ...] = ()
    """folder of shards (its validation split is used), or texts as for `ant5m data pack`"""
    text_column: str = "text"
    """name of the text field in .jsonl, .parquet and hf: data"""
    allow_loss: bool = False
    """evaluate also where the tokenizer cannot spell all of the text; without bits per byte"""
    tasks: tuple[str, ...] = ()
    """names of tasks, or all: measure 0-shot scores instead of perplexity"""
    data_dir: Path | None = None
    """folder of .jsonl or .parquet files with the tasks' items (default: the Hugging Face hub)"""
    limit: int | None = None
    """use only the first N items of each task"""
    output: Path | None = None
    """JSON file for the tasks' results, which a stopped evaluation continues (default: that of the run)"""
    repository: str | None = None
    """OWNER/NAME on the hub, for the row that a board asks for (default: the name of the folder)"""
    batch_size: int = 8
    """sequences per forward pass, for perplexity"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps (untried)"""
    json: bool = False
    """print JSON and nothing else"""

    def run(self) -> None:
        from ant5m.device import choose_device

        if not self.models:
            raise UserError("name a model: a run folder, a checkpoint or a Hugging Face folder")
        device = choose_device(self.device)
        if self.tasks:
            self._run_tasks(device)
        elif len(self.models) > 1:
            raise UserError("models are compared in tasks: name some with --tasks, or evaluate one at a time")
        else:
            self._run_perplexity(self.models[0], device)

    def _run_perplexity(self, model: Path, device: "torch.device") -> None:
        from ant5m.eval import perplexity
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve

        if self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {self.batch_size}")
        if self.data_dir or self.limit is not None or self.output or self.repository:
            raise UserError(
                "--data-dir, --limit, --output and --repository are for tasks: name some with --tasks"
            )
        run, folder = find_run(model), resolve(model)
        net, tokenizer = load_with_tokenizer(folder)
        if not self.data and run is None:
            raise UserError(f"{model} is not of a run: say with --data on what text to evaluate it")
        names = self.data or (tuple(map(str, perplexity.run_data(run))) if run else ())
        shards, text = perplexity.open_data(names, tokenizer, self.text_column, self.allow_loss)
        with _bar("tokens") as progress:
            evaluation = perplexity.evaluate(
                net.to(device),
                shards,
                self.batch_size,
                text=text,
                progress=progress,
                document_mask=run is not None and perplexity.masks_documents(run),
            )
            harness = perplexity.evaluate_as_lm_eval(net, shards, tokenizer, progress)
        if run:
            perplexity.record_evaluation(run, folder.name, evaluation, held_out=not self.data)
        if self.json:
            _print_json({**evaluation.to_dict(), "lm_eval": harness.to_dict(), "model": str(folder)})
        else:
            Console().print(_table(evaluation, harness, folder))

    def _run_tasks(self, device: "torch.device") -> None:
        from ant5m.eval import comparison, tasks

        if self.data:
            raise UserError("--data is text for perplexity: leave it out, or --tasks")
        if self.repository and len(self.models) > 1:
            raise UserError("--repository is the name of one model: leave it out, or the other models")
        names = tasks.known_tasks(self.tasks)
        measured = [self._measure(model, names, device) for model in self.models]
        first, *others = measured
        compared = [comparison.compare(first.results, other.results) for other in others]
        if self.json:
            values = [one.to_dict() for one in measured]
            differences = [
                {
                    "first": str(first.folder),
                    "second": str(other.folder),
                    "tasks": [d.to_dict() for d in found],
                }
                for other, found in zip(others, compared, strict=True)
            ]
            _print_json({"models": values, "comparisons": differences} if others else values[0])
            return
        console = Console()
        for one in measured:
            console.print(_task_table(one.results, one.folder, one.contaminated))
            for score in one.scores:
                console.print(_board_text(score), soft_wrap=True, highlight=False)
        for other, found in zip(others, compared, strict=True):
            console.print(_comparison_table(found, first.folder, other.folder))

    def _measure(self, model: Path, names: list[str], device: "torch.device") -> "_Measured":
        """One model in all tasks; what it reached is kept as it comes."""
        from ant5m.eval import boards, results, tasks
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve

        run, folder = find_run(model), resolve(model)
        net, tokenizer = load_with_tokenizer(folder)
        weights = results.weights_sha256(folder)
        kept = self.output or (run / "eval.json" if run else None)
        known = results.recorded(kept, weights) if kept else []

        def keep(result: "TaskResult") -> None:
            if kept and result not in known:
                results.record_task(kept, weights, folder.name, result)

        with _bar("requests") as progress:
            found = tasks.evaluate_tasks(
                net.to(device), tokenizer, names, self.data_dir, self.limit, known, keep, progress
            )
        parameters = sum(weight.numel() for weight in net.parameters())
        repository = self.repository or real_path(run or folder).name
        scores = boards.board_scores(self.tasks, found, parameters, repository)
        for one in scores:
            if kept and one.row:
                write_json(kept.with_name(f"{one.board}.json"), one.row)
        if run:
            results.publish(run, folder)
        return _Measured(folder, found, scores, results.contamination_of(run))


@dataclass(frozen=True)
class _Measured:
    """A model and what it reached."""

    folder: Path
    results: "list[TaskResult]"
    scores: "list[BoardScore]"
    contaminated: "Contaminated"

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"model": str(self.folder)}
        values["tasks"] = [result.to_dict() for result in self.results]
        values["contamination"] = {"note": self.contaminated.note, "tasks": sorted(self.contaminated.tasks)}
        return {**values, **({"boards": [one.to_dict() for one in self.scores]} if self.scores else {})}


def _comparison_table(found: "list[Difference]", first: Path, second: Path) -> Table:
    """Short enough for 80 columns."""
    table = Table(
        title=f"{second} minus {first}",
        caption="points of accuracy with 95 % intervals, paired by item; p: corrected for the number of "
        "tasks (Holm), below 0.05 a difference is shown",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for heading in ("task", "metric", "difference", "p", "second model"):
        table.add_column(heading, overflow="fold")
    for one in found:
        table.add_row(
            one.task,
            one.metric,
            f"{100 * one.difference:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]",
            f"{one.adjusted:.3f}",
            one.verdict,
            style="dim" if one.adjusted >= 0.05 else None,
        )
    return table


def _board_text(score: "BoardScore") -> str:
    """The figures of a board, one a line."""
    lines = [f"\n[bold]{score.board}[/bold] ({score.protocol})"]
    if score.missing:
        lines.append(f"  no figure: {', '.join(score.missing)} has no result here")
    for name, (value, error) in score.figures.items():
        lines.append(f"  {name:<15} {value:8.3f}" + ("" if error is None else f" ± {error:.3f}"))
    if score.row:
        lines += ["  the row for the board's page:", f"  {escape(json.dumps(score.row, ensure_ascii=False))}"]
    return "\n".join(lines)


def _print_json(values: dict[str, Any]) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))


def _bar(unit: str) -> Progress:
    return progress_bar(BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())


def _table(evaluation: "Evaluation", harness: "LmEvalPerplexity", folder: Path) -> Table:
    table = Table(
        title=escape(f"{folder} on {evaluation.text}"),
        caption=f"{evaluation.tokens:,} tokens{_size(evaluation)}; "
        f"windows of {evaluation.window:,} tokens that do not overlap"
        + (", in which no document sees another" if evaluation.document_mask else "")
        + ". Ours: one stream, with an end-of-text token behind every document, which is scored, too. "
        "lm-eval's: each document by itself, without it",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("measure", style="bold")
    for heading in ("ours", "lm-eval's"):
        table.add_column(heading, justify="right")
    table.add_column("unit")
    theirs = (harness.word_perplexity, harness.byte_perplexity, harness.bits_per_byte)
    table.add_row("loss", f"{evaluation.loss:.4f}", "", "nats per token")
    table.add_row("token perplexity", f"{evaluation.token_perplexity:,.2f}", "", "exp(loss)")
    known = [None if evaluation.lost_bytes else value for value in theirs]
    word, byte, bits = (_number(value, digits) for value, digits in zip(known, (2, 4, 4), strict=True))
    table.add_row("word perplexity", _number(evaluation.word_perplexity, 2), word, "exp(nats / words)")
    table.add_row("byte perplexity", "", byte, "exp(nats / bytes)")
    table.add_row("bits per byte", _number(evaluation.bits_per_byte, 4), bits, "nats / (ln 2 x bytes)")
    return table


def _size(evaluation: "Evaluation") -> str:
    if evaluation.lost_bytes:
        return f" ({evaluation.lost_bytes:,} bytes are lost in the tokenizer, so words and bytes say nothing)"
    return f", {evaluation.words:,} words, {evaluation.bytes:,} bytes"


def _number(value: float | None, digits: int) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"


def _task_table(found: "list[TaskResult]", folder: Path, contaminated: "Contaminated | None" = None) -> Table:
    """Short enough for 80 columns."""
    from ant5m.eval.results import UNCHECKED, rows

    known = contaminated or UNCHECKED

    table = Table(
        title=escape(f"{folder}, 0-shot"),
        caption="accuracies in percent ± standard error, over so many items; at: within two of "
        f"these errors of chance; published: the original Ant-5M's. {known.note}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", overflow="fold", min_width=11, justify="right")
    table.add_column("chance", no_wrap=True, justify="right")
    table.add_column("over", overflow="fold", min_width=9, justify="right")
    table.add_column("published", justify="right")
    for row in rows(found, known.tasks):
        chance = f"{row.verdict.removesuffix('chance')}{row.chance}"
        over = row.over.removesuffix(" items")
        style = "dim" if row.verdict == "at chance" else None
        table.add_row(row.task, row.metric, row.value, chance, over, row.published, style=style)
    return table
