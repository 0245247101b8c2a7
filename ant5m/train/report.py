"""What a finished run leaves behind: loss.png, eval.json, hf/ and report.md."""

import dataclasses
import io
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ant5m.data.mixture_loader import MixtureLoader
from ant5m.data.tokenizer import Tokenizer
from ant5m.device import describe_device
from ant5m.eval.perplexity import Evaluation, put_together, record_evaluation
from ant5m.eval.results import section_of
from ant5m.export.card import HELD_OUT_TEXT, card_of_run
from ant5m.export.huggingface import export
from ant5m.files import real_path, write_file
from ant5m.model.ant import Ant
from ant5m.train.average import AverageWeights
from ant5m.train.data import TrainingData
from ant5m.train.metrics import read_metrics
from ant5m.train.run import Run, versions
from ant5m.train.samples import GeneratedText, final_samples
from ant5m.train.trainer import Trainer
from ant5m.train.validation import validate

AVERAGED = " averaged"
"""behind a checkpoint's name in eval.json: of the average of its weights"""
HELD_OUT = "documents that training never saw"
HELD_OUT_PIECES = (
    "pieces of the one document of which training saw the others: easier to predict than another document"
)


def finish(run: Run, trainer: Trainer, data: TrainingData) -> Evaluation:
    """Evaluate on the whole validation split, let the model write, export it and write the report.

    Where the weights were averaged both are evaluated, and the better of the two is what is left.
    """
    trained = _evaluate(trainer, data)
    average = next((c for c in trainer.callbacks if isinstance(c, AverageWeights)), None)
    if average is None:
        return _finish(run, trainer, data, [trained])
    with average.in_place():
        averaged = _evaluate(trainer, data)
        if averaged[-1].loss < trained[-1].loss:
            return _finish(run, trainer, data, [trained, averaged], averaged)
    return _finish(run, trainer, data, [trained, averaged])


def _evaluate(trainer: Trainer, data: TrainingData) -> list[Evaluation]:
    """Of the whole validation split; of a mixture first that of each source."""
    found = [
        validate(trainer.net, shards, trainer.settings, ranks=trainer.ranks)
        for shards in data.held_out.values()
    ]
    if data.mixture:
        found.append(put_together(found, f"validation split of {data.validation.folder}"))
    return found


def _finish(
    run: Run,
    trainer: Trainer,
    data: TrainingData,
    evaluations: list[list[Evaluation]],
    averaged: list[Evaluation] | None = None,
) -> Evaluation:
    """`evaluations`: of the trained weights, and of their average where there is one, as `_evaluate` gives
    them. `averaged`: the latter, where the model has these weights now."""
    chosen = averaged or evaluations[0]
    evaluation = chosen[-1]
    if not trainer.ranks.is_first:
        return evaluation
    checkpoint = run.checkpoints / f"step-{trainer.step:08d}"
    for one in evaluations[0]:
        record_evaluation(run.folder, checkpoint.name, one, held_out=True)
    for one in averaged or []:
        record_evaluation(run.folder, f"{checkpoint.name}{AVERAGED}", one, held_out=True)
    samples = final_samples(trainer.net, data.tokenizer, data.validation, trainer.settings.seed)
    lines = read_metrics(run.folder / "metrics.jsonl")
    final = {"kind": "validation", "step": trainer.step, "loss": evaluation.loss, "tokens": evaluation.tokens}
    plot_loss([*lines, final], run.folder / "loss.png")
    plot_scores(lines, run.folder / "tasks.png")
    tasks = section_of(run.folder, checkpoint) if averaged is None else ""  # they are the checkpoint's
    _export(run, trainer.net, data.tokenizer, checkpoint, samples, tasks, averaged[-1] if averaged else None)
    compared = _compared([one[-1] for one in evaluations], averaged is not None)
    sources = _sources(trainer, data, chosen)
    write_file(
        run.folder / "report.md", report(run, trainer, lines, evaluation, samples, tasks, compared, sources)
    )
    return evaluation


def plot_loss(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw training loss (each step, and a running mean) and validation loss from the lines of metrics.jsonl.

    Losses over different numbers of tokens, and so over different text, are not joined by a line.
    """
    train = [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(losses, len(losses) // 50 + 1), color="tab:blue", label="training")
    validation = _by_text(lines)
    for number, (name, points) in enumerate(_by_source(lines).items(), 3):  # C1, C2: of all together
        axes.plot(*zip(*points, strict=True), "--", color=f"C{number}", label=f"validation of {name}")
    for number, (tokens, points) in enumerate(validation.items(), 1):
        label = "validation" + (f", {tokens:,} tokens" if len(validation) > 1 else "")
        axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}", markersize=4, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def plot_scores(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the accuracies in tasks from the lines of metrics.jsonl, if there are any."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "tasks":
            for task, value in line.items():
                if task not in ("kind", "step", "seconds"):
                    found[task].append((line["step"], 100 * value))
    if not found:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for task, points in found.items():
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=task)
    axes.set(xlabel="step", ylabel="accuracy (percent)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def _by_text(lines: list[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """{tokens: [(step, loss)]} of the validations: as many tokens are the same text."""
    points: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        if line["kind"] == "validation":
            points[line["tokens"]].append((line["step"], line["loss"]))
    return points


def _by_source(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """{source: [(step, loss)]} of the validations of a mixture."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        for key, value in line.items() if line["kind"] == "validation" else ():
            if key.startswith("loss/"):
                points[key.removeprefix("loss/")].append((line["step"], value))
    return points


def count_epochs(tokens: int, unique: int) -> str:
    """Epochs over `unique` tokens, for people: 4.3, and below one with two digits, 0.05."""
    return f"{tokens / unique:.{1 if tokens >= unique else 2}f}"


def report(
    run: Run,
    trainer: Trainer,
    lines: list[dict[str, Any]],
    evaluation: Evaluation,
    samples: list[GeneratedText],
    tasks: str,
    compared: str = "",
    sources: str = "",
) -> str:
    """The text of report.md. `tasks`, `sources`: its sections on 0-shot tasks and on the sources of a
    mixture, or nothing. `compared`: what is said of averaged weights."""
    model, config, data, settings = run.model, run.config, run.data, trainer.settings
    parameters = sum(p.numel() for p in trainer.net.parameters())
    seconds = max((line["seconds"] for line in lines if line["kind"] == "train"), default=0.0)
    source = ", ".join(Path(name).name for name in config.data[:5]) or "the built-in text"
    return _REPORT.format(
        name=run.folder.name,
        parameters=f"{parameters:,}",
        model=config.model,
        shape=f"{model.num_hidden_layers} layers, width {model.hidden_size}, vocabulary {model.vocab_size:,}",
        source=source,
        documents=f"{data['train']['documents']:,}",
        unique=f"{data['train']['tokens']:,}",
        megabytes=f"{data['train']['bytes'] / 1e6:.1f}",
        tokens=f"{trainer.tokens:,}",
        epochs=count_epochs(trainer.tokens, data["train"]["tokens"]),
        steps=f"{trainer.step:,}",
        batch=f"{settings.batch_size} x {settings.sequence_length}",
        ended=f" (of {settings.steps:,}: ended after {trainer.ended})" if trainer.ended else "",
        began=f"| begun with | {config.init} |\n" if config.init else "",
        optimizer="Muon and AdamW" if settings.optimizer == "muon" else "AdamW",
        device=describe_device(settings.device, settings.precision),
        minutes=f"{seconds / 60:.1f}",
        speed=f"{trainer.tokens / seconds:,.0f}" if seconds else "?",
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        results=_results(evaluation) + compared,
        tasks=sources + tasks,
        samples="\n\n".join(_quoted(sample) for sample in samples),
        loops=_remark(samples),
        held_out=HELD_OUT if run.data["held_out"] == "documents" else HELD_OUT_PIECES,
        folder=run.folder,
        scores="\n\n![scores in tasks](tasks.png)" if (run.folder / "tasks.png").exists() else "",
    )


def _results(evaluation: Evaluation) -> str:
    words, size = evaluation.word_perplexity, evaluation.bits_per_byte
    rows = [("loss", f"{evaluation.loss:.4f} nats per token", f"{evaluation.tokens:,} tokens")]
    rows.append(("token perplexity", f"{evaluation.token_perplexity:.2f}", f"{evaluation.tokens:,} tokens"))
    if words is not None:
        rows.append(("word perplexity", f"{words:,.2f}", f"{evaluation.words:,} words"))
    if size is not None:
        rows.append(("bits per byte", f"{size:.4f}", f"{evaluation.bytes:,} bytes"))
    return "\n".join(f"| {name} | {value} | {over} |" for name, value, over in rows)


def _sources(trainer: Trainer, data: TrainingData, evaluations: list[Evaluation]) -> str:
    """The section on the sources of a mixture. `evaluations`: of each of them, in their order."""
    if not isinstance(trainer.loader, MixtureLoader) or not data.mixture:
        return ""
    rows, taken = [], trainer.loader.taken
    for source, count, result in zip(data.sources, taken, evaluations, strict=False):
        tokens = f"{count * trainer.settings.sequence_length:,} ({count / sum(taken):.1%})"
        epochs = data.epochs(source, count, trainer.settings)
        bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
        rows.append(
            f"| {source.name} | {tokens} | {epochs:.2f} of {source.train.num_tokens:,} | {result.loss:.4f} | "
            f"{bits} | {result.tokens:,} |"
        )
    phases = "; ".join(data.mixture.describe())
    return _SOURCES.format(rows="\n".join(rows), phases=phases)


def _compared(evaluations: list[Evaluation], averaged: bool) -> str:
    """Which weights the report and the export are of, where there are two."""
    if len(evaluations) == 1:
        return ""
    trained, average = (f"{one.loss:.4f} nats per token" for one in evaluations)
    chosen = "averaged ones; the checkpoint is of the trained ones" if averaged else "trained ones"
    return (
        f"\n\nTrained weights: {trained}, their average: {average}. This report and `hf/` are of "
        f"the better, the {chosen}."
    )


def _quoted(sample: GeneratedText) -> str:
    note = " (falls into a loop)" if sample.looping else ""
    body = f"{sample.prompt}{sample.text}".replace("\n", "\n> ")
    return f"**{sample.prompt}** ...{note}\n\n> {body}"


def _remark(samples: list[GeneratedText]) -> str:
    loops = sum(sample.looping for sample in samples)
    verdict = (
        f"{loops} of these {len(samples)} texts fall into a loop." if loops else "None of these texts loops."
    )
    return (
        f"{verdict} The last one is greedy (temperature 0, no penalty), the others are sampled as `ant5m "
        "generate` does; all are unselected. Models of this size write locally plausible text without "
        "meaning, and greedy text loops."
    )


def _export(
    run: Run,
    net: Ant,
    tokenizer: Tokenizer,
    checkpoint: Path,
    samples: list[GeneratedText],
    tasks: str,
    averaged: Evaluation | None,
) -> None:
    folder = run.folder / "hf"
    if folder.is_symlink():  # somebody moved it to another disk: the export goes there
        folder = real_path(folder)
    if folder.exists():
        shutil.rmtree(folder)  # of this same run, finished before
    card = card_of_run(run.folder.name, run.folder, checkpoint)
    shown = [(sample.prompt, sample.text) for sample in samples]
    card = dataclasses.replace(card, samples=shown, tasks=tasks, repo=run.config.push)
    if averaged is not None:
        facts = {**card.facts, "weights": f"exponential moving average, decay {run.config.ema:g}"}
        validation = {**averaged.to_dict(), "text": HELD_OUT_TEXT}
        card = dataclasses.replace(card, validation=validation, results=[], facts=facts)
    export(net, tokenizer, folder, card)


def running_mean(values: tuple[float, ...], width: int) -> list[float]:
    """Mean over the last `width` values, of fewer at the beginning."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


_SOURCES = """\
## Sources
| source | trained on, tokens | epochs | validation loss | bits per byte | over, tokens |
| --- | --- | --- | --- | --- | --- |
{rows}

{phases}. The result above is of the validation text of all sources together, whatever their weights.

"""
_REPORT = """\
# {name}

`{model}`: {parameters} parameters, {shape}.

## Training
| | |
| --- | --- |
| text | {source}: {documents} documents, {megabytes} MB, {unique} tokens |
| trained on | {tokens} tokens ({epochs} epochs): {steps} steps of {batch}{ended} |
{began}| optimizer | {optimizer} |
| device | {device} |
| time | {minutes} minutes of training, {speed} tokens/s with validation and saving |
| versions | {versions} |

![loss](loss.png){scores}

## Result
On the validation split, {held_out}:

| measure | value | over |
| --- | --- | --- |
{results}

Token perplexity is exp(loss); word perplexity is exp(total nats / words), another number; bits per byte
compares models with different tokenizers.

{tasks}## Samples
{samples}

{loops}

## Go on
```
ant5m generate {folder} --prompt "The"     # let it write
ant5m eval {folder}                        # measure it
ant5m train --resume {folder}              # repeat this report; or continue, where the run was stopped
```
`hf/` opens with `transformers`; `config.json` holds every setting, and the same settings on the same data and
machine give the same model.
"""
