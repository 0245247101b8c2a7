"""What a training step would take on a device, from counts and the device's rates: no measurement.

    python benchmarks/roofline.py                        # ant-5m, 64 x 1,024 tokens, T4 to H100
    python benchmarks/roofline.py ant-5m-fit --device T4 --batch-size 32
    python benchmarks/roofline.py --scaling              # several of a device, beside one

For each kernel of a step: FLOPs, other arithmetic, exponentials and bytes (`work`), each divided by what the
device does of it in a second (`devices`); the longest of these is the kernel's time, and the step's time is
the sum. Real kernels take longer: how much longer is shown for every device that has been measured, from the
files in results/ that hold both rates and steps (`pytest benchmarks/test_training.py --benchmark-only` makes
one). Writes results/roofline.json and docs/roofline.png when asked for ant-5m at the usual size.
"""

import argparse
import collections
import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devices import DEVICES, LINKS, Rates
from matplotlib.figure import Figure
from provenance import RESULTS, provenance
from rich.console import Console
from rich.table import Table
from work import OPS, Kernel, Step, ours, traced

from ant5m.files import write_json
from ant5m.model.config_file import load_config
from ant5m.model.costs import count_flops, count_parameters

RUN_TOKENS = 655_360_000  # the published run
VARIANTS = {"transformers": "transformers, eager", "ours": "ant5m"}
PICTURE = Path(__file__).parents[1] / "docs" / "roofline.png"
_HUES = ("#8c8c8c", "#9ecae1", "#08519c", "#6baed6", "#d94801", "#74c476", "#54278f", "#bdbdbd")
COLOURS = dict(zip(OPS, _HUES, strict=True))


@dataclass(frozen=True)
class Prediction:
    """The time of a step and where it goes."""

    variant: str
    rates: Rates
    step: Step
    seconds: dict[tuple[str, str], float]
    """{(op, direction): seconds}"""
    bounds: dict[tuple[str, str], str]
    """what most of that time is spent on: products, arithmetic, exponentials, memory or launches"""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.step.tokens / self.total

    @property
    def minutes(self) -> float:
        """of the published run's 655.36M tokens"""
        return RUN_TOKENS / self.tokens_per_second / 60

    def of(self, op: str) -> float:
        return sum(seconds for (name, _), seconds in self.seconds.items() if name == op)


def predict(variant: str, step: Step, rates: Rates) -> Prediction:
    """`variant`: transformers, a backend of ours, or ours: the one that `auto` takes on the device."""
    return _predict(variant, step, rates, count(rates.backend if variant == "ours" else variant, step))


def count(variant: str, step: Step) -> list[Kernel]:
    """The kernels of a step of `variant`: transformers, or a backend of ours."""
    return traced(variant, step) if variant in ("transformers", "reference") else ours(step, variant)


def _predict(variant: str, step: Step, rates: Rates, kernels: list[Kernel]) -> Prediction:
    spent: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for kernel in kernels:
        seconds, bound = time_of(kernel, rates)
        spent[kernel.op, kernel.direction][bound] += seconds
    return Prediction(
        variant,
        rates,
        step,
        {key: sum(by_bound.values()) for key, by_bound in spent.items()},
        {key: by_bound.most_common(1)[0][0] for key, by_bound in spent.items()},
    )


def time_of(kernel: Kernel, rates: Rates) -> tuple[float, str]:
    """Seconds, and what they are spent on."""
    computing = {
        "products": kernel.flops / rates.flops,
        "arithmetic": kernel.ops / rates.ops,
        "exponentials": kernel.exps / rates.exps,
    }
    bound = max(computing, key=lambda name: computing[name])
    times = {
        bound: computing[bound] if rates.units else sum(computing.values()),
        "memory": kernel.bytes / rates.bytes,
        "launches": kernel.launches * rates.launch,
    }
    slowest = max(times, key=lambda name: times[name])
    return times[slowest], slowest


def checks(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Every measured step beside its prediction from the rates of the same run."""
    found = []
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        where, rates = values.get("provenance", {}), values.get("rates")
        if rates is None:
            continue
        for row in values["benchmarks"]:
            if "variants" in row["info"]:
                found += _check(where, Rates(**rates), row["info"])
    return found


def _check(where: dict[str, Any], rates: Rates, info: dict[str, Any]) -> list[dict[str, Any]]:
    step = Step(load_config(info["preset"]), *info["batch"], half=info["dtype"] != "float32")
    rows = []
    for variant, figures in info["variants"].items():
        if variant in ("transformers-compiled", "transformers-liger"):
            continue  # what others fuse is not counted
        taken = dataclasses.replace(step, optimizer=figures.get("optimizer", "adamw"))
        predicted = predict("ours" if variant == "trainer" else variant, taken, rates)
        measured = figures["tokens_per_second"]
        rows.append(
            {
                "device": where["device"],
                "commit": where["commit"][:9],
                "preset": info["preset"],
                "batch": info["batch"],
                "variant": variant,
                "measured_tokens_per_second": measured,
                "predicted_tokens_per_second": round(predicted.tokens_per_second),
                "measured_over_predicted": round(measured / predicted.tokens_per_second, 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ant-5m", help="preset or config file")
    parser.add_argument("--device", choices=DEVICES, help="default: all")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences a step")
    parser.add_argument("--sequence-length", type=int, help="default: the model's context")
    parser.add_argument("--scaling", action="store_true", help="data parallelism: what several GPUs reach")
    arguments = parser.parse_args()
    if arguments.scaling:
        Console(width=100).print(_scaling_table(arguments.model))
        return
    config = load_config(arguments.model)
    length = arguments.sequence_length or config.max_position_embeddings
    step = Step(config, arguments.batch_size, length, half=True, optimizer="muon")
    devices = [DEVICES[arguments.device]] if arguments.device else list(DEVICES.values())
    counted = {
        variant: count(variant, step) for variant in ("transformers", *{rates.backend for rates in devices})
    }
    predictions = [
        _predict(variant, step, rates, counted[rates.backend if variant == "ours" else variant])
        for rates in devices
        for variant in VARIANTS
    ]
    console = Console(width=120)
    console.print(_work_table(step, counted["transformers"], counted[devices[0].backend]))
    for rates in devices[:1] if arguments.device is None else devices:
        console.print(_op_table([p for p in predictions if p.rates is rates], arguments.model))
    console.print(_summary(predictions))
    checked = checks()
    console.print(
        _check_table(checked) if checked else "No device has been measured: results/ holds no rates."
    )
    if arguments.model == "ant-5m" and not arguments.device and (step.batch_size, length) == (64, 1_024):
        draw(predictions).savefig(PICTURE, dpi=130)
        write_json(RESULTS / "roofline.json", _to_dict(step, predictions, checked))


def scaling(name: str, device: str, tokens: int) -> tuple[float, float, float, float]:
    """Of a step of `tokens` over all devices: milliseconds of one device's share, of the all-reduce at the
    least and at the most, and how much of n times one device is reached at the least."""
    config, rates, link = load_config(name), DEVICES[device], LINKS[device]
    length = config.max_position_embeddings

    def seconds(tokens: int) -> float:
        return predict(
            "ours", Step(config, tokens // length, length, half=True, optimizer="muon"), rates
        ).total

    share = seconds(tokens // link.devices)
    fastest, slowest = link.all_reduce(4 * (sum(count_parameters(config).values()) + 1))
    efficiency = seconds(tokens) / link.devices / (share + slowest)
    return share * 1e3, fastest * 1e3, slowest * 1e3, efficiency


def _scaling_table(name: str) -> Table:
    table = Table(
        "devices", "tokens a step", "share of a step", "all-reduce", "of n times one",
        title=f"PREDICTED for {name}, not measured",
    )  # fmt: skip
    for device, link in LINKS.items():
        for tokens in (8_192, 65_536, 524_288):
            share, fastest, slowest, least = scaling(name, device, tokens)
            most = least * (share + slowest) / (share + fastest)
            table.add_row(
                f"{link.devices} x {device}",
                f"{tokens:,}",
                f"{share:,.1f} ms",
                f"{fastest:.2f} to {slowest:.2f} ms",
                f"{least:.0%} to {most:.0%}",
            )
    table.caption = "; ".join(f"{device}: {link.source}" for device, link in LINKS.items())
    return _right(table)


def _work_table(step: Step, *counted: list[Kernel]) -> Table:
    work = ("MFLOP", "exps", "other ops", "KB", "launches")
    table = Table("op", *work * 2, title="a training step, for each token")
    table.caption = "left: transformers, eager; right: ant5m, all ops fused (launches: of the whole step)"
    for op in OPS:
        table.add_row(op, *(cell for kernels in counted for cell in _work(step, kernels, op)))
    table.add_section()
    table.add_row("all", *(cell for kernels in counted for cell in _work(step, kernels)))
    return _right(table)


def _work(step: Step, kernels: list[Kernel], op: str | None = None) -> list[str]:
    chosen = [kernel for kernel in kernels if op in (None, kernel.op)]
    flops, exps, ops, moved = (
        sum(getattr(kernel, name) for kernel in chosen) / step.tokens
        for name in ("flops", "exps", "ops", "bytes")
    )
    launches = sum(kernel.launches for kernel in chosen)
    return [f"{flops / 1e6:.2f}", f"{exps:,.0f}", f"{ops:,.0f}", f"{moved / 1e3:,.1f}", f"{launches:,.0f}"]


def _op_table(predictions: list[Prediction], model: str) -> Table:
    rates = predictions[0].rates
    table = Table("op", "direction", title=f"PREDICTED milliseconds of a step of {model} on {rates.name}")
    for prediction in predictions:
        table.add_column(VARIANTS[prediction.variant])
        table.add_column("bound by")
    keys = sorted(
        {key for p in predictions for key in p.seconds},
        key=lambda key: (OPS.index(key[0]), key[1] != "forward"),
    )
    for key in keys:
        cells = []
        for prediction in predictions:
            cells += [f"{prediction.seconds.get(key, 0) * 1e3:.2f}", prediction.bounds.get(key, "")]
        table.add_row(*key, *cells)
    table.add_section()
    table.add_row("all", "", *(cell for p in predictions for cell in (f"{p.total * 1e3:.1f}", "")))
    table.caption = (
        f"{rates.flops / 1e12:.0f} TFLOP/s, {rates.bytes / 1e9:,.0f} GB/s, "
        f"{rates.exps / 1e12:.2f}T exponentials/s, {rates.ops / 1e12:.1f}T fp32 ops/s ({rates.source})"
    )
    return _right(table, 2)


def _summary(predictions: list[Prediction]) -> Table:
    table = Table(
        "device", "variant", "ms a step", "tokens/s", "minutes for 655.36M tokens", "TFLOP/s of the model",
        title="PREDICTED from counts and data sheets, not measured",
    )  # fmt: skip
    for prediction in predictions:
        speed = prediction.tokens_per_second
        table.add_row(
            prediction.rates.name,
            VARIANTS[prediction.variant],
            f"{prediction.total * 1e3:,.1f}",
            f"{speed:,.0f}",
            f"{prediction.minutes:,.1f}",
            f"{speed * _model_flops(prediction.step) / 1e12:.1f}",
        )
    return _right(table, 2)


def _model_flops(step: Step) -> int:
    return 3 * sum(count_flops(step.config, step.sequence_length).values())


def _check_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "device", "preset", "batch", "variant", "measured tokens/s", "predicted", "measured / predicted",
        title="the same model on what has been measured",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            *(row["device"], row["preset"], "x".join(map(str, row["batch"])), row["variant"]),
            *(f"{row[f'{kind}_tokens_per_second']:,}" for kind in ("measured", "predicted")),
            f"{row['measured_over_predicted']:.2f}",
        )
    return _right(table, 4)


def _right(table: Table, first: int = 1) -> Table:
    for column in table.columns[first:]:
        column.justify = "right"
    return table


def draw(predictions: list[Prediction]) -> Figure:
    """A row of stacked bars for each device, each with a scale of its own."""
    names = list(dict.fromkeys(p.rates.name for p in predictions))
    figure = Figure(figsize=(9, 1.1 * len(names) + 1.3), layout="constrained")
    grid = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axes, name in zip(grid, names, strict=True):
        shown = [p for p in predictions if p.rates.name == name][::-1]
        for place, prediction in enumerate(shown):
            left = 0.0
            for op in OPS:
                milliseconds = prediction.of(op) * 1e3
                axes.barh(place, milliseconds, left=left, color=COLOURS[op], label=op if place else None)
                left += milliseconds
            text = f" {left:,.0f} ms, {prediction.tokens_per_second / 1e3:,.0f}k tokens/s"
            axes.text(left, place, text, va="center", fontsize=8)
        axes.set_yticks(range(len(shown)), [VARIANTS[p.variant] for p in shown], fontsize=8)
        axes.set_xlim(0, 1.28 * max(p.total for p in shown) * 1e3)
        axes.set_title(name, loc="left", fontsize=9, fontweight="bold", pad=2)
        axes.tick_params(axis="x", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel("milliseconds of a step of 65,536 tokens: predicted, not measured", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(OPS), fontsize=8, frameon=False)
    return figure


def _to_dict(step: Step, predictions: list[Prediction], checked: list[dict[str, Any]]) -> dict[str, Any]:
    where = {
        key: value for key, value in provenance().items() if key not in ("device", "cores", "threads", "load")
    }
    ratios = [row["measured_over_predicted"] for row in checked]
    return {
        "what": "predictions from counts and data sheets; only what stands under 'checked' was measured",
        "provenance": where,
        "step": dataclasses.asdict(step),
        "predictions": [
            {
                "device": p.rates.to_dict(),
                "variant": p.variant,
                "milliseconds": round(p.total * 1e3, 3),
                "tokens_per_second": round(p.tokens_per_second),
                "minutes_for_655M_tokens": round(p.minutes, 2),
                "ops": [
                    {
                        "op": op,
                        "direction": direction,
                        "milliseconds": round(s * 1e3, 3),
                        "bound": p.bounds[op, direction],
                    }
                    for (op, direction), s in p.seconds.items()
                ],
            }
            for p in predictions
        ],
        "checked": checked,
        "median_measured_over_predicted": statistics.median(ratios) if ratios else None,
    }


if __name__ == "__main__":
    main()
