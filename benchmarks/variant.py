"""One training setup in a process of its own, stepped from outside: peak memory is then its own, and several
setups can be interleaved, so that a ratio holds on a machine whose speed drifts.

    python benchmarks/variant.py '{"name": "cpu", "preset": "ant-5m", "batch_size": 8, "sequence_length": 64}'

reads a line, makes one step, answers with one line of JSON: {"seconds": .., "processor_seconds": ..,
"peak_bytes": .., "loss": ..}.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def training_precision(device) -> str:
    """The precision of a comparison: the one in which a GPU trains, fp32 on a CPU."""
    from ant5m.device import choose_precision

    return choose_precision("auto" if device.type == "cuda" else "fp32", device)


def backends() -> list[str]:
    """The backends of `ant5m.kernels` that can run a whole step on this machine's device in its precision."""
    import torch

    from ant5m import kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = {"cpu"} if device.type == "cuda" else {"triton", "cuda"}
    if training_precision(device) != "fp16":
        others.add("cuda")  # its attention takes nothing else
    ready = [row for op, row in kernels.available().items() if op in kernels.OPS]
    return [b for b in kernels.BACKENDS if b not in others and all(row[b] == "ready" for row in ready)]


class Variant:
    """The outside of such a process.

    Args:
        name: transformers, transformers-compiled, transformers-liger, a kernel backend in the same loop, or
            trainer: the step of `ant5m train`. With -bf16 behind it in that precision, else on a GPU in the
            one that it trains in, on a CPU in fp32.
        instruction_set: of our C++, where it shall not be the best that the processor has.
    """

    def __init__(
        self,
        name: str,
        preset: str,
        batch_size: int,
        sequence_length: int,
        instruction_set: str | None = None,
    ):
        self.name, self.tokens = name, batch_size * sequence_length
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.micro_batch_size = batch_size
        settings = {
            "name": name,
            "preset": preset,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "instruction_set": instruction_set,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, Any]:
        """One optimizer step; its seconds are measured inside the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the benchmark variant '{self.name}' died: its message stands above")
        result = json.loads(answer)
        self.seconds.append(result["seconds"])
        self.peak_bytes, self.micro_batch_size = result["peak_bytes"], result["micro_batch_size"]
        return result

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _serve(settings: dict[str, Any]) -> None:
    import torch

    from ant5m import _cpu
    from ant5m.model.config_file import load_config

    if settings.get("instruction_set"):
        _cpu.use(settings["instruction_set"])
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(settings["preset"])
    shape = (settings["batch_size"], settings["sequence_length"] + 1)
    batch = torch.randint(config.vocab_size, shape, device=device)
    batch = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    name = settings["name"].removesuffix("-bf16")
    precision = training_precision(device) if name == settings["name"] else "bf16"
    take_step, rows = None, 0
    for _ in sys.stdin:
        if take_step is None:
            take_step, rows = _fitting(name, config, device, precision, batch)
        start, worked = time.perf_counter(), time.process_time()
        loss = take_step(*batch).item()  # waits for the device
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        answer = {
            "seconds": seconds,
            "processor_seconds": worked,
            "peak_bytes": _peak(device),
            "loss": loss,
            "micro_batch_size": rows,
        }
        print(json.dumps(answer), flush=True)


def _fitting(name: str, config, device, precision, batch):
    """The step with the largest micro-batches that fit, the trainer's with those that it plans, and how many
    sequences these are."""
    import torch

    from ant5m.train.plan import micro_batch

    rows, length = batch[0].shape
    if name == "trainer":
        rows = micro_batch(config, rows, length, device, precision)
    while True:
        try:
            take_step = (
                _trainer(config, device, precision, rows)
                if name == "trainer"
                else _loop(name, config, device, precision, rows)
            )
            take_step(*batch)
            return take_step, rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Outside the handler, which would keep the failed step's memory alive.
        rows //= 2
        take_step = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _trainer(config, device, precision: str, rows: int):
    """What `ant5m train` does: on a GPU one CUDA graph, the fastest kernels, Muon."""
    from ant5m.model.ant import Ant
    from ant5m.train.loss_scaler import LossScaler
    from ant5m.train.optimizer import Optimizer
    from ant5m.train.schedule import Schedule
    from ant5m.train.step import Step, make_step

    net = Ant(config).to(device)
    scaler = LossScaler(device) if precision == "fp16" else None
    step = make_step(
        Step(net, Optimizer(net, "muon", precision=precision), Schedule(1_000), rows, 1.0, precision, scaler)
    )
    return lambda inputs, targets: step(inputs, targets)[0]


def _loop(name: str, config, device, precision: str, rows: int):
    """An ordinary PyTorch loop: autocast, clipping, AdamW in one launch, a loss scale for fp16."""
    import torch

    from ant5m.device import DTYPES, autocast
    from ant5m.train.loss_scaler import FIRST_SCALE

    def inside():
        if name.startswith("transformers") and precision != "fp32":
            return torch.autocast(device.type, DTYPES[precision])  # it does not know our kernels' way
        return autocast(precision, device)

    loss_of, parameters = _model(name, config, device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler(device.type, FIRST_SCALE, enabled=precision == "fp16")

    def take_step(inputs, targets):
        total = torch.zeros((), device=device)
        share = rows / len(inputs)
        for part, part_targets in zip(inputs.split(rows), targets.split(rows), strict=True):
            with inside():
                loss = loss_of(part, part_targets)
            scaler.scale(loss * share).backward()
            total += loss.detach() * share
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    return take_step


def _model(name: str, config, device):
    import torch
    from peers import transformers_llama, transformers_loss

    if not name.startswith("transformers"):
        from ant5m import kernels
        from ant5m.model.ant import Ant

        kernels.select(name)
        net = Ant(config).to(device)
        return net, list(net.parameters())
    if name == "transformers-liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    turing = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    net = transformers_llama(config, expand_keys=turing).to(device)
    run = torch.compile(net) if name == "transformers-compiled" else net
    return lambda inputs, targets: transformers_loss(run, inputs, targets), list(net.parameters())


def _peak(device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
