"""Any bytes in any kind of file give documents or one error that names the file: never a traceback."""

import gzip
import json
import lzma
import warnings
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from fuzz.targets import try_one
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ant5m.data.corpus import SEPARATOR, Corpus
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.eval.items import _read_jsonl
from ant5m.files import read_json
from ant5m.manifest import read_manifest
from ant5m.model.config_file import load_config
from ant5m.train.metrics import split_metrics

PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
NAMES = [f"a{kind}{packed}" for kind in (".txt", ".jsonl", ".json", ".csv", ".tar") for packed in PACK] + [
    "a.parquet"
]
anything = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
rows = st.lists(
    st.dictionaries(st.sampled_from(["text", "body", ""]), json_values, max_size=3) | json_values, max_size=6
)


@st.composite
def files(draw):
    """Bytes of a file, with its name: noise, or good files with a few bytes changed."""
    name = draw(st.sampled_from(NAMES))
    kind = draw(st.sampled_from(["noise", "text", "rows"]))
    if kind == "noise":
        raw = draw(st.binary(max_size=400))
    elif kind == "text":
        raw = draw(st.text(max_size=300)).encode("utf-8", "surrogatepass") + draw(st.binary(max_size=3))
    else:
        raw = "\n".join(json.dumps(row) for row in draw(rows)).encode()
    pack = PACK.get("." + name.rpartition(".")[2], bytes)
    if name == "a.parquet" and kind != "noise":
        texts = [row.get("text") for row in draw(rows) if isinstance(row, dict)]
        texts = [text if isinstance(text, str) and text.isprintable() else None for text in texts]
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), sink)
        raw = sink.getvalue().to_pybytes()
    content = bytearray(pack(raw) if draw(st.booleans()) else raw)
    for place in draw(st.lists(st.integers(0, 10_000), max_size=3)):
        if content:
            content[place % len(content)] ^= 1 << place % 8
    return name, bytes(content)


def documents_or_error(path, **options):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(Corpus.open([path], **options).documents())
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None
    assert all(isinstance(text, str) and text.encode() and not text.isspace() for text in found)
    return found


@anything
@given(files())
def test_any_bytes_are_documents_or_one_error(tmp_path, file):
    name, content = file
    path = tmp_path / name
    path.write_bytes(content)
    found = documents_or_error(path)
    skipped = documents_or_error(path, on_error="skip")
    if found is not None:
        assert skipped == found  # leaving out what cannot be read changes nothing where all can be


@anything
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50), max_size=8))
def test_what_was_written_is_read(tmp_path, texts):
    kept = [text for text in texts if text and not text.isspace()]
    raw = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    for packed, pack in PACK.items():
        (tmp_path / f"a.jsonl{packed}").write_bytes(pack(raw))
        found = documents_or_error(tmp_path / f"a.jsonl{packed}")
        assert (found or []) == kept
    plain = [text.strip("\r\n\ufeff") for text in kept if SEPARATOR not in text]
    plain = [text for text in plain if text and not text.isspace()]
    if plain:
        (tmp_path / "a.txt").write_bytes(SEPARATOR.join(["first", *plain]).encode())
        assert documents_or_error(tmp_path / "a.txt") == ["first", *plain]


READERS = {
    "config.json": load_config,
    "manifest.json": lambda path: read_manifest(path.parent),
    "tokenizer.json": Tokenizer.load,
    "metrics.jsonl": split_metrics,
    "items.jsonl": _read_jsonl,
    "any.json": lambda path: read_json(path, dict[str, list[int]]),
}
NAMED = (
    "vocab_size",
    "hidden_size",
    "model",
    "model_type",
    "type",
    "vocab",
    "merges",
    "added_tokens",
    "files",
)
objects = st.dictionaries(st.sampled_from([*NAMED, "format", "kind", "step", "rope_scaling"]), json_values)


@pytest.mark.parametrize("name", READERS)
@anything
@given(st.binary(max_size=200) | objects.map(lambda value: json.dumps(value).encode()))
def test_any_json_is_read_or_one_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    try:
        READERS[name](tmp_path / name)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "seed", sorted((Path(__file__).parent / "fuzz" / "seeds").iterdir()), ids=lambda p: p.name
)
def test_what_the_fuzz_found_stays_mended(tmp_path, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try_one(seed.read_bytes(), tmp_path)
