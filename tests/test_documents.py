"""The documents: what they say to type works, every command and flag has its page, no link is dead."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from accuracy import check_op

from ant5m.cli import COMMANDS, call
from ant5m.kernels import cpu, ops
from ant5m.kernels.registry import OPS
from ant5m.kernels.samples import Draw, Sizes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXECUTED = (ROOT / "README.md", DOCS / "tutorial.md")
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
LINES = (
    "the old man went down to the sea",
    "a fox and a crow met by the river",
    "she opened the door and saw it",
)

SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]

# What stands in for the flags of a command, or is added to them: small enough for a test. None: left out.
TINY = {
    "tokenizer train": {"--vocab-size": "300"},
    "tokenizer health": {"--compare": "280"},
    "data pack": {"--validation-fraction": "0.2"},
    "train": {
        "--tokens": None,
        "--steps": "2",
        "--batch-size": "1",
        "--sequence-length": "64",
        "--eval-tokens": "64",
    },
    "generate": {"--max-new-tokens": "4"},
    "doctor": {"--device-memory": "16GB"},  # then it measures no time
    "autopsy": {"--tokens": "256", "--prompts": "1"},
}
PYTHON = {
    "steps=1000": "steps=1, batch_size=1, sequence_length=64, eval_tokens=64",
    "max_new_tokens=40": "max_new_tokens=4",
}
ELSEWHERE = ("git clone", "pip install", "ant5m push")
"""what begins so needs a network"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The lines of the shell blocks of a page, without comments."""
    joined = (block.replace("\\\n", " ") for block in blocks(page, "sh"))
    lines = [line for block in joined for line in block.splitlines()]
    return [line for line in (line.partition(" #")[0].strip() for line in lines) if line]


def words_of(line: str) -> tuple[str, list[str]]:
    """(name, flags) of a line that calls ant5m."""
    words = shlex.split(line)[1:]
    name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    return name, words[len(name.split()) :]


def tiny(name: str, flags: list[str]) -> list[str]:
    """The command line with its budget cut down; a resumed run keeps its own."""
    if "--resume" in flags:
        return [*name.split(), *flags]
    kept = list(flags)
    for flag, value in TINY.get(name, {}).items():
        if flag in kept:
            at = kept.index(flag)
            kept[at : at + 2] = [flag, value] if value else []
        elif value:
            kept += [flag, value]
    return [*name.split(), *kept]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flags(hooks) -> dict[str, set[str]]:
    """Of each command, as its --help has them."""
    rows = {name: [row for row, _ in hooks.flags_of(hooks.help_of(name))] for name in COMMANDS}
    return {name: set(re.findall(r"--[a-z][\w-]*", " ".join(found))) for name, found in rows.items()}


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.name)
def test_what_a_page_says_to_type_works(page, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    for number in range(12):
        text = "\n".join(f"{number} {i} {LINES[(number + i) % len(LINES)]}." for i in range(60))
        text += " ".join(WORDS[number % 6 :: 6])  # enough for a vocabulary of 4,096
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in commands(page):
        if line.startswith(ELSEWHERE):
            continue
        assert line.startswith("ant5m "), f"neither run here nor known to need a network: {line}"
        assert call(tiny(*words_of(line))) == 0, line
        ran += 1
    assert ran >= 2
    for block in blocks(page, "python"):
        for long, short in PYTHON.items():
            block = block.replace(long, short)
        exec(block, {})


def test_the_op_of_the_how_to_computes_what_it_says(monkeypatch):
    record, function, line = blocks(DOCS / "how-to" / "add-an-op.md", "python")
    name, draw = "relu_squared", Draw(Sizes(2, 33, 27, 20, 6, 2, 10, 50))
    for table in (OPS, cpu.IMPLEMENTATIONS):
        monkeypatch.setitem(table, name, None)  # taken away behind the test
        del table[name]
    exec(record, vars(ops) | {"__name__": "ops"})
    assert OPS[name].unsupported_reason("cpu", *OPS[name].samples(draw)[0]) == f"it has no {name}"
    check_op(name, "cpu", draw)

    def implement(code):
        exec(record, vars(ops) | {"__name__": "ops"})  # again: an op remembers who runs it
        exec(code + line, vars(ops) | vars(cpu) | {"__name__": "cpu"})
        assert OPS[name].unsupported_reason("cpu", *OPS[name].samples(draw)[0]) is None
        check_op(name, "cpu", draw)

    implement(function)
    with pytest.raises(AssertionError):
        implement(function.replace("2 * ", ""))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_in_a_page_exists(page, flags):
    for line in commands(page):
        if line.startswith("ant5m "):
            name, words = words_of(line)
            used = {word for word in words if re.match("--[a-z]", word)}
            assert used <= flags[name], line


def test_the_site_is_built_and_has_a_place_for_every_flag(tmp_path, monkeypatch, flags):
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    pytest.importorskip("material")
    build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    page = (tmp_path / "reference" / "commands.html").read_text("utf-8")
    sections = dict(re.findall(r'<h2 id="ant5m-([\w-]+)">(.*?)(?=<h2|</article>)', page, re.DOTALL))
    assert set(sections) == {name.replace(" ", "-") for name in COMMANDS}
    for name in COMMANDS:
        rows = re.findall(r"<code>(--.*?)</code>", sections[name.replace(" ", "-")])
        shown = set(re.findall(r"--[a-z][\w-]*", " ".join(rows)))
        assert shown == flags[name] and (flags[name] or name == "completion")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
