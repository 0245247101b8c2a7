"""A search through folders finds every file once, and says what it left out."""

import os

import pytest

from ant5m.data.folders import find_files


def text_files(folder):
    found = find_files(folder, lambda path: path.suffix == ".txt")
    return [str(path.relative_to(folder)) for path in found.files], found


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_files_in_any_depth_in_order(tmp_path):
    make(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "d.md", *(f"n/{i}.txt" for i in range(20)))
    names, found = text_files(tmp_path)
    assert names == sorted(["b.txt", "a/z.txt", "a/b/c.txt", *(f"n/{i}.txt" for i in range(20))])
    assert found.left_out == {} and found.describe_left_out() == ""


def test_links_are_followed_and_end(tmp_path):
    make(tmp_path / "data", "a.txt", "inner/b.txt")
    make(tmp_path / "elsewhere", "c.txt", "deep/d.txt")
    (tmp_path / "data" / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "a-loop").symlink_to(".")
    (tmp_path / "data" / "0-inner").symlink_to("inner")
    (tmp_path / "data" / "0.txt").symlink_to("a.txt")
    (tmp_path / "data" / "e.txt").symlink_to(tmp_path / "elsewhere" / "c.txt")
    names, found = text_files(tmp_path / "data")
    assert names == ["a.txt", "away/c.txt", "away/deep/d.txt", "inner/b.txt"] and found.left_out == {}


def test_what_is_left_out_is_named(tmp_path):
    make(tmp_path, "a.txt", ".git/x.txt", ".ipynb_checkpoints/a.txt", ".hidden.txt", ".gitignore", "e/f.txt")
    (tmp_path / "gone.txt").symlink_to("nothing")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lfs.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    os.mkfifo(tmp_path / "pipe.txt")
    names, found = text_files(tmp_path)
    assert names == ["a.txt", "e/f.txt"]
    assert {kind: [path.name for path in paths] for kind, paths in found.left_out.items()} == {
        "git-lfs pointer": ["lfs.txt"],
        "dangling": ["gone.txt", "self"],
        "hidden": [".git", ".hidden.txt", ".ipynb_checkpoints"],
        "special": ["pipe.txt"],
        "empty": ["empty.txt"],
    }
    with pytest.warns(
        UserWarning, match=r"1 git-lfs pointers, .* git lfs pull.*: lfs\.txt; 2 links to nothing"
    ):
        found.warn()


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "closed/b.txt")
    real = os.scandir

    def scandir(path):  # root may read everything, so permissions would not do
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    names, found = text_files(tmp_path)
    assert names == ["a.txt"] and [path.name for path in found.left_out["unreadable"]] == ["closed"]


def test_a_hidden_folder_that_was_asked_for_is_searched(tmp_path):
    make(tmp_path / ".cache", "a.txt")
    assert text_files(tmp_path / ".cache")[0] == ["a.txt"]
