"""A training step (forward, backward, clipping, AdamW) of the larger presets beside transformers.

    python benchmarks/larger_presets.py [--presets ant-10m ant-25m] [--tokens 256] [--rounds 2]

One thread, interleaved, ratios of processor time: other work on the machine takes less part in them.
Prints a table and writes a file in results/.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for the variants' processes

import torch
from provenance import RESULTS, provenance
from variant import Variant

from ant5m import kernels
from ant5m.files import write_json
from ant5m.model.config import PRESETS

LARGER = ("ant-10m", "ant-25m", "ant-50m", "ant-100m")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="*", default=LARGER, choices=PRESETS)
    parser.add_argument("--tokens", type=int, default=256, help="of a step, one sequence")
    parser.add_argument("--rounds", type=int, default=2)
    flags = parser.parse_args()
    rows = {preset: measure(preset, flags.tokens, flags.rounds) for preset in flags.presets}
    found = {"provenance": provenance(), "tokens": flags.tokens, "rounds": flags.rounds, "presets": rows}
    write_json(RESULTS / "larger-presets.json", found)


def measure(preset: str, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """{variant: seconds a step, speed over transformers in the same precision, memory}, printed, too."""
    bf16 = ("-bf16",) if kernels.multiplies_bf16(torch.device("cpu")) else ()
    with tempfile.TemporaryDirectory() as folder:
        normed = Path(folder) / "qk-norm.json"
        normed.write_text(json.dumps({**PRESETS[preset].to_dict(), "qk_norm": True}))
        figures: dict[str, dict[str, float]] = {}
        for suffix in ("", *bf16):
            shapes = {"transformers": preset, "cpu": preset, "cpu QK-norm": str(normed)}
            variants = {
                name: Variant(name.split()[0] + suffix, shape, 1, tokens) for name, shape in shapes.items()
            }
            seconds = {name: [] for name in variants}
            for _ in range(rounds):
                for name, variant in variants.items():
                    seconds[name].append(variant.step()["processor_seconds"])
            for name, variant in variants.items():
                variant.close()
                pairs = zip(seconds["transformers"], seconds[name], strict=True)
                figures[name + suffix] = {
                    "processor_seconds": round(statistics.median(seconds[name]), 3),
                    "speed_over_transformers": round(statistics.median(a / b for a, b in pairs), 3),
                    "peak_bytes": variant.peak_bytes,
                }
    for name, one in figures.items():
        print(preset, name, *(f"{key} {value}" for key, value in one.items()), sep="  ", flush=True)
    return figures


if __name__ == "__main__":
    main()
