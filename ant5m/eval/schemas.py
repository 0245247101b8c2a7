"""What an item of each benchmark must look like, in the field names of the hub's data sets.

A benchmark's items are checked against its schema before anything is scored: lm-eval takes an item with three
endings, or a label that no answer has, and counts it wrong.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ant5m.files import what_and_where

Text = Annotated[str, Meta(pattern=r"\S")]
"""not empty, nor mere white space"""
Two = Literal[0, 1] | bool
Four = Literal[0, 1, 2, 3]
FourSpelled = Literal[0, 1, 2, 3, "0", "1", "2", "3"]
FourTexts = Annotated[list[Text], Meta(min_length=4, max_length=4)]


class Choices(Struct):
    """Lettered answers."""

    text: Annotated[list[Text], Meta(min_length=2)]
    label: list[str]


class Lettered(Struct):
    """An item whose right answer is named by its letter."""

    choices: Choices
    answerKey: str

    def __post_init__(self) -> None:
        if len(self.choices.text) != len(self.choices.label):
            raise ValueError(f"{len(self.choices.text)} answers but {len(self.choices.label)} labels")
        if self.answerKey not in self.choices.label:
            raise ValueError(f"answerKey {self.answerKey!r} is not one of {', '.join(self.choices.label)}")


class Arc(Lettered, kw_only=True):
    question: Text


class CommonsenseQa(Lettered, kw_only=True):
    question: Text


class OpenBookQa(Lettered, kw_only=True):
    question_stem: Text


class BoolQ(Struct):
    question: Text
    passage: Text
    label: Two


class Copa(Struct):
    premise: Text
    choice1: Text
    choice2: Text
    question: Literal["cause", "effect"]
    label: Two


class MinimalPair(Struct):
    """BLiMP and its supplement."""

    sentence_good: Text
    sentence_bad: Text


class WinoGrande(Struct):
    sentence: Annotated[str, Meta(pattern="_")]
    option1: Text
    option2: Text
    answer: Literal["1", "2"]


class Truths(Struct):
    choices: Annotated[list[Text], Meta(min_length=2)]
    labels: list[Two]

    def __post_init__(self) -> None:
        if len(self.choices) != len(self.labels):
            raise ValueError(f"{len(self.choices)} answers but {len(self.labels)} labels")


class TruthfulQa(Struct):
    question: Text
    mc2_targets: Truths


class Piqa(Struct):
    goal: Text
    sol1: Text
    sol2: Text
    label: Two


class HellaSwag(Struct):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: FourTexts
    label: FourSpelled


class Swag(Struct):
    startphrase: Text
    ending0: Text
    ending1: Text
    ending2: Text
    ending3: Text
    label: Four


class Mmlu(Struct):
    question: Text
    subject: Text
    choices: Annotated[list[str], Meta(min_length=4, max_length=4)]
    answer: Four


class Race(Struct):
    article: Text
    problems: Any  # a list, or the text of one


class SciQ(Struct):
    support: str
    question: Text
    correct_answer: Text
    distractor1: Text
    distractor2: Text
    distractor3: Text


class Passage(Struct):
    text: Text


class Page(Struct):
    page: Text


class Line(Struct):
    """A line of raw text; most of WikiText's are empty."""

    text: str


class ArithMark(Struct):
    ctx: Text
    endings: FourTexts
    label: FourSpelled

    def __post_init__(self) -> None:
        if bare := [ending for ending in self.endings if not ending.startswith(" ")]:
            raise ValueError(f"the ending {bare[0]!r} does not begin with a space")


class Ewok(Struct):
    Context1: Text
    Context2: Text
    Target1: Text
    Target2: Text
    Domain: Text
    ContextType: str
    ContextDiff: str
    TargetDiff: str


class EntityTracking(Struct):
    input_prefix: Text
    options: Annotated[list[Text], Meta(min_length=2)]
    numops: int


def fault(row: Any, schema: type[Struct]) -> str | None:
    """What is wrong with an item, in a few words; None when it is as it should be."""
    if not isinstance(row, dict):
        return "not a JSON object"
    fields = [field for field in schema.__struct_fields__ if field not in row]
    if fields:
        return f"no field {', '.join(fields)} (found: {', '.join(map(str, row)) or 'none'})"
    try:
        msgspec.convert(row, schema)
    except msgspec.ValidationError as error:
        return what_and_where(error)
    return None
