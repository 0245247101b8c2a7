"""Nothing is lost: files and folders appear whole or not at all."""

import os

import pytest

from ant5m.errors import UserError
from ant5m.files import new_folder, read_json, write_file, write_json


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
