"""Opening a trained model, wherever it lies: a run folder, one of its checkpoints, or a Hugging Face folder.

A checkpoint is a folder with `model.safetensors` and a `state.json`, which is written last and says

    {"format": "ant5m-checkpoint", "version": 1, "step": 1000, "model": {a ModelConfig},
     "tokenizer": sha256 of the tokenizer (may be left out), "files": {name: sha256 of every other file}, ...}

so a checkpoint is good if and only if its `state.json` is there and the files have those hashes. Since ant5m
0.2 a `manifest.json` has the hash of `state.json` too.
"""

import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ant5m.errors import UserError
from ant5m.files import check_json, is_plain_name, read_json, real_path
from ant5m.manifest import MANIFEST, check_file, read_manifest
from ant5m.model.config import ModelConfig
from ant5m.model.config_file import load_config
from ant5m.model.weights import WEIGHTS, load_model, save_model

if TYPE_CHECKING:
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.model.ant import Ant

FORMAT = "ant5m-checkpoint"
VERSION = 1
STATE = "state.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"

__all__ = ["find_run", "latest_checkpoint", "load", "load_with_tokenizer", "save_model", "verify_checkpoint"]


def load(path: str | Path) -> "tuple[Ant, Tokenizer | None]":
    """A model and its tokenizer from a run folder (its newest good checkpoint), a checkpoint or a Hugging
    Face folder.

    The model is fp32 and on the CPU. The tokenizer is None where the folder has none. Raises `UserError` when
    there is nothing to load, or it is damaged, half-written, foreign, or the parts do not belong together.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        raise UserError(f"{path} is a file: give the folder it lies in")
    path = resolve(path)
    if (path / STATE).exists():
        return _load_checkpoint(path, real_path(path).parent.parent / TOKENIZER)
    if (path / WEIGHTS).exists() or (path / "config.json").exists():
        return _load_huggingface(path)
    raise UserError(
        f"{path} holds no model: it is neither a run, nor a checkpoint, nor a Hugging Face folder"
    )


def load_with_tokenizer(path: str | Path) -> "tuple[Ant, Tokenizer]":
    """`load`, but a folder without a tokenizer raises `UserError` too."""
    net, tokenizer = load(path)
    if tokenizer is None:
        raise UserError(f"{path} has no tokenizer: put its tokenizer.json beside the model")
    return net, tokenizer


def resolve(path: str | Path) -> Path:
    """The folder that `load` reads: a run's newest good checkpoint (`UserError` if none), else `path`."""
    path = Path(path)
    is_run = (path / CHECKPOINTS).is_dir() or _says_how_it_trains(path / "config.json")
    if not is_run:
        return path
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise UserError(f"{path} has no good checkpoint yet")
    return checkpoint


def _says_how_it_trains(config: Path) -> bool:
    """Whether it is the config.json of a run, not of a model."""
    values = read_json(config) if config.is_file() else None
    return isinstance(values, dict) and isinstance(values.get("train"), dict)


def find_run(path: str | Path) -> Path | None:
    """The run folder that a model path belongs to (itself, or around a checkpoint), or None."""
    path = real_path(path)
    if (path / CHECKPOINTS).is_dir():
        return path
    return path.parent.parent if path.parent.name == CHECKPOINTS and (path / STATE).exists() else None


def checkpoints(folder: Path) -> list[Path]:
    """Those in a run's folder of checkpoints, good or not, oldest first; nothing that is named otherwise."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=lambda path: int(path.name[5:]))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest good checkpoint folder of a run, or None; damaged ones are passed over with a warning."""
    for folder in reversed(checkpoints(run / CHECKPOINTS)):
        try:
            verify_checkpoint(folder)
        except UserError as error:
            warnings.warn(f"{error}; looking for an older one", stacklevel=2)
            continue
        return folder
    return None


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of `state.json`, after reading every file of the checkpoint and comparing its hash.

    Raises `UserError` when the checkpoint is half-written, damaged, of another program or of a newer version.
    """
    if not (folder / STATE).exists():
        raise UserError(f"{folder} has no {STATE}: it is not a checkpoint, or was not written to the end")
    state = read_json(folder / STATE, dict[str, Any])
    if state.get("format") != FORMAT:
        raise UserError(f"{folder} is not a checkpoint of ant5m")
    if state.get("version") != VERSION:
        raise UserError(
            f"{folder} has checkpoint version {state.get('version')!r}, this ant5m reads {VERSION}: "
            "use the ant5m that wrote it"
        )
    try:
        files = check_json(state, str(folder / STATE), State).files
        if (folder / MANIFEST).exists() or "manifest" in state:
            files = files | read_manifest(folder)
        if WEIGHTS not in files:
            raise UserError(f"{folder} has no hash of {WEIGHTS}")
        for name, expected in files.items():
            if not is_plain_name(name):
                raise UserError(f"{folder / STATE} names {name}, which is no file of the folder")
            check_file(folder, name, expected)
    except UserError as error:
        raise UserError(f"{error}: the checkpoint is damaged") from None
    return state


@dataclass
class State:
    """What is checked of a `state.json`; `ant5m.train.trainer` says what else is there."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    model: dict[str, Any]
    files: dict[str, str]
    tokenizer: str | None = None
    tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    skipped: Annotated[int, msgspec.Meta(ge=0)] = 0
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    random: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, float] | None = None
    loader: dict[str, Any] = field(default_factory=dict)


def check_tokenizer(tokenizer: "Tokenizer", config: ModelConfig) -> None:
    """Raise `UserError` when the tokenizer makes ids that the model has no row for.

    A model may have more rows than the tokenizer has entries: tables are often padded to a round number.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} entries, the model {config.vocab_size:,}: "
            "they do not belong together (take a larger model, or a smaller tokenizer)"
        )


def _load_checkpoint(folder: Path, tokenizer_folder: Path) -> "tuple[Ant, Tokenizer | None]":
    state = verify_checkpoint(folder)
    try:
        config = ModelConfig.from_dict(state["model"])
    except UserError as error:
        raise UserError(f"{folder / STATE}: {error}") from None
    tokenizer = _load_tokenizer(tokenizer_folder, config)
    trained_with = state.get("tokenizer")
    if tokenizer and trained_with is not None and not tokenizer.has_fingerprint(trained_with):
        raise UserError(f"{tokenizer_folder} is not the tokenizer that {folder} was trained with")
    if tokenizer and "chat_template" in tokenizer.settings:
        from ant5m.data.conversations import end_ids as ends_of_replies

        tokenizer.end_ids = ends_of_replies(tokenizer)
    return load_model(config, folder), tokenizer


def _load_huggingface(folder: Path) -> "tuple[Ant, Tokenizer | None]":
    config = load_config(folder)
    tokenizer = _load_tokenizer(folder, config)
    if tokenizer is not None:
        _take_end_ids(tokenizer, config, folder)
    return load_model(config, folder), tokenizer


def _take_end_ids(tokenizer: "Tokenizer", config: ModelConfig, folder: Path) -> None:
    """Let generation end where transformers ends it: by the model's own files, not by the tokenizer's."""
    ids: tuple[int, ...] = ()
    for path in (folder / "generation_config.json", folder / "config.json"):
        if not ids and path.exists():
            ids = _end_ids(path, config.vocab_size)
    if ids and tokenizer.eos_token_id not in ids:
        warnings.warn(
            f"{folder}: the model ends a text with id {' or '.join(map(str, ids))}, its tokenizer with "
            f"{tokenizer.eos_token} ({tokenizer.eos_token_id}): texts are generated up to the model's, as in "
            "transformers, and packed with the tokenizer's",
            stacklevel=2,
        )
    tokenizer.end_ids = ids or tokenizer.end_ids


@dataclass
class _Ends:
    """What is relied upon of a config.json or generation_config.json of transformers."""

    eos_token_id: int | list[int] | None = None


def _end_ids(path: Path, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a generated text, as a file says; () where it names none."""
    named = read_json(path, _Ends).eos_token_id
    ids = () if named is None else tuple(named) if isinstance(named, list) else (named,)
    if any(not 0 <= one < vocab_size for one in ids):
        raise UserError(
            f"{path}: eos_token_id is {named!r}: an id of the vocabulary must be from 0 to {vocab_size - 1:,}"
        )
    return ids


def _load_tokenizer(folder: Path, config: ModelConfig) -> "Tokenizer | None":
    if not (folder / "tokenizer.json").exists():
        return None
    from ant5m.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    try:
        check_tokenizer(tokenizer, config)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    return tokenizer
