"""Writing so that nothing is lost: aside, synced, then renamed into place."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ant5m.errors import UserError

_READ_BYTES = 1 << 20
_UMASK = os.umask(0)  # it cannot be read without being set
os.umask(_UMASK)


def fsync(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` in one step: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_UMASK)  # mkstemp makes private files
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_file` of indented JSON."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; a missing or malformed one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error})") from None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside; it takes the name `path` only when the block ends well.

    Yields the temporary folder. On an exception it is removed and `path` never appears. `path` must not
    exist.
    """
    if path.exists():
        raise UserError(f"{path} exists already: choose another name or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield aside
        for entry in (aside, *aside.rglob("*")):
            # As a plain `open` would have made them.
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_UMASK)
            fsync(entry)
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    fsync(path.parent)
