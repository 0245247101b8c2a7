"""When a run must end before its last step: Ctrl-C, SIGTERM, or the time limit."""

import os
import signal
import threading
import time
from types import FrameType

from ant5m import torchrun

NOTICE = b"\nsaving; Ctrl-C again stops without saving\n"
EXIT_CODES = {"time limit": 0, "terminated": 143, "interrupted": 130}
REASONS = (None, *EXIT_CODES)
"""by their number in `Stop.code`"""


class Stop:
    """A context in which SIGINT and SIGTERM only leave a note, so that the run can save itself first.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python delivers no
    signals, only the time limit counts.

    Args:
        deadline: value of `time.monotonic()` at which to stop, or None.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self._signal: str | None = None
        self._before: dict[int, object] = {}

    @property
    def reason(self) -> str | None:
        """A key of `EXIT_CODES`, or None to go on."""
        if self._signal is None and self.deadline is not None and time.monotonic() >= self.deadline:
            return "time limit"
        return self._signal

    @property
    def code(self) -> int:
        """The reason as a number, 0 for none: what ranks agree on."""
        return REASONS.index(self.reason)

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "interrupted":
            raise KeyboardInterrupt
        if number == signal.SIGINT and torchrun.rank() == 0:
            os.write(2, NOTICE)  # not print, which the signal may have interrupted
        self._signal = "interrupted" if number == signal.SIGINT else "terminated"
