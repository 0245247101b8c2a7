"""The notebooks for everyone run from top to bottom on the CPU, with tiny budgets and folders for the hub."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_hub import REPO, local_hub  # noqa: F401  (fixture)
from test_notebook import TINY, shown  # noqa: F401  (fixture)

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def text(tmp_path, monkeypatch, shown):  # noqa: F811
    ipython = sys.modules["IPython"]  # what libraries ask it when they see it
    ipython.get_ipython, ipython.version_info = (lambda: None), (9, 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    paragraphs = (NOTEBOOKS.parent / "CONTRIBUTING.md").read_text().split("\n\n")
    documents = [f"{n}. {paragraph}" for n in range(40) for paragraph in paragraphs]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents))
    tiny = {"TEXT": "text.txt", "MODEL": str(tmp_path / "model.json"), "VOCAB_SIZE": 320, "INSTALL": False}
    return tiny


def execute(name, settings):
    """Run all cells; `settings` replace what the first one sets."""
    cells = json.loads((NOTEBOOKS / name).read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    namespace = {}
    exec(compile(code[0], name, "exec"), namespace)
    assert set(settings) <= set(namespace)
    namespace |= settings
    for cell in code[1:]:
        exec(compile(cell, name, "exec"), namespace)


def test_a_first_run_ends_with_a_page(text, shown, tmp_path):  # noqa: F811
    execute("first-run.ipynb", {**text, "MINUTES": 0.05})
    assert shown[0] == (tmp_path / "first-run" / "report.md").read_text()
    assert "<title>first-run</title>" in (tmp_path / "first-run.html").read_text()
    execute("first-run.ipynb", {**text, "MINUTES": 0.05})  # once more: nothing is in the way


def test_the_full_recipe_goes_on_in_another_session(text, local_hub, shown, tmp_path, capsys):  # noqa: F811
    settings = {**text, "REPO": REPO, "STEPS": 40, "BATCH_SIZE": 2, "SAVE_EVERY": 10}
    execute("full-recipe.ipynb", {**settings, "HOURS": 1e-6})
    assert "not done yet" in capsys.readouterr().out and not shown
    shutil.rmtree(tmp_path / "full-recipe")  # another machine
    execute("full-recipe.ipynb", {**settings, "HOURS": 1.0})
    assert f"done: AutoModelForCausalLM.from_pretrained('{REPO}')" in capsys.readouterr().out
    assert (local_hub.root / REPO / "model.safetensors").exists()
    with pytest.raises(AssertionError, match="say in REPO"):
        execute("full-recipe.ipynb", {**settings, "REPO": ""})
