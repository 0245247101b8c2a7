"""What every test shares: few threads, no network, no terminal width of somebody's own."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COLUMNS", "120")
import hypothesis
import pytest

hypothesis.settings.register_profile("short", max_examples=60, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("long", max_examples=3_000, deadline=None, print_blob=True)


@pytest.fixture(autouse=True)
def chosen_anew():
    """What a test makes of backends and devices, the dispatcher finds out itself."""
    if "ant5m.kernels" in sys.modules:
        sys.modules["ant5m.kernels"].registry.forget()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="long forms, and property tests over many examples")


def pytest_configure(config):
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long form: pytest --long"))
