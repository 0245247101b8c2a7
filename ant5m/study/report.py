"""What an experiment says: study.json, study.md and study.png, from the results of its runs."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ant5m.eval.intervals import wilson
from ant5m.eval.loops import PROMPTS
from ant5m.files import write_file, write_json
from ant5m.model.costs import count_flops
from ant5m.schema import Count, CountOrZero, Positive
from ant5m.study.config import CompareConfig
from ant5m.study.statistics import RULE, SMALLEST_EFFECT, Interval, interval, judge, paired
from ant5m.study.studies import CLAIMS, STUDIES, Study, Variant


@dataclass
class _Loops:
    looping: CountOrZero
    texts: CountOrZero


@dataclass
class RunResult:
    """What is relied upon of a run's result.json."""

    variant: str
    seed: int
    rate_factor: Positive
    bits_per_byte: float
    training_tokens: Count
    training_seconds: Positive
    loops: _Loops
    device: str = ""


@dataclass(frozen=True)
class Row:
    """One variant of the table. Numbers of its runs are None before the first of them is done."""

    variant: str
    parameters: int
    flops_per_token: int
    """forward and backward, mean over the context"""
    vocab_size: int
    intermediate_size: int
    bits_per_byte: Interval | None
    difference: Interval | None
    """to the baseline, paired by seed"""
    by_seed: dict[int, float]
    """bits per byte"""
    bigram: float
    """bits per byte of a bigram counted on the training tokens of the first seed"""
    rate_factor: float | None
    """the best of the grid"""
    training_tokens: int | None
    """mean over the runs"""
    bytes_seen: int | None
    tokens_per_second: float | None
    """of all runs together, as they ran: other work on the machine counts too"""
    looping: int | None
    texts: int | None

    @property
    def mean(self) -> float:
        """Bits per byte over the seeds; infinite before the first run."""
        return math.inf if self.bits_per_byte is None else self.bits_per_byte.mean

    @property
    def beats_bigram(self) -> bool:
        return self.mean < self.bigram

    @property
    def loop_rate(self) -> float | None:
        return self.looping / self.texts if self.looping is not None and self.texts else None


def write_report(
    config: CompareConfig,
    study: Study | None,
    variants: list[Variant],
    results: list[dict[str, Any]],
    bigrams: dict[str, float],
    planned: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    """Write the three files into the study's folder.

    Args:
        results: the result.json of each run that is done, with `bytes_seen`.
        bigrams: bits per byte of a bigram counted on what each variant trains on.
        planned: `runs` and, for each variant, `steps`.
        origin: `text` and `versions`.
    """
    rows = summarize(config, variants, results, bigrams)
    verdicts = judge_claims(config.study, rows)
    factor = study.factor if study else "model"
    values = {
        "study": config.name,
        "factor": factor,
        "controlled": describe_controlled(study, rows),
        "baseline": config.baseline,
        "rule": RULE,
        "smallest_effect": SMALLEST_EFFECT,
        "settings": config.identity(),
        "planned": planned,
        "rows": [{**dataclasses.asdict(row), "loop_rate": row.loop_rate} for row in rows],
        "verdicts": verdicts,
        "runs": results,
        **origin,
    }
    write_json(config.folder / "study.json", values)
    write_file(config.folder / "study.md", text(config, study, rows, verdicts, planned, results))
    title = f"{config.name}: {config.tokens:,} tokens a run, {len(results)} of {planned['runs']} runs"
    draw(rows, config.baseline, factor, title, config.folder / "study.png")


def summarize(
    config: CompareConfig, variants: list[Variant], results: list[dict[str, Any]], bigrams: dict[str, float]
) -> list[Row]:
    """One row a variant; of a grid of learning rates the factor with the lowest mean is taken."""
    chosen = {
        variant.name: _best_factor([one for one in results if one["variant"] == variant.name])
        for variant in variants
    }
    taken = [one for one in results if one["rate_factor"] == chosen[one["variant"]]]
    scores = {
        variant.name: {one["seed"]: one["bits_per_byte"] for one in taken if one["variant"] == variant.name}
        for variant in variants
    }
    return [
        _row(
            variant,
            [one for one in taken if one["variant"] == variant.name],
            scores[variant.name],
            None
            if variant.name == config.baseline
            else paired(scores[variant.name], scores[config.baseline]),
            chosen[variant.name],
            bigrams[variant.name],
        )
        for variant in variants
    ]


def _best_factor(results: list[dict[str, Any]]) -> float | None:
    """Only factors with as many seeds as the one that has most are candidates."""
    scores: dict[float, list[float]] = {}
    for one in results:
        scores.setdefault(one["rate_factor"], []).append(one["bits_per_byte"])
    most = max(map(len, scores.values()), default=0)
    whole = [factor for factor, values in scores.items() if len(values) == most]
    return min(whole, key=lambda factor: sum(scores[factor]), default=None)


def _row(
    variant: Variant,
    results: list[dict[str, Any]],
    by_seed: dict[int, float],
    difference: Interval | None,
    rate_factor: float | None,
    bigram: float,
) -> Row:
    def total(key: str) -> float:
        return sum(one[key] for one in results)

    done = bool(results)
    return Row(
        variant=variant.name,
        parameters=variant.parameters,
        flops_per_token=3 * sum(count_flops(variant.model).values()),
        vocab_size=variant.model.vocab_size,
        intermediate_size=variant.model.intermediate_size,
        bits_per_byte=interval(list(by_seed.values())) if done else None,
        difference=difference,
        by_seed=by_seed,
        bigram=bigram,
        rate_factor=rate_factor,
        training_tokens=round(total("training_tokens") / len(results)) if done else None,
        bytes_seen=round(total("bytes_seen") / len(results)) if done else None,
        tokens_per_second=total("training_tokens") / total("training_seconds") if done else None,
        looping=sum(one["loops"]["looping"] for one in results) if done else None,
        texts=sum(one["loops"]["texts"] for one in results) if done else None,
    )


def judge_claims(study: str | None, rows: list[Row]) -> list[dict[str, Any]]:
    """For each published claim its verdict and interval, or which study would test it."""
    by_variant = {row.variant: row for row in rows}
    verdicts = []
    for topic, tester in CLAIMS.items():
        claim = STUDIES[tester].claim
        assert claim
        difference, beats = None, False
        if study == tester and claim.blamed in by_variant and claim.against in by_variant:
            pair = by_variant[claim.blamed], by_variant[claim.against]
            difference = paired(pair[0].by_seed, pair[1].by_seed)
            beats = min(pair, key=lambda row: row.mean).beats_bigram
        verdicts.append(
            {
                "claim": topic,
                "study": tester,
                "tested": study == tester,
                "difference": f"{claim.blamed} minus {claim.against}",
                "interval": dataclasses.asdict(difference) if difference else None,
                "corrected_interval": dataclasses.asdict(difference.corrected()) if difference else None,
                "beats_bigram": beats,
                "verdict": judge(difference, beats) if study == tester else "not decided",
            }
        )
    return verdicts


def describe_controlled(study: Study | None, rows: list[Row]) -> str:
    """What the variants have in common, computed from them."""
    parameters = spread(row.parameters for row in rows)
    flops = spread(row.flops_per_token for row in rows)
    measured = f"parameters differ by up to {parameters:.1%}, FLOPs per token by up to {flops:.1%}"
    if study is None or study.parameters is None:
        return f"neither parameters nor FLOPs are equal: {measured}"
    return f"equal parameters (the SwiGLU's width makes up for the rest): {measured}"


def spread(values: Iterable[int]) -> float:
    """(largest - smallest) / smallest."""
    ordered = sorted(values)
    return ordered[-1] / ordered[0] - 1


def text(
    config: CompareConfig,
    study: Study | None,
    rows: list[Row],
    verdicts: list[dict[str, Any]],
    planned: dict[str, Any],
    results: list[dict[str, Any]],
) -> str:
    """The content of study.md."""
    same = len({row.vocab_size for row in rows}) == 1
    amount = "the same tokens in the same order" if same else "the same bytes of text (not tokens)"
    grid = (
        "One recipe for all variants: a variant that would like another learning rate is at a disadvantage."
        if len(config.rate_factors) == 1
        else f"Each variant at the best of the factors {', '.join(f'{f:g}' for f in config.rate_factors)}, "
        "chosen on the validation split: its interval is a little too good."
    )
    done, devices = len(results), sorted({one["device"] for one in results if one.get("device")})
    unfinished = "" if done == planned["runs"] else f"\n**{done} of {planned['runs']} runs are done.**\n"
    return _REPORT.format(
        name=config.name,
        factor=study.factor if study else "the models",
        note=f"\n{study.note[0].upper()}{study.note[1:]}.\n" if study and study.note else "",
        unfinished=unfinished,
        controlled=describe_controlled(study, rows),
        amount=amount,
        tokens=f"{config.tokens:,}",
        seeds=config.seeds,
        optimizer=config.optimizer,
        devices=f" Run on: {'; '.join(devices)}." if devices else "",
        rates=f"AdamW {config.learning_rate:g}, Muon {config.muon_learning_rate:g}",
        grid=grid,
        baseline=config.baseline,
        head=_HEAD.format(baseline=config.baseline),
        table="\n".join(_line(row, config.baseline) for row in rows),
        effect=SMALLEST_EFFECT,
        prompts=len(PROMPTS),
        rule=RULE,
        verdicts="\n".join(_verdict(one) for one in verdicts),
    )


def _line(row: Row, baseline: str) -> str:
    cells = [
        row.variant,
        f"{row.parameters:,}",
        f"{row.flops_per_token / 1e6:.1f}",
        f"{row.intermediate_size}",
        str(row.bits_per_byte or "-"),
        "baseline" if row.variant == baseline else signed(row.difference),
        f"{row.bigram:.4f}",
        _loops(row),
        f"{row.training_tokens:,}" if row.training_tokens else "-",
        f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "-",
        f"{row.rate_factor:g}" if row.rate_factor else "-",
        f"{row.bits_per_byte.count}" if row.bits_per_byte else "0",
    ]
    return f"| {' | '.join(cells)} |"


def signed(difference: Interval | None) -> str:
    """With the sign in front: below 0 is better than the baseline."""
    if difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} {_brackets(difference)}"


def _loops(row: Row) -> str:
    if row.looping is None or not row.texts:
        return "-"
    low, high = wilson(row.looping, row.texts)
    return f"{row.looping / row.texts:.0%} [{low:.0%}, {high:.0%}]"


def _verdict(one: dict[str, Any]) -> str:
    if not one["tested"]:
        return f"| {one['claim']} | not tested here | `ant5m compare --study {one['study']}` | | |"
    found = Interval(**one["interval"]) if one["interval"] else None
    verdict = one["verdict"] + (" at this budget" if one["verdict"] == "not decided" else "")
    if found and not one["beats_bigram"]:
        verdict += " (no better than a bigram)"
    corrected = Interval(**one["corrected_interval"]) if found else None
    brackets = "-" if corrected is None or corrected.low is None else _brackets(corrected)
    return f"| {one['claim']} | **{verdict}** | {one['difference']} | {signed(found)} | {brackets} |"


def _brackets(value: Interval) -> str:
    return f"[{value.low:+.4f}, {value.high:+.4f}]"


def draw(rows: list[Row], baseline: str, factor: str, title: str, path: Path) -> None:
    """Bits per byte with every seed, the paired differences with the smallest effect, and the loop rates."""
    figure = Figure(figsize=(11, 2 + 0.5 * len(rows)), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    scores, differences, loops = figure.subplots(1, 3, sharey=True)
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        if row.bits_per_byte is not None:
            scores.plot(list(row.by_seed.values()), [place] * len(row.by_seed), ".", color="0.6")
            _whisker(scores, row.bits_per_byte, place)
        scores.plot(row.bigram, place, "|", color="tab:red", markersize=12)
        if row.difference is not None:
            _whisker(differences, row.difference, place)
        if row.looping is not None and row.texts:
            low, high = wilson(row.looping, row.texts)
            _whisker(loops, Interval(row.looping / row.texts, low, high, row.texts), place)
    differences.axvspan(-SMALLEST_EFFECT, SMALLEST_EFFECT, color="0.9", label="too small to matter")
    differences.axvline(0, color="0.5", linewidth=0.8)
    differences.legend(loc="best", fontsize="small")
    scores.set(xlabel="bits per byte, held-out text (red: bigram)", ylabel=factor, yticks=places)
    scores.set_yticklabels([row.variant for row in rows])
    scores.set_ylim(len(rows) - 0.5, -0.5)
    differences.set(xlabel=f"difference to {baseline} (left: better)")
    loops.set(xlabel="share of greedy texts that loop", xlim=(-0.05, 1.05))
    for axes in (scores, differences, loops):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=90)


def _whisker(axes: Any, value: Interval, place: int) -> None:
    reach = None
    if value.low is not None and value.high is not None:
        reach = [[value.mean - value.low], [value.high - value.mean]]
    axes.errorbar(value.mean, place, xerr=reach, fmt="o", color="tab:blue", capsize=3)


_HEAD = (
    "| variant | parameters | MFLOP/token | SwiGLU | bits per byte | minus {baseline} | bigram | loops "
    "| tokens | tokens/s | rate x | seeds |"
)

_REPORT = """# Study: {name}

Varied: {factor}.
{note}{unfinished}
Controlled: {controlled}; {amount}; the same evaluation: bits per byte over the whole validation split,
documents that no run saw. Budget: {tokens} training tokens a run of `{baseline}`, {seeds} seeds,
optimizer {optimizer} unless the study varies it ({rates}). {grid}{devices}

![bits per byte, differences, loops](study.png)

{head}
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

Brackets: 95 % t-intervals over seeds; differences are paired by seed, which decides weights and order of
the data. Loops: share of greedy continuations of {prompts} fixed prompts, over all runs of a variant,
that fall into a loop; the interval is Wilson's and counts texts, not seeds. Tokens/s: as it ran, whatever
else the machine did. Bigram: what counting pairs on the training tokens of one run achieves on the same
held-out text; a model above it has not learned to use its context yet.

## Verdicts
{rule}

| published claim | verdict | difference | bits per byte, 95 % | 98.75 %, which decides |
| --- | --- | --- | --- | --- |
{verdicts}
"""
