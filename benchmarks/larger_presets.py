"""A training step (forward, backward, clipping, AdamW) of larger models beside transformers.

    python benchmarks/larger_presets.py [--models ant-10m archaea-74m shape.json] [--batch-size 4]
    python benchmarks/larger_presets.py --instruction-set avx2 --qk-norm

One thread, interleaved, ratios of processor time: other work on the machine takes less part in them.
Prints a line for each and adds it to a file in results/.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch, and for the variants' processes

from provenance import RESULTS, provenance
from variant import Variant

from ant5m import _cpu
from ant5m.files import write_json
from ant5m.model.config_file import load_config

LARGER = ("ant-10m", "ant-25m", "ant-50m", "ant-100m")
FILE = RESULTS / "larger-presets.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=LARGER, help="presets or config files")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step")
    parser.add_argument("--context", type=int, default=1_024, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--instruction-set", choices=_cpu.instruction_sets(), help="default: the best")
    parser.add_argument("--bf16", action="store_true", help="products in bf16, transformers' in autocast")
    parser.add_argument("--qk-norm", action="store_true", help="the same shape with QK-norm, too")
    flags = parser.parse_args()
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    for model in flags.models:
        rows += measure(model, flags)
        write_json(FILE, {"rows": rows})


def measure(model: str, flags: argparse.Namespace) -> list[dict]:
    """For each variant seconds a step, speed over transformers, and memory; printed, too."""
    if flags.instruction_set == "avx2":  # torch's own loops, too; MKL chooses by the maker of the processor
        os.environ["ATEN_CPU_CAPABILITY"] = "avx2"
    precision = "bf16" if flags.bf16 else "fp32"
    suffix = "-bf16" if flags.bf16 else ""
    with tempfile.TemporaryDirectory() as folder:
        shapes = {"transformers": model, "cpu": model}
        if flags.qk_norm:
            normed = Path(folder) / "qk-norm.json"
            normed.write_text(json.dumps({**load_config(model).to_dict(), "qk_norm": True}))
            shapes["cpu QK-norm"] = str(normed)
        variants = {
            name: Variant(
                name.split()[0] + suffix, shape, flags.batch_size, flags.context, flags.instruction_set
            )
            for name, shape in shapes.items()
        }
        seconds = {name: [] for name in variants}
        for _ in range(flags.rounds):
            for name, variant in variants.items():
                seconds[name].append(variant.step()["processor_seconds"])
        for variant in variants.values():
            variant.close()
    rows = []
    for name, variant in variants.items():
        pairs = zip(seconds["transformers"], seconds[name], strict=True)
        row = {
            "model": Path(model).stem,
            "variant": name,
            "precision": precision,
            "instruction_set": flags.instruction_set or _cpu.instruction_set(),
            "batch_size": flags.batch_size,
            "context": flags.context,
            "processor_seconds": [round(value, 3) for value in seconds[name]],
            "speed_over_transformers": round(statistics.median(a / b for a, b in pairs), 3),
            "peak_bytes": variant.peak_bytes,
            "memory_over_transformers": round(variant.peak_bytes / variants["transformers"].peak_bytes, 3),
        }
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
        rows.append(row)
    rows[0] |= {"shape": load_config(model).to_dict(), "provenance": provenance()}
    return rows


if __name__ == "__main__":
    main()
