"""A coverage-guided fuzz of what reads files of other people, run by hand:

    pip install atheris
    python tests/fuzz/readers.py tests/fuzz/seeds -max_total_time=300

The first byte of an input chooses the reader. Anything but a result or a `UserError` of one line is a find;
its input goes into `seeds/`, so that it is tried first from then on.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["ant5m.data", "ant5m.eval", "ant5m.files", "ant5m.model.config_file"]
):
    from ant5m.data.corpus import Corpus
    from ant5m.data.tokenizer import Tokenizer
    from ant5m.errors import UserError
    from ant5m.eval.items import _read_jsonl
    from ant5m.manifest import read_manifest
    from ant5m.model.config_file import load_config
    from ant5m.train.metrics import split_metrics

FOLDER = Path(tempfile.mkdtemp())
TEXTS = [f"a{kind}{packed}" for kind in (".txt", ".jsonl") for packed in ("", ".gz", ".xz", ".zst")]
READERS = {
    **dict.fromkeys([*TEXTS, "a.parquet"], lambda path: list(Corpus.open([path]).documents())),
    "config.json": load_config,
    "tokenizer.json": Tokenizer.load,
    "manifest.json": lambda path: read_manifest(path.parent),
    "metrics.jsonl": split_metrics,
    "items.jsonl": _read_jsonl,
}


def try_one(content: bytes) -> None:
    if not content:
        return
    name, read = list(READERS.items())[content[0] % len(READERS)]
    path = FOLDER / name
    path.write_bytes(content[1:])
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error), error
    finally:
        path.unlink()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, try_one)
    atheris.Fuzz()
