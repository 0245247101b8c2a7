"""One training setup in a process of its own, stepped from outside: peak memory is then its own, and several
setups can take turns, so that a ratio holds on a machine whose speed drifts.

    python benchmarks/arm.py '{"name": "cpu", "preset": "ant-5m", "batch_size": 8, "sequence_length": 1024}'

reads a line, makes one step, answers with one line of JSON: {"seconds": .., "peak_bytes": .., "loss": ..}.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Arm:
    """The outside of such a process; `name`: transformers, transformers-compiled, or a kernel backend."""

    def __init__(self, name: str, preset: str, batch_size: int, sequence_length: int):
        self.name, self.tokens = name, batch_size * sequence_length
        self.seconds: list[float] = []
        self.peak_bytes = 0
        settings = {
            "name": name,
            "preset": preset,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
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
            raise RuntimeError(f"the benchmark arm '{self.name}' died: its message stands above")
        result = json.loads(answer)
        self.seconds.append(result["seconds"])
        self.peak_bytes = result["peak_bytes"]
        return result

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _serve(settings: dict[str, Any]) -> None:
    import torch

    from ant5m.model.config import load_config

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(settings["preset"])
    loss_of, parameters = _model(settings["name"], config, device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    shape = (settings["batch_size"], settings["sequence_length"] + 1)
    batch = torch.randint(config.vocab_size, shape, device=device)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak_bytes": _peak(device), "loss": loss}), flush=True)


def _model(name: str, config, device):
    import torch

    if not name.startswith("transformers"):
        from ant5m import kernels
        from ant5m.model.ant import Ant

        kernels.select(name)
        net = Ant(config).to(device)
        return net, list(net.parameters())
    from transformers import LlamaConfig, LlamaForCausalLM

    net = LlamaForCausalLM(LlamaConfig(**config.to_dict(), attn_implementation="sdpa", use_cache=False)).to(
        device
    )
    run = torch.compile(net) if name == "transformers-compiled" else net

    def loss_of(inputs, targets):
        # Our targets are shifted already, so transformers need not do it again.
        return run(input_ids=inputs, labels=targets, shift_labels=targets).loss

    return loss_of, list(net.parameters())


def _peak(device) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
