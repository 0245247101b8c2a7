"""What the presets' Triton kernels cost a device, found out without one: registers, shared memory, spills.

    python benchmarks/triton_resources.py                        # all presets, capabilities and dtypes
    python benchmarks/triton_resources.py ant-5m --capability 90 --dtype bf16

prints a table and keeps it in benchmarks/results/triton-resources.json (only when nothing was left out).
"""

import argparse
import dataclasses
import itertools
import sys

import torch
import triton
from provenance import RESULTS, provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ant5m.files import write_json
from ant5m.kernels.triton.resources import SHARED_MEMORY, Resources, of_training_step
from ant5m.model.config import PRESETS, ModelConfig

SHAPES = {
    **PRESETS,
    "head size 32": ModelConfig(num_attention_heads=4, num_key_value_heads=2),
    "head size 128": ModelConfig(num_attention_heads=4, num_key_value_heads=1, head_dim=128),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help=f"of: {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--capability", type=int, choices=SHARED_MEMORY, help="75, 80 or 90 (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the activations (default: all)")
    arguments = parser.parse_args()
    shapes = arguments.shapes or list(SHAPES)
    if not set(shapes) <= set(SHAPES):
        parser.error(f"there is no {', '.join(set(shapes) - set(SHAPES))}")
    capabilities = [arguments.capability] if arguments.capability else list(SHARED_MEMORY)
    dtypes = [arguments.dtype] if arguments.dtype else list(DTYPES)
    wanted = [
        (shape, capability, dtype)
        for shape, capability, dtype in itertools.product(shapes, capabilities, dtypes)
        if (capability, dtype) != (75, "bf16")  # no such conversions there: refused
    ]
    rows = []
    for shape, capability, dtype in track(wanted, "compiling", console=Console(stderr=True)):
        for found in _kernels(SHAPES[shape], capability, DTYPES[dtype]):
            constants = ", ".join(f"{name}={value}" for name, value in found.constants.items())
            rows.append({"shape": shape, "dtype": dtype, **dataclasses.asdict(found), "constants": constants})
    Console(width=140).print(_table(rows))
    if len(shapes) == len(SHAPES) and not (arguments.capability or arguments.dtype):
        where = {
            key: value for key, value in provenance().items() if key not in ("device", "cores", "threads")
        }
        write_json(
            RESULTS / "triton-resources.json",
            {"provenance": {**where, "ptxas": triton.knobs.nvidia.ptxas.version}, "kernels": rows},
        )
    return int(any(row["spill_bytes"] and row["shape"] in PRESETS for row in rows))


def _kernels(config: ModelConfig, capability: int, dtype: torch.dtype) -> list[Resources]:
    sizes = {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_size": config.head_size,
        "vocab": config.vocab_size,
        "length": config.max_position_embeddings,
    }
    found = of_training_step(capability, dtype, **sizes)
    if capability >= 80:
        again = of_training_step(capability, dtype, **sizes, documents=True)
        found += [kernel for kernel in again if kernel.constants.get("STARTS")]
    return found


def _table(rows: list[dict]) -> Table:
    table = Table(
        "shape", "dtype", "sm", "kernel", "warps", "regs", "shared", "of", "spills", "tensor", "code"
    )
    for row in rows:
        table.add_row(
            row["shape"],
            row["dtype"],
            str(row["capability"]),
            row["kernel"] + (" (documents)" if "STARTS=True" in row["constants"] else ""),
            *(str(row[name]) for name in ("warps", "registers", "shared_bytes")),
            f"{SHARED_MEMORY[row['capability']] >> 10} KiB",
            *(str(row[name]) for name in ("spill_bytes", "tensor_instructions", "instructions")),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
