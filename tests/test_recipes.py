"""The recipes: settings that `ant5m train --config` takes, and a mixture that it reads."""

from pathlib import Path

import pytest

from ant5m.data.mixture import Mixture
from ant5m.model.config import PRESETS
from ant5m.train.config_file import read_config

FOLDER = Path(__file__).parents[1] / "recipes"
MIXTURE = FOLDER / "web-and-textbooks.toml"
RECIPES = sorted(set(FOLDER.glob("*.toml")) - {MIXTURE})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_preset_and_a_time(path):
    config = read_config(path)
    assert config.model in PRESETS
    assert config.max_minutes and config.steps is None and config.tokens is None
    minutes = {"15-minutes": 15, "30-minutes": 30, "1-hour": 60, "12-hours": 720}
    assert config.max_minutes <= minutes["-".join(path.stem.split("-")[-2:])]


def test_every_recipe_is_in_the_table():
    page = (FOLDER.parent / "docs" / "how-to" / "recipes.md").read_text()
    assert len(RECIPES) >= 5 and all(f"`{path.name}`" in page for path in [*RECIPES, MIXTURE])


def test_the_mixture_ends_with_more_textbooks():
    mixture = Mixture.read(MIXTURE)
    last = dict(zip(mixture.names, mixture.phases[-1].weights, strict=True))
    first = dict(zip(mixture.names, mixture.phases[0].weights, strict=True))
    assert mixture.phases[-1].start == 0.8
    assert last["cosmopedia"] / sum(last.values()) > first["cosmopedia"] / sum(first.values())
