"""The built-in corpus: prose only, no paragraph twice, the same every time, and nothing is imported."""

import argparse
import random
import sys
from pathlib import Path

import pytest

from ant5m.data import builtin
from ant5m.data.builtin import Seen, collect, is_prose, paragraphs, read_prose
from ant5m.data.corpus import Corpus, Position

MODULE = '''
"""Carry leaves from the tree to the nest, one after the other.

The ants walk in a line that is as long as the way to the tree, and each of them carries a leaf::

    for ant in line:
        ant.carry(leaf)

.. note:: Nothing is carried on a day on which it rains from the morning to the evening.

.. code-block:: python

    this code must not be in the text that is read from the module, not at all.

>>> carry(leaf)
The output of the example must not be in the text that is read, not at all.

Examples
--------
The examples must not be in the text that is read from the module, not at all.
"""
raise RuntimeError("a module of the corpus was imported")


class Ant:
    def carry(self, leaf, weight=1):
        """
        Carry a :class:`~nest.Leaf` to the *nest*, and ``rest`` before the next [1]_.

        Parameters
        ----------
        leaf : Leaf
            The leaf that is to be carried to the nest by this ant.
        weight : float, optional
            What the leaf weighs when it has been raining for a day.
        """

    def rest(self, hours):
        """Rest for as long as the other ants of the nest do.

        Args:
            hours (int): how many hours are left until
                the sun goes down over the nest.

        Returns:
            Whether the ant has had enough of a rest to go on.
        """
        # The ant that has rested for the longest time is the
        # one that goes to the tree before the others.
        parser.add_argument("--rest", help="how long an ant is to rest before it goes to the tree again.")


add_docstr(carry, """Carry it, unless it is too heavy for the ant that was asked to.""".format(**common))
'''


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_what_is_read_from_a_module(tmp_path):
    assert read_prose(write(tmp_path / "ants.py", MODULE)) == [
        "Carry leaves from the tree to the nest, one after the other.",
        "Nothing is carried on a day on which it rains from the morning to the evening.",
        "Carry a Leaf to the nest, and rest before the next.",
        "The leaf that is to be carried to the nest by this ant.",
        "What the leaf weighs when it has been raining for a day.",
        "Rest for as long as the other ants of the nest do.",
        "How many hours are left until the sun goes down over the nest.",
        "Whether the ant has had enough of a rest to go on.",
        "The ant that has rested for the longest time is the one that goes to the tree before the others.",
        "Carry it, unless it is too heavy for the ant that was asked to.",
    ]


@pytest.mark.parametrize("text", ["def broken(:\n  '''x'''", "'''\x00'''", '"""' + "(" * 5000, ""])
def test_a_file_that_does_not_parse_is_left_out(tmp_path, text):
    assert read_prose(write(tmp_path / "a.py", text)) == []
    assert read_prose(tmp_path / "absent.py") == []


def test_a_package_description(tmp_path):
    text = "Name: ants\n\n# Ants\n\nThe [ants](https://a.org) of this package carry what you give them.\n"
    text += "\n## License\n\nThe text of the license is not for a reader of the corpus, and it is left out.\n"
    found = read_prose(write(tmp_path / "METADATA", text))
    assert found == ["The ants of this package carry what you give them."]


@pytest.mark.parametrize(
    "text",
    [
        "Copyright 2020 by the authors of this module and all of their friends.",
        "x = y + z if the value of z is known to be so, as in the case above.",
        "See https://example.org for all of the details that are not in here.",
        "and so it goes on in the middle of a sentence, as it does here.",
        "This is the beginning of a sentence that leads up to a list:",
        "Too short to be of any use.",
        "foo_bar baz_qux __init__ __new__ a.b.c d[e] f(g) h<i> are the names of it.",
        "Zebra quokka xylophone jigsaw quartz mumble frobnicate gobbledygook splendid.",
    ],
)
def test_what_is_no_prose(text):
    assert not is_prose(text)


def test_markup_goes_and_a_missing_full_stop_comes():
    doc = "Return the **first** `element` of a |list| that :func:`map <a.b>` was given to `us <http://x.y>`_"
    assert list(paragraphs(doc)) == ["Return the first element of a list that a.b was given to us."]
    assert list(paragraphs("The value that is the result of all of this is\n\n    x = 5\n")) == []


def test_no_paragraph_comes_twice():
    seen = Seen()
    text = "The ants carry the leaf that they found below the tree to the nest by the river."
    assert seen.is_new(text)
    assert not seen.is_new(text.upper().replace(" ", "  "))
    long = [f"word{chr(97 + i)} follows word{chr(98 + i)}" for i in range(20)]
    assert seen.is_new(" ".join(long))
    assert not seen.is_new(" ".join(long[:-2]) + " and ends in another way")
    others = [f"other{chr(97 + i)} words" for i in range(20)]
    assert seen.is_new(" ".join(long[:4] + others))


@pytest.fixture
def packages(tmp_path):
    chance = random.Random(0)

    def noun() -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=6))

    def sentence() -> str:
        return f"The {noun()} of the {noun()} is with the {noun()} when a {noun()} has its {noun()}."

    def module() -> str:
        text = "\n\n".join(sentence() for _ in range(30))
        return f'"""{text}"""\n'

    files = {
        name: [write(tmp_path / name / f"{i}.py", module()) for i in range(40)] for name in ("one", "two")
    }
    files["two"].append(write(tmp_path / "two" / "copy.py", files["one"][0].read_text()))
    files["two"].append(write(tmp_path / "two" / "short.py", '"""The ant is as short as this text is."""'))
    return list(files.items())


def test_collecting(packages):
    found = collect(packages)
    assert list(found.packages) == ["one", "two"] and found.size == sum(
        len(d.encode()) for d in found.documents
    )
    assert len(found.documents) <= 80
    every = [paragraph for document in found.documents for paragraph in document.split("\n\n")]
    assert len(every) == len(set(every)) > 100
    again = collect(packages)
    assert again.documents == found.documents and again.fingerprint == found.fingerprint
    assert collect(packages[:1]).fingerprint != found.fingerprint


def test_it_is_a_source_of_a_corpus(packages, monkeypatch):
    monkeypatch.setattr(builtin, "_LOADED", [collect(packages)])
    documents = list(builtin.load_builtin().documents)
    source = Corpus.open(["builtin"])
    cursor = source.documents()
    assert list(cursor) == documents
    assert list(source.documents(Position(0, 5))) == documents[5:]


def test_the_packages_of_this_machine():
    packages = dict(builtin._packages())
    names = list(packages)
    assert names[0] == "python" and {"torch", "numpy", "sympy"} <= set(names)
    assert "ant5m" not in names and "pytest" not in names
    stdlib = packages["python"]
    assert stdlib == sorted(stdlib) and Path(argparse.__file__) in stdlib
    assert not [file for file in stdlib if "site-packages" in file.parts or "test" in file.parts]
    assert any(file.name == "METADATA" for file in packages["numpy"])


def test_the_standard_library_reads_as_english():
    import pydoc_data.topics

    modules_before = set(sys.modules)
    folder = Path(argparse.__file__).parent
    found = [read_prose(folder / name) for name in ("argparse.py", "difflib.py", "random.py")]
    assert all(sum(map(len, text)) > 2_000 for text in found)
    topics = "\n".join(read_prose(Path(pydoc_data.topics.__file__)))
    assert "The assertion" in topics or "assert" in topics
    assert len(topics) > 100_000
    for mark in (">>>", "::", "\n\n", "```", ":class:", "http"):
        assert mark not in topics
    assert set(sys.modules) == modules_before
