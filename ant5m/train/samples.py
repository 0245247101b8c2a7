"""Texts that a model writes while it is trained, and when it is done."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.model.ant import Ant
from ant5m.model.generation import find_loops, generate
from ant5m.train.callback import Periodic
from ant5m.train.settings import Settings

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer

PROMPTS, PROMPT_WORDS = 4, 4
"""so many texts begin with so many words of a held-out document each"""
SAMPLE_TOKENS, FINAL_TOKENS = 64, 100
_BEGINNING = 64
"""tokens that hold the first words of a document"""
_SEARCHED = 1 << 22
"""tokens in which beginnings of documents are looked for"""


@dataclass(frozen=True)
class GeneratedText:
    """One text of the finished model."""

    prompt: str
    text: str
    looping: bool


class WriteSamples(Periodic):
    """Logs a text for each of the prompts."""

    def __init__(self, settings: Settings, tokenizer: Tokenizer, validation: Shards):
        super().__init__(settings.sample_every)
        self._seed, self._tokenizer, self._validation = settings.seed, tokenizer, validation

    def run(self, trainer: "Trainer") -> None:
        prompts = find_prompts(self._validation, self._tokenizer, trainer.settings.sequence_length)
        texts = generate(trainer.net, self._tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, seed=self._seed)
        samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        trainer.log("sample", samples=samples)


def final_samples(net: Ant, tokenizer: Tokenizer, validation: Shards, seed: int) -> list[GeneratedText]:
    """The first text for each of the prompts, and one greedy text: that loops most easily."""
    prompts = find_prompts(validation, tokenizer, net.config.max_position_embeddings)
    texts = generate(net, tokenizer, prompts, max_new_tokens=FINAL_TOKENS, seed=seed)
    greedy = generate(
        net, tokenizer, prompts[:1], max_new_tokens=FINAL_TOKENS, temperature=0, repetition_penalty=1
    )
    pairs = zip((*prompts, prompts[0]), (*texts, *greedy), strict=True)
    return [GeneratedText(prompt, text, find_loops(text).looping) for prompt, text in pairs]


def find_prompts(shards: Shards, tokenizer: Tokenizer, context: int) -> list[str]:
    """The first words of documents spread over a split, as many as leave room in `context` tokens; the empty
    prompt where there are none."""
    tokens = shards.tokens[: min(shards.num_tokens, _SEARCHED)]
    starts = np.concatenate(([0], np.flatnonzero(tokens == shards.eos_token_id)[:-1] + 1))
    chosen = starts[np.arange(min(PROMPTS, len(starts))) * len(starts) // min(PROMPTS, len(starts))]
    prompts = [
        _first_words(tokens[start : start + _BEGINNING], shards, tokenizer, context) for start in chosen
    ]
    return [*dict.fromkeys(prompt for prompt in prompts if prompt)] or [""]


def _first_words(tokens: NDArray[np.uint16], shards: Shards, tokenizer: Tokenizer, context: int) -> str:
    ends = np.flatnonzero(tokens == shards.eos_token_id)
    words = tokenizer.decode(tokens[: ends[0]] if len(ends) else tokens).split()
    for count in range(PROMPT_WORDS, 0, -1):
        prompt = " ".join(words[:count])
        if len(tokenizer.encode(prompt)) < context:
            return prompt
    return ""
