"""What a compiled kernel needs of a device, read from its machine code: registers, spills, instructions."""

import functools
import re
import subprocess
import tempfile

import triton


@functools.lru_cache(maxsize=8)  # a binary has several kernels, and callers take one at a time
def read(binary: bytes) -> dict[str, dict[str, int]]:
    """{kernel: what it needs} of a cubin. `spill_bytes` are a thread's, `static_shared_bytes` a block's.

    `narrow_accesses` counts loads and stores in global memory of less than 4 bytes: vectors that were none.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        listing = _cuobjdump("--dump-sass", file.name)
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
    # STACK holds spilled registers, and arrays with computed indices, which these kernels do not have.
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    return {
        kernel: {
            "registers": int(registers),
            "spill_bytes": int(stack),
            "static_shared_bytes": int(shared),
            **_count(code[kernel]),
        }
        for kernel, registers, stack, shared in found
    }


def _count(code: str) -> dict[str, int]:
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9.]+)", code)
    return {
        "instructions": sum(name != "NOP" for name in instructions),
        "tensor_instructions": sum(
            name.startswith(("HMMA", "HGMMA")) or (name.startswith("UTC") and "MMA" in name)
            for name in instructions
        ),
        "narrow_accesses": sum(bool(re.match(r"(LDG|STG)\..*[US](8|16)\b", name)) for name in instructions),
    }


def _cuobjdump(*arguments: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
