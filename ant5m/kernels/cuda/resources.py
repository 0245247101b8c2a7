"""What the kernels cost a device, found out without one: registers, shared memory, spills, tensor cores.

The ops are called on tensors of the CPU; instead of a launch, each kernel is compiled for the device asked
for. What the ops return then is not computed.
"""

import math
from dataclasses import dataclass

import torch

from ant5m.kernels import cuda as ops
from ant5m.kernels import machine_code
from ant5m.kernels.cuda import compiler
from ant5m.kernels.cuda.compiler import Compiler
from ant5m.kernels.cuda.runtime import launched_by


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
    capability: int,
    *,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    vocab: int,
    documents: bool = False,
    made_by: Compiler | None = None,
) -> list[Resources]:
    """The kernels that a training step of such a Llama launches in fp16 with fp32 weights and residuals.

    `documents`: attention stays inside document boundaries. `made_by`: the compiler, None for that which a
    device would use; what it makes is kept where that looks.
    """
    made_by = made_by or compiler.available()
    if made_by is None:
        raise RuntimeError("there is neither NVRTC nor nvcc")
    found = []
    for source, kernel, defines, threads in _launches(
        hidden, intermediate, heads, kv_heads, head_size, vocab, documents
    ):
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


def _launches(hidden, intermediate, heads, kv_heads, head_size, vocab, documents):
    """(source, kernel, constants, threads) of each kernel, once."""
    found: dict[tuple, None] = {}

    def note(source, kernel, defines, grid, threads, arguments):
        found[source, kernel, tuple(sorted(defines.items())), threads] = None

    length = 32  # no constant of a kernel depends on it

    def draw(*shape, dtype=torch.float16):
        return torch.zeros(1, length, *shape, dtype=dtype, requires_grad=True)

    with launched_by(note), torch.autocast("cpu", torch.float16):
        weight = torch.ones(hidden, requires_grad=True)
        embedding = torch.zeros(vocab, hidden, requires_grad=True)
        residual, x = draw(hidden, dtype=torch.float32), draw(hidden)
        outputs = [ops.rms_norm(residual, weight), *ops.rms_norm(x, weight, 1e-5, residual)]
        counts = [heads, kv_heads, kv_heads]
        angles = torch.zeros(length, head_size // 2)
        q, k, v = ops.rope_packed(draw(sum(counts) * head_size), angles, angles, counts)
        starts = torch.zeros(1, length, dtype=torch.int32) if documents else None
        outputs += [q, k, ops.attention(q, k, v, starts)]
        if hidden in ops.SIZES:
            shapes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
            outputs.append(ops.mlp(x, *(torch.zeros(shape, requires_grad=True) for shape in shapes)))
        else:
            padded = math.ceil(intermediate / 8) * 8  # as the model pads it
            outputs.append(ops.swiglu(*draw(2 * padded).chunk(2, -1)))
        targets = torch.zeros(length, dtype=torch.long)
        outputs.append(ops.linear_cross_entropy(x[0], embedding, targets))
        torch.autograd.backward([out.sum() for out in outputs])
    return list(found)
