"""The charts of the README and of benchmarks/, from the committed files: `make tables`."""

import json
import statistics
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import scipy.stats

from benchmarks.tables import EQUAL_EPOCHS, HERE, ROOT, ablations, runs
from checker.rules import PARAMETER_LIMIT
from model import NetDilated
from plots import BLUE, COLOURS, ORANGE, finish_figure
from pretrained import load_metrics
from published import NETWORKS


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
    """Draw how many points each change is worth in ten epochs, and the spread of the seeds."""
    accuracies = {
        name: row["validation_accuracy"]
        for table in ("10 epochs", "10 epochs, other code")
        for name, row in ablations()[table].items()
    }
    unchanged = [accuracies.pop(name) for name in list(accuracies) if name.startswith("NetDilated")]
    base = statistics.mean(unchanged)
    bars = {name: accuracy - base for name, accuracy in accuracies.items()}
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(bars) + 1), layout="constrained")
    names, values = zip(*sorted(bars.items(), key=lambda bar: -bar[1]), strict=True)
    names = [textwrap.fill(name, 44) for name in names]
    drawn = axis.barh(
        names, values, color=[COLOURS[2] if value > 0 else ORANGE for value in values]
    )
    axis.bar_label(drawn, [f"{value:+.2f}" for value in values], padding=3, fontsize=9)
    axis.set(
        xlim=(min(values) - 0.4, max(*values, 0) + 0.4),
        xlabel="percentage points of validation accuracy",
        title=f"Variants after ten epochs (unchanged: {base:.2f} %)",
    )
    if len(unchanged) > 1:
        error = (
            statistics.stdev(unchanged) * (1 + 1 / len(unchanged)) ** 0.5
        )  # of a run's distance from their mean
        half_width = error * scipy.stats.t.ppf(0.975, len(unchanged) - 1)
        axis.axvspan(-half_width, half_width, color="lightgrey", alpha=0.5, zorder=0)
        axis.set_xlabel(
            f"{axis.get_xlabel()}\n"
            f"grey: 95 % prediction interval, unchanged ({len(unchanged)} seeds)"
        )
    axis.invert_yaxis()
    return finish_figure(figure, path)


if __name__ == "__main__":
    main()
