"""A picture of the training steps in a results file: tokens a second and peak memory of every variant.

`python benchmarks/bars.py benchmarks/results/FILE.json docs/step.png` draws it again.
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ant5m.files import read_json
from ant5m.kernels import BACKENDS

COLORS = PEER, BACKEND, TRAINER = "tab:gray", "lightgreen", "tab:green"
PANELS = (("tokens_per_second", 1, "tokens/s"), ("peak_bytes", 1e-6, "peak memory, MB"))


def draw_file(source: Path, path: Path) -> None:
    """To `path`, if `source` has steps. `ant5m train` is green, a backend in the usual loop light."""
    results = read_json(source)
    rows = [row["info"] for row in results["benchmarks"] if "variants" in row["info"]]
    if not rows:
        return
    sizes = [len(row["variants"]) + 2 for row in rows]
    figure = Figure(figsize=(8, 0.5 + 0.24 * sum(sizes)), layout="constrained")
    where = results["provenance"]
    figure.suptitle(f"a training step on {where['device']}, commit {where['commit'][:9]}", fontsize="medium")
    grid = figure.subplots(len(rows), len(PANELS), squeeze=False, height_ratios=sizes)
    for row, line in zip(rows, grid, strict=True):
        for axes, (key, scale, label) in zip(line, PANELS, strict=True):
            variants = sorted(row["variants"].items(), key=lambda item: COLORS.index(_color(item[0])))
            _draw_bars(axes, {name: variant[key] * scale for name, variant in variants})
            axes.set_title(f"{row['preset']}: {label}", fontsize="small")
        line[1].set_yticklabels([])
    figure.savefig(path, dpi=120)


def _draw_bars(axes: Axes, values: dict[str, float]) -> None:
    bars = axes.barh(list(values), list(values.values()), color=list(map(_color, values)))
    axes.bar_label(bars, [f"{value:,.0f}" for value in values.values()], padding=3, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False, labelsize="small")


def _color(variant: str) -> str:
    return TRAINER if variant.startswith("trainer") else BACKEND if variant in BACKENDS else PEER


if __name__ == "__main__":
    draw_file(*map(Path, sys.argv[1:]))
