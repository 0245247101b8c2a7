"""The folder that an autopsy leaves: autopsy.json, autopsy.md and its pictures."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from ant5m.eval.autopsy import Autopsy, Finding, Section
from ant5m.files import write_file, write_json


def write(autopsy: Autopsy, folder: Path) -> None:
    """Write everything; what an earlier autopsy left under these names is replaced."""
    for section in autopsy.sections:
        for name, figure in section.figures.items():
            write_file(folder / f"{name}.png", _png(figure))
    write_file(folder / "autopsy.md", markdown(autopsy))
    write_json(folder / "autopsy.json", autopsy.to_dict())


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def markdown(autopsy: Autopsy) -> str:
    """The text of autopsy.md."""
    return _REPORT.format(
        name=autopsy.name,
        text=autopsy.text,
        tokens=f"{autopsy.tokens:,}",
        windows=autopsy.tokens // autopsy.window,
        window=f"{autopsy.window:,}",
        summary="\n".join(f"- {line}" for line in summary(autopsy)),
        sections="\n\n".join(_section(section) for section in autopsy.sections),
    )


def summary(autopsy: Autopsy) -> list[str]:
    """The main findings, a line each, beginning with the loss."""
    loss = f"loss {autopsy.loss.mean:.3f} ± {autopsy.loss.half:.3f} nats per token"
    findings = (finding for section in autopsy.sections for finding in section.findings)
    return [loss, *(finding.summary for finding in findings if finding.summary)]


def _section(section: Section) -> str:
    pictures = "\n\n".join(f"![{name}]({name}.png)" for name in section.figures)
    findings = "\n\n".join(_finding(finding) for finding in section.findings)
    parts = [f"## {TITLES[section.name]}", pictures, findings]
    if longest := section.data.get("longest"):
        parts.append(_longest(longest))
    return "\n\n".join(parts)


def _finding(finding: Finding) -> str:
    return (
        f"### {finding.topic[0].upper()}{finding.topic[1:]}\n"
        f"**{finding.number}**\n\n"
        f"- Beside: {finding.comparison}\n"
        f"- Means: {finding.meaning}\n"
        f"- Does not show: {finding.limits}"
    )


def _longest(loop: dict) -> str:
    quoted = (loop["prompt"] + loop["text"]).replace("\n", "\n> ")
    return f"### The longest loop\n{loop['times']} times in a row, {loop['words']} words:\n\n> {quoted}"


TITLES = {
    "embedding": "Token table",
    "heads": "Heads and RoPE",
    "groups": "Grouped queries",
    "loops": "Loops",
}

_REPORT = """\
# Autopsy of {name}

Evidence, not verdicts: every number has a baseline beside it and says what it does not show. Whether another
architecture would do better takes a controlled run of both.

Looked at {tokens} tokens ({windows} windows of {window}) of the {text}. "±" and intervals are 95 %, from
these windows, so they hold for this text, not for another training seed.

## Summary

{summary}

{sections}
"""
