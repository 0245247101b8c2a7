"""`ant5m autopsy`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ant5m.console import progress_bar
from ant5m.errors import UserError
from ant5m.files import real_path

if TYPE_CHECKING:
    from ant5m.data.shards import Shards
    from ant5m.eval.autopsy import Autopsy, Counts, Section


@dataclass
class AutopsyCommand:
    """Examine a trained model: token embeddings, attention heads and RoPE, grouped queries, loops.

    Every finding has a number, its uncertainty, a baseline to compare with, and what it does not show. They
    are written to autopsy/ in the model's folder: autopsy.md, autopsy.json and pictures.

    Examples:

        ant5m autopsy runs/my-run
        ant5m autopsy runs/my-run/hf --data book.txt --tokens 65536 --out my-autopsy
        ant5m autopsy runs/my-run --prompts 500 --json
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """run folder, checkpoint or Hugging Face folder"""
    data: tuple[str, ...] = ()
    """folder of shards (its validation split is used), or texts; default: the run's own shards"""
    text_column: str = "text"
    """name of the text field in .jsonl, .parquet and hf: data"""
    tokens: int = 16_384
    """number of held-out tokens to examine"""
    prompts: int = 0
    """number of held-out documents whose beginnings are prompts of the loop test; 0: 56 built-in prompts"""
    out: Path | None = None
    """folder to write; default: autopsy/ in the folder of the run or model"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps (untried)"""
    json: bool = False
    """print JSON and nothing else"""

    def run(self) -> None:
        from ant5m.device import choose_device
        from ant5m.eval import autopsy, loops, perplexity
        from ant5m.eval.autopsy import report
        from ant5m.model.checkpoint import find_run, load_with_tokenizer, resolve

        if self.tokens < 1 or self.prompts < 0:
            raise UserError("--tokens must be above 0, --prompts 0 or above")
        device = choose_device(self.device)
        run, folder = find_run(self.model), resolve(self.model)
        net, tokenizer = load_with_tokenizer(folder)
        if not self.data and run is None:
            raise UserError(f"{self.model} is not of a run: say with --data on what text to examine it")
        names = self.data or (tuple(map(str, perplexity.run_data(run))) if run else ())
        shards, text = perplexity.open_data(names, tokenizer, self.text_column)
        text = _plain(text)
        if run and perplexity.masks_documents(run):
            text += " (documents see each other, which --document-mask forbade in training)"
        prompts = list(loops.PROMPTS)
        if self.prompts:
            prompts = loops.validation_prompts(shards, tokenizer, self.prompts)
            if not prompts:
                raise UserError("no document of the text is long enough for a prompt: leave --prompts out")
        out = self.out or (run or self.model) / "autopsy"
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: name a folder with --out")
        with progress_bar() as progress:
            task = progress.add_task("")
            found = autopsy.examine(
                net.to(device),
                tokenizer,
                shards,
                _counts(shards, net.config.vocab_size),
                name=_name(real_path(self.model)),
                text=text,
                tokens=self.tokens,
                prompts=prompts,
                step=lambda what: progress.update(task, description=what),
            )
            report.write(found, out)
        if self.json:
            print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        else:
            _show(found, out)


def _counts(shards: "Shards", vocab_size: int) -> "Counts":
    """Of the training split where the shards have one on the disk, else of the text itself."""
    from ant5m.data.shards import META, Shards
    from ant5m.eval.autopsy.embedding import count_tokens

    if (shards.folder / META).exists():
        return count_tokens(
            Shards.open(shards.folder, "train", verify=False), vocab_size, "the training text"
        )
    return count_tokens(shards, vocab_size, "the examined text")


def _name(folder: Path) -> str:
    """Of a model: that of its folder, or of the run whose exported folder it is."""
    return folder.parent.name if folder.name == "hf" else folder.name


def _plain(text: str) -> str:
    """The name of a text without its folders."""
    return text.split(" of ")[0] + f" of {Path(text.split(' of ', 1)[1]).name}" if " of " in text else text


def _show(autopsy: "Autopsy", out: Path) -> None:
    from ant5m.eval.autopsy.report import summary

    console = Console(highlight=False)
    console.print(
        f"[bold]{escape(autopsy.name)}[/bold] on {autopsy.tokens:,} tokens of the {escape(autopsy.text)}:"
    )
    for line in summary(autopsy):
        console.print(f"- {line}", markup=False)
    for section in autopsy.sections:
        console.print(_table(section))
    console.print(
        f"Evidence, not verdicts: what each number does not show is in {escape(str(out))}/autopsy.md"
    )


def _table(section: "Section") -> Table:
    from ant5m.eval.autopsy.report import TITLES

    table = Table(title=TITLES[section.name], title_justify="left", show_lines=True, expand=True)
    table.add_column("finding", style="bold", ratio=2)
    table.add_column("number and what it means", ratio=5)
    table.add_column("beside", ratio=3)
    for finding in section.findings:
        text = f"[bold]{escape(finding.number)}[/bold]\n{escape(finding.meaning)}"
        table.add_row(escape(finding.topic), text, escape(finding.comparison))
    return table
