"""The charts of the README and of benchmarks/, from the committed files: `make tables`."""

import json
import statistics
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.tables import EQUAL_EPOCHS, HERE, ROOT, runs
from benchmarks.verdicts import Tables, ablations, by_recipe, judge, variants
from checker.rules import PARAMETER_LIMIT
from model import NetDilated
from plots import BLUE, ORANGE, finish_figure
from pretrained import load_metrics
from published import NETWORKS

SAME_FUNCTION = ["sums and differences of the halves as weights"]  # as NetDilated: not drawn


def main() -> None:
    """Draw every chart."""
    plot_comparison(ROOT / "img" / "comparison_image.png")
    plot_ablations(ROOT / "img" / "ablations_image.png")


def plot_comparison(path: Path) -> plt.Figure:
    """Draw test accuracy against parameters, of our networks and of references."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for row in json.loads((HERE / "references.json").read_text()):
        point(
            axis,
            row["parameters"],
            row["test_accuracy"],
            row["network"],
            "grey",
            "s",
            right=row["label_right"],
        )
    for name, network in NETWORKS.items():
        if network is NetDilated:
            continue
        metrics, published = load_metrics(name, EQUAL_EPOCHS), network.published_accuracy
        parameters, retrained = metrics["parameters"], metrics["test_accuracy"]
        axis.annotate(
            "",
            (parameters, retrained),
            (parameters, published),
            arrowprops={"arrowstyle": "->", "color": BLUE},
        )
        point(axis, parameters, published, "", BLUE, "o", markerfacecolor="white")
        point(
            axis, parameters, retrained, f"{name}, {metrics['recipe']['epochs']} epochs", BLUE, "o"
        )
    right = load_metrics("PublishedDepthwise", EQUAL_EPOCHS)["parameters"]
    axis.annotate(
        "as published (the left one: more than 85)",
        (right, 85.1),
        (-18, -3),
        textcoords="offset points",
        fontsize=9,
        color=BLUE,
        ha="right",
    )
    metrics, headline_runs = load_metrics("NetDilated", EQUAL_EPOCHS), runs()
    ours = statistics.mean(run["test_accuracy"] for run in headline_runs)
    point(
        axis,
        metrics["parameters"],
        metrics["test_accuracy"],
        f"NetDilated, {metrics['recipe']['epochs']} epochs",
        ORANGE,
        "o",
    )
    point(
        axis,
        metrics["parameters"],
        ours,
        f"NetDilated, headline recipe, mean of {len(headline_runs)}: {ours:.2f} ",
        ORANGE,
        "*",
        markersize=16,
    )
    axis.axvline(PARAMETER_LIMIT, color="black", linewidth=1, linestyle=":", zorder=0)
    axis.text(1.015 * PARAMETER_LIMIT, 84.7, f"the limit of {PARAMETER_LIMIT:,}", fontsize=9)
    axis.set(
        xscale="log",
        xlim=(64_000, 560_000),
        xlabel="parameters (logarithmic)",
        ylabel="test accuracy, %",
        title="CIFAR-10 (grey: other networks, as published)",
    )
    axis.set_xticks([100_000, 200_000, 400_000], ["100,000", "200,000", "400,000"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    return finish_figure(figure, path)


def point(
    axis: plt.Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    marker: str,
    right: bool = False,
    **style: object,
) -> None:
    """Draw a point, with its text to the left or to the right of it."""
    axis.plot(x, y, marker, color=colour, **style)
    axis.annotate(
        text,
        (x, y),
        (8 if right else -8, -3),
        textcoords="offset points",
        fontsize=9,
        color=colour,
        ha="left" if right else "right",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def plot_ablations(path: Path) -> plt.Figure:
    """Draw how each change moves the loss in ten epochs, and what chance alone would."""
    tables = ablations()
    compared = {
        place: judge(tables, place, base)
        for place, base in variants(tables)
        if place[0].startswith("10 epochs") and place[1] not in SAME_FUNCTION
    }
    bars = {label(tables, place): verdict for place, verdict in compared.items() if verdict}
    bars = dict(sorted(bars.items(), key=lambda bar: bar[1].difference))
    changes = [bar.difference for bar in bars.values()]
    widths = np.array([bar.half_width for bar in bars.values()])
    colours = [BLUE if bar.outside else "grey" for bar in bars.values()]
    figure, axis = plt.subplots(figsize=(8, 0.38 * len(bars) + 1), layout="constrained")
    axis.barh([*bars], 2 * widths, left=-widths, height=0.9, color="gainsboro")
    drawn = axis.barh([*bars], changes, height=0.5, color=colours)
    axis.bar_label(drawn, [f"{change:+.4f}" for change in changes], padding=3, fontsize=9)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(
        xlim=(min(changes) - 0.015, max(changes) + 0.015),
        xlabel="change of the validation loss: left is better\n"
        "light grey: 95 % interval of chance; blue: outside of it",
        title="Variants of NetDilated after ten epochs",
    )
    axis.invert_yaxis()
    return finish_figure(figure, path)


def label(tables: Tables, place: tuple[str, str]) -> str:
    """Return the name of a recipe in lines, with its number of seeds if it has several."""
    table, name = place
    seeds = len(by_recipe(tables[table])[name])
    return textwrap.fill(f"{name} ({seeds} seeds)" if seeds > 1 else name, 44)


if __name__ == "__main__":
    main()
