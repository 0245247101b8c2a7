"""A GPU's rate of exponentials and of multiply-adds, from a loop that touches no memory."""

import torch
import triton
import triton.language as tl
from stopwatch import seconds

ROUNDS = 4_096
BLOCK = 1_024
"""numbers of a program: 8 a thread, so that no latency shows"""


@triton.jit
def spin_kernel(p_x, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, EXP: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o)
    for _ in range(ROUNDS):
        # Either way x stays where it is, near 0.64 and near 0.5.
        b_x = tl.exp2(-b_x) if EXP else b_x * 0.5 + 0.25
    tl.store(p_x + o, b_x)


def measure_spin(device: torch.device) -> tuple[float, float]:
    """(multiply-adds, exponentials) a second."""
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.ones(programs * BLOCK, device=device)

    def rate(exp: bool) -> float:
        def run() -> None:
            spin_kernel[(programs,)](x, ROUNDS, BLOCK, EXP=exp, num_warps=4)

        return ROUNDS * x.numel() / seconds(run, device)

    return rate(False), rate(True)
