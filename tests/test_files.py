"""Nothing is lost: files and folders appear whole or not at all."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from ant5m.errors import UserError
from ant5m.files import (
    is_locked,
    is_unused,
    lock,
    new_folder,
    read_json,
    remove_asides,
    write_file,
    write_json,
)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert (target / "whole").read_text() == "x"
    assert (target / "whole").stat().st_mode & 0o777 == 0o644 and target.stat().st_mode & 0o777 == 0o755


def test_a_folder_is_never_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"), new_folder(tmp_path / "there"):
        pass


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, None]}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "c.json")


@dataclasses.dataclass
class Shape:
    width: int
    parts: list[dict[str, int]] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("text", "words"),
    {
        '{"width": "8"}': r"a\.json: width: expected int, got str",
        '{"width": 8, "parts": [{}, {"a": 1.5}]}': r"a\.json: parts\[1\]\[\.\.\.\]: expected int, got float",
        '{"parts": []}': "object missing required field width",
        "[]": "expected object, got array",
        "[" * 100_000: "nested too deeply",
        '{"width": ' + "1" * 5_000 + "}": "not valid JSON",
        '{"width"': "not valid JSON",
        "": "not valid JSON",
    }.items(),
)
def test_json_that_is_not_of_its_type_is_one_line_with_file_and_place(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read_json(tmp_path / "a.json", Shape)
    assert "\n" not in str(error.value)


def test_json_of_its_type(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"width": 8, "parts": [{"a": 1}]}')
    assert read_json(tmp_path / "a.json", Shape) == Shape(8, [{"a": 1}])
    (tmp_path / "b.json").write_bytes(b'"\xff"')
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "b.json")
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path)


def test_names_that_utf8_cannot_spell_are_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"name": os.fsdecode(b"caf\xe9")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "caf\udce9"}


HOLD = (
    "import sys,time,pathlib; from ant5m.files import *\nwith {}: print('held', flush=True); time.sleep(60)"
)


@contextlib.contextmanager
def another_process(code):
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_has_one_writer_until_that_dies(tmp_path):
    held = pytest.raises(UserError, match="another process is writing into")
    with another_process(f"lock(pathlib.Path({str(tmp_path)!r}))"), held, lock(tmp_path):
        pass
    with lock(tmp_path), held, lock(tmp_path):  # SIGKILL freed it
        pass
    assert is_unused(tmp_path)


def test_what_a_killed_process_left_is_removed_but_not_what_is_being_filled(tmp_path):
    with another_process(f"new_folder(pathlib.Path({str(tmp_path / 'made')!r})) as f") as process:
        left = next(tmp_path.glob(".made.*"))
        with new_folder(tmp_path / "made"):
            assert left.exists()
        (tmp_path / "made").rename(tmp_path / "first")
        process.kill()
        process.wait()
    with new_folder(tmp_path / "made"):
        assert not left.exists()
    assert sorted(os.listdir(tmp_path)) == ["first", "made"] and os.listdir(tmp_path / "made") == []


def test_a_folder_with_nothing_but_remains_is_unused(tmp_path):
    assert is_unused(tmp_path / "absent") and is_unused(tmp_path)
    (tmp_path / ".meta.json.abcdefgh.aside").write_text("half")
    (tmp_path / ".step.abcdefgh.aside").mkdir()
    with lock(tmp_path):
        assert is_unused(tmp_path)
        remove_asides(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    (tmp_path / "thesis.txt").write_text("mine")
    assert not is_unused(tmp_path) and not is_unused(tmp_path / "thesis.txt")


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "EIO"])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", flock)
    if code == "EIO":
        with pytest.raises(OSError, match="Input/output"), lock(tmp_path):
            pass
        return
    told = pytest.warns(UserWarning, match="cannot be locked .*: let no second process write there")
    with told, lock(tmp_path):
        assert not is_locked(tmp_path)
    with pytest.warns(UserWarning), new_folder(tmp_path / "new") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path / "new") == ["a"]
