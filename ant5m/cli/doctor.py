"""`ant5m doctor`."""

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m.errors import UserError
from ant5m.model.config_file import load_config

if TYPE_CHECKING:
    from ant5m.model.config import ModelConfig
    from ant5m.model.doctor import Diagnosis

MEASURED_FLOPS = 3e12
"""of a step on a CPU; a larger one (of about 250M parameters) takes half a minute or more"""
RUNS = (10_000_000, 100_000_000, 1_000_000_000)
"""training tokens for which the time is told"""
TOKENS_PER_PARAMETER = 20
"""a run of so many is told too: compute-optimal by Hoffmann et al., "Training Compute-Optimal Large Language
Models", 2022"""

_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "failure": "bold red"}


@dataclass
class Doctor:
    """Examine an architecture before training it: parameters, FLOPs, memory, time on this machine and weak
    points.

    Examples:

        ant5m doctor ant-5m
        ant5m doctor ant-5m-wide --max-params 5M
        ant5m doctor my-config.json --device-memory 16GB --json
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """a preset (ant-5m, ant-5m-wide, ant-5m-fit, ant-5m-best, ant-10m, ant-25m, ant-50m,
    ant-100m, archaea-74m), a config file or a folder
    with one"""
    max_params: str | None = None
    """upper limit for the number of parameters, like 5M or 4_950_000"""
    device_memory: str = "detected"
    """memory that a batch must fit into, like 16GB or 15GiB (no time is measured then); "detected": that of
    this machine"""
    json: bool = False
    """print JSON and nothing else"""

    def run(self) -> None:
        from ant5m.device import detect_memory
        from ant5m.model import doctor

        config = load_config(self.model)
        envelope = None if self.max_params is None else doctor.parse_count(self.max_params)
        if self.device_memory == "detected":
            device, memory = detect_memory()
        else:
            device, memory = self.device_memory, doctor.parse_bytes(self.device_memory)
        diagnosis = doctor.examine(config, envelope, memory)
        # Another device's memory says that another device is meant.
        training = _time_training(config) if self.device_memory == "detected" else None
        if self.json:
            print(json.dumps({**diagnosis.to_dict(), "training": training}, indent=2))
        else:
            _show(diagnosis, self.model, device, training)


def _time_training(config: "ModelConfig") -> dict[str, Any] | None:
    """Device, tokens a second, and for some numbers of tokens the batch, micro-batch and seconds of
    `ant5m train`; None where the model is too large for a step here."""
    from ant5m.device import choose_device
    from ant5m.model.costs import count_flops, count_parameters
    from ant5m.train.config import TrainConfig
    from ant5m.train.forecast import Forecast
    from ant5m.train.plan import LEAST_BATCH_TOKENS, batch_for_tokens, check_memory, micro_batch

    device, length = choose_device("auto"), config.max_position_embeddings
    try:
        check_memory(config, 1, device)
    except UserError:
        return None
    step = 3 * sum(count_flops(config).values()) * max(length, LEAST_BATCH_TOKENS)
    if device.type == "cpu" and step > MEASURED_FLOPS:
        return None
    forecast = Forecast.measure(config, device, TrainConfig())
    optimal = TOKENS_PER_PARAMETER * sum(count_parameters(config).values())
    runs = []
    for tokens in sorted({*RUNS, optimal}):
        batch = batch_for_tokens(tokens, length)
        rows = micro_batch(config, batch, length, device, forecast.precision, tokens)
        runs.append(
            {
                "tokens": tokens,
                "batch_size": batch,
                "micro_batch_size": rows,
                "seconds": forecast.seconds(tokens),
            }
        )
    return {"device": forecast.device, "tokens_per_second": forecast.tokens_per_second, "runs": runs}


def _show(diagnosis: "Diagnosis", name: str, device: str, training: dict[str, Any] | None) -> None:
    console = Console()
    console.print(_costs(diagnosis, name))
    console.print(_memory(diagnosis, device))
    if training:
        speed = f"{training['tokens_per_second']:,.0f} tokens/s, measured now"
        console.print(f"Training on {escape(training['device'])}: {speed}", style="italic", soft_wrap=True)
        console.print(_training(training, diagnosis.config.max_position_embeddings))
        console.print(
            f"without validation and checkpoints; *: {TOKENS_PER_PARAMETER} tokens a parameter",
            style="dim italic",
        )
    console.print("Findings\n", style="italic")
    console.print(_findings(diagnosis))


def _costs(diagnosis: "Diagnosis", name: str) -> Table:
    parameters, flops = diagnosis.parameters, diagnosis.flops_training
    total, work = sum(parameters.values()), sum(flops.values())
    context = diagnosis.config.max_position_embeddings
    table = Table(
        title=f"{name}: {total:,} parameters, {work / 1e6:.1f} MFLOP per token (forward and backward)",
        caption=f"attention: mean over a context of {context:,}; FLOPs of matrix products only",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("parameters", "", "share", "training FLOPs per token", "", "share"):
        table.add_column(
            heading, justify="left" if heading in ("parameters", "training FLOPs per token") else "right"
        )
    left = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parameters.items() if count]
    right = [(part, f"{count / 1e6:.2f} M", f"{count / work:.1%}") for part, count in flops.items()]
    for one, other in itertools.zip_longest(left, right, fillvalue=("", "", "")):
        table.add_row(*one, *other)
    return table


def _memory(diagnosis: "Diagnosis", device: str) -> Table:
    memory, context = diagnosis.memory, diagnosis.config.max_position_embeddings
    fixed = memory["weights"] + memory["gradients"] + memory["adamw_moments"]
    table = Table(
        title=f"Memory for activations of a training step ({device}: {memory['device'] / 1e9:.1f} GB)",
        caption=f"besides {fixed / 1e6:.1f} MB for weights, gradients and AdamW; estimates",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("precision")
    table.add_column("per token", justify="right")
    table.add_column("per sequence", justify="right")
    table.add_column("largest micro-batch", justify="right")
    for precision, label in (("fp32", "fp32"), ("half", "fp16 / bf16 autocast")):
        per_token = memory[f"activations_per_token_{precision}"]
        tokens = memory[f"batch_tokens_{precision}"]
        batch = f"{tokens // context:,} x {context:,}" if tokens else "not one sequence fits"
        table.add_row(label, f"{per_token / 1e3:.1f} kB", f"{per_token * context / 1e6:.1f} MB", batch)
    return table


def _training(training: dict[str, Any], context: int) -> Table:
    from ant5m.train.forecast import describe_duration

    table = Table()
    for heading in ("training tokens", "batch", "micro-batch", "time"):
        table.add_column(heading, justify="right")
    for run in training["runs"]:
        table.add_row(
            f"{run['tokens']:,}" + ("" if run["tokens"] in RUNS else " *"),
            f"{run['batch_size']:,} x {context:,}",
            f"{run['micro_batch_size']:,} x {context:,}",
            describe_duration(run["seconds"]),
        )
    return table


def _findings(diagnosis: "Diagnosis") -> Table:
    table = Table.grid("verdict", "text", padding=(0, 2, 1, 0), collapse_padding=False)
    for finding in diagnosis.findings:
        text = (
            f"[bold]{escape(finding.topic)}: {escape(finding.number)}[/bold] (evidence: {finding.evidence})"
        )
        if finding.severity != "ok":
            text += f"\n{escape(finding.why)}"
        if finding.remedy:
            text += f"\n[italic]Remedy:[/italic] {escape(finding.remedy)}"
        style = _STYLE[finding.severity]
        table.add_row(f"[{style}]{finding.severity}[/{style}]", text)
    return table
