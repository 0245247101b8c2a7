"""The figures by which public boards rank tiny models, computed from the results of their tasks.

Formulas are those of the boards' pages on 2026-12-01: the Open SLM Leaderboard (AxiomicLabs) and the Glint
Tiny-ML Leaderboard. Standard errors come from the items: tasks are independent, and the figures are linear in
their accuracies. BabyLM has no figure over its tasks here: the challenge's mean has tasks that need training.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ant5m.eval.results import TaskResult

Figure = tuple[float, float | None]
"""a value and its standard error (None: not known)"""

WORST_BYTE_PERPLEXITY, BEST_BYTE_PERPLEXITY = 500.0, 1.86
MOST_PARAMETERS, FEWEST_PARAMETERS = 150e6, 1e3
ARITHMARK_WEIGHT = 0.65


@dataclass(frozen=True)
class BoardScore:
    """What a board would show."""

    board: str
    protocol: str
    """how the tasks were scored, for people"""
    figures: dict[str, Figure] = field(default_factory=dict)
    row: dict[str, Any] | None = None
    """as the board's page wants it"""
    missing: tuple[str, ...] = ()
    """tasks without a result: then there are no figures"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {name: {"value": value, "stderr": error} for name, (value, error) in self.figures.items()}
        return {
            "board": self.board,
            "protocol": self.protocol,
            "figures": figures,
            **({"row": self.row} if self.row else {}),
            **({"missing": list(self.missing)} if self.missing else {}),
        }


def board_scores(
    names: Sequence[str], results: Sequence[TaskResult], parameters: int, repository: str
) -> list[BoardScore]:
    """The figures of the boards among `names` (of suites and tasks).

    Args:
        parameters: of the model, exact.
        repository: "OWNER/NAME" on the hub, or a mere name, for the rows that boards ask for.
    """
    asked = {name for word in names for name in word.split(",")}
    found = {result.task: result for result in results}
    scores = []
    if "open-slm" in asked:
        scores.append(_open_slm(found, parameters, repository))
    if "glint" in asked:
        lm_eval = ("blimp", "arc_easy", "wikitext")
        scores.append(_glint(found, lm_eval, "lm-eval's tasks", parameters))
        own = ("glint_blimp", "glint_arc_easy", "glint_wikitext")
        scores.append(_glint(found, own, "the board's own script", parameters))
    return scores


def normalized(percent: float, chance: float) -> float:
    """0 at chance, 100 when all is right; below chance it is negative."""
    return 100 * (percent - chance) / (100 - chance)


def open_slm_index(
    hellaswag: Figure, arc_easy: Figure, arc_challenge: Figure, piqa: Figure, arithmark: Figure
) -> tuple[Figure, Figure]:
    """(index, average) in percent, of accuracies in percent.

    index = [N(HellaSwag) + N(mean of both ARC) + N(PIQA) + 0.65 N(ArithMark-3.0)] / 3.65 with N of
    `normalized` and chance 25, 25, 50, 25; the average is the same weighted mean without N.
    """
    arc = weighted([(0.5, arc_easy), (0.5, arc_challenge)])
    terms = ((1.0, hellaswag, 25), (1.0, arc, 25), (1.0, piqa, 50), (ARITHMARK_WEIGHT, arithmark, 25))
    total = sum(weight for weight, _, _ in terms)
    index = weighted(
        [
            (weight / total, (normalized(value, chance), _scaled(error, 100 / (100 - chance))))
            for weight, (value, error), chance in terms
        ]
    )
    return index, weighted([(weight / total, figure) for weight, figure, _ in terms])


def glint_scores(
    blimp: Figure, arc_easy: Figure, byte_perplexity: float, parameters: float
) -> tuple[Figure, float, Figure]:
    """(overall, factor of size, efficiency), of accuracies in percent.

    overall = mean(BLiMP, ARC-Easy, W), W = 100 clip(1 - ln(min(p, 500) / 1.86) / ln(500 / 1.86), 0, 1);
    efficiency = overall * [1 + 0.5 clip(ln(150e6 / P) / ln(150e6 / 1e3), 0, 1)]. The perplexity has no
    standard error; those of the accuracies are carried through.
    """
    worst = math.log(WORST_BYTE_PERPLEXITY / BEST_BYTE_PERPLEXITY)
    lost = math.log(min(byte_perplexity, WORST_BYTE_PERPLEXITY) / BEST_BYTE_PERPLEXITY) / worst
    w = 100 * _clip(1 - lost)
    overall = weighted([(1 / 3, blimp), (1 / 3, arc_easy), (1 / 3, (w, 0.0))])
    smallness = math.log(MOST_PARAMETERS / parameters) / math.log(MOST_PARAMETERS / FEWEST_PARAMETERS)
    factor = 1 + 0.5 * _clip(smallness)
    return overall, factor, (overall[0] * factor, _scaled(overall[1], factor))


def weighted(terms: Sequence[tuple[float, Figure]]) -> Figure:
    """The weighted sum of independent figures; its error is unknown where one of theirs is."""
    value = sum(weight * figure[0] for weight, figure in terms)
    errors = [figure[1] for _, figure in terms]
    if any(error is None for error in errors):
        return value, None
    squares = ((weight * (figure[1] or 0.0)) ** 2 for weight, figure in terms)
    return value, math.sqrt(sum(squares))


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))


def _scaled(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor


def _percent(found: Mapping[str, TaskResult], task: str, metric: str) -> Figure:
    value, error = found[task].metrics[metric]
    return 100 * value, _scaled(error, 100)


def _open_slm(found: Mapping[str, TaskResult], parameters: int, repository: str) -> BoardScore:
    protocol = "lm-eval 0-shot acc_norm; ArithMark-3.0 acc_norm per token"
    tasks = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "ArithMark-3.0")
    if missing := tuple(task for task in tasks if task not in found):
        return BoardScore("open-slm", protocol, missing=missing)
    figures = [_percent(found, task, "acc_norm") for task in tasks]
    index, average = open_slm_index(*figures)
    owner, _, name = repository.rpartition("/")
    hellaswag, arc, challenge, piqa, arithmark = (round(value, 2) for value, _ in figures)
    older = _percent(found, "ArithMark-2.0", "acc")[0] if "ArithMark-2.0" in found else None
    row = {
        "name": name,
        "org": owner,
        "params": parameters,
        "paramsDisplay": display(parameters),
        "arc": arc,
        "hellaswag": hellaswag,
        "piqa": piqa,
        "arcChall": challenge,
        "arithmark3": arithmark,
        "arithmark2": None if older is None else round(older, 2),
        "links": {"card": f"https://huggingface.co/{repository}"} if owner else {},
    }
    return BoardScore("open-slm", protocol, {"index": index, "average": average}, row)


def _glint(
    found: Mapping[str, TaskResult], tasks: tuple[str, str, str], protocol: str, parameters: int
) -> BoardScore:
    if missing := tuple(task for task in tasks if task not in found):
        return BoardScore("glint", protocol, missing=missing)
    blimp, arc = (_percent(found, task, "acc") for task in tasks[:2])
    perplexity = found[tasks[2]].metrics["byte_perplexity"][0]
    overall, factor, efficiency = glint_scores(blimp, arc, perplexity, parameters)
    figures = {"overall": overall, "factor of size": (factor, None), "efficiency": efficiency}
    return BoardScore("glint", protocol, figures)


def display(parameters: int) -> str:
    """4.73M for 4,730,240."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{name}"
    return str(parameters)
