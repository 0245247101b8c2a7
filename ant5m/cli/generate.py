"""`ant5m generate`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from ant5m.cli.stream import Stream, write
from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer


@dataclass
class Generate:
    """Generate text from a prompt.

    Generation ends at the end-of-text token, after --max-new-tokens, or when the model's context is full. A
    warning says when the text falls into a loop. The same seed gives the same text.

    Examples:

        ant5m generate runs/my-run --prompt "Once upon a time"
        ant5m generate runs/my-run --prompt "The ant" "A tree" --seed 3
        ant5m generate my-model --prompt "The ant" --temperature 0 --json
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, checkpoint or Hugging Face folder"""
    prompt: tuple[str, ...] = ("",)
    """one or more texts to continue; default: an empty prompt"""
    max_new_tokens: int = 200
    """largest number of tokens to generate"""
    temperature: float = 0.8
    """below 1: more predictable text; above 1: more varied; 0: always the most likely token (greedy)"""
    top_k: int = 0
    """sample from the k most likely tokens; 0: no limit"""
    top_p: float = 1.0
    """sample from the smallest set of most likely tokens whose probabilities sum to p"""
    repetition_penalty: float = 1.1
    """above 1: tokens that already occurred become less likely; 1: no penalty"""
    seed: int = 0
    """seed of the random sampling"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps (untried)"""
    json: bool = False
    """print JSON and nothing else"""

    def run(self) -> None:
        from ant5m.device import choose_device
        from ant5m.model.checkpoint import load_with_tokenizer
        from ant5m.model.generation import find_loops, generate

        if not self.prompt:
            raise UserError("--prompt needs a text (leave it out, and the model begins one of its own)")
        device = choose_device(self.device)
        net, tokenizer = load_with_tokenizer(self.model)
        written = [0] * len(self.prompt)
        stream = _Stream(self.prompt[0], tokenizer) if len(self.prompt) == 1 and not self.json else None

        def on_token(row: int, token: int) -> None:
            written[row] += 1
            if stream:
                stream.add(token)

        texts = generate(
            net.to(device),
            tokenizer,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            on_token=on_token,
        )
        reports = [find_loops(text) for text in texts]
        if self.json:
            rows = zip(self.prompt, texts, written, reports, strict=True)
            print(json.dumps([_row(*row) for row in rows], indent=2, ensure_ascii=False))
        elif stream:
            stream.end()
        else:
            for prompt, text in zip(self.prompt, texts, strict=True):
                write(prompt, bold=True)
                write(f"{text}\n\n")
        context = net.config.max_position_embeddings
        for prompt, count, report in zip(self.prompt, written, reports, strict=True):
            if max(1, len(tokenizer.encode(prompt))) + count == context:
                _warn(f"the text ends here because the model's context of {context:,} tokens is full")
            if report.looping:
                _warn(report.advice)


def _row(prompt: str, text: str, tokens: int, report) -> dict:
    return {
        "prompt": prompt,
        "text": text,
        "tokens": tokens,
        "looping": report.looping,
        "repeated_ngrams": report.repeated,
        "advice": report.advice,
    }


def _warn(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[yellow]warning:[/yellow] {escape(text)}")


class _Stream(Stream):
    """A prompt and what continues it, as it comes."""

    def __init__(self, prompt: str, tokenizer: "Tokenizer") -> None:
        super().__init__(tokenizer, tokenizer.encode(prompt), prompt)
