"""The benchmark does not rot: all of it runs, on very little."""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench
import short
import tries
import utils
from model import build_network, count_parameters


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR10_ROOT", str(folder))
        results = bench.main(["--images", "32", "--seconds", "0", "--repeats", "1", "--data", "built-in",
                              "--output", str(folder / "r.json")])
    assert json.loads((folder / "r.json").read_text()) == results
    return results


def test_training_steps_are_compared_with_ours(results):
    rows = results["training step"]
    assert list(rows) == list(bench.SIDES) and rows[bench.OURS]["ours_is_faster"] == 1
    for row in rows.values():
        assert row["ours_is_faster"] == pytest.approx(rows[bench.OURS]["median"] / row["median"])
        assert row["lowest"] <= row["median"] <= row["highest"] and row["peak_mb"] > 100


def test_shares_lie_between_nothing_and_everything(results):
    assert 0 < results["rate of arithmetic, GFLOP/s"]["share"] < 1.5
    assert 0 <= results["waiting for data, %"] < 100
    pipeline = results["input pipeline"]
    assert all(row["of_the_limit"] > 0 for row in pipeline.values())
    assert pipeline["albumentations alone, 1 worker"]["of_the_limit"] == 1 and "ours, 1 worker" in pipeline
    assert results["evaluation, seconds"]["images"] == 500 and results["evaluation, seconds"]["median"] > 0
    assert len(results["cost of the training step, ms an image"]) == 10


def test_time_to_85_is_epochs_times_the_time_of_an_epoch(tmp_path):
    path = tmp_path / "short.json"
    steps = {name: {"median": 1000 if name == bench.SHORT else 100} for name in bench.SIDES}
    assert bench.time_to_85(steps, path) is None
    path.write_text(json.dumps({"schedule": bench.SCHEDULE, "mean_test_accuracy": 85.0}))
    result, epochs = bench.time_to_85(steps, path), bench.SCHEDULE["epochs"]
    assert result["minutes"][bench.SHORT] == pytest.approx(epochs * 50 / 60)
    assert result["ours_is_faster"]["PublishedDepthwise, as published"] == pytest.approx(98 / epochs * 10)


@pytest.mark.parametrize("changes", [{"mean_test_accuracy": 84.9}, {"schedule": {"epochs": 1}}])
def test_a_short_schedule_that_misses_85_or_is_another_one_does_not_count(changes, tmp_path, capsys):
    short = {"schedule": bench.SCHEDULE, "mean_test_accuracy": 85.0, **changes}
    (tmp_path / "short.json").write_text(json.dumps(short))
    assert bench.time_to_85({}, tmp_path / "short.json") is None
    assert "run benchmarks/short.py first" in capsys.readouterr().out


def test_the_network_as_wide_as_ours_is_ours():
    ours, same = build_network("NetDilated"), bench.widened(1)
    assert [tuple(p.shape) for p in same.parameters()] == [tuple(p.shape) for p in ours.parameters()]
    assert count_parameters(bench.widened(2)) > 3 * count_parameters(same)


def test_ours_is_among_the_tries():
    ours, same, images = build_network("NetDilated"), tries.Try(**tries.LARGE), torch.randn(2, 3, 32, 32)
    same.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(images), same.eval()(images))


@pytest.mark.parametrize("name", [name for name in tries.IDEAS if "shortcuts" not in name])  # slices can't be told
def test_every_try_keeps_the_rules(name):
    network = tries.Try(**tries.IDEAS[name][0])
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(layer.weight)  # gradients see nothing of a unit that begins as the identity
    assert all(holds for _, _, holds in utils.check_rules(network))


@pytest.fixture
def small_tries(tmp_path, monkeypatch):
    """The tries in one epoch of built-in data, sixteen batches; the path of their file."""
    small = {"data": "built-in", "epochs": 1, "batch_size": 100, "validation_size": 400, "sizes": None}
    monkeypatch.setattr(tries, "IDEAS", {name: (layout, settings | small, *replaced)
                                         for name, (layout, settings, *replaced) in tries.IDEAS.items()})
    monkeypatch.setattr(tries, "HERE", tmp_path / "benchmarks")
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    (tmp_path / "benchmarks").mkdir()
    return tmp_path / "benchmarks" / "tries.json"


def test_a_try_writes_its_row_once(small_tries, capsys):
    tries.main(["as it was, SGD", "Muon"])
    rows = json.loads(small_tries.read_text())
    assert list(rows) == ["as it was, SGD", "Muon"]
    assert rows["Muon"]["settings"]["optimizer"] == "Muon" and rows["Muon"]["settings"]["validation_size"] == 400
    assert rows["Muon"]["parameters"] == count_parameters(tries.Try()) and rows["Muon"]["seconds_an_epoch"] > 0
    capsys.readouterr()
    tries.main(["as it was, SGD"])
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize("name, averages, decay", [("no average of the weights", 0, 0),
                                                   ("weight decay of norms and biases", 8, 5e-4)])
def test_a_try_replaces_what_it_says(name, averages, decay, small_tries, monkeypatch):
    averaged, decays = [], []
    monkeypatch.setattr(utils.Muon, "step", lambda self, closure=None: decays.append(self.param_groups[1]["weight_decay"]))
    monkeypatch.setattr(utils.AveragedModel, "update_parameters", lambda self, model: averaged.append(1))
    before = utils._Run.average_weights, utils.make_optimizer
    tries.main([f"as it is now, {name}"])
    assert len(averaged) == averages and set(decays) == {decay}
    assert (utils._Run.average_weights, utils.make_optimizer) == before


def test_the_short_schedule_takes_finished_runs_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(short, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(short, "SCHEDULE", {"data": "built-in", "epochs": 2, "batch_size": 500})
    monkeypatch.setattr(short, "SEEDS", (0, 1))
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    (tmp_path / "benchmarks").mkdir()
    short.main()
    first = (tmp_path / "benchmarks" / "short.json").read_text()
    capsys.readouterr()
    short.main()
    assert (tmp_path / "benchmarks" / "short.json").read_text() == first
    assert capsys.readouterr().out.count("finished before, loaded") == 2
