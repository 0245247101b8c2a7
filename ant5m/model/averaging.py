"""The mean of the weights of several checkpoints of one model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import (
    CHECKPOINTS,
    checkpoints,
    load_with_tokenizer,
    resolve,
    verify_checkpoint,
)


def expand(paths: Sequence[Path]) -> list[Path]:
    """Each run folder replaced by all of its checkpoints, which must be good; the rest as it is."""
    found = []
    for path in paths:
        if resolve(path) == path:
            found.append(path)
            continue
        inside = checkpoints(path / CHECKPOINTS)
        for checkpoint in inside:
            verify_checkpoint(checkpoint)
        found += inside
    return found


def average(paths: Sequence[Path]) -> tuple[Ant, Tokenizer]:
    """The mean of the weights in these folders (checkpoints, Hugging Face folders), taken in float64, and
    their tokenizer.

    Raises `UserError` when there are fewer than two, or they differ in shape or tokenizer.
    """
    if len(paths) < 2:
        raise UserError(f"an average needs at least two checkpoints, and there is {len(paths)}")
    net, tokenizer = load_with_tokenizer(paths[0])
    total = {name: weight.detach().double() for name, weight in net.named_parameters()}
    for path in paths[1:]:
        other, its_tokenizer = load_with_tokenizer(path)
        if other.config != net.config:
            raise UserError(f"{path} is a model of another shape than {paths[0]}: they have no average")
        if its_tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{path} has another tokenizer than {paths[0]}: they have no average")
        for name, weight in other.named_parameters():
            total[name] += weight.detach()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.copy_(total[name] / len(paths))
    return net, tokenizer
