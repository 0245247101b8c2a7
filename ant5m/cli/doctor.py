"""`ant5m doctor`."""

import itertools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m.model.config_file import load_config

if TYPE_CHECKING:
    from ant5m.model.doctor import Diagnosis

_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "failure": "bold red"}


@dataclass
class Doctor:
    """Examine an architecture before training it: parameters, FLOPs, memory and weak points.

    Examples:

        ant5m doctor ant-5m
        ant5m doctor ant-5m-wide --max-params 5M
        ant5m doctor my-config.json --device-memory 16GB --json
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """a preset (ant-5m, ant-5m-wide, ant-5m-fit, ant-5m-best, archaea-74m), a config file or a folder
    with one"""
    max_params: str | None = None
    """upper limit for the number of parameters, like 5M or 4_950_000"""
    device_memory: str = "detected"
    """memory that a batch must fit into, like 16GB or 15GiB; "detected": that of this machine"""
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
        if self.json:
            print(json.dumps(diagnosis.to_dict(), indent=2))
        else:
            _show(diagnosis, self.model, device)


def _show(diagnosis: "Diagnosis", name: str, device: str) -> None:
    console = Console()
    console.print(_costs(diagnosis, name))
    console.print(_memory(diagnosis, device))
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
        title=f"Memory of a training step ({device}: {memory['device'] / 1e9:.1f} GB)",
        caption=f"besides {fixed / 1e6:.1f} MB for weights, gradients and AdamW; batches are estimates",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("precision")
    table.add_column("activations per token", justify="right")
    table.add_column("per sequence", justify="right")
    table.add_column("largest micro-batch", justify="right")
    for precision, label in (("fp32", "fp32"), ("half", "fp16 / bf16 autocast")):
        per_token = memory[f"activations_per_token_{precision}"]
        tokens = memory[f"batch_tokens_{precision}"]
        batch = f"{tokens // context:,} x {context:,}" if tokens else "not one sequence fits"
        table.add_row(label, f"{per_token / 1e3:.1f} kB", f"{per_token * context / 1e6:.1f} MB", batch)
    return table


def _findings(diagnosis: "Diagnosis") -> Table:
    table = Table(title="Findings", title_justify="left", show_lines=True)
    table.add_column("topic", style="bold")
    table.add_column("verdict")
    table.add_column("what, why and what to do", ratio=1)
    table.add_column("evidence")
    for finding in diagnosis.findings:
        text = f"[bold]{escape(finding.number)}[/bold]"
        if finding.severity != "ok":
            text += f"\n{escape(finding.why)}"
        if finding.remedy:
            text += f"\n[italic]Remedy:[/italic] {escape(finding.remedy)}"
        style = _STYLE[finding.severity]
        table.add_row(finding.topic, f"[{style}]{finding.severity}[/{style}]", text, finding.evidence)
    return table
