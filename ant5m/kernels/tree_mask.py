"""Attention along the branches of a forest."""

from collections.abc import Sequence

import torch


class TreeMask:
    """Position t of a row sees key s when s <= t < ends[b, s].

    So a row may hold a forest, depth first: ends[b, s] lies behind the last descendant of s, and t sees its
    ancestors.

    Args:
        ends: [B, T] integers on the CPU.
        sizes: lengths of pieces of the rows, end to end, that do not see one another; None: one piece.
        device: where the tensors are that attend.
    """

    def __init__(
        self,
        ends: torch.Tensor,
        sizes: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ):
        self.sizes = [ends.shape[1]] if sizes is None else list(sizes)
        self.ends = ends.to(device)
        self._host = ends
        self._biases: dict[tuple[int, torch.dtype], list[torch.Tensor | None]] = {}

    def biases(self, group: int, like: torch.Tensor) -> list[torch.Tensor | None]:
        """Of each piece what is added to the scores [B, 1, group * T, T]: 0 or -inf, for `group` query heads
        below one another; None where the piece is a single branch. In `like`'s dtype, made once."""
        key = group, like.dtype
        if key not in self._biases:
            self._biases[key] = [self._bias(part, group, like) for part in self._pieces()]
        return self._biases[key]

    def _pieces(self) -> list[torch.Tensor]:
        pieces, first = [], 0
        for size in self.sizes:
            pieces.append(self._host[:, first : first + size] - first)
            first += size
        return pieces

    @staticmethod
    def _bias(ends: torch.Tensor, group: int, like: torch.Tensor) -> torch.Tensor | None:
        size = ends.shape[1]
        if bool((ends >= size).all()):  # also where there is nothing
            return None
        position = torch.arange(size)
        seen = (position <= position[:, None]) & (position[:, None] < ends[:, None, :])
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        return bias.to(like).repeat(1, group, 1)[:, None]
