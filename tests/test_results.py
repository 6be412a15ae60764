"""What is committed: weights, metrics, tables and README tell the same story."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torchvision
from matplotlib.colors import to_rgba

import utils
from benchmarks import ablation_tables, charts, corruption_tables, tables
from benchmarks.ablations import RECIPES
from benchmarks.corruptions import SIMILAR, similar_to_training
from benchmarks.verdicts import ablations
from dataset import MEAN, STD, TRAIN_CORRUPTIONS, data_folder, load_dataset
from device import pick_device, to_device
from loader import make_loader
from model import NetDilated
from pretrained import load, load_metrics
from published import NETWORKS
from recipe import Recipe
from train import labels_sha256

HERE = Path(__file__).parent.parent
WEIGHTS = HERE / "weights"
TESTED = [
    *(Path("weights", folder, "NetDilated.pt") for folder in ("", "robust")),
    *(Path("weights", "30-epochs", f"{name}.pt") for name in NETWORKS),
]
SAVED = [*TESTED, *(Path("weights", folder, "NetDilated.pt") for folder in ("teacher", "held-out"))]


@pytest.fixture(scope="session")
def real_test_set():
    try:
        torchvision.datasets.CIFAR10(data_folder(), train=False)
    except RuntimeError:
        pytest.skip(f"CIFAR-10 is not in {data_folder()}")
    return load_dataset("test")


# ---------------------------------------------------------------- weights and metrics


def test_mean_and_standard_deviation_are_those_of_the_training_set(real_test_set):
    channels, values = load_dataset("train").data.reshape(-1, 3).T, np.arange(256) / 255
    shares = np.stack([np.bincount(channel, minlength=256) / len(channel) for channel in channels])
    mean = shares @ values
    assert mean == pytest.approx(MEAN, abs=6e-5)
    assert np.sqrt(shares @ values**2 - mean**2) == pytest.approx(STD, abs=6e-5)


def test_committed_weights_reach_the_accuracy_of_their_metrics(real_test_set):
    model, metrics = load(NetDilated)
    to_device(model, pick_device())  # as in training, and twice as fast
    loss, accuracy = utils.test(model, make_loader(real_test_set, 500))
    assert accuracy == pytest.approx(
        metrics["test_accuracy"], abs=0.021
    )  # two images: hardware rounds differently
    assert loss == pytest.approx(metrics["test_loss"], rel=1e-3)


@pytest.mark.parametrize("path", TESTED, ids=str)
def test_metrics_are_of_this_code(path):
    model, metrics = NETWORKS[path.stem](), load_metrics(path.stem, HERE / path.parent)
    measured = utils.count_parameters(model), utils.count_macs(model)
    assert measured == (metrics["parameters"], metrics["macs"])
    assert metrics["data"] == "CIFAR-10" and metrics["recipe"]["validation_size"] == 0
    assert {len(column) for column in metrics["history"].values()} == {metrics["recipe"]["epochs"]}
    assert metrics["test_accuracy"] == metrics["history"]["test_accuracy"][-1]


def test_the_headline_runs_have_the_default_recipe():
    recipes = [Recipe(**metrics["recipe"]) for metrics in tables.runs()]
    seeds = [recipe.seed for recipe in recipes]
    assert (
        recipes == [Recipe(seed=seed) for seed in seeds]
        and seeds[0] == 0
        and len(set(seeds)) == len(seeds)
    )


def test_the_ablations_have_the_recipes_of_the_command():
    there = {
        table: {name: Recipe(**row["recipe"]) for name, row in ablations()[table].items()}
        for table in RECIPES
    }
    assert there == RECIPES


def test_the_networks_are_compared_after_equal_epochs_of_one_recipe():
    for name in NETWORKS:
        metrics = load_metrics(name, WEIGHTS / "30-epochs")
        assert Recipe(**metrics["recipe"]) == Recipe(
            network=name, epochs=30, teacher=None, corruption=0
        )


@pytest.mark.parametrize(
    "folder, recipe",
    [
        ("teacher", Recipe().teacher_recipe()),
        ("held-out", Recipe(validation_size=5000)),
        ("robust", Recipe.robust()),
    ],
)
def test_the_other_weights_have_the_recipes_that_are_documented(folder, recipe):
    assert Recipe(**load_metrics("NetDilated", WEIGHTS / folder)["recipe"]) == recipe


def test_the_temperature_fits_the_held_out_images(real_test_set):
    model, metrics = load(NetDilated, WEIGHTS / "held-out")
    size = metrics["recipe"]["validation_size"]
    if (
        labels_sha256(load_dataset("train", validation_size=size).targets)
        != metrics["labels_sha256"]
    ):
        pytest.skip("these training images have another order, so others are held out")
    to_device(model, pick_device())
    held_out = load_dataset("validation", validation_size=size)
    logits, labels = utils.predict(model, make_loader(held_out, 500))
    assert utils.fit_temperature(logits, labels) == pytest.approx(metrics["temperature"], rel=1e-2)
    assert load_metrics("NetDilated", WEIGHTS)["temperature"] == metrics["temperature"]


@pytest.mark.parametrize("path", SAVED, ids=str)
def test_committed_weights_make_the_same_mistakes_on_the_sample(path):
    """Image for image: hardware rounds differently, which may turn a few close decisions."""
    model, metrics = load(NETWORKS[path.stem], HERE / path.parent)
    to_device(model, pick_device())
    mistakes = utils.sample_mistakes(model)
    assert len(set(mistakes) ^ set(metrics["sample_mistakes"])) <= 3
    # and as many as the metrics say, within three standard errors of 1,000 images
    accuracy = metrics.get("test_accuracy") or metrics["validation_accuracy"]
    assert 100 - len(mistakes) / 10 == pytest.approx(accuracy, abs=3)


# ---------------------------------------------------------------- README and tables


def test_missing_losses_leave_gaps_in_the_tables(monkeypatch):
    rows = {
        "NetDilated": {"validation_loss": 0.2, "validation_accuracy": 92},
        "NetDilated, seed 1": {"validation_loss": 0.3, "validation_accuracy": 91},
        "old": {"validation_accuracy": 90},
    }
    monkeypatch.setattr(ablation_tables, "ablations", lambda: {"10 epochs": rows})
    monkeypatch.setattr(ablation_tables, "COMPARED", {("10 epochs", "NetDilated"): ["10 epochs"]})
    base, old = ablation_tables.judged().splitlines()[2:]
    assert base == "| **NetDilated** | 10 | 2 | 0.2500 |  | base | 91.50 |  |"
    assert old == "| old | 10 | 1 |  | not comparable |  | 90.00 | -1.50 ± 11.00 |"
    runs = ablation_tables.all_ablations().splitlines()
    assert runs[2] == "| variant | validation accuracy, % | validation loss |"
    assert runs[-1] == "| old | 90.00 |  |"


def test_the_tables_are_up_to_date():
    for path in tables.FILES:
        text = path.read_text()
        assert tables.updated(text) == text, f"{path.name}: run `make tables`"


def test_a_table_that_is_not_up_to_date_is_noticed():
    text, parameters = (
        (HERE / "README.md").read_text(),
        f"{utils.count_parameters(NetDilated()):,}",
    )
    stale = text.replace(parameters, "199,999")
    assert stale != text and tables.updated(stale) == text


def test_an_unknown_table_is_named():
    with pytest.raises(
        ValueError, match="^name of a table is 'resluts': choose one of headline, corruptions, "
    ):
        tables.updated("<!-- resluts -->\n<!-- end -->")


@pytest.fixture
def corrupted(monkeypatch):
    """Metrics of two networks, of which not both have the same kinds."""
    ours = {"fog": 5 * [91.0], "contrast": [80.0, 85.0, 90.0, 95.0, 100.0], "snow": 5 * [85.0]}
    known = {
        "": {"recipe": {}, "cifar10c": {"accuracies": ours}},
        "teacher": {
            "recipe": {"corruption": 0},
            "cifar10c": {"accuracies": {"contrast": 5 * [60.0], "fog": 5 * [70.0]}},
        },
    }
    monkeypatch.setattr(
        corruption_tables,
        "load_metrics",
        lambda _, folder: known["" if folder == WEIGHTS else folder.name],
    )
    return known


def test_a_network_without_corruptions_is_named(corrupted):
    del corrupted[""]["cifar10c"]
    with pytest.raises(ValueError, match="has no cifar10c: `python evaluate.py weights --corr"):
        corruption_tables.corruptions()


def test_corruptions_are_compared_over_the_kinds_that_both_networks_have(corrupted):
    first, second = corruption_tables.corruptions().splitlines()
    assert first.startswith("Under 2 of [CIFAR-10-C](benchmarks/README.md#cifar-10-c)'s 15 kinds")
    assert first.endswith("seed 0 has 90.5 % accuracy, 91.0 % under the 1")
    assert "AugMix (WRN-40-2, trained on none) 90.9 %." in second  # of 91.54 and 90.32
    assert second.endswith("The teacher, trained on none: 65.0 %.")
    assert max(len(first), len(second)) <= 120
    rows = corruption_tables.cifar10c().splitlines()[2:]
    assert rows[0].startswith("| fog | 91.0 | 70.0 | 88.8 | 91.5 | 94.1 |")
    assert rows[1].startswith("| contrast | 90.0\\* | 60.0 |") and len(rows) == 4
    assert rows[3].startswith("| **mean of the 1 unseen by seed 0** | 91.0 | 70.0 |")


def test_what_is_similar_to_training_depends_on_its_types_of_corruption():
    assert similar_to_training(Recipe()) == [
        "gaussian_noise",
        "shot_noise",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "contrast",
    ]
    assert similar_to_training(Recipe(corruption=0)) == []
    assert similar_to_training(Recipe(corruption_types=("augmix",))) == []
    assert len(similar_to_training(Recipe.robust())) == 10
    assert set(SIMILAR) == set(TRAIN_CORRUPTIONS)


def test_the_chart_of_ablations_shows_every_loss_that_can_be_compared(tmp_path):
    axis = charts.plot_ablations(tmp_path / "ablations.png").axes[0]
    labels = [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]
    rows = {
        re.sub(r", seed \d+$", "", name)
        for table in ("10 epochs", "10 epochs, other code")
        for name, row in ablations()[table].items()
        if "validation_loss" in row
    }
    names = {re.sub(r" \(\d+ seeds\)$", "", label) for label in labels}
    taught = {name for name in names if "teacher" in name}  # where it is comparable
    assert names - taught == rows - {"NetDilated", *charts.SAME_FUNCTION}
    chance, changes = axis.containers
    for interval, change in zip(chance, changes, strict=True):
        outside = abs(change.get_width()) > interval.get_width() / 2
        assert change.get_facecolor() == to_rgba(charts.BLUE if outside else "grey")


def test_the_chart_of_networks_shows_every_row(tmp_path):
    texts = [
        text.get_text()
        for text in charts.plot_comparison(tmp_path / "comparison.png").axes[0].texts
    ]
    references = json.loads((HERE / "benchmarks" / "references.json").read_text())
    assert {row["network"] for row in references} | {
        f"{name}, 30 epochs" for name in NETWORKS
    } <= set(texts)
    assert any(text.startswith("NetDilated, headline recipe") for text in texts)


@pytest.mark.parametrize(
    "path", [*tables.FILES, HERE / "S9.ipynb"], ids=lambda path: str(path.relative_to(HERE))
)
def test_links_exist(path):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    assert all((path.parent / link).exists() for link in links)
