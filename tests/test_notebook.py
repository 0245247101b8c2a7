"""notebooks/t4.ipynb runs from top to bottom, with a small model and little text, on whatever is here."""

import json
import sys
import types
import zipfile
from pathlib import Path

import pytest

from ant5m.train.metrics import read_metrics

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "t4.ipynb"
TINY = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


@pytest.fixture
def shown(monkeypatch):
    """What the notebook displays."""
    found = []
    display = types.ModuleType("IPython.display")
    display.Image, display.Markdown = (lambda path: path), (lambda text: text)
    display.display = lambda *things: found.extend(things)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return found


def test_the_notebook_runs_and_goes_on_after_the_time_limit(tmp_path, monkeypatch, shown):
    cells = [
        "".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"
    ]
    monkeypatch.chdir(tmp_path)
    for name in ("ant5m", "benchmarks", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(NOTEBOOK.parents[1] / name)
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    paragraphs = (NOTEBOOK.parents[1] / "CONTRIBUTING.md").read_text().split("\n\n")
    documents = [f"{n}. {paragraph}" for n in range(40) for paragraph in paragraphs]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents))
    tiny = {
        "MODEL": str(tmp_path / "model.json"),
        "VOCAB_SIZE": 320,
        "STEPS": 60,
        "BATCH_SIZE": 2,
        "SHORT_MINUTES": 0.02,
        "HOURS": 0.0,  # the full run stops as soon as it can
        "DATA": str(tmp_path / "text.txt"),
        "INSTALL": False,
        "GPU_TESTS": ["tests/test_schedule.py", "-m", "gpu"],
        "BENCHMARKS": ["--collect-only", "benchmarks/test_data.py"],
    }
    namespace = {}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), namespace)
        if set(tiny) <= set(namespace) and "WORK" not in namespace:
            namespace |= tiny
    work = tmp_path / "ant5m-t4"
    assert "deselected" in (work / "tests.log").read_text()
    assert (work / "short" / "config.json").exists()
    assert (work / "full" / "config.json").exists() and not (work / "full" / "report.md").exists()
    assert not shown

    # The next session: the data are there, and the runs continue.
    packed = (work / "data" / "meta.json").stat().st_mtime_ns
    namespace["HOURS"] = 1.0
    for cell in cells[cells.index(next(cell for cell in cells if 'train("full"' in cell)) :]:
        exec(compile(cell, str(NOTEBOOK), "exec"), namespace)
    assert (work / "data" / "meta.json").stat().st_mtime_ns == packed
    steps = [row["step"] for row in read_metrics(work / "full" / "metrics.jsonl") if row["kind"] == "train"]
    assert steps[-1] == 60
    assert shown[0] == (work / "full" / "report.md").read_text() and shown[1] == work / "full" / "loss.png"
    names = zipfile.ZipFile(work / "results.zip").namelist()
    assert {"tests.log", "full.log", "full/metrics.jsonl", "full/report.md"} <= set(names)
