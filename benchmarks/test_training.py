"""A whole training step (forward, backward, clipping, optimizer) beside transformers' Llama, in one run.

Every round lets each variant take one step; the figures are medians over rounds, the ratios medians of
the rounds' own ratios. Peak memory is that of the variant's whole process on a CPU, of its tensors on a GPU.
"""

import importlib.util
import statistics

import pytest
import torch
from variant import Variant, backends, training_precision

from ant5m import kernels
from ant5m.device import peak_flops
from ant5m.model.config import PRESETS
from ant5m.model.costs import count_flops

RUN_TOKENS = 655_360_000  # 10,000 steps of 64 x 1,024: the published run
GPU = torch.cuda.is_available()
LIGER = GPU and importlib.util.find_spec("liger_kernel") is not None
PEERS = ("transformers", "transformers-compiled", *(("transformers-liger",) if LIGER else ()))
# A GPU trains in 16 bits anyway.
ALSO_BF16 = not GPU and kernels.multiplies_bf16(torch.device("cpu"))
WARM_UP = 6 if GPU else 2  # compilation, and the capture of a CUDA graph


@pytest.mark.parametrize("preset", ["ant-5m", "ant-5m-fit"])
def test_training_step(benchmark, pytestconfig, device, rates, preset, sequence_length=1_024):
    batch_size, rounds = pytestconfig.getoption("--batch-size"), 20 if GPU else 5
    bf16 = ("transformers-bf16", "trainer-bf16") if ALSO_BF16 else ()
    names = (*PEERS, *backends(), *bf16, "trainer")
    variants = [Variant(name, preset, batch_size, sequence_length) for name in names]
    variants = [variant for variant in variants if _warm_up(variant)]
    failed = sorted(set(names) - {variant.name for variant in variants})
    assert not {"transformers", "trainer"} & set(failed), f"no comparison without {failed}"
    *others, ours = variants  # the timed one is the trainer's step; the others are interleaved with it
    benchmark.group = "training step"  # is read when the timing begins
    benchmark.pedantic(
        ours.step, setup=lambda: [variant.step() for variant in others] and None, rounds=rounds
    )
    for variant in variants:
        variant.close()
    precision = training_precision(device)
    benchmark.extra_info |= {"preset": preset, "batch": [batch_size, sequence_length], "failed": failed}
    benchmark.extra_info["dtype"] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    peak = peak_flops(device, precision) or rates.flops
    flops = 3 * sum(count_flops(PRESETS[preset], sequence_length).values())
    benchmark.extra_info["variants"] = {
        variant.name: _figures(variant, variants[0], flops, peak) for variant in variants
    }


def _warm_up(variant: Variant) -> bool:
    """Whether it can take steps at all; why not, it says on stderr."""
    try:
        for _ in range(WARM_UP):
            variant.step()
    except RuntimeError:
        variant.close()
        return False
    variant.seconds.clear()
    return True


def _figures(variant: Variant, peer: Variant, flops: int, peak: float) -> dict[str, float | str]:
    """`flops`: of the model, per token; `peak`: the data sheet's on a known GPU, else the measured rate."""
    seconds = statistics.median(variant.seconds)
    return {
        "tokens_per_second": round(variant.tokens / seconds),
        "seconds": statistics.quantiles(variant.seconds, n=10),
        "speed_over_transformers": round(statistics.median(map(_ratio, peer.seconds, variant.seconds)), 3),
        "model_flops_utilization": round(variant.tokens / seconds * flops / peak, 4),
        "peak_bytes": variant.peak_bytes,
        "memory_over_transformers": round(variant.peak_bytes / peer.peak_bytes, 3),
        "micro_batch_size": variant.micro_batch_size,
        "optimizer": "muon" if variant.name.startswith("trainer") else "adamw",
        "hours_for_655M_tokens": round(RUN_TOKENS * seconds / variant.tokens / 3_600, 2),
    }


def _ratio(a: float, b: float) -> float:
    return a / b
