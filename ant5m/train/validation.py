"""The loss on held-out text, in the precision of the training."""

import math
from typing import TYPE_CHECKING

from ant5m.data.shards import Shards
from ant5m.device import autocast
from ant5m.eval.perplexity import Evaluation, evaluate
from ant5m.model.ant import Ant
from ant5m.ranks import Ranks
from ant5m.train.average import AverageWeights
from ant5m.train.callback import Periodic
from ant5m.train.settings import Settings

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


class Validate(Periodic):
    """Logs the loss over `eval_tokens` of the validation split, in windows spread over it: of the weights,
    and of their average where there is one."""

    everywhere = True

    def __init__(self, settings: Settings, shards: Shards, average: AverageWeights | None = None):
        super().__init__(settings.eval_every)
        self._settings, self._shards, self._average = settings, shards, average

    def run(self, trainer: "Trainer") -> None:
        limit = self._settings.eval_tokens
        result = validate(trainer.net, self._shards, self._settings, limit, trainer.ranks)
        size = bytes_per_token(self._shards)
        bits = {} if size is None else {"bits_per_byte": result.loss / (math.log(2) * size)}
        averaged = {}
        if self._average is not None:
            with self._average.in_place():
                other = validate(trainer.net, self._shards, self._settings, limit, trainer.ranks)
            averaged = {"average_loss": other.loss}
        trainer.log("validation", loss=result.loss, tokens=result.tokens, **bits, **averaged)


def bytes_per_token(shards: Shards) -> float | None:
    """Mean over a split: with it a loss per token becomes one per byte, exact over the whole split and close
    over evenly spread parts of it. None where the tokenizer lost bytes, or some tokens do not count."""
    return (
        None
        if shards.lost_bytes or shards.tokens.masked
        else shards.counts["bytes"] / shards.counts["tokens"]
    )


def validate(
    net: Ant,
    shards: Shards,
    settings: Settings,
    limit_tokens: int | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Perplexities on the validation split, on a GPU in the precision of the training; a collective of
    `ranks`."""
    with autocast(settings.precision, net.device):
        return evaluate(
            net,
            shards,
            batch_size=settings.micro_batch_size,
            sequence_length=settings.sequence_length,
            limit_tokens=limit_tokens,
            document_mask=settings.document_mask,
            ranks=ranks,
        )
