"""A model's weights on the disk: safetensors, under the names of Hugging Face's `LlamaForCausalLM`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ant5m.device import installed_memory
from ant5m.errors import UserError
from ant5m.files import is_lfs_pointer, is_plain_name, lfs_explained, read_bytes, read_json
from ant5m.model.ant import Ant
from ant5m.model.config import ModelConfig
from ant5m.model.costs import count_parameters

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save_model(net: Ant, folder: Path) -> None:
    """Write `folder/model.safetensors`: every weight once, in its own dtype, under its Hugging Face name."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    # In memory first: the library's own writer hides a full disk behind an error of its own.
    (folder / WEIGHTS).write_bytes(to_safetensors(weights, metadata={"format": "pt"}))


def load_model(config: ModelConfig, folder: Path) -> Ant:
    """An fp32 `Ant` on the CPU with the weights of a folder: one `model.safetensors` or shards with an index.

    Raises `UserError` when weights are missing, too many, of another shape, not numbers, or unreadable.
    """
    weights = _read_weights(folder)
    if config.tie_word_embeddings:
        weights = _tied(weights, folder)
    _check_size(config, weights, folder)
    with _NoInitialization():
        net = Ant(config)
    expected = {name: tensor.shape for name, tensor in net.state_dict().items()}
    _check_names(set(expected), set(weights), folder)
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(
                f"{folder}: {name} is {tuple(weights[name].shape)}, its config says {tuple(shape)}: "
                "weights and config.json do not belong together"
            )
        if not weights[name].is_floating_point():
            raise UserError(
                f"{folder}: {name} is {weights[name].dtype}: only floating-point weights can be read"
            )
        if not torch.isfinite(weights[name].float()).all():
            raise UserError(
                f"{folder}: {name} holds NaN or infinity: the file is damaged or its training diverged"
            )
    # Copies, which lie where torch wants them; each takes the place of what was read.
    copies = {name: weights.pop(name).to(torch.float32, copy=True) for name in expected}
    net.load_state_dict(copies, assign=True)
    return net


def _check_size(config: ModelConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Refuse, before it is built, a model that is far larger than its file, or than this machine."""
    asked, there = sum(count_parameters(config).values()), sum(map(torch.Tensor.numel, weights.values()))
    if asked > 2 * there:
        raise UserError(
            f"{folder} holds {there:,} weights, its config says {asked:,}: "
            "weights and config.json do not belong together"
        )
    table, memory = 8 * config.max_position_embeddings * config.head_size, installed_memory()
    if table > memory:
        raise UserError(
            f"{folder}: a context of {config.max_position_embeddings:,} needs {table / 1e9:,.0f} GB for RoPE "
            f"alone, this machine has {memory / 1e9:,.1f}: set max_position_embeddings in its config.json"
        )


class _NoInitialization(TorchFunctionMode):
    """Nothing is drawn that would be thrown away. A model on the device "meta" would not do: its `normal_`
    imports `torch._dynamo`, which takes longer than all the rest of a start."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        pickled = next(folder.glob("*.bin"), None)
        reason = f" ({pickled.name} may run code when loaded: convert it to safetensors)" if pickled else ""
        raise UserError(f"{folder} has no {WEIGHTS}{reason}")
    weights: dict[str, Tensor] = {}
    for name in _weight_files(folder):
        try:
            found = _read_file(folder / name)
            if twice := sorted(found.keys() & weights.keys()):
                raise UserError(f"{folder / name} holds {twice[0]}, which another file of {folder} holds too")
            weights.update(found)
        except FileNotFoundError:
            raise UserError(f"{folder / name} is missing though {INDEX} names it") from None
        except SafetensorError as error:
            raise UserError(f"{folder / name} is damaged or not a safetensors file ({error})") from None
    # Buffers that old versions of transformers saved; they follow from the config.
    return {key: tensor for key, tensor in weights.items() if not key.endswith("rotary_emb.inv_freq")}


def _read_file(path: Path) -> dict[str, Tensor]:
    """Read, not mapped: a mapped file that another program cuts meanwhile kills the process (SIGBUS)."""
    if is_lfs_pointer(path):
        raise lfs_explained(path)
    return parse_safetensors(read_bytes(path, installed_memory()))


@dataclass
class _Index:
    """What is relied upon of a model.safetensors.index.json."""

    weight_map: dict[str, str]
    """of each weight its file"""


def _weight_files(folder: Path) -> list[str]:
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    names = read_json(folder / INDEX, _Index).weight_map
    outside = [name for name in names.values() if not is_plain_name(name)]
    if outside:
        raise UserError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of that folder")
    return sorted(set(names.values()))


def _tied(weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Leave one copy of a tied table, whichever of its two names (or both) the file uses."""
    head = weights.pop("lm_head.weight", None)
    if head is None:
        return weights
    table = weights.setdefault("model.embed_tokens.weight", head)
    if not torch.equal(table, head):
        raise UserError(
            f"{folder}: config.json ties the head to the token table, but lm_head.weight differs from it: "
            "set tie_word_embeddings to false if the head was trained apart"
        )
    return weights


def _check_names(expected: set[str], found: set[str], folder: Path) -> None:
    for what, names in (("lacks", expected - found), ("holds unexpected", found - expected)):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{folder} {what} {shown}: weights and config.json do not belong together")
