"""One line about the first value that an annotation does not allow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from ant5m.errors import UserError
from ant5m.schema import Count, Positive, Share, check, check_names, flag


@dataclass
class Config:
    rows: Count = 1
    maybe: Count | None = None
    rate: Positive = 1.0
    share: Share = 0.5
    inside: Annotated[float, Meta(gt=0, lt=1)] = 0.5
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[Positive, ...] = ()
    switch: bool = False
    place: Path | None = None


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rows", 0, "a whole number of at least 1, not 0"),
        ("rows", True, "a whole number of at least 1, not True"),
        ("rows", 1.0, "a whole number of at least 1, not 1.0"),
        ("maybe", -3, "a whole number of at least 1, not -3"),
        ("rate", float("nan"), "a number above 0, not nan"),
        ("rate", "1", "a number above 0, not '1'"),
        ("share", 1.01, "a number from 0 to 1, not 1.01"),
        ("inside", 1, "a number above 0 and below 1, not 1"),
        ("kind", "c", "one of a, b, not 'c'"),
        ("pair", (1.0,), r"2 values, each a number, not \(1.0,\)"),
        ("many", (1.0, float("inf")), r"values, each a number above 0, not \(1.0, inf\)"),
        ("switch", 1, "true or false, not 1"),
        ("place", 7, "a path, not 7"),
    ],
)
def test_a_value_that_is_not_allowed(field, value, expected):
    with pytest.raises(UserError, match=f"^--{field} must be {expected}$"):
        check(Config(**{field: value}), flag)


def test_what_is_allowed():
    check(Config(rows=10**9, maybe=3, rate=2, share=0, many=(1, 2.5), place=Path("x"), switch=True))
    assert flag("micro_batch_size") == "--micro-batch-size"


def test_names():
    check_names(Config, {"rows": 1}, "a config", ("rows",))
    with pytest.raises(UserError, match=r"^unknown in a config: colour, z \(known: inside, kind"):
        check_names(Config, {"z": 1, "colour": 2}, "a config")
    with pytest.raises(UserError, match=r"^missing in a config: rate$"):
        check_names(Config, {"rows": 1}, "a config", ("rows", "rate"))
