"""The benchmarks do not rot: all of them run, on very little."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import ablations, bench, cifar10c, quick
from benchmarks.corruptions import CORRUPTIONS
from dataset import load_dataset
from model import NetDilated
from recipe import Recipe
from train import run
from utils import count_macs


class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))


SIDES = {bench.OURS: (Tiny, 8, bench.PLAIN), bench.PUBLISHED: (Tiny, 8, None)}
OPTIONS = ["--images", "32", "--seconds", "0", "--repeats", "1", "--data", "tiny", "--output"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "SIDES", SIDES)
        patch.setattr(bench, "NetDilated", Tiny)
        patch.setattr(bench, "CORES", 1)
        patch.setattr(bench, "arithmetic", partial(bench.arithmetic, side=64))
        patch.setattr(bench, "whole_runs", lambda steps, path: None)  # it needs all sides
        results = bench.main([*OPTIONS, str(output)])
    assert json.loads(output.read_text()) == results
    return results


def test_training_steps_are_compared_with_ours(results):
    rows = results["training step"]
    assert list(rows) == list(SIDES) and rows[bench.OURS]["speedup"] == 1
    for row in rows.values():
        assert row["speedup"] == pytest.approx(rows[bench.OURS]["median"] / row["median"])
        assert row["min"] <= row["median"] <= row["max"] and row["peak_mb"] > 0


def test_rates_of_input_and_evaluation_are_measured(results):
    assert 0 <= results["waiting for data, %"] < 100
    limit, *others = results["input pipeline"].values()
    for row in others:
        assert row["of_the_limit"] == pytest.approx(row["median"] / limit["median"])
    assert "ours, 1 worker" in results["input pipeline"]
    assert (
        results["evaluation, seconds"]["images"] == 32
        and results["evaluation, seconds"]["median"] > 0
    )


def test_a_ratio_is_the_median_of_those_of_each_repeat():
    assert bench.median_ratio([1, 10, 3], [1, 2, 3]) == 1  # that of the medians is 1.5


def test_a_training_step_computes_six_operations_for_each_multiply_accumulate():
    rate = bench.arithmetic({bench.OURS: {"median": 1000}}, torch.device("cpu"), side=64)
    assert rate["training step"] == pytest.approx(6 * count_macs(NetDilated()) * 1000 / 1e9)
    assert rate["share"] == pytest.approx(rate["training step"] / rate["matrix product"])


def test_a_whole_run_is_its_epochs_times_the_time_of_an_epoch(tmp_path):
    steps = {
        bench.QUICK: {"median": 1000},
        bench.HEADLINE: {"median": 200},
        bench.TEACHER: {"median": 300},
        bench.PUBLISHED: {"median": 100},
    }
    path, good = (
        tmp_path / "quick.json",
        {"mean_accuracy": 85, "runs": [{"recipe": Recipe.quick().to_json()}]},
    )
    path.write_text(json.dumps({"test": good}))
    quick, headline, published = bench.whole_runs(steps, path).values()
    assert quick == pytest.approx(Recipe.quick().epochs * 50_000 / 1000 / 60)
    teacher = Recipe().teacher_recipe().epochs * 45_000 / 300
    assert headline == pytest.approx((Recipe().epochs * 50_000 / 200 + teacher) / 60)
    assert published == pytest.approx(98 * 50_000 / 100 / 60)


@pytest.mark.parametrize(
    "changes", [None, {"mean_accuracy": 84.9}, {"runs": [{"recipe": Recipe().to_json()}]}]
)
def test_a_quick_recipe_that_misses_85_or_is_another_one_does_not_count(changes, tmp_path, capsys):
    good = {"mean_accuracy": 85, "runs": [{"recipe": Recipe.quick().to_json()}]}
    if changes:
        (tmp_path / "quick.json").write_text(json.dumps({"test": good | changes}))
    assert bench.whole_runs({}, tmp_path / "quick.json") is None
    assert "run `python -m benchmarks.quick` first" in capsys.readouterr().out


@pytest.fixture
def tiny_runs(monkeypatch):
    """The runs of the benchmarks train a tiny network."""
    for module in (ablations, quick):
        monkeypatch.setattr(module, "run", lambda recipe, build=None: run(recipe, build or Tiny))
    monkeypatch.setattr(ablations, "CORRUPTIONS", ["contrast"])
    return Recipe(data="tiny", epochs=2, batch_size=50, sizes=(32,), teacher=None, num_workers=0)


def test_an_ablation_writes_its_row_once(tiny_runs, tmp_path, monkeypatch, capsys):
    recipe = replace(tiny_runs, validation_size=100)
    monkeypatch.setattr(
        ablations, "RECIPES", {"table": {"base": recipe, "SGD": replace(recipe, optimizer="SGD")}}
    )
    ablations.main(["SGD"], tmp_path / "rows.json", tmp_path)
    ablations.main([], tmp_path / "rows.json", tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())["table"]
    assert list(rows) == ["SGD", "base"] and rows["SGD"]["recipe"]["optimizer"] == "SGD"
    assert 0 <= rows["base"]["mean_accuracy_cifar10c"] <= 100
    assert 0 < rows["base"]["validation_loss_scaled"] < rows["base"]["validation_loss"]
    capsys.readouterr()
    ablations.main([], tmp_path / "rows.json", tmp_path)
    assert "epoch" not in capsys.readouterr().out
    (tmp_path / "rows.json").write_text(json.dumps({"table": {"SGD": {}, "base": rows["base"]}}))
    ablations.main(["SGD"], tmp_path / "rows.json", tmp_path)  # of the run that is finished
    assert json.loads((tmp_path / "rows.json").read_text())["table"] == rows


def test_an_ablation_is_measured_under_all_corruptions_but_frost_wherever_it_is(monkeypatch):
    monkeypatch.setenv("FROST_ROOT", "anywhere")
    monkeypatch.setenv("CIFAR10C_ROOT", "anywhere")
    seen = []

    def accuracies_of(model, kind, images, labels):
        seen.append(kind)
        return 5 * [len(images) + len(seen)]

    monkeypatch.setattr(cifar10c, "accuracies_of", accuracies_of)
    dataset = load_dataset("test", "tiny")
    mean = ablations.mean_accuracy_cifar10c(Tiny(), dataset, 50)
    assert set(seen) == set(CORRUPTIONS) - {"frost"} and mean == 50 + sum(range(1, 15)) / 14


def test_a_side_that_dies_ends_the_measurement():
    with pytest.raises(EOFError):
        bench.serve(print)


def test_an_unknown_row_is_named(tmp_path):
    with pytest.raises(ValueError, match="row is 'max_lr 9': choose one of NetDilated, "):
        ablations.main(["max_lr 9"], tmp_path / "rows.json")


def test_every_ablation_holds_images_out():
    assert all(
        recipe.validation_size > 0
        for recipes in ablations.RECIPES.values()
        for recipe in recipes.values()
    )


def test_the_quick_runs_take_finished_runs_as_they_are(tiny_runs, tmp_path, capsys):
    arguments = tiny_runs, (0, 1), tmp_path / "quick.json", tmp_path / "quick"
    quick.main(0, *arguments)
    first = json.loads((tmp_path / "quick.json").read_text())
    capsys.readouterr()
    quick.main(0, *arguments)
    assert capsys.readouterr().out.count("finished before, loaded") == 2
    quick.main(100, *arguments)
    second = json.loads((tmp_path / "quick.json").read_text())
    assert second["test"] == first["test"] and len(first["test"]["runs"]) == 2
    accuracies = [run["validation_accuracy"] for run in second["validation"]["runs"]]
    assert second["validation"]["mean_accuracy"] == pytest.approx(sum(accuracies) / 2)


def test_our_training_step_trains_the_network():
    network = NetDilated()
    before = network.O[-1].weight.clone()
    bench.our_steps(network, 4, replace(Recipe.quick(), sizes=(8,)))()
    assert not before.equal(network.O[-1].weight)
