"""`ant5m export`."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ant5m.errors import UserError
from ant5m.files import real_path

TYPES = {"hf": ("f32",), "gguf": ("f16", "f32", "q8_0"), "html": ("int8", "f16", "f32")}
"""of the numbers, by format; the first is the default"""


@dataclass
class Export:
    """Write a trained model in the format of another program.

    hf: a Hugging Face folder, which opens offline with transformers' AutoModelForCausalLM and AutoTokenizer,
    and holds config.json, model.safetensors, the tokenizer and a model card (README.md) that shows what the
    run folder records. gguf: a folder with one file for llama.cpp and LM Studio, and a Modelfile for Ollama.
    html: one page with the model inside, which writes text in any browser, without a network.

    Examples:

        ant5m export runs/my-run my-model
        ant5m export runs/my-run --format gguf --type q8_0
        ant5m export runs/my-run page.html --format html
        ant5m export runs/my-run/checkpoints/step-00001000 early --name "Half-grown"
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, checkpoint or Hugging Face folder"""
    out: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = None
    """folder to create, for html the file; default: NAME-hf, NAME-gguf or NAME.html, here"""
    format: Literal["hf", "gguf", "html"] = "hf"
    """output format"""
    type: Literal["f32", "f16", "q8_0", "int8"] | None = None
    """number format of the weights; gguf: f16 (default), f32 or q8_0; html: int8 (default), f16 or f32"""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """name of the model; default: hf: the name of OUT, else that of the run or folder"""

    license: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """license of the model for its card, as the Hugging Face hub names it: apache-2.0, cc-by-4.0"""
    language: Annotated[str | None, tyro.conf.arg(metavar="CODE")] = None
    """language of the text, for the card: en"""

    def run(self) -> None:
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve

        types = TYPES[self.format]
        if self.type not in (None, *types):
            raise UserError(f"--type {self.type} is not for --format {self.format}: use {', '.join(types)}")
        run, folder = find_run(self.model), resolve(self.model)
        name = self.name or real_path(run or self.model).name
        ending = ".html" if self.format == "html" else f"-{self.format}"
        out = self.out or Path(f"{file_name(name)}{ending}")
        if out.exists():
            raise UserError(f"{out} exists already: choose another name or remove it")
        net, tokenizer = load_with_tokenizer(folder)
        if self.format == "gguf":
            from ant5m.export.gguf import export_gguf

            file = export_gguf(net, tokenizer, out, file_name(name), self.type or types[0])
            _say(f"wrote {file}: open it with llama.cpp or LM Studio, or in Ollama by {out / 'Modelfile'}")
        elif self.format == "html":
            from ant5m.export.html import export_html

            export_html(net, tokenizer, out, name, self.type or types[0])
            _say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")
        else:
            from ant5m.export.card import ModelCard, card_of_run
            from ant5m.export.huggingface import export

            title = self.name or out.name
            card = card_of_run(title, run, folder) if run else ModelCard(title)
            card = dataclasses.replace(card, license=self.license, language=self.language)
            export(net, tokenizer, out, card)
            _say(f"wrote {out}: open it with AutoModelForCausalLM.from_pretrained({str(out)!r})")


def file_name(name: str) -> str:
    """A name that can be part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
