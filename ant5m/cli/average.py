"""`ant5m average`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape


@dataclass
class Average:
    """Average the weights of checkpoints into one model, a Hugging Face folder.

    The last checkpoints of one run, from before its learning rate falls, are often better together than each
    by itself. Keep enough of them with `ant5m train --keep-last`.

    Examples:

        ant5m average runs/books --out books-average
        ant5m average runs/a/checkpoints/step-0000080* --out mean
        ant5m eval books-average --data data/books
    """

    checkpoints: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CHECKPOINT...", help_behavior_hint="(required)"),
    ]
    """checkpoints or Hugging Face folders of models of one shape and tokenizer; a run folder stands for all
    its checkpoints"""
    out: Path
    """folder to create"""

    def run(self) -> None:
        from ant5m.export.card import ModelCard
        from ant5m.export.huggingface import export
        from ant5m.model.averaging import average, expand

        paths = expand(self.checkpoints)
        net, tokenizer = average(paths)
        facts = {"weights": f"mean of {len(paths)} checkpoints: {', '.join(path.name for path in paths)}"}
        export(net, tokenizer, self.out, ModelCard(self.out.resolve().name, facts=facts))
        Console().print(f"the mean of {len(paths)} checkpoints: {escape(str(self.out))}", soft_wrap=True)
