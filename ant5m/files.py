"""Files are whole or not there: written aside, synced, renamed. JSON has a schema, a folder one writer."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

import filelock
import msgspec

from ant5m.errors import UserError, first_line

LOCK = ".lock"
"""in a folder that is being written; without meaning when no process holds it"""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""`OSError.errno` of file systems without locks, such as NFS without its lock daemon"""
ASIDE = ".aside"
"""ends the hidden name of what is being written; a kill leaves such a file or folder behind"""

LARGEST_JSON = 1 << 28
"""bytes; the largest tokenizer.json there is has a tenth of it"""
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""how a pointer file begins, which git leaves of a large file when git-lfs is not installed"""
_READ_BYTES = 1 << 20
_UMASK = os.umask(0)  # it cannot be read without being set
os.umask(_UMASK)

T = TypeVar("T")


def fsync(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def real_path(path: str | Path) -> Path:
    """Where links lead, absolute. One in a circle, for which `Path.resolve` raises, leads to itself."""
    return Path(os.path.realpath(path))


def write_file(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` in one step: a reader sees the old file or the new one, never half of one.
    What UTF-8 cannot spell of a text, as in a file name of another encoding, is escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=ASIDE)
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


def to_json(value: Any) -> bytes:
    """Indented JSON; what UTF-8 cannot spell is escaped."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """`write_file` of `to_json`."""
    write_file(path, to_json(value))


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a file. `UserError` when it is none (a pipe would have to be waited for, a device has no
    end), or larger than `most` bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is not a file")
    if most is not None and found.st_size > most:
        raise UserError(f"{path} is too large: {found.st_size:,} bytes, at most {most:,} are read")
    return path.read_bytes()


def is_plain_name(name: str) -> bool:
    """Whether it names something in a folder, and not the folder, one around it or one inside it."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)


@overload
def read_json(path: Path) -> Any: ...
@overload
def read_json(path: Path, type: type[T]) -> T: ...
def read_json(path: Path, type: Any = Any) -> Any:
    """Parse a JSON file and check it against `type`, anything that `msgspec.convert` takes.

    Whatever is wrong (no such file, no JSON, nested too deeply, a value of another type at any depth) is one
    `UserError` that names the file and the place in it.
    """
    try:
        if is_lfs_pointer(path):
            raise lfs_explained(path)
        return parse_json(read_bytes(path, LARGEST_JSON), str(path), type)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a JSON file") from None


@overload
def parse_json(raw: bytes | str, name: str) -> Any: ...
@overload
def parse_json(raw: bytes | str, name: str, type: type[T]) -> T: ...
def parse_json(raw: bytes | str, name: str, type: Any = Any) -> Any:
    """`read_json` of what is in memory; `name` is what errors call it."""
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{name} is not valid JSON (nested too deeply)") from None
    except ValueError as error:  # bytes that are not UTF-8, bad JSON, an integer of thousands of digits
        raise UserError(f"{name} is not valid JSON ({str(error).partition(';')[0]})") from None
    return check_json(value, name, type)


@overload
def read_toml(path: Path) -> dict[str, Any]: ...
@overload
def read_toml(path: Path, type: type[T]) -> T: ...
def read_toml(path: Path, type: Any = dict[str, Any]) -> Any:
    """`read_json` of a TOML file."""
    try:
        return msgspec.toml.decode(read_bytes(path, LARGEST_JSON), type=type)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {what_and_where(error)}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid TOML (nested too deeply)") from None
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: bytes that are not UTF-8
        raise UserError(f"{path} is not valid TOML ({first_line(error)})") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a TOML file") from None


def read_object(path: Path, schema: Any) -> dict[str, Any]:
    """A JSON object with all that is in it, of which `schema`, a dataclass, says what is relied upon.

    `UserError` as of `read_json`.
    """
    values = read_json(path, dict[str, Any])
    check_json(values, str(path), schema)
    return values


def check_json(value: Any, name: str, type: Any) -> Any:
    """A parsed value as `type`; `UserError` as of `read_json` when it is of another."""
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: {what_and_where(error)}") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply") from None


def what_and_where(error: msgspec.ValidationError) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a[0].b`" as "a[0].b: expected int, got str"."""
    what, _, where = str(error).replace("`", "").partition(" - at ")
    what = what[:1].lower() + what[1:]
    place = where.removeprefix("key in ").removeprefix("$").removeprefix(".")
    return f"{place}: {what}" if place else what


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether a file is only a pointer of git-lfs. Source: the specification of git-lfs, docs/spec.md."""
    if not os.path.isfile(path) or os.path.getsize(path) >= 1024:
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def lfs_explained(path: str | Path) -> UserError:
    """What to say of a pointer file."""
    return UserError(f"{path} is only a git-lfs pointer, not the file: get it with git lfs pull")


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
    exist. What killed processes left of the same folder is removed.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: choose another name or remove it")
    is_first = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=ASIDE))
    try:
        with lock(aside):
            yield aside
            for entry in (aside, *aside.rglob("*")):
                # As a plain `open` would have made them.
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~_UMASK)
                fsync(entry)
            (aside / LOCK).unlink(missing_ok=True)
            os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if is_first:
            with contextlib.suppress(OSError):  # another process may have begun something there
                path.parent.rmdir()
        raise
    fsync(path.parent)


def _remove_abandoned(path: Path) -> None:
    """Remove what killed calls of `new_folder(path)` left; one that another process is filling stays."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\w{{8}}({re.escape(ASIDE)})?")
    for aside in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        if not aside.is_dir() or aside.is_symlink():
            continue
        with contextlib.suppress(UserError, OSError), lock(aside):
            shutil.rmtree(aside)


@contextlib.contextmanager
def lock(folder: Path, wait: float = 0) -> Iterator[None]:
    """Be the only process (and the only holder in this one) that writes into `folder`, made where it is not
    there. The system frees the lock when the process ends, however it ends.

    Raises `UserError` when another holds it, for `wait` seconds and longer. Where the file system knows no
    locks (some network drives) a warning says so, and nobody is kept out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} cannot be a folder: a file is in its way") from None
    file_lock = filelock.FileLock(folder / LOCK, timeout=wait)
    try:
        file_lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"another process is writing into {folder}: wait for it to end, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): let no second process write there", stacklevel=3
        )
    try:
        yield
    finally:
        file_lock.release()  # the file stays: without it, who waits and who comes would lock two files


def is_locked(folder: Path) -> bool:
    """Whether a process writes into `folder`; nothing is made there."""
    if not (folder / LOCK).exists():
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where there are no locks nothing is locked
        try:
            with lock(folder):
                return False
        except (UserError, OSError):
            return True


def is_unused(folder: Path) -> bool:
    """Whether nothing is at this place, or a folder with nothing in it but what a killed process left."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(entry.name == LOCK or _is_aside(entry) for entry in folder.iterdir())


def remove_asides(folder: Path) -> None:
    """Remove what killed writers left, in any depth, in a folder whose lock the caller holds."""
    for entry in [entry for entry in folder.rglob(f".*{ASIDE}") if _is_aside(entry)]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_aside(entry: Path) -> bool:
    return entry.name.startswith(".") and entry.name.endswith(ASIDE)
