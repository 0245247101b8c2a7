"""What the presets' CUDA kernels cost a device, found out without one: registers, shared memory, spills.

    python benchmarks/cuda_resources.py                           # all presets and capabilities
    python benchmarks/cuda_resources.py ant-5m --capability 75
    python benchmarks/cuda_resources.py ant-5m --compiler nvcc    # ahead of time: a run takes what it leaves

prints a table and keeps it in benchmarks/results/cuda-resources.json (only when nothing was left out).
"""

import argparse
import dataclasses
import itertools
import sys

from conftest import RESULTS, provenance
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ant5m.files import write_json
from ant5m.kernels.cuda import HEAD_SIZES, compiler
from ant5m.kernels.cuda.resources import MULTIPROCESSORS, Resources, of_training_step
from ant5m.model.config import PRESETS, ModelConfig

SHAPES = {
    **{name: shape for name, shape in PRESETS.items() if shape.head_size in HEAD_SIZES},
    "head size 32": ModelConfig(num_attention_heads=4, num_key_value_heads=2),
}
COMPILERS = {"nvrtc": compiler.nvrtc_compiler, "nvcc": compiler.nvcc_compiler}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", help=f"of: {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--capability", type=int, choices=MULTIPROCESSORS, help="75, 80 or 90 (default: all)")
    parser.add_argument("--compiler", choices=COMPILERS, default="nvrtc", help="(default: nvrtc)")
    arguments = parser.parse_args()
    shapes = arguments.shapes or list(SHAPES)
    if not set(shapes) <= set(SHAPES):
        parser.error(f"there is no {', '.join(set(shapes) - set(SHAPES))}")
    made_by = COMPILERS[arguments.compiler]()
    if made_by is None:
        parser.error(f"there is no {arguments.compiler}")
    capabilities = [arguments.capability] if arguments.capability else list(MULTIPROCESSORS)
    rows: list[dict] = []
    wanted = list(itertools.product(shapes, capabilities, (False, True)))
    for shape, capability, documents in track(wanted, "compiling", console=Console(stderr=True)):
        for found in _kernels(SHAPES[shape], capability, documents, made_by):
            if not documents or found.constants.get("STARTS"):
                rows.append({"shape": shape, **dataclasses.asdict(found)})
    Console(width=140).print(_table(rows))
    if len(shapes) == len(SHAPES) and not arguments.capability and arguments.compiler == "nvrtc":
        where = {
            key: value for key, value in provenance().items() if key not in ("device", "cores", "threads")
        }
        write_json(
            RESULTS / "cuda-resources.json",
            {"provenance": {**where, made_by.name: made_by.version}, "kernels": rows},
        )
    return int(any(row["spill_bytes"] and row["capability"] == 75 for row in rows))


def _kernels(config: ModelConfig, capability: int, documents: bool, made_by) -> list[Resources]:
    return of_training_step(
        capability,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_size,
        vocab=config.vocab_size,
        documents=documents,
        made_by=made_by,
    )


def _table(rows: list[dict]) -> Table:
    table = Table("shape", "sm", "kernel", "threads", "regs", "shared", "spills", "blocks", "tensor", "code")
    for row in rows:
        table.add_row(
            row["shape"],
            str(row["capability"]),
            row["kernel"] + (" (documents)" if row["constants"].get("STARTS") else ""),
            *(str(row[name]) for name in ("threads", "registers", "shared_bytes", "spill_bytes")),
            *(str(row[name]) for name in ("blocks", "tensor_instructions", "instructions")),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
