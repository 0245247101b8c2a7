"""What reads files of other people, by the name of the file: for the fuzz in `readers.py`, and for its seeds.

The first byte of an input is the number of its reader here: new ones come last.
"""

from ant5m.data.corpus import Corpus
from ant5m.data.mixture import Mixture
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.eval.items import _read_jsonl
from ant5m.manifest import read_manifest
from ant5m.model.config_file import load_config
from ant5m.model.weights import _read_weights
from ant5m.train.config_file import read_config
from ant5m.train.metrics import split_metrics


def read_text(path):
    """All documents."""
    return list(Corpus.open([path]).documents())


TEXTS = [f"a{kind}{packed}" for kind in (".txt", ".jsonl") for packed in ("", ".gz", ".xz", ".zst")]
READERS = {
    **dict.fromkeys([*TEXTS, "a.parquet"], read_text),
    "config.json": load_config,
    "tokenizer.json": Tokenizer.load,
    "manifest.json": lambda path: read_manifest(path.parent),
    "metrics.jsonl": split_metrics,
    "items.jsonl": _read_jsonl,
    **dict.fromkeys(["a.csv", "a.json", "a.tar", "a.tar.gz"], read_text),
    "mixture.toml": Mixture.read,
    "settings.toml": read_config,
    "model.safetensors": lambda path: _read_weights(path.parent),
}


def try_one(content: bytes, folder) -> None:
    """Read one input: anything but a result or a `UserError` of one line is a find."""
    if not content:
        return
    name, read = list(READERS.items())[content[0] % len(READERS)]
    path = folder / name
    path.write_bytes(content[1:])
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error), error
    finally:
        path.unlink()
