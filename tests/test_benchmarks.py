"""The benchmarks do not rot: all of them run, on very little."""
import json
from dataclasses import replace
from functools import partial

import pytest
from torch import nn

from benchmarks import ablations, bench, quick
from model import NetDilated
from recipe import Recipe
from train import run


class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))


@pytest.fixture(scope="module")
def results(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR10_ROOT", str(root))
        patch.setattr(bench, "SIDES", {name: (network, 8, recipe) for name, (network, _, recipe) in bench.SIDES.items()
                                       if name in (bench.OURS, bench.QUICK, bench.PUBLISHED)})
        patch.setattr(bench, "CORES", 1)
        patch.setattr(bench, "arithmetic", partial(bench.arithmetic, side=64))
        results = bench.main(["--images", "32", "--seconds", "0", "--repeats", "1", "--data", "sample",
                              "--output", str(output)])
    assert json.loads(output.read_text()) == results
    return results


def test_training_steps_are_compared_with_ours(results):
    rows = results["training step"]
    assert list(rows) == [bench.OURS, bench.QUICK, bench.PUBLISHED] and rows[bench.OURS]["ours_is_faster"] == 1
    for row in rows.values():
        assert row["ours_is_faster"] == pytest.approx(rows[bench.OURS]["median"] / row["median"])
        assert row["min"] <= row["median"] <= row["max"] and row["peak_mb"] > 100


def test_shares_lie_between_nothing_and_everything(results):
    assert results["rate of arithmetic, GFLOP/s"]["share"] > 0
    assert 0 <= results["waiting for data, %"] < 100
    pipeline = results["input pipeline"]
    assert all(row["of_the_limit"] > 0 for row in pipeline.values())
    assert pipeline["albumentations alone, 1 worker"]["of_the_limit"] == 1 and "ours, 1 worker" in pipeline
    assert results["evaluation, seconds"]["images"] == 32 and results["evaluation, seconds"]["median"] > 0


def test_time_to_85_is_epochs_times_the_time_of_an_epoch(tmp_path):
    steps = {bench.QUICK: {"median": 1000}, bench.PUBLISHED: {"median": 100}}
    path, good = tmp_path / "quick.json", {"mean_test_accuracy": 85, "runs": [{"recipe": Recipe.quick().to_json()}]}
    path.write_text(json.dumps(good))
    rows, epochs = bench.time_to_85(steps, path), Recipe.quick().epochs
    assert rows[bench.QUICK]["minutes"] == pytest.approx(epochs * 50 / 60)
    assert rows[bench.PUBLISHED]["ours_is_faster"] == pytest.approx(98 / epochs * 10)


@pytest.mark.parametrize("changes", [None, {"mean_test_accuracy": 84.9}, {"runs": [{"recipe": Recipe().to_json()}]}])
def test_a_quick_recipe_that_misses_85_or_is_another_one_does_not_count(changes, tmp_path, capsys):
    good = {"mean_test_accuracy": 85, "runs": [{"recipe": Recipe.quick().to_json()}]}
    if changes:
        (tmp_path / "quick.json").write_text(json.dumps(good | changes))
    assert bench.time_to_85({}, tmp_path / "quick.json") is None
    assert "run `python -m benchmarks.quick` first" in capsys.readouterr().out


@pytest.fixture
def tiny_runs(root, monkeypatch):
    """The runs of the benchmarks train a tiny network."""
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    for module in (ablations, quick):
        monkeypatch.setattr(module, "run", partial(run, build=Tiny))
    return Recipe(data="sample", epochs=2, batch_size=100, sizes=(32,), teacher=None, num_workers=0)


def test_an_ablation_writes_its_row_once(tiny_runs, tmp_path, monkeypatch, capsys):
    recipe = replace(tiny_runs, validation_size=1500)
    monkeypatch.setattr(ablations, "RECIPES", {"table": {"base": recipe, "SGD": replace(recipe, optimizer="SGD")}})
    ablations.main(["SGD"], tmp_path / "rows.json", tmp_path)
    ablations.main([], tmp_path / "rows.json", tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())["table"]
    assert list(rows) == ["SGD", "base"] and rows["SGD"]["recipe"]["optimizer"] == "SGD"
    assert rows["base"]["seconds_an_epoch"] > 0 and 0 <= rows["base"]["validation_accuracy"] <= 100
    capsys.readouterr()
    ablations.main([], tmp_path / "rows.json", tmp_path)
    assert "epoch" not in capsys.readouterr().out


def test_every_ablation_holds_images_out():
    assert all(recipe.validation_size > 0 for recipes in ablations.RECIPES.values() for recipe in recipes.values())


def test_the_quick_runs_take_finished_runs_as_they_are(tiny_runs, tmp_path, capsys):
    arguments = tiny_runs, (0, 1), tmp_path / "quick.json", tmp_path / "quick"
    quick.main(*arguments)
    first = (tmp_path / "quick.json").read_text()
    capsys.readouterr()
    quick.main(*arguments)
    assert (tmp_path / "quick.json").read_text() == first and len(json.loads(first)["runs"]) == 2
    assert capsys.readouterr().out.count("finished before, loaded") == 2


def test_our_training_step_trains_the_network():
    network = NetDilated()
    before = network.O[2].weight.clone()
    bench.our_steps(network, 4, replace(Recipe.quick(), sizes=(8,)))()
    assert not before.equal(network.O[2].weight)
