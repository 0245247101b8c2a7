"""How time and peak memory of a training step of `ant-5m` grow with batch, context and vocabulary.

Every variant is a process of its own; those of one size are interleaved. Figures are medians over few rounds:
the shape of a curve is what counts here, `test_training.py` compares the variants.
"""

import dataclasses
import json
import statistics

import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table
from variant import Variant, backends

from ant5m.model.config_file import load_config

VARIANTS = ("transformers", *backends())
# axis: what the sizes count, and for each size [batch, context, vocabulary]
AXES = {
    "batch": {n: (n, 1_024, 16_384) for n in (1, 2, 4, 8, 16)},
    "context": {n: (4_096 // n, n, 16_384) for n in (256, 512, 1_024, 2_048, 4_096)},
    "vocabulary": {n: (4, 1_024, n) for n in (1_024, 4_096, 16_384, 65_536)},
}


@pytest.mark.parametrize("axis", AXES)
def test_growth(benchmark, capsys, tmp_path, results, axis, rounds=3):
    rows = []
    for size, shape in AXES[axis].items():
        rows += [{axis: size, **row} for row in _measure(tmp_path / "model.json", *shape, rounds)]
    benchmark.group = "growth"  # is read when the timing begins
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are in extra_info
    benchmark.extra_info |= {"axis": axis, "rows": rows}
    _draw(axis, rows, results / f"growth-by-{axis}.png")
    table = Table(
        axis, "variant", "s a step", "tokens/s", "peak MB", title=f"a training step of ant-5m by {axis}"
    )
    for row in rows:
        seconds, megabytes = f"{row['seconds']:.3f}", f"{row['peak_bytes'] / 1e6:,.0f}"
        table.add_row(f"{row[axis]:,}", row["variant"], seconds, f"{row['tokens_per_second']:,}", megabytes)
    with capsys.disabled():
        Console().print(table)


def _measure(path, batch_size, context, vocabulary, rounds):
    config = dataclasses.replace(
        load_config("ant-5m"), max_position_embeddings=context, vocab_size=vocabulary
    )
    path.write_text(json.dumps(config.to_dict()))
    variants = [Variant(name, str(path), batch_size, context) for name in VARIANTS]
    for round_ in range(-1, rounds):
        for variant in variants:
            variant.step()
            if round_ < 0:
                variant.seconds.clear()
    for variant in variants:
        variant.close()
    return [
        {
            "variant": variant.name,
            "seconds": round(statistics.median(variant.seconds), 4),
            "tokens_per_second": round(variant.tokens / statistics.median(variant.seconds)),
            "peak_bytes": variant.peak_bytes,
        }
        for variant in variants
    ]


def _draw(axis, rows, path):
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (key, scale, label) in enumerate(
        (("seconds", 1, "s a step"), ("peak_bytes", 1e-6, "peak MB")), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        for variant in VARIANTS:
            points = [(row[axis], row[key] * scale) for row in rows if row["variant"] == variant]
            axes.plot(*zip(*points, strict=True), marker="o", label=variant)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        axes.set_xticks([x for x, _ in points], [f"{x:,}" for x, _ in points])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"a training step of ant-5m by {axis}")
    figure.savefig(path, dpi=120)
