"""The tokens of a split in the memory of a device, so that only the numbers of the sequences go there."""

import numpy as np
import torch
from numpy.typing import NDArray

from ant5m.data.shards import IGNORE, Tokens

LARGEST_SHARE = 1 / 8
"""of a device's memory; the published 655M tokens are 1.3 GB"""
_CHUNK = 1 << 26


class ResidentTokens:
    """A copy of `tokens` on `device`, two bytes each, and one for whether it counts where that is said."""

    def __init__(self, tokens: Tokens, device: torch.device):
        # int16, because torch has few ops for uint16: those from 32,768 on are negative here.
        self._tokens = torch.empty(len(tokens), dtype=torch.int16, device=device)
        self._counted = torch.empty(len(tokens) if tokens.masked else 0, dtype=torch.bool, device=device)
        for start in range(0, len(tokens), _CHUNK):
            part = np.array(tokens[start : start + _CHUNK]).view(np.int16)
            place = slice(start, start + len(part))
            self._tokens[place].copy_(torch.from_numpy(part))
            if tokens.masked:
                self._counted[place].copy_(torch.from_numpy(tokens.counted(place.start, place.stop)))

    def gather(self, starts: NDArray[np.int64], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows [start, start + length] and, shifted by one, their targets: int64 [rows, length].

        Raises `IndexError` when a window, with the target of its last token, leaves the tokens.
        """
        if len(starts) and (starts.min() < 0 or starts.max() + length >= len(self._tokens)):
            raise IndexError(f"a window of {length} + 1 tokens leaves the {len(self._tokens)} of the split")
        device = self._tokens.device
        first = torch.from_numpy(starts)
        if device.type == "cuda":
            first = first.pin_memory().to(device, non_blocking=True)
        places = first[:, None] + torch.arange(length + 1, device=device)
        windows = self._tokens[places].long() & 0xFFFF
        targets = windows[:, 1:].contiguous()
        if len(self._counted):
            targets = torch.where(self._counted[places[:, 1:]], targets, IGNORE)
        return windows[:, :-1].contiguous(), targets


def fits(num_tokens: int, device_memory: int) -> bool:
    """Whether so many tokens may be kept in a device of so many bytes."""
    return 2 * num_tokens <= LARGEST_SHARE * device_memory
