"""Writing checkpoints, and taking up a run from one. `ant5m.model.checkpoint` says which one is good.

A checkpoint is a folder `step-00001000` with `model.safetensors`, `optimizer.safetensors`, `state.json`,
which holds every other thing that a resumed run needs, and `manifest.json` with the sha256 of the three.
Nothing in it executes when it is read.
"""

import base64
import hashlib
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors

from ant5m.errors import UserError
from ant5m.files import new_folder, read_json, to_json
from ant5m.manifest import MANIFEST, write_manifest
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import FORMAT, STATE, VERSION, checkpoints, verify_checkpoint
from ant5m.train.callback import Callback, Periodic
from ant5m.train.optimizer import Optimizer
from ant5m.train.run import Run
from ant5m.train.settings import Settings

if TYPE_CHECKING:
    from ant5m.train.trainer import Trainer


SAVE_SECONDS = 15 * 60.0
"""between two checkpoints, at most: what a crash costs"""


class SaveCheckpoints(Periodic):
    """Writes a checkpoint now and then, and when the training ends or stops; keeps the last ones."""

    def __init__(self, settings: Settings, run: Run, tokenizer_fingerprint: str):
        super().__init__(settings.checkpoint_every)
        self._saved_at = time.monotonic()
        self._run, self._keep = run, settings.keep_last
        self._tokenizer = tokenizer_fingerprint

    def on_start(self, trainer: "Trainer") -> None:
        remove_remains(self._run.checkpoints)

    def is_overdue(self) -> bool:
        return time.monotonic() - self._saved_at >= SAVE_SECONDS

    def run(self, trainer: "Trainer") -> None:
        state = {"tokenizer": self._tokenizer, **trainer.state_dict()}
        more = {callback.name: callback.tensors() for callback in trainer.callbacks if callback.tensors()}
        save_checkpoint(self._run.checkpoints, state.pop("step"), trainer.net, trainer.optimizer, state, more)
        prune_checkpoints(self._run.checkpoints, self._keep)
        self._saved_at = time.monotonic()

    def on_end(self, trainer: "Trainer") -> None:
        self.run(trainer)


def save_checkpoint(
    folder: Path,
    step: int,
    net: Ant,
    optimizer: Optimizer,
    state: dict[str, Any],
    more: dict[str, dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Write `folder`/step-XXXXXXXX aside and rename it into place; a good one that is there already is kept.

    `state` is what else the run must remember, in plain values for JSON, `more` the tensors: a file for each
    name.
    """
    path = folder / f"step-{step:08d}"
    if path.exists():
        if _is_good(path):
            return path
        _remove(path)
    files = {
        "model.safetensors": to_safetensors(_to_cpu(net.state_dict()), metadata={"format": "pt"}),
        "optimizer.safetensors": to_safetensors(_to_cpu(optimizer.tensors())),
        **{f"{name}.safetensors": to_safetensors(_to_cpu(tensors)) for name, tensors in (more or {}).items()},
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    described = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "model": net.config.to_dict(),
        "files": hashes,
        "manifest": MANIFEST,
        **state,
    }
    files[STATE] = to_json(described)
    with new_folder(path) as aside:
        for name, data in files.items():
            (aside / name).write_bytes(data)
        write_manifest(aside, {**hashes, STATE: hashlib.sha256(files[STATE]).hexdigest()})
    return path


def load_checkpoint(
    folder: Path, net: Ant, optimizer: Optimizer, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Fill `net`, `optimizer` and the tensors of `callbacks` from a checkpoint, verified before, and return
    its state."""
    state: dict[str, Any] = read_json(folder / STATE)
    if state.get("model") != net.config.to_dict():
        raise UserError(f"{folder} is a checkpoint of another model than the run's: start a new run")
    net.load_state_dict(parse_safetensors((folder / "model.safetensors").read_bytes()))
    optimizer.load_tensors(parse_safetensors((folder / "optimizer.safetensors").read_bytes()))
    for callback in callbacks:
        if callback.tensors():
            callback.load_tensors(parse_safetensors((folder / f"{callback.name}.safetensors").read_bytes()))
    return state


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the `keep` last checkpoints."""
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def remove_remains(folder: Path) -> None:
    """Remove what killed processes left of saves and removals; no other process may be writing here."""
    for entry in folder.glob(".step-*"):
        if re.fullmatch(r"\.step-\d+\.(removed|\w{8}(\.aside)?)", entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def random_state(device: torch.device) -> dict[str, str]:
    """The state of torch's generators, as base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """The inverse of `random_state`; a run that moved to another kind of device keeps what applies."""
    decoded = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for name, text in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)


def _is_good(path: Path) -> bool:
    try:
        verify_checkpoint(path)
    except UserError:
        return False
    return True


def _remove(path: Path) -> None:
    # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
    aside = path.with_name(f".{path.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def _to_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
