"""A list of the files of a folder with their hashes, so that what was edited or damaged is noticed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from ant5m.errors import UserError
from ant5m.files import file_sha256, read_json, write_json

MANIFEST = "manifest.json"
FORMAT: Literal["ant5m-manifest-1"] = "ant5m-manifest-1"


@dataclass
class Manifest:
    """The content of `manifest.json`."""

    format: Literal["ant5m-manifest-1"]
    files: dict[str, str]
    """path below the folder, with "/" -> sha256 (hex)"""


def write_manifest(folder: Path, hashes: dict[str, str]) -> None:
    """Write the manifest of `folder`: `hashes` gives each file's path below it and its sha256."""
    write_json(folder / MANIFEST, {"format": FORMAT, "files": hashes})


def hash_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """The sha256 of files in `folder`, by their paths below it."""
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}


def read_manifest(folder: Path) -> dict[str, str]:
    """The hashes of the files of a folder. `UserError` when the manifest is missing or damaged."""
    files = read_json(folder / MANIFEST, Manifest).files
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise UserError(f"{folder / MANIFEST} names {name}, which is no file of the folder")
    return files


def check_file(folder: Path, name: str, sha256: str) -> None:
    """Raise `UserError` unless a file of the folder is there and has that hash."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if file_sha256(path) != sha256:
        raise UserError(f"{path} is not what was saved (its hash differs): it was edited or damaged")
