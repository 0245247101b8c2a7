"""Losses against loops, for the last part of a training: each lowers the probability of what repeats.

Both need probabilities of single tokens. They are computed chunk by chunk and computed again in the backward
pass (`torch.utils.checkpoint`): the N x V logits never exist as a whole, at the price of the head's product
once more. `CHUNK_BYTES` of logits, and about five tensors of that size, are alive at once.

Neither draws from a generator nor waits for the device: a resumed run repeats exactly, and a step that uses
one can be a CUDA graph.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ant5m import kernels
from ant5m.train.callback import Callback

if TYPE_CHECKING:
    from ant5m.train.settings import Settings
    from ant5m.train.trainer import Trainer

CHUNK_BYTES = 16 << 20
"""of fp32 logits"""
LEAST_REST = 1e-5
"""1 - p is not taken to be smaller, as in the authors' code: a certain repeat costs 11.5 nats at most"""
SHORTEST, LONGEST = 4, 32
"""tokens of a pseudo-repetition: a phrase to a sentence"""
DAMPING = 0.5
"""DITTO's lambda: every repeat should be half as likely as the one before"""

Forward = Callable[..., Tensor]
"""the model: forward(input_ids, targets=...) or forward(input_ids, head=...), as in `ant5m.model.ant.Ant`"""
LoopLoss = Callable[[Forward, Tensor, Tensor], Tensor]
"""(forward, input_ids [B, T], targets [B, T]) -> the cross-entropy in value, with the term in its gradient
only: so the losses of a run compare before and after it sets in"""


class AddLoopLoss(Callback):
    """Adds the loss against loops from its share of the run on."""

    everywhere = True

    def __init__(self, settings: "Settings"):
        self._settings = settings
        self._first = settings.steps - round(settings.loop_loss_share * settings.steps)
        self._added = settings.loop_loss == "none"
        self._trainer: Trainer | None = None

    def on_start(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        if self.is_due(trainer.step):
            self.act(trainer)

    def is_due(self, step: int) -> bool:
        position = self._trainer.position if self._trainer else 0  # of a run that a time limit ends
        return max(step, position) >= self._first and not self._added

    def act(self, trainer: "Trainer") -> None:
        self._added = True
        settings = self._settings
        trainer.use_loss(make_loop_loss(settings.loop_loss, settings.loop_loss_weight, settings.z_loss))


def make_loop_loss(kind: str, weight: float, z_loss: float = 0.0) -> LoopLoss:
    """`weight` times "unlikelihood" or "ditto" beside the cross-entropy, which has this `z_loss`.

    ditto is taken on repetitions made of the same rows, in a forward pass of its own: twice the activations
    and twice the time.
    """

    def with_unlikelihood(forward: Forward, input_ids: Tensor, targets: Tensor) -> Tensor:
        def head(hidden: Tensor, matrix: Tensor) -> Tensor:
            rows = hidden.flatten(0, 1)
            loss = kernels.linear_cross_entropy(rows, matrix, targets.flatten(), z_loss=z_loss or None)
            return _steer(loss, weight * unlikelihood(hidden, matrix, input_ids, targets))

        return forward(input_ids, head=head)

    def with_ditto(forward: Forward, input_ids: Tensor, targets: Tensor) -> Tensor:
        loss = forward(input_ids, targets=targets)
        repeated, periods = pseudo_repetition(input_ids)

        def head(hidden: Tensor, matrix: Tensor) -> Tensor:
            return ditto(hidden, matrix, repeated[:, 1:], periods)

        return _steer(loss, weight * forward(repeated[:, :-1], head=head))

    return {"unlikelihood": with_unlikelihood, "ditto": with_ditto}[kind]


def _steer(loss: Tensor, term: Tensor) -> Tensor:
    return loss + (term - term.detach())


def unlikelihood(hidden: Tensor, weight: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Token unlikelihood: mean over the tokens of sum over c in C_t of -log(1 - p(c | x_<t)), 0-dim.

    C_t holds, once each, the tokens that precede target t in its row, without the target itself.
    Probabilities are softmax(hidden [B, T, D] @ weight [V, D]^T); input_ids and targets are int64 [B, T], and
    a negative target does not count.
    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020, equation 4.
    """
    rows, length = input_ids.shape
    places = torch.arange(length, dtype=torch.int32, device=input_ids.device)
    # Where each entry occurs first: it is a candidate from there on.
    first = torch.full((rows, len(weight)), length, dtype=torch.int32, device=input_ids.device)
    first.scatter_reduce_(1, input_ids, places.expand(rows, length), "amin")

    def total(hidden: Tensor, weight: Tensor, targets: Tensor, row: Tensor, place: Tensor) -> Tensor:
        p = _logits(hidden, weight).softmax(-1)
        candidate = first[row] <= place[:, None]
        candidate.scatter_(-1, targets.clamp(min=0)[:, None], False)
        candidate &= (targets >= 0)[:, None]
        return -((1 - p).clamp(min=LEAST_REST).log() * candidate).sum()

    row = torch.arange(rows, device=input_ids.device).repeat_interleave(length)
    sums = _over_chunks(total, hidden.flatten(0, 1), weight, targets.flatten(), row, places.repeat(rows))
    return torch.stack(sums).sum() / (targets >= 0).sum().clamp(min=1)


def ditto(hidden: Tensor, weight: Tensor, targets: Tensor, periods: Tensor) -> Tensor:
    """Mean over the repeated tokens of -log(1 - |p - DAMPING * p'|), 0-dim; p' is the same token's
    probability one period before and has no gradient.

    Args:
        hidden: [B, T, D]. weight: [V, D]. targets: int64 [B, T], row b with period periods[b] (int64 [B, 1]).

    Source: Xu et al., "Learning to Break the Loop: Analyzing and Mitigating Repetitions for Neural Text
    Generation" (DITTO), 2022, equation 5.
    """

    def log_p(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return _logits(hidden, weight).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    parts = _over_chunks(log_p, hidden.flatten(0, 1), weight, targets.flatten())
    p = torch.cat(parts).exp().view(targets.shape)
    places = torch.arange(targets.shape[1], device=targets.device)
    before = p.detach().gather(1, (places - periods).clamp(min=0))
    losses = -torch.log((1 - (p - DAMPING * before).abs()).clamp(min=LEAST_REST))
    repeats = places >= periods
    return (losses * repeats).sum() / repeats.sum().clamp(min=1)


def pseudo_repetition(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [B, T] a row [B, T + 1] that says one of its phrases again and again, and the phrases'
    lengths [B, 1], `SHORTEST` to `LONGEST` (at most T / 2).

    Which phrase depends on the row's own tokens alone: no generator's state has to be kept. DITTO takes
    whole sentences; where one ends is a tokenizer's matter, so these are phrases of any beginning.
    """
    length = input_ids.shape[1]
    longest = max(1, min(LONGEST, length // 2))
    shortest = min(SHORTEST, longest)
    places = torch.arange(length, device=input_ids.device)
    # A sum with odd weights, its low bits mixed up by a multiplication (Knuth's 2^32 / phi).
    mixed = (input_ids * (2 * places + 1)).sum(-1, keepdim=True) * 2_654_435_761 & 0xFFFFFFFF
    periods = shortest + (mixed >> 8) % (longest - shortest + 1)
    starts = (mixed >> 16) % (length - longest + 1)
    steps = torch.arange(length + 1, device=input_ids.device)
    return input_ids.gather(1, starts + steps % periods), periods


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T  # in the dtype of autocast
    return logits if logits.dtype == torch.float64 else logits.float()


def _over_chunks(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, *rest: Tensor
) -> list[Tensor]:
    """`function` of the rows of hidden [N, D] and of each of `rest` [N], and the weight, chunk by chunk."""
    chunk = max(1, CHUNK_BYTES // (4 * len(weight)))
    parts = zip(hidden.split(chunk), *(x.split(chunk) for x in rest), strict=True)
    return [
        checkpoint(function, part, weight, *others, use_reentrant=False, preserve_rng_state=False)
        for part, *others in parts
    ]
