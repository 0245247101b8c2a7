"""Evidence about a trained model in four sections: token table, heads, grouped queries, loops.

Numbers are measured on held-out text, beside a baseline: chance, the same shape with random weights, or
the text itself. They say what this model does, not what another architecture would have done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.eval.autopsy import embedding, evidence, groups, heads, looping
from ant5m.eval.autopsy.embedding import Counts
from ant5m.eval.autopsy.evidence import Estimate, Finding, Section, Step
from ant5m.eval.loops import PROMPTS
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import check_tokenizer

__all__ = ["Autopsy", "Counts", "Finding", "Section", "examine"]

MAX_WINDOW = 1_024
"""tokens of a window, where the context is longer"""


@dataclass(frozen=True)
class Autopsy:
    """All sections, and the text that they were measured on."""

    name: str
    text: str
    tokens: int
    window: int
    loss: Estimate
    """nats per token on these tokens"""
    sections: list[Section]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.name,
            "text": self.text,
            "tokens": self.tokens,
            "window": self.window,
            "loss": self.loss.to_dict(),
            **{section.name: section.to_dict() for section in self.sections},
        }


def examine(
    net: Ant,
    tokenizer: Tokenizer,
    shards: Shards,
    counts: Counts,
    name: str,
    text: str,
    tokens: int = 16_384,
    prompts: Sequence[str] = PROMPTS,
    step: Step = lambda what: None,
) -> Autopsy:
    """Examine a model in fp32 on its own device.

    Args:
        shards: held-out text; `text` says what it is.
        counts: occurrences of every token, of the training text where it is there.
        tokens: about how many are looked at, in windows spread over the text.
        prompts: what the model continues, for its loops.
        step: called with what is being looked at now.

    Raises `UserError` when the text fills less than two windows or has ids that the model lacks, or when the
    tokenizer does not fit.
    """
    check_tokenizer(tokenizer, net.config)
    if shards.vocab_size > net.config.vocab_size:
        raise UserError(
            f"{text} has {shards.vocab_size:,} token ids, the model {net.config.vocab_size:,}: "
            "they do not belong together"
        )
    training = net.training
    net.eval()
    step("the model as it is")
    window = min(net.config.max_position_embeddings, MAX_WINDOW)
    with torch.inference_mode():
        inputs, targets = evidence.windows(shards, window, tokens)
        sample = evidence.sample(net, inputs.to(net.device), targets.to(net.device))
    sections = [
        embedding.examine(net, sample, counts, step),
        heads.examine(net, sample, counts, step),
        groups.examine(net, sample, step),
        looping.examine(net, tokenizer, shards, prompts, step),
    ]
    net.train(training)
    return Autopsy(name, text, sample.tokens, window, evidence.estimate(sample.losses), sections)
