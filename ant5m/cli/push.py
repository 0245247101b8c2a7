"""`ant5m push`."""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console


@dataclass
class Push:
    """Put a trained model on the Hugging Face hub, as a folder that transformers opens by its name.

    Makes the repository, private unless told otherwise, and uploads what `ant5m export` writes. Log in first:
    `hf auth login`, or HF_TOKEN. While a model is trained, `ant5m train --push` does it.

    Examples:

        ant5m push runs/my-run ada/ants-5m --license apache-2.0 --language en
        ant5m push runs/my-run ada/ants-5m --public
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, checkpoint or Hugging Face folder"""
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")]
    """OWNER/NAME"""
    license: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """license of the model for its card, as the hub names it: apache-2.0, cc-by-4.0"""
    language: Annotated[str | None, tyro.conf.arg(metavar="CODE")] = None
    """language of the text, for the card: en"""
    public: bool = False
    """make a new repository public; one that exists keeps its visibility"""

    def run(self) -> None:
        from ant5m.export import hub

        hub.check_name(self.repo)
        from ant5m.export.card import ModelCard, card_of_run
        from ant5m.export.huggingface import export
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve

        run, folder = find_run(self.model), resolve(self.model)
        net, tokenizer = load_with_tokenizer(folder)
        name = self.repo.partition("/")[2]
        card = card_of_run(name, run, folder) if run else ModelCard(name)
        card = dataclasses.replace(card, license=self.license, language=self.language, repo=self.repo)
        with tempfile.TemporaryDirectory(prefix="ant5m-push-") as aside:
            export(net, tokenizer, Path(aside) / "hf", card)
            address = hub.create(self.repo, private=not self.public)
            hub.push(Path(aside) / "hf", self.repo)
        opened = f"AutoModelForCausalLM.from_pretrained({self.repo!r})"
        Console(highlight=False, soft_wrap=True).print(f"pushed to {address}: {opened}", markup=False)
