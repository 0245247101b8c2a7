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
    and of their average where there is one; in a mixture together and of each source."""

    everywhere = True

    def __init__(
        self, settings: Settings, held_out: dict[str, Shards], average: AverageWeights | None = None
    ):
        """`held_out`: the validation split of each source of a mixture; without one a single split."""
        super().__init__(settings.eval_every)
        self._settings, self._held_out, self._average = settings, held_out, average

    def run(self, trainer: "Trainer") -> None:
        found = self._validate(trainer)
        sizes = [bytes_per_token(shards) for shards in self._held_out.values()]
        values = _numbers(found, sizes)
        if len(found) > 1:
            for name, result, size in zip(self._held_out, found, sizes, strict=True):
                numbers = _numbers([result], [size])
                values |= {f"{key}/{name}": value for key, value in numbers.items()}
        if self._average is not None:
            with self._average.in_place():
                values["average_loss"] = _numbers(self._validate(trainer), sizes)["loss"]
        trainer.log("validation", **values)

    def _validate(self, trainer: "Trainer") -> list[Evaluation]:
        """Of each source; the tokens are shared out by the sizes of their splits, one sequence at least."""
        limit, total = self._settings.eval_tokens, sum(one.num_tokens for one in self._held_out.values())
        least = self._settings.sequence_length if len(self._held_out) > 1 else 1
        return [
            validate(
                trainer.net,
                shards,
                self._settings,
                max(least, round(limit * shards.num_tokens / total)),
                trainer.ranks,
            )
            for shards in self._held_out.values()
        ]


def _numbers(results: list[Evaluation], sizes: list[float | None]) -> dict[str, float]:
    """Loss, tokens and bits per byte of all `results` together, whose texts have `sizes` bytes a token."""
    tokens = sum(result.tokens for result in results)
    values = {"loss": sum(result.nats for result in results) / tokens, "tokens": tokens}
    if None in sizes:
        return values
    size = sum((size or 0.0) * result.tokens for size, result in zip(sizes, results, strict=True)) / tokens
    return {**values, "bits_per_byte": values["loss"] / (math.log(2) * size)}


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
