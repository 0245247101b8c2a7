"""A coverage-guided fuzz of what reads files of other people, run by hand:

    pip install atheris
    mkdir found && python tests/fuzz/readers.py found tests/fuzz/seeds -max_total_time=300

The input of a find goes into `seeds/`: it is tried first from then on, and by `tests/test_readers.py`.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

MODULES = ["data", "eval", "files", "manifest", "model", "schema", "train.config_file", "train.metrics"]

with atheris.instrument_imports(include=[f"ant5m.{name}" for name in MODULES]):
    import targets

FOLDER = Path(tempfile.mkdtemp())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, lambda content: targets.try_one(content, FOLDER))
    atheris.Fuzz()
