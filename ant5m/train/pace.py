"""How far in its schedule a run with a time limit has to be, by the clock.

The learning rate follows the larger of the share of the steps that are taken and the share of the time that
is used: on a machine that slows down it still falls to its end, and the run ends as a finished one. What
comes after the last step has its time reserved.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

FINISH_SECONDS = 10.0
"""for samples, export, pictures and report, at least"""
FINISH_TOKENS = 20_000
"""or as long as so many training tokens take: twice what a loaded processor core was seen to need"""
EVALUATION = 0.5
"""time of a token that is evaluated, as a share of one that is trained on; a forward pass is a third of it"""
LARGEST_RESERVE = 0.5
"""of what is left of the time limit"""


def finish_seconds(validation_tokens: int, seconds_per_token: float) -> float:
    """What evaluation, export and report take, at that speed of the training."""
    work = (EVALUATION * validation_tokens + FINISH_TOKENS) * seconds_per_token
    return max(work, FINISH_SECONDS + EVALUATION * validation_tokens * seconds_per_token)


class Pace:
    """Gives the least position in the schedule, a step from 0 on, for each step of a run.

    Args:
        steps: of the schedule.
        deadline: of the whole run, on `time.monotonic()`.
        validation_tokens: evaluated after the last step.
        recorded: the positions of steps that were taken before, by `attempt`: they are repeated.
    """

    def __init__(
        self, steps: int, deadline: float, validation_tokens: int, recorded: Mapping[int, int] | None = None
    ):
        self._steps, self._deadline, self._validation_tokens = steps, deadline, validation_tokens
        self._recorded = recorded or {}
        self._reached = 0
        self._since = time.monotonic()

    def start(self, position: int) -> None:
        """The clock counts from here on, and from this position."""
        self._reached, self._since = position, time.monotonic()

    def position(self, attempt: int, seconds_per_token: float) -> int:
        """The least position of a step; the number of steps when the time for training is over.

        Args:
            attempt: how many steps were taken before, with those that fp16 skipped.
            seconds_per_token: of the training lately.
        """
        if attempt in self._recorded:
            self.start(self._recorded[attempt])
            return self._reached
        now = time.monotonic()
        left = self._deadline - self._since
        reserve = min(finish_seconds(self._validation_tokens, seconds_per_token), LARGEST_RESERVE * left)
        share = min(1.0, (now - self._since) / (left - reserve)) if left > 0 else 1.0
        return self._reached + int(share * (self._steps - self._reached))


def recorded_positions(lines: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """{attempt: position} of the steps in the lines of a metrics.jsonl."""
    train = [line for line in lines if line["kind"] == "train" and "position" in line]
    return {line["step"] + line["skipped"] - 1: line["position"] for line in train}
