"""Saved weights on the test set: what is measured, shown and saved."""

import json

import pytest

import evaluate
import tiny
import utils
from benchmarks import cifar10c
from dataset import load_dataset
from loader import make_loader
from pretrained import WEIGHTS, load_metrics, save
from recipe import Recipe
from tiny import HISTORY, SHORT, Tiny, confident

TINY = ("--data", "tiny", "--network", f"{tiny.__file__}:Tiny")


@pytest.fixture
def saved(tmp_path):
    """The folder of a small network with its weights and metrics."""
    save(Tiny(), {"network": "Tiny", "recipe": SHORT.to_json(), "history": HISTORY}, tmp_path)
    return tmp_path


def exit_of(*arguments):
    with pytest.raises(SystemExit) as end:
        evaluate.main(list(arguments))
    return end.value.code


def test_loss_accuracies_and_calibration_are_those_of_the_logits(monkeypatch):
    """A tenth of the images is taken for the next class, with a confidence of 90 %."""
    dataset, model = load_dataset("test", "tiny"), Tiny()
    logits = confident(dataset, 0.9, 180)
    labels = next(iter(make_loader(dataset, 200)))[1]
    monkeypatch.setattr(utils, "predict", lambda model, loader: (logits, labels))
    monkeypatch.setattr(utils, "sample_mistakes", lambda model: [1, 2])
    results = evaluate.evaluate(model, dataset, temperature=2.0)
    assert results["test_accuracy"] == pytest.approx(90)
    assert list(results["accuracy_by_class"].values()) == [pytest.approx(90)] * 10
    assert results["calibration_error"] == pytest.approx(0, abs=0.01)
    assert results["calibration_error_scaled"] > 10 and results["temperature"] == 2
    assert results["sample_mistakes"] == [1, 2]
    text = evaluate.report(results, "title")
    assert text.startswith("title: 90.00 %, loss 0.") and text.count("90.0 %") == 10


@pytest.fixture
def measured(monkeypatch):
    """The kinds that are measured, in a moment, and from where; at pixelate one can interrupt."""
    kinds = []

    def accuracies_of(model, kind, images, labels, root):
        kinds.append((kind, root))
        if kind == "pixelate" and kinds.count((kind, root)) == 1:
            raise KeyboardInterrupt
        return [50.0, 60.0, 70.0, 80.0, 90.0]

    monkeypatch.setattr(cifar10c, "accuracies_of", accuracies_of)
    for name in ("FROST_ROOT", "CIFAR10C_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return kinds


def test_the_command_shows_accuracy_by_class_and_under_corruptions_if_asked(saved, capsys):
    evaluate.main([str(saved), *TINY])
    text = capsys.readouterr().out
    assert text.startswith("Tiny on a sample of CIFAR-10, 200 images: ") and "airplane" in text
    assert "CIFAR-10-C" not in text


def test_corruptions_are_measured_of_the_sample_and_not_saved(saved, measured, capsys, monkeypatch):
    monkeypatch.setenv("CIFAR10C_ROOT", "files of CIFAR-10")
    before = (saved / "Tiny.json").read_bytes()
    assert exit_of(str(saved), *TINY, "--corruptions") == 130
    evaluate.main([str(saved), *TINY, "--corruptions"])
    text = capsys.readouterr().out
    assert "mean of 14 of 15 kinds" in text and "\nsnow " in text and "200 images, made" in text
    assert (saved / "Tiny.json").read_bytes() == before
    assert {root for _, root in measured} == {None} and len(measured) == 13 + 14


def test_corruptions_are_saved_kind_by_kind_and_an_interrupted_measurement_goes_on(
    saved, measured, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "load_dataset", lambda *_: load_dataset("test", "tiny"))
    command = [str(saved), *TINY[2:], "--corruptions", "--save"]
    assert exit_of(*command) == 130
    kinds = load_metrics("Tiny", saved)["cifar10c"]["accuracies"]
    assert len(kinds) == 12 and list(kinds)[-1] == "elastic_transform"
    evaluate.main(command)
    metrics = load_metrics("Tiny", saved)
    assert len(measured) == 13 + 2 and len(metrics["accuracy_by_class"]) == 10
    assert metrics["cifar10c"]["accuracies"]["pixelate"] == [50, 60, 70, 80, 90]
    assert capsys.readouterr().out.count("\ncontrast ") == 2
    evaluate.main(command)
    assert len(measured) == 15 and load_metrics("Tiny", saved) == metrics
    monkeypatch.setenv("CIFAR10C_ROOT", "there")
    assert "instead of official files: remove" in exit_of(*command)


def test_results_are_saved_but_the_runs_own_figures_stay(saved, monkeypatch):
    monkeypatch.setattr(evaluate, "load_dataset", lambda *_: load_dataset("test", "tiny"))
    evaluate.main([str(saved), *TINY[2:], "--save"])
    metrics = json.loads((saved / "Tiny.json").read_text())
    assert len(metrics["accuracy_by_class"]) == 10 and metrics["history"] == HISTORY
    assert "test_loss" not in metrics  # the history has it
    history = {"validation_loss": [1.0], "seconds": [1.0]}
    save(Tiny(), {"network": "Tiny", "recipe": SHORT.to_json(), "history": history}, saved)
    evaluate.main([str(saved), *TINY[2:], "--save"])  # a run that held out images
    assert 0 <= json.loads((saved / "Tiny.json").read_text())["test_accuracy"] <= 100


def test_only_the_headline_recipe_has_the_temperature_of_the_held_out_run():
    held_out = load_metrics("NetDilated", WEIGHTS / "held-out")["temperature"]
    headline = {"network": "NetDilated", "recipe": Recipe(seed=3).to_json()}
    short = {"network": "NetDilated", "recipe": SHORT.to_json()}
    assert evaluate.temperature_of(headline) == held_out
    assert evaluate.temperature_of({**headline, "network": "Mine"}) == 1
    assert evaluate.temperature_of(short) == 1
    assert evaluate.temperature_of({**short, "temperature": 1.5}) == 1.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "evaluate.py: nowhere/NetDilated.pt is not there: train NetDilated first"),
        (["--data", "MNIST"], "evaluate.py: data is 'MNIST': choose one of CIFAR-10, sample"),
        (["--data", "tiny", "--save"], "evaluate.py: only results on CIFAR-10 are saved"),
        (["--network", "ResNet"], "evaluate.py: network is 'ResNet': choose one of NetDilated"),
        (["--data", "tiny", "--device", "cuda:9"], "evaluate.py: device is 'cuda:9', which is not"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message):
    text = exit_of(*arguments)
    assert text.startswith(message) and "\n" not in text
