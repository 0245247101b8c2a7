"""Texts that a model writes while it is trained, and when it is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ant5m.data.tokenizer import Tokenizer
from ant5m.model.ant import Ant
from ant5m.model.generation import find_loops, generate
from ant5m.train.callback import Periodic
from ant5m.train.settings import Settings

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

PROMPTS = ("The", "Returns a list of", "This is an example of how to", "The history of the")
SAMPLE_TOKENS, FINAL_TOKENS = 64, 100


@dataclass(frozen=True)
class Sample:
    """One text of the finished model."""

    prompt: str
    text: str
    looping: bool


class WriteSamples(Periodic):
    """Logs a text for each of the standard prompts."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer):
        super().__init__(settings.sample_every)
        self._seed, self._tokenizer = settings.seed, tokenizer

    def run(self, trainer: "Trainer") -> None:
        prompts = fitting_prompts(trainer.net, self._tokenizer)
        texts = generate(trainer.net, self._tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, seed=self._seed)
        samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        trainer.log("sample", samples=samples)


def final_samples(net: Ant, tokenizer: Tokenizer, seed: int) -> list[Sample]:
    """The first text for each of the standard prompts, and one greedy text: that loops most easily."""
    prompts = fitting_prompts(net, tokenizer)
    texts = generate(net, tokenizer, prompts, max_new_tokens=FINAL_TOKENS, seed=seed)
    greedy = generate(
        net, tokenizer, prompts[:1], max_new_tokens=FINAL_TOKENS, temperature=0, repetition_penalty=1
    )
    pairs = zip((*prompts, prompts[0]), (*texts, *greedy), strict=True)
    return [Sample(prompt, text, find_loops(text).looping) for prompt, text in pairs]


def fitting_prompts(net: Ant, tokenizer: Tokenizer) -> Sequence[str]:
    """Those of the standard ones that leave room in the model's context, or the empty one."""
    context = net.config.max_position_embeddings
    return [prompt for prompt in PROMPTS if len(tokenizer.encode(prompt)) < context] or [""]
