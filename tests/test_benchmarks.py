"""The benchmark does not rot: all of it runs, on very little."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench
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
