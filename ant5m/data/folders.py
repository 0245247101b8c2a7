"""Searching folders for files: once each, links followed, and nothing left out without a word."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ant5m.files import is_lfs_pointer

NAMED = 3
"""examples in a message, of each kind of thing that was left out"""
KINDS = {
    "git-lfs pointer": "git-lfs pointers, not the text (get it with: git lfs pull)",
    "dangling": "links to nothing",
    "unreadable": "folders that may not be read",
    "hidden": "hidden files and folders",
    "special": "neither files nor folders",
    "empty": "empty files",
    "other kind": "files of another kind than the rest (name them, or a glob of them, to read them)",
    "not in a tar": "files that are not read inside a .tar (unpack it)",
}


@dataclass
class Found:
    """What `find_files` found in a folder."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    """in the order of their paths, each file once however many links lead to it"""
    left_out: dict[str, list[Path]] = field(default_factory=dict)
    """paths by kind, a key of `KINDS`"""

    def leave_out(self, kind: str, path: Path) -> None:
        self.left_out.setdefault(kind, []).append(path)

    def keep(self, wanted: Callable[[Path], bool], otherwise: str) -> None:
        """Leave out the files that are not `wanted`, as of the kind `otherwise`."""
        files, self.files = self.files, []
        for path in files:
            if wanted(path):
                self.files.append(path)
            else:
                self.leave_out(otherwise, path)

    def describe_left_out(self) -> str:
        """One line for people: how many of each kind, and examples; "" when nothing was left out."""
        listed = []
        for kind, paths in self.left_out.items():
            names = ", ".join(str(path.relative_to(self.folder)) for path in paths[:NAMED])
            more = ", ..." if len(paths) > NAMED else ""
            listed.append(f"{len(paths):,} {KINDS[kind]}: {names}{more}")
        return "; ".join(listed)

    def warn(self) -> None:
        """Say what was left out, if anything was."""
        if self.left_out:
            warnings.warn(f"left out of {self.folder}: {self.describe_left_out()}", stacklevel=3)


def find_files(folder: str | Path, wanted: Callable[[Path], bool]) -> Found:
    """Every file below `folder` whose path is `wanted`, in any depth.

    Links to files and folders are followed, but nothing is visited twice, so that links in a circle end.
    Left out, and listed in the result: hidden files and folders, git-lfs pointers, empty files, links to
    nothing, folders that may not be read, and what is neither a file nor a folder. `folder` itself may be
    hidden or a link.
    """
    found = Found(Path(folder))
    visited: set[tuple[int, int]] = set()
    # Linked folders come last: what can be reached without a link has its own path.
    pending: list[Path] = [found.folder]
    linked: list[Path] = []
    paths: list[Path] = []
    while pending or linked:
        here = pending.pop() if pending else linked.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(here) as listing:
                entries = list(listing)
        except OSError:
            found.leave_out("unreadable", here)
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                if entry.is_dir() or wanted(path):
                    found.leave_out("hidden", path)
            elif _is_folder(entry):
                (linked if entry.is_symlink() else pending).append(path)
            elif entry.is_symlink() and not path.exists():
                found.leave_out("dangling", path)
            elif wanted(path):
                paths.append(path)
    for path in _once(sorted(paths)):
        kind = _fault(path)
        if kind:
            found.leave_out(kind, path)
        else:
            found.files.append(path)
    found.left_out = {kind: sorted(found.left_out[kind]) for kind in KINDS if kind in found.left_out}
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to a place that may not be entered
        return False


def _once(paths: list[Path]) -> list[Path]:
    """Each file by one path: its own, else the first link to it."""
    chosen: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: path.is_symlink()):
        chosen.setdefault(os.path.realpath(path), path)
    return sorted(chosen.values())


def _fault(path: Path) -> str | None:
    """Why a file is left out: a key of `KINDS`, or None."""
    if not path.is_file():
        return "special"
    if not path.stat().st_size:
        return "empty"
    try:
        return "git-lfs pointer" if is_lfs_pointer(path) else None
    except OSError:
        return None  # whoever reads it will say so
