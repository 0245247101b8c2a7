"""What the kernels cost a device, found out without one: registers, shared memory, spills, tensor cores.

The ops are called on tensors of the CPU; instead of a launch, each kernel is compiled for the device asked
for. What the ops return then is not computed.
"""

from dataclasses import dataclass

import torch

from ant5m.kernels import machine_code
from ant5m.kernels.cuda import IMPLEMENTATIONS, SIZES, compiler
from ant5m.kernels.cuda.compiler import Compiler
from ant5m.kernels.cuda.runtime import launched_by
from ant5m.kernels.ops import *  # noqa: F403  (it fills OPS)
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes


@dataclass(frozen=True)
class Multiprocessor:
    """Of a compute capability: what its blocks share. Source: CUDA C++ Programming Guide, technical
    specifications per capability."""

    shared_bytes: int
    threads: int
    blocks: int
    reserved_bytes: int  # of shared memory, a block
    registers: int = 65_536

    def holds(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks of so many threads, registers a thread and bytes of shared memory that run at once."""
        by_registers = self.registers // (threads * (registers + -registers % 8))
        shared = shared_bytes + self.reserved_bytes
        by_shared = self.shared_bytes // max(1, shared + -shared % 256)
        return min(by_registers, by_shared, self.threads // threads, self.blocks)


MULTIPROCESSORS = {
    75: Multiprocessor(64 << 10, 1_024, 16, 0),
    80: Multiprocessor(164 << 10, 2_048, 32, 1 << 10),
    90: Multiprocessor(228 << 10, 2_048, 32, 1 << 10),
}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. `shared_bytes` are a block's, `spill_bytes` a thread's, `blocks` those that a
    multiprocessor holds at once."""

    kernel: str
    capability: int
    constants: dict[str, int]
    threads: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    blocks: int
    instructions: int
    tensor_instructions: int


def of_training_step(
    capability: int, *, documents: bool = False, made_by: Compiler | None = None, **sizes: int
) -> list[Resources]:
    """The kernels that a training step of a Llama of such `Sizes` launches in fp16, called as the records of
    the ops say.

    `documents`: attention stays inside document boundaries. `made_by`: the compiler, None for that which a
    device would use; what it makes is kept where that looks.
    """
    made_by = made_by or compiler.available()
    if made_by is None:
        raise RuntimeError("there is neither NVRTC nor nvcc")
    found = []
    for source, kernel, defines, threads in _launches(documents, **sizes):
        binary = compiler.compile_and_keep(made_by, source, dict(defines), f"sm_{capability}")
        need = machine_code.read(binary)[kernel]
        registers, shared = need["registers"], need["static_shared_bytes"]
        found.append(
            Resources(
                kernel=kernel,
                capability=capability,
                constants=dict(defines),
                threads=threads,
                registers=registers,
                shared_bytes=shared,
                spill_bytes=need["spill_bytes"],
                blocks=MULTIPROCESSORS[capability].holds(threads, registers, shared),
                instructions=need["instructions"],
                tensor_instructions=need["tensor_instructions"],
            )
        )
    return found


def _launches(documents: bool, **sizes: int) -> list[tuple]:
    """(source, kernel, constants, threads) of each kernel, once."""
    found: dict[tuple, None] = {}

    def note(source, kernel, defines, grid, threads, arguments):
        found[source, kernel, tuple(sorted(defines.items())), threads] = None

    whole = Sizes(**({"batch": 1, "length": 32} | sizes))  # no constant of a kernel depends on the length
    draw = Draw(whole, torch.float16, requires_grad=True)
    block = "mlp" if whole.hidden in SIZES else "swiglu"
    ways = {
        "attention": [int(documents)],
        "rope_packed": [0],
    }  # of the others all samples; no norms of q and k
    with launched_by(note), torch.autocast("cpu", torch.float16):
        for name in ("rms_norm", "rope_packed", "attention", block, "linear_cross_entropy"):
            samples = OPS[name].samples(draw)
            for arguments in (samples[way] for way in ways.get(name, range(len(samples)))):
                out = IMPLEMENTATIONS[name].function(*arguments)
                torch.autograd.backward([x.sum() for x in (out if isinstance(out, tuple) else (out,))])
    return list(found)
