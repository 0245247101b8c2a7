"""`ant5m chat`."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ant5m.cli.stream import Stream
from ant5m.console import stderr
from ant5m.errors import UserError

if TYPE_CHECKING:
    from ant5m.data.conversations import ChatTemplate, Message
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.model.ant import Ant


@dataclass
class Chat:
    """Talk to a model that was trained on conversations.

    Each line that you type is a message. A reply ends where the model ends it, after --max-new-tokens, or at
    Ctrl-C. What no longer fits the model's context is forgotten, oldest first. /new begins a new
    conversation; Ctrl-D or /exit ends the program. Lines may also come from a file or a pipe: then only
    replies are printed.

    Examples:

        ant5m chat runs/my-chat
        ant5m chat runs/my-chat --system "Answer in one sentence." --temperature 0.5
        echo "What do ants eat?" | ant5m chat runs/my-chat/hf
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """run folder, checkpoint or Hugging Face folder"""
    system: str = ""
    """a message of the system, before all others"""
    max_new_tokens: int = 200
    """largest number of tokens of a reply"""
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
    """auto, cpu, cuda, cuda:1"""

    def run(self) -> None:
        from ant5m.data.conversations import ChatTemplate
        from ant5m.device import choose_device
        from ant5m.model.checkpoint import load_with_tokenizer

        device = choose_device(self.device)
        net, tokenizer = load_with_tokenizer(self.model)
        net.to(device)
        template = ChatTemplate(tokenizer)
        tokenizer.end_ids = tuple(dict.fromkeys([*tokenizer.end_ids, *template.end_ids]))
        begin: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        said = list(begin)
        for number, line in enumerate(_lines()):
            if line == "/new":
                said = list(begin)
                continue
            message = {"role": "user", "content": line}
            try:
                said = _forget(template, [*said, message], len(begin), net.config.max_position_embeddings)
                said.append(
                    {"role": "assistant", "content": self._reply(net, tokenizer, template, said, number)}
                )
            except UserError as error:
                if not sys.stdin.isatty():
                    raise
                stderr().print(str(error), markup=False)

    def _reply(
        self, net: "Ant", tokenizer: "Tokenizer", template: "ChatTemplate", said: "list[Message]", number: int
    ) -> str:
        """What the assistant says next, printed as it comes."""
        from ant5m.model.generation import generate

        prompt = template.prompt(said)
        written: list[int] = []
        stream = Stream(tokenizer, prompt)

        def on_token(row: int, token: int) -> None:
            written.append(token)
            stream.add(token)

        try:
            generate(
                net,
                tokenizer,
                [prompt],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed + number,
                on_token=on_token,
            )
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        stream.end()
        return template.clean(tokenizer.decode(written))


def _lines() -> Iterator[str]:
    """What is typed, or stands in the file that stdin is; without blank lines."""
    with contextlib.suppress(ImportError):  # with it `input` edits lines and has a history
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except UnicodeDecodeError:
            raise UserError("the message is not UTF-8 text: convert it, try iconv") from None
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def _forget(template: "ChatTemplate", said: "list[Message]", kept: int, context: int) -> "list[Message]":
    """`said` without its oldest exchanges, behind the `kept` first messages, as far as a context of so many
    tokens asks for it; a quarter of it is left for the reply."""
    shown = said
    while len(template.prompt(shown)) > context * 3 // 4:
        if len(shown) - kept < 3:
            raise UserError(f"the message is too long for the model's context of {context:,} tokens")
        shown = [*shown[:kept], *shown[kept + 2 :]]
    if shown is not said:
        stderr().print("(the beginning of the conversation no longer fits the context)", style="dim")
    return shown
