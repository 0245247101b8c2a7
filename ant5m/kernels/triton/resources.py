"""What the kernels cost a device, found out without one: registers, shared memory, spills, tensor cores.

Triton compiles for any compute capability on any machine. A `compile_only` device stands in for Triton's
driver: an op that is called under it, on tensors of the CPU, compiles exactly the kernels that it would
launch on such a device, with the same arguments, and launches none. What the op returns then is not computed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from ant5m.kernels import machine_code
from ant5m.kernels.ops import *  # noqa: F403  (it fills OPS)
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes
from ant5m.kernels.triton import IMPLEMENTATIONS, SIZES

# Most shared memory of a block, by compute capability. 8.0 stands for its whole family, of which the consumer
# devices (8.6, 8.9) have least. Source: CUDA C++ Programming Guide, technical specifications per capability.
SHARED_MEMORY = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10}
_READ = "registers", "spill_bytes", "instructions", "tensor_instructions", "narrow_accesses"


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. Bytes are a block's, except `spill_bytes`, which are a thread's.

    `narrow_accesses` counts loads and stores in global memory of less than 4 bytes: vectors that were none.
    """

    kernel: str
    capability: int
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    instructions: int
    tensor_instructions: int
    narrow_accesses: int


@contextlib.contextmanager
def compile_only(capability: int, shared_memory: int | None = None) -> Iterator[list[Resources]]:
    """Inside, ops called on CPU tensors compile for `capability` (75, 80, 90); new kernels join the list."""
    found: list[Resources] = []
    before = driver._active
    driver.set_active(_CompileOnly(capability, shared_memory or SHARED_MEMORY[capability], found))
    try:
        yield found
    finally:
        driver._active = before


_TOKENS_OF_THE_HEAD = 16
"""because its products are computed, on the CPU; no kernel depends on it"""


def of_training_step(
    capability: int,
    dtype: torch.dtype,
    *,
    documents: bool = False,
    qk_norm: bool = False,
    **sizes: int,
) -> list[Resources]:
    """The kernels that a training step of a Llama of such `Sizes` launches, with activations in `dtype`, the
    rest fp32, called as the records of the ops say.

    `documents`: attention stays inside document boundaries. Below 80 there is none. `qk_norm`: q and k have
    norms.
    """
    whole = Sizes(**({"batch": 1, "length": 1_024} | sizes))
    draw = Draw(whole, dtype, requires_grad=True)
    few = dataclasses.replace(draw, sizes=dataclasses.replace(whole, length=_TOKENS_OF_THE_HEAD))
    half = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    ways = {"attention": [int(documents)], "rope_packed": [int(qk_norm)]}  # of the others all samples
    with compile_only(capability) as found, half:
        for name in _launched(capability, dtype, whole):
            samples = OPS[name].samples(few if name == "linear_cross_entropy" else draw)
            for arguments in (samples[way] for way in ways.get(name, range(len(samples)))):
                out = IMPLEMENTATIONS[name].function(*arguments)
                outputs = out if isinstance(out, tuple) else (out,)
                torch.autograd.backward([x.sum() for x in outputs])
    return found


def _launched(capability: int, dtype: torch.dtype, sizes: Sizes) -> list[str]:
    """Of `swiglu` and `mlp` both: which of them a device takes is a matter of time."""
    names = ["rms_norm", "rope_packed", "swiglu", "linear_cross_entropy"]
    if capability >= 80:
        names.append("attention")
        if dtype.itemsize == 2 and sizes.hidden in SIZES:
            names.append("mlp")
    return names


class _CompileOnly(DriverBase):
    _count = 0

    def __init__(self, capability: int, shared_memory: int, found: list[Resources]):
        # A number of its own, because Triton keeps compiled kernels and properties by device.
        _CompileOnly._count += 1
        self._device = -_CompileOnly._count
        self._capability, self._found = capability, found
        self._launched: Any = None
        self.utils = SimpleNamespace(
            load_binary=self._load_binary,
            get_device_properties=lambda device: {"max_shared_mem": shared_memory},
        )

    def launcher_cls(self, source, metadata):
        """Called once for each compiled kernel, before its binary is loaded."""
        names = source.fn.arg_names
        self._launched = metadata, {names[path[0]]: value for path, value in source.constants.items()}
        return lambda *arguments: None

    def _load_binary(self, name, binary, shared, device):
        metadata, constants = self._launched
        (need,) = machine_code.read(binary).values()
        found = Resources(
            kernel=name,
            capability=self._capability,
            constants=constants,
            warps=metadata.num_warps,
            stages=metadata.num_stages,
            shared_bytes=shared,
            **{field: need[field] for field in _READ},
        )
        self._found.append(found)
        return None, None, found.registers, found.spill_bytes, 1_024

    def get_current_target(self):
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self):
        return self._device

    def get_current_stream(self, device):
        return 0

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError
