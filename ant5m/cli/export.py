"""`ant5m export`."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console


@dataclass
class Export:
    """Write a Hugging Face folder from a run or a checkpoint.

    It opens offline with transformers' AutoModelForCausalLM and AutoTokenizer, and holds config.json,
    model.safetensors, the tokenizer and a model card (README.md) made from what the run folder records.

    Examples:

        ant5m export runs/my-run my-model
        ant5m export runs/my-run/checkpoints/step-00001000 my-model-1000 --name "My model after 1,000 steps"
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, checkpoint or Hugging Face folder"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """folder to create"""
    name: str | None = None
    """name of the model in its card; default: the folder's name"""

    def run(self) -> None:
        from ant5m.eval.results import section_of
        from ant5m.export.card import ModelCard, card_of_run
        from ant5m.export.huggingface import export
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve

        run, folder = find_run(self.model), resolve(self.model)
        net, tokenizer = load_with_tokenizer(folder)
        name = self.name or self.out.name
        card = card_of_run(name, run, folder) if run else ModelCard(name)
        tasks = section_of(run, folder) if run else ""
        export(net, tokenizer, self.out, dataclasses.replace(card, tasks=tasks))
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"wrote {self.out}: open it with AutoModelForCausalLM.from_pretrained({str(self.out)!r})",
            markup=False,
        )
