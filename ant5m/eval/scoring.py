"""How likely a model finds many continuations, each behind its context: what they share is computed once.

The token sequences of all requests, sorted, are a trie walked depth first. It is cut into packs; a position
of a pack sees itself and its ancestors, so every branch computes what it would compute alone. All packs of a
batch lie end to end, without padding, and only positions whose next token is asked for pass through the head.
On a CPU a pack is as large as a batch: attention there skips what a position does not see.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ant5m import kernels
from ant5m.errors import UserError
from ant5m.model.ant import NOT_FINITE, Ant

PACK_TOKENS = 128
"""behind so many a pack with a mask is closed, unless what would be computed again outweighs the mask"""
BATCH_TOKENS = 2048


class Request(NamedTuple):
    """Token ids: how likely is `continuation` behind `context`, which may not be empty?"""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of one request: log p(continuation | context) in nats, and whether greedy decoding writes it."""

    log_likelihood: float
    greedy: bool


@dataclass
class Pack:
    """A piece of the trie, depth first: position t sees every s with s <= t < ends[s]."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """of each token in its own sequence"""
    ends: list[int] = field(default_factory=list)
    """behind the last descendant"""
    rows: list[int] = field(default_factory=list)
    """positions whose next token is asked for: `targets` holds that token, `requests` who asks"""
    targets: list[int] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    """indices into the requests"""


def score(
    net: Ant, requests: Sequence[Request], on_scored: Callable[[int], None] | None = None
) -> list[Score]:
    """The scores of all requests, in their order.

    A sequence that is longer than the model's context loses its beginning, as in lm-eval. Computes in the
    net's dtype. `on_scored` is called now and then with a number of requests that are done. Raises
    `UserError` when a continuation is empty (it would be certain, and always win) or longer than the context.
    """
    total = np.zeros(len(requests))
    greedy = np.ones(len(requests), dtype=bool)
    training = net.training
    net.eval()
    try:
        with torch.inference_mode():
            packs = pack_requests(requests, net.config.max_position_embeddings, _pack_tokens(net.device))
            for batch in _batches(packs):
                ids, log_probs, is_argmax = _score_batch(net, batch)
                np.add.at(total, ids, log_probs)
                np.logical_and.at(greedy, ids, is_argmax)
                if on_scored:
                    on_scored(len(np.unique(ids)))
    finally:
        net.train(training)
    return [Score(float(nats), bool(flag)) for nats, flag in zip(total, greedy, strict=True)]


def pack_requests(
    requests: Sequence[Request], context: int, pack_tokens: int = PACK_TOKENS
) -> Iterator[Pack]:
    """The trie of all requests in packs of about so many tokens. `context`: what a sequence may have."""
    if any(not request.continuation for request in requests):
        raise UserError("an answer of no tokens cannot be scored")
    sequences = [[*request.context, *request.continuation][-context - 1 :] for request in requests]
    pack, path, last = Pack(), list[int](), list[int]()
    # The last token is only predicted, never read.
    for request in sorted(range(len(requests)), key=lambda index: sequences[index][:-1]):
        *tokens, _ = sequence = sequences[request]
        asked = len(requests[request].continuation)
        if asked > len(tokens):
            raise UserError(
                f"an item's answer of {asked} tokens does not fit into the model's context of {context}"
            )
        shared = _shared(last, tokens)
        if pack.ids and len(pack.ids) + len(tokens) - shared > max(pack_tokens, 4 * shared):
            _close(pack, path)
            yield pack
            pack, path, shared = Pack(), [], 0
        _close(pack, path[shared:])
        start, grown = len(pack.ids), len(tokens) - shared
        path = path[:shared] + list(range(start, start + grown))
        pack.ids += tokens[shared:]
        pack.positions += range(shared, len(tokens))
        pack.ends += [-1] * grown
        pack.rows += path[-asked:]
        pack.targets += sequence[-asked:]
        pack.requests += [request] * asked
        last = tokens
    if pack.ids:
        _close(pack, path)
        yield pack


def _pack_tokens(device: torch.device) -> int:
    return BATCH_TOKENS if device.type == "cpu" else PACK_TOKENS


def _shared(left: list[int], right: list[int]) -> int:
    """Length of the common beginning."""
    for index, (a, b) in enumerate(zip(left, right)):  # noqa: B905  (of different lengths)
        if a != b:
            return index
    return min(len(left), len(right))


def _close(pack: Pack, positions: list[int]) -> None:
    """Whatever comes now does not descend from these."""
    for position in positions:
        pack.ends[position] = len(pack.ids)


def _batches(packs: Iterator[Pack]) -> Iterator[list[Pack]]:
    batch, tokens = list[Pack](), 0
    for pack in packs:
        if batch and tokens + len(pack.ids) > BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(pack)
        tokens += len(pack.ids)
    if batch:
        yield batch


class _PackedBatch:
    """Stands in for the KV cache of `Body`: attention inside each pack, along its branches."""

    def __init__(self, packs: list[Pack], device: torch.device) -> None:
        ends = [np.array(pack.ends) + offset for pack, offset in zip(packs, _offsets(packs), strict=True)]
        sizes = [len(pack.ids) for pack in packs]
        self.mask = kernels.TreeMask(torch.from_numpy(np.concatenate(ends))[None], sizes, device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, N, H, D], k and v [1, N, KV, D] of all packs end to end -> [1, N, H, D]."""
        return kernels.tree_attention(q, k, v, self.mask)


def _offsets(packs: list[Pack]) -> np.ndarray:
    """Where each pack begins."""
    return np.cumsum([0, *(len(pack.ids) for pack in packs[:-1])])


def _score_batch(net: Ant, packs: list[Pack]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index of the request, log-probability, whether it is the most likely) for every token asked for."""
    pairs = zip(packs, _offsets(packs), strict=True)
    rows = np.concatenate([np.array(pack.rows) + offset for pack, offset in pairs])
    targets = np.array(list(itertools.chain.from_iterable(pack.targets for pack in packs)))
    requests = np.array(list(itertools.chain.from_iterable(pack.requests for pack in packs)))
    unique, pointer = np.unique(rows, return_inverse=True)
    log_probs, is_argmax = _log_probs(net, _hidden(net, packs, unique), pointer, targets)
    return requests, log_probs, is_argmax


def _hidden(net: Ant, packs: list[Pack], rows: np.ndarray) -> Tensor:
    """What the head takes of these rows, [len(rows), D]."""
    ids = torch.tensor([list(itertools.chain.from_iterable(pack.ids for pack in packs))], device=net.device)
    positions = list(itertools.chain.from_iterable(pack.positions for pack in packs))
    place = torch.tensor(positions, device=net.device)
    batch = _PackedBatch(packs, net.device)
    wanted = torch.from_numpy(rows).to(net.device)
    return net.model(ids, net.cos[place], net.sin[place], batch, rows=wanted)[0]


def _log_probs(
    net: Ant, hidden: Tensor, rows: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log p(targets[i] | hidden[rows[i]]), and whether it is the largest."""
    log_sum, argmax = kernels.logsumexp_argmax(hidden, net.head_weight)
    row, target = (torch.from_numpy(x).to(hidden.device) for x in (rows, targets))
    logits = (hidden[row] * net.head_weight[target]).sum(-1, dtype=torch.float32)
    log_probs = (logits - log_sum[row]).cpu().numpy()
    if not np.isfinite(log_probs).all():
        raise UserError(NOT_FINITE)
    return log_probs, (argmax[row] == target).cpu().numpy()
