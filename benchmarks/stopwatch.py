"""Seconds of the host's clock, or of a GPU's own."""

import time
from collections.abc import Callable

import torch


def seconds(action: Callable[[], object], device: torch.device | str, tries: int = 7) -> float:
    """The shortest time of `action`, by the device's own clock on a GPU."""
    action()
    return min(_once(action, torch.device(device)) for _ in range(tries))


def _once(action: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Stopwatch:
    """Seconds between marks: of a GPU's own clock, without the host's time, else of the host's.

    On a GPU a pause stands before the first mark, in which the host queues what is to be timed.
    """

    PAUSE = 10_000_000
    """cycles, some milliseconds: longer than the host takes to queue an op's two directions"""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._marks: list = []

    def start(self) -> None:
        self._marks.clear()
        if self._gpu:
            torch.cuda._sleep(self.PAUSE)
        self.split()

    def split(self) -> None:
        if not self._gpu:
            self._marks.append(time.perf_counter())
            return
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append(mark)

    def read(self) -> list[float]:
        """Between each mark and the next."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._gpu:
            return [end - begin for begin, end in pairs]
        self._marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
