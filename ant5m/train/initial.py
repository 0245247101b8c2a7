"""What a run begins with in place of random weights: a model that was trained before."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors

from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.files import read_json
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import CHECKPOINTS, STATE, checkpoints, find_run, load_with_tokenizer, resolve
from ant5m.model.config import ModelConfig
from ant5m.train.callback import Callback
from ant5m.train.config import TrainConfig
from ant5m.train.optimizer import Optimizer

INHERITED = (
    "optimizer",
    "learning_rate",
    "muon_learning_rate",
    "betas",
    "eps",
    "weight_decay",
    "grad_clip",
    "batch_size",
    "document_mask",
    "z_loss",
    "ema",
    "seed",
    "data",
    "text_column",
    "group_column",
    "max_documents",
    "max_tokens",
)
"""settings that a run with the optimizer of another one takes from it, where nobody said otherwise"""
CHANGEABLE = ("vocab_size", "max_position_embeddings", "rope_theta", "initializer_range")
"""in a model's shape, of the weights that it begins with"""


@dataclass
class _RunFile:
    """What is relied upon of the config.json of the run that is begun with."""

    train: dict[str, Any]


@dataclass(frozen=True)
class Initial:
    """A checkpoint or a Hugging Face folder, opened."""

    name: str
    """as it was given"""
    folder: Path
    net: Ant
    tokenizer: Tokenizer

    @classmethod
    def open(cls, name: str) -> "Initial":
        """`name`: a run (its newest good checkpoint), RUN@STEP, a checkpoint, or a Hugging Face folder."""
        folder = _find(name)
        net, tokenizer = load_with_tokenizer(folder)
        return cls(name, folder, net, tokenizer)

    def inherit(self, config: TrainConfig) -> TrainConfig:
        """`config` with the optimizer's settings of the run whose checkpoint this is, and no warm-up."""
        run = find_run(self.folder)
        if run is None:
            raise UserError(f"{self.name} has no optimizer: --keep-optimizer needs a run or its checkpoint")
        path = run / "config.json"
        values = read_json(path, _RunFile).train
        try:
            then = TrainConfig.from_dict({name: values[name] for name in INHERITED if name in values})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        usual = TrainConfig()
        names = [name for name in INHERITED if getattr(config, name) == getattr(usual, name)]
        warmup = 0.0 if config.warmup == usual.warmup else config.warmup
        return dataclasses.replace(config, warmup=warmup, **{name: getattr(then, name) for name in names})

    def fit(self, model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
        """The shape `model`, with rows for all entries of the data's tokenizer, which may have more than
        these weights know.

        Raises `UserError` where it gives an old entry another number, or weights do not fit the shape.
        """
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            moved = [token for token, i in self.tokenizer.vocab.items() if tokenizer.vocab.get(token) != i]
            if moved:
                raise UserError(
                    f"{self.name} has another tokenizer than the data ({len(moved):,} of its entries have "
                    "another number there, or none): give the text itself as --data, or pack it with that one"
                )
        model = dataclasses.replace(model, vocab_size=max(model.vocab_size, tokenizer.vocab_size))
        self._check_shape(model)
        return model

    def _check_shape(self, model: ModelConfig) -> None:
        expected = {name: p.shape for name, p in Ant(model).named_parameters()}
        for name, weight in self.net.named_parameters():
            there = expected.pop(name, None)
            if there is None or there[1:] != weight.shape[1:] or not _grows(name, weight.shape, there):
                shape = "not there" if there is None else tuple(there)
                raise UserError(
                    f"{name} is {tuple(weight.shape)} in {self.name} and {shape} in the model to train: "
                    "leave out --model, or begin with another"
                )
        if expected:
            raise UserError(
                f"{self.name} has no {next(iter(expected))}: leave out --model, or begin with another"
            )
        for field in dataclasses.fields(model):
            before, after = getattr(self.net.config, field.name), getattr(model, field.name)
            if before != after and field.name not in CHANGEABLE:
                raise UserError(
                    f"{field.name} is {before} in {self.name} and {after} in the model to train: leave out "
                    "--model"
                )

    @torch.no_grad()
    def fill(self, net: Ant) -> None:
        """Give `net` these weights. New rows of a table are the mean of the old ones: what a token is before
        anything is known of it (Hewitt, "Initializing new word embeddings for pretrained language models",
        2021)."""
        weights = dict(self.net.named_parameters())
        for name, parameter in net.named_parameters():
            weight = weights[name].to(parameter.device)
            parameter[: len(weight)] = weight
            parameter[len(weight) :] = weight.mean(0)

    def load_optimizer(self, optimizer: Optimizer, callbacks: Sequence[Callback]) -> dict[str, Any]:
        """Give `optimizer`, and those of `callbacks` whose tensors are in this checkpoint, the state of then;
        returns the position in the data at that step."""
        optimizer.load_tensors(parse_safetensors((self.folder / "optimizer.safetensors").read_bytes()))
        for callback in callbacks:
            file = self.folder / f"{callback.name}.safetensors"
            if callback.tensors() and file.exists():
                callback.load_tensors(parse_safetensors(file.read_bytes()))
        position: dict[str, Any] = read_json(self.folder / STATE, dict[str, Any])["loader"]
        return position

    def describe(self, model: ModelConfig) -> str:
        """What is begun with, and what changes, in one line for people."""
        before = self.net.config
        changes = {
            "context": (before.max_position_embeddings, model.max_position_embeddings),
            "RoPE base": (before.rope_theta, model.rope_theta),
            "vocabulary": (before.vocab_size, model.vocab_size),
        }
        told = [f"{name} {old:,} -> {new:,}" for name, (old, new) in changes.items() if old != new]
        return ", ".join([f"begins with {self.folder}", *told])


def _find(name: str) -> Path:
    run, at, step = name.rpartition("@")
    if not at or Path(name).exists():
        return resolve(Path(name))
    if not re.fullmatch(r"\d+", step):
        raise UserError(f"{name} is neither a folder nor of the form RUN@STEP, as runs/books@9000")
    folder = Path(run) / CHECKPOINTS / f"step-{int(step):08d}"
    if not folder.is_dir():
        there = ", ".join(str(int(path.name[5:])) for path in checkpoints(Path(run) / CHECKPOINTS))
        raise UserError(f"{run} has no checkpoint of step {int(step):,} (there are: {there or 'none'})")
    return folder


def _grows(name: str, before: torch.Size, after: torch.Size) -> bool:
    """Whether a tensor may have so many rows: as many as before, or more in a table."""
    table = name in ("model.embed_tokens.weight", "lm_head.weight")
    return after[0] == before[0] or (table and after[0] > before[0])
