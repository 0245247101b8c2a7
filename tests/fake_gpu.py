"""Training steps of two layers of `ant-5m` on a GPU that is none: every operation happens, with shapes and
devices only.

torch refuses a tensor of the host among those of the device, and a number read back from the device. The
ops of `kernels` answer through their fake kernels, chosen as on a GPU, except that nothing is compared with
the reference first. Run as `python fake_gpu.py TORCH LIBRARY` (torch's folder; fake_gpu.cpp compiled) in a
process of its own, because the library has to be there before torch looks for a GPU. Prints {case: ops of
ours, or the error} as JSON.
"""

import ctypes
import dataclasses
import json
import sys
from pathlib import Path

for name in ("libc10.so", "libtorch_cpu.so"):
    ctypes.CDLL(str(Path(sys.argv[1]) / "lib" / name), ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2])

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from ant5m.kernels import check, cuda, dispatch, triton  # noqa: E402
from ant5m.kernels.registry import OPS  # noqa: E402
from ant5m.model.ant import Ant  # noqa: E402
from ant5m.model.config_file import load_config  # noqa: E402
from ant5m.ranks import Ranks  # noqa: E402
from ant5m.train import average as averaging  # noqa: E402
from ant5m.train import step as module  # noqa: E402
from ant5m.train.loss_scaler import LossScaler  # noqa: E402
from ant5m.train.losses import make_loop_loss  # noqa: E402
from ant5m.train.optimizer import Optimizer  # noqa: E402
from ant5m.train.schedule import Schedule  # noqa: E402
from ant5m.train.step import Step  # noqa: E402


class Ours(TorchDispatchMode):
    """Remembers the ops of our backends by name; nothing may be made on the host, where torch itself would
    still take a single number from."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("ant5m"):
            self.names.add(str(func).removesuffix(".default"))
        out = func(*args, **(kwargs or {}))
        made = {x.device.type for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        assert "cpu" not in made, f"{func} made a tensor on the host"
        return out


def pretend(capability):
    """What a GPU of this compute capability would say."""
    dispatch._capability = lambda device: capability
    triton._machine_refuses = lambda *_: None
    triton._no_tensor_cores = lambda *_: "no" if capability < (8, 0) else None
    cuda._machine_refuses = lambda *_: None
    check.unsupported_reason = lambda *_: None
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.is_current_stream_capturing = lambda: False
    for op in OPS.values():  # who runs an op was decided for another device
        op.chosen.clear()
    # torch's fused AdamW has no fake kernel. It is torch's, and all that we give to it is on the device.
    torch.optim.AdamW.step = lambda self: None


def train(capability, precision, documents=False, loop_loss="none", ranks=None, qk_norm=False, limited=False):
    """The ops of two steps of two micro-batches."""
    pretend(capability)
    with FakeTensorMode(), torch.device("cuda"):
        net = Ant(dataclasses.replace(load_config("ant-5m"), num_hidden_layers=2, qk_norm=qk_norm))
        scaler = LossScaler("cuda") if precision == "fp16" else None
        eos = 0 if documents else None
        loss = None if loop_loss == "none" else make_loop_loss(loop_loss, 1.0)
        with torch.device("cpu"):  # where a run makes its step
            optimizer = Optimizer(net, "muon", precision=precision)
            step = Step(net, optimizer, Schedule(9), 2, 1.0, precision, scaler, 0, eos, loss)
            step.ranks = ranks or step.ranks
            if limited:  # as a run that a time limit ends, with an average of its weights
                step._position = torch.zeros(1, dtype=torch.int64, device="cuda")
                step.on_update = [averaging.AverageWeights(net, 0.999).on_update]
            ids = torch.zeros(4, 1_024, dtype=torch.int64, device="cuda")
            with Ours() as ours:
                assert all(step(ids, ids).device.type == "cuda" for _ in range(2))
    return sorted(ours.names)


def fake_ranks():
    """Two ranks over torch's group for tests, which exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    return Ranks(0, 2, FakeStore())


def on_the_host(function):
    return lambda *args: function(*args).cpu()


def mixed():
    """Starts of documents that stayed on the host."""
    starts, module.document_starts = module.document_starts, on_the_host(module.document_starts)
    try:
        return train((9, 0), "bf16", documents=True)
    finally:
        module.document_starts = starts


def mixed_average():
    """An average that counts on the host."""
    made = averaging.AverageWeights.__init__

    def counting(self, net, decay):
        made(self, net, decay)
        self._count = torch.zeros((), device="cpu")

    averaging.AverageWeights.__init__ = counting
    try:
        return train((9, 0), "bf16", limited=True)
    finally:
        averaging.AverageWeights.__init__ = made


def reading():
    """A clipping that asks for the norm."""
    clip = module.clip
    module.clip = lambda *args: [norm := clip(*args), norm.item()][0]
    try:
        return train((9, 0), "bf16")
    finally:
        module.clip = clip


CASES = {
    "9.0 bf16": lambda: train((9, 0), "bf16"),
    "9.0 bf16 documents": lambda: train((9, 0), "bf16", documents=True),
    "9.0 fp16": lambda: train((9, 0), "fp16"),
    "9.0 fp32": lambda: train((9, 0), "fp32"),
    "9.0 bf16 unlikelihood": lambda: train((9, 0), "bf16", loop_loss="unlikelihood"),
    "9.0 bf16 ditto": lambda: train((9, 0), "bf16", loop_loss="ditto"),
    "9.0 bf16 ranks": lambda: train((9, 0), "bf16", ranks=fake_ranks()),
    "9.0 bf16 average": lambda: train((9, 0), "bf16", limited=True),
    "9.0 fp16 average": lambda: train((9, 0), "fp16", limited=True),
    "9.0 bf16 QK-norm": lambda: train((9, 0), "bf16", qk_norm=True),
    "7.5 fp16": lambda: train((7, 5), "fp16"),
    "7.5 fp16 QK-norm": lambda: train((7, 5), "fp16", qk_norm=True),
    "7.5 fp16 documents": lambda: train((7, 5), "fp16", documents=True),
    "7.5 fp32": lambda: train((7, 5), "fp32"),
    "mixed": mixed,
    "mixed average": mixed_average,
    "reading": reading,
}


def outcome(case):
    try:
        return case()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    print(json.dumps({name: outcome(case) for name, case in CASES.items()}))
