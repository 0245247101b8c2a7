"""What suits a run where its flags say nothing: batch, micro-batch, learning rate; how fast it will be."""

import copy
import math
import time

import torch

from ant5m.data.resident import fits
from ant5m.device import installed_memory
from ant5m.errors import UserError
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.model.costs import count_parameters, fitting_tokens
from ant5m.train.config import TrainConfig
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.optimizer import Optimizer
from ant5m.train.schedule import Schedule
from ant5m.train.step import WARM_UP, CapturedStep, Step, make_step

LEARNING_RATE = 4e-3
BUILTIN_LEARNING_RATE = 1.2e-2
"""beside Muon, in a short run of small batches: 500k tokens ended at 5.87 nats with 4e-3, 5.79 with 1.6e-2"""
CPU_MICRO_TOKENS = 4_096
"""tokens computed at once on a CPU: more does not go faster on up to 16 cores, it only takes memory"""
CPU_MICRO_TOKENS_A_CORE = 256
"""on more cores: so each has four tasks of every op"""
LEAST_BATCH_TOKENS = 2_048
PROBE_SECONDS = 3.0
"""of measured steps, at most three: a slow step needs no repetition"""
GPU_PROBE_TOKENS = 65_536
"""computed at once to measure a GPU's speed: with few, it would wait for the launches"""


def batch_for_tokens(tokens: int, length: int) -> int:
    """Sequences a step for a run of so many tokens: the nearest power of two to 0.58 D^0.571 tokens.

    Source: Li et al., "Predictable Scale: Part I, Step Law", 2025. It gives 62k tokens for the 655M of the
    published recipe.
    """
    return _power_of_two(max(LEAST_BATCH_TOKENS, 0.58 * tokens**0.571) / length)


def batch_for_steps(steps: int, length: int) -> int:
    """The same law solved for a given number of steps: D = steps x batch tokens."""
    return _power_of_two(max(LEAST_BATCH_TOKENS, (0.58 * steps**0.571) ** (1 / (1 - 0.571))) / length)


def keeps_tokens(num_tokens: int, device: torch.device) -> bool:
    """Whether the training split is kept in the device's memory: on a GPU, when it takes little of it."""
    return device.type == "cuda" and fits(num_tokens, _memory(device))


def check_memory(model: ModelConfig, batch: int, device: torch.device) -> None:
    """Raise `UserError` at once where a run needs more than all of the device's memory whatever is done: for
    fp32 weights, gradients and AdamW's moments, the RoPE table, and the token ids of a batch and its targets.
    """
    state = 16 * sum(count_parameters(model).values())
    table = 8 * model.max_position_embeddings * model.head_size
    ids = 16 * batch * model.max_position_embeddings
    needed = state + table + ids
    there = _memory(device) if device.type == "cuda" else installed_memory()
    if needed > there:
        raise UserError(
            f"this run needs more than {needed / 1e9:,.0f} GB of memory, the device has {there / 1e9:,.1f}: "
            f"{state / 1e9:,.0f} GB for the model and its optimizer, {table / 1e9:,.0f} for the context, "
            f"{ids / 1e9:,.0f} for a batch"
        )


def measure_speed(net: Ant, config: TrainConfig, precision: str) -> float:
    """Seconds per training token, from a few steps on a copy of the model, whose own state stays as it is; on
    average over the parts of the run with short contexts and with whole ones."""
    whole = _measure_speed(net, config, precision, net.config.max_position_embeddings)
    if not config.short_context:
        return whole
    short = _measure_speed(net, config, precision, config.short_context)
    return config.short_share * short + (1 - config.short_share) * whole


def _measure_speed(net: Ant, config: TrainConfig, precision: str, length: int) -> float:
    twin = copy.deepcopy(net)
    rows = micro_batch(
        net.config, max(1, _probe_tokens(net, config) // length), length, net.device, precision
    )
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=net.device)
    tokens += torch.arange(length, device=net.device) % net.config.vocab_size
    scaler = LossScaler(net.device) if precision == "fp16" else None
    optimizer, schedule = Optimizer(twin, config.optimizer, precision=precision), Schedule(WARM_UP + 4)
    step = make_step(Step(twin, optimizer, schedule, rows, config.grad_clip, precision, scaler))
    for _ in range(1 if net.device.type == "cpu" else WARM_UP + 1):
        _take(step, tokens)
    start, taken, elapsed = time.monotonic(), 0, 0.0
    while taken < 3 and elapsed < PROBE_SECONDS:
        _take(step, tokens)
        taken, elapsed = taken + 1, time.monotonic() - start
    return elapsed / taken / tokens.numel()


def _probe_tokens(net: Ant, config: TrainConfig) -> int:
    """Tokens of a measured step: as many as the run's have, where that is known, because the optimizer takes
    its time once for all of them (a token of steps of 2,048 costs 9 to 23 % more than of 4,096)."""
    if net.device.type == "cuda":
        return GPU_PROBE_TOKENS
    batch = (config.batch_size or 0) * net.config.max_position_embeddings
    return min(CPU_MICRO_TOKENS, batch) or LEAST_BATCH_TOKENS


def _take(step: Step | CapturedStep, tokens: torch.Tensor) -> None:
    stats = step(tokens, tokens)
    assert stats is not None
    stats.tolist()  # waits for the device


def default_learning_rate(config: TrainConfig) -> float:
    """AdamW's."""
    short = not config.data and config.optimizer == "muon"
    return BUILTIN_LEARNING_RATE if short else LEARNING_RATE


def micro_batch(
    model: ModelConfig,
    batch: int,
    length: int,
    device: torch.device,
    precision: str,
    num_tokens: int = 0,
    loop_loss: str = "none",
) -> int:
    """Sequences computed at once: the largest divisor of the batch that fits, beside the tokens if kept."""
    if device.type != "cuda":
        fitting = max(CPU_MICRO_TOKENS, CPU_MICRO_TOKENS_A_CORE * torch.get_num_threads())
    else:
        kept = 2 * num_tokens if keeps_tokens(num_tokens, device) else 0
        fitting = fitting_tokens(model, _memory(device) - kept, half=precision != "fp32")
        fitting //= 1 + (loop_loss == "ditto")  # a second forward pass before the backward pass
    most = max(1, fitting // length)
    return next(rows for rows in range(min(most, batch), 0, -1) if batch % rows == 0)


def _memory(device: torch.device) -> int:
    """Bytes that this process has or can have."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _power_of_two(value: float) -> int:
    return 1 << max(0, round(math.log2(value)))
