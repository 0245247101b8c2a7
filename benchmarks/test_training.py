"""A whole training step (forward, backward, clipping, AdamW) beside transformers' Llama, in one run.

Every round lets each arm take one step in turn; the figures are medians over rounds, the ratios medians of
the rounds' own ratios. Peak memory is that of the arm's whole process.
"""

import statistics

import pytest
from arm import Arm

from ant5m import kernels

RUN_TOKENS = 655_360_000  # 10,000 steps of 64 x 1,024: the published run
PEERS = ("transformers", "transformers-compiled")
OURS = [b for b in kernels.BACKENDS if all(row[b] == "ready" for row in kernels.available().values())]


@pytest.mark.parametrize("preset", ["ant-5m", "ant-5m-fit"])
def test_training_step(benchmark, preset, batch_size=8, sequence_length=1_024, rounds=5):
    arms = [Arm(name, preset, batch_size, sequence_length) for name in (*PEERS, *OURS)]
    *others, ours = arms  # the timed one is the fastest backend; the others take their turns beside it
    for arm in arms:
        for _ in range(2):
            arm.step()
        arm.seconds.clear()
    benchmark.pedantic(ours.step, setup=lambda: [arm.step() for arm in others] and None, rounds=rounds)
    benchmark.group = "training step"
    benchmark.extra_info |= {"preset": preset, "batch": [batch_size, sequence_length], "dtype": "float32"}
    benchmark.extra_info["arms"] = {arm.name: _figures(arm, arms[0]) for arm in arms}
    for arm in arms:
        arm.close()


def _figures(arm: Arm, peer: Arm) -> dict[str, float]:
    seconds = statistics.median(arm.seconds)
    return {
        "tokens_per_second": round(arm.tokens / seconds),
        "speed_over_transformers": round(statistics.median(map(_ratio, peer.seconds, arm.seconds)), 3),
        "peak_bytes": arm.peak_bytes,
        "memory_over_transformers": round(arm.peak_bytes / peer.peak_bytes, 3),
        "hours_for_655M_tokens": round(RUN_TOKENS * seconds / arm.tokens / 3_600, 2),
    }


def _ratio(a: float, b: float) -> float:
    return a / b
