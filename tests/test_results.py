"""What is committed: weights, facts, notebook and README have to tell the same story."""
import contextlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from IPython.core.inputtransformer2 import TransformerManager

import utils
from dataset import MEAN, STD, data_folder, load_dataset, make_loader
from model import build_network, count_macs, count_parameters, receptive_field

HERE = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (HERE / "weights").glob("*.json"))


@pytest.fixture(scope="session")
def real_test_set():
    try:
        torchvision.datasets.CIFAR10(data_folder(), train=False)
    except RuntimeError:
        pytest.skip(f"CIFAR-10 is not in {data_folder()}")
    return load_dataset("test")


def test_mean_and_deviation_are_those_of_the_training_set(real_test_set):
    channels, values = load_dataset("train").data.reshape(-1, 3).T, np.arange(256) / 255
    shares = np.stack([np.bincount(channel, minlength=256) / len(channel) for channel in channels])
    mean = shares @ values
    assert mean == pytest.approx(MEAN, abs=6e-5)
    assert np.sqrt(shares @ values**2 - mean**2) == pytest.approx(STD, abs=6e-5)


def test_ours_is_committed():
    assert "NetDilated" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_weights_reach_the_accuracy_of_their_facts(name, real_test_set):
    model, facts = utils.load(name, HERE / "weights")
    model.to(utils.pick_device(), memory_format=torch.channels_last)  # as in training, and twice as fast
    loss, accuracy = utils.test(model, make_loader(real_test_set, 500))
    assert accuracy == pytest.approx(facts["test_accuracy"], abs=0.021)  # two images: other hardware rounds otherwise
    assert loss == pytest.approx(facts["test_loss"], rel=1e-3)
    flipped = utils.score(*utils.predict(model, make_loader(real_test_set, 500), flip=True))[1]
    assert flipped == pytest.approx(facts["flip_accuracy"], abs=0.021)


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_of_this_code(name):
    model, facts = build_network(name), utils.load_facts(name, HERE / "weights")
    measured = count_parameters(model), count_macs(model), receptive_field(model)
    assert measured == (facts["parameters"], facts["macs"], facts["receptive_field"])
    assert facts["data"] == "CIFAR-10" and facts["settings"].get("validation_size", 0) == 0
    assert {len(column) for column in facts["history"].values()} == {facts["settings"]["epochs"]}
    assert facts["test_accuracy"] == facts["history"]["test_accuracy"][-1]


def test_torch_hub_gives_the_committed_network():
    hub = torch.hub.load(str(HERE), "net_dilated", source="local", pretrained=True)
    committed = utils.load("NetDilated", HERE / "weights")[0].state_dict()
    assert all(torch.equal(value, committed[key]) for key, value in hub.state_dict().items()) and not hub.training
    assert torch.hub.load(str(HERE), "net_dilated", source="local").training


def test_torch_hub_refuses_damaged_weights(tmp_path):
    shutil.copy(HERE / "hubconf.py", tmp_path)
    shutil.copytree(HERE / "weights", tmp_path / "weights")
    path = tmp_path / "weights" / "NetDilated.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RuntimeError, match="NetDilated.pt is damaged, its SHA-256 is not .*: fetch it again"):
        torch.hub.load(str(tmp_path), "net_dilated", source="local", pretrained=True)


def test_readme_shows_the_facts():
    ordered = ["NetDilated", *(name for name in utils.PUBLISHED if name in NAMES)]
    table = utils.comparison_table([utils.load_facts(name, HERE / "weights") for name in ordered])
    text = (HERE / "README.md").read_text()
    assert table in text
    accuracy = utils.load_facts("NetDilated", HERE / "weights")["test_accuracy"]
    assert f"| at least 85 % test accuracy | {accuracy:.2f} % |" in text


def test_the_temperature_is_that_of_the_run_that_held_images_out():
    held_out = utils.load_facts("NetDilated", HERE / "weights" / "held-out")
    facts, text = utils.load_facts("NetDilated", HERE / "weights"), (HERE / "README.md").read_text()
    assert held_out["settings"] == {**facts["settings"], "validation_size": 5000}
    assert facts["temperature"] == round(held_out["temperature"], 2)
    before, after = (f"{facts[name]:.1f}" for name in ("calibration_error", "calibrated_error"))
    assert f"The temperature, {facts['temperature']}, tones" in text and f"from {before} to {after} %" in " ".join(text.split())
    notebook = json.loads((HERE / "S9.ipynb").read_text())
    assert sum(f'"temperature": {facts["temperature"]},' in "".join(cell["source"]) for cell in notebook["cells"]) == 1
    assert sum(f"`temperature`, {facts['temperature']}." in "".join(cell["source"]) for cell in notebook["cells"]) == 1


def test_the_teacher_is_of_the_same_recipe_without_one():
    teacher = utils.load_facts("NetDilated", HERE / "weights" / "teacher")
    facts, text = utils.load_facts("NetDilated", HERE / "weights"), (HERE / "README.md").read_text()
    assert {"teacher": None, **teacher["settings"]} == {**facts["settings"], "teacher": None, "validation_size": 5000}
    assert facts["settings"]["teacher"] == "weights/teacher"
    assert f"{teacher['seconds'] / 60:.0f} minutes, and reaches {teacher['test_accuracy']:.2f} %" in " ".join(text.split())


def test_readme_shows_the_runs():
    folders = [HERE / "weights", *sorted((HERE / "weights").glob("seed-*"))]
    runs, text = [utils.load_facts("NetDilated", folder) for folder in folders], (HERE / "README.md").read_text()
    assert len(runs) == 3
    for seed, run in enumerate(runs):
        assert run["settings"] == {**runs[0]["settings"], "seed": seed}
    accuracies, flipped = ([run[name] for run in runs] for name in ("test_accuracy", "flip_accuracy"))
    seconds = [run["seconds"] / run["settings"]["epochs"] for run in runs]
    assert (f"{' / '.join(f'{accuracy:.2f}' for accuracy in accuracies)} %, a mean of **{statistics.mean(accuracies):.2f} ± "
            f"{statistics.stdev(accuracies):.2f} %** (with flips {statistics.mean(flipped):.2f} %), in "
            f"{min(seconds):.0f} to {max(seconds):.0f} seconds an epoch.") in " ".join(text.split())


@pytest.mark.parametrize("folder", ["held-out", "teacher"])
def test_the_temperature_fits_the_images_that_were_held_out(folder, real_test_set):
    model, facts = utils.load("NetDilated", HERE / "weights" / folder)
    model.to(utils.pick_device(), memory_format=torch.channels_last)
    held_out = load_dataset("validation", validation_size=facts["settings"]["validation_size"])
    logits, labels = utils.predict(model, make_loader(held_out, 500))
    assert utils.fit_temperature(logits, labels) == pytest.approx(facts["temperature"], rel=1e-2)
    assert utils.score(logits, labels)[1] == pytest.approx(facts["test_accuracy"], abs=0.05)


def test_readme_links_exist():
    text = (HERE / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and all((HERE / link).exists() for link in links)


def test_notebook_was_run_from_top_to_bottom_and_shows_the_facts():
    cells = [cell for cell in json.loads((HERE / "S9.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output.get("name") == "stderr" or output["output_type"] == "error"]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    facts = utils.load_facts("NetDilated", HERE / "weights")
    assert f"CIFAR-10: test accuracy {facts['test_accuracy']:.2f} %" in text


def test_every_figure_in_the_notebook_has_an_alternative_text_and_the_notebook_is_small():
    text = (HERE / "S9.ipynb").read_text()
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    alternatives = [output["metadata"]["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(alternatives) >= 8 and all(alternatives) and len(text) < 2_000_000


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_demo_leaves_the_notebook_alone(tmp_path):
    """The command of `make demo`, on a notebook of one cell."""
    arguments = "-n", "--no-print-directory", "demo", f"RUN={sys.executable}"
    demo = subprocess.check_output(["make", *arguments], cwd=HERE, text=True)
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [],
            "source": "print(6 * 7)"}
    before = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (tmp_path / "S9.ipynb").write_text(before)
    subprocess.run(demo[demo.index("S9_SETTINGS="):], shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "S9.ipynb").read_text() == before
    assert '"42\\n"' in (tmp_path / "demo" / "S9.ipynb").read_text()


@pytest.mark.parametrize("chosen, missing", [
    (("model.py", "dataset.py", "utils.py"), None), (("utils.py",), "upload model.py, dataset.py to the folder"),
    ((), "upload model.py, dataset.py, utils.py to the folder")])
def test_the_first_cell_asks_for_the_modules_in_colab(chosen, missing, tmp_path, monkeypatch):
    """With a stand-in for Colab's upload button, which writes the files that were chosen."""
    upload = lambda: [shutil.copy(HERE / name, tmp_path) for name in chosen]
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=SimpleNamespace(upload=upload)))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.chdir(tmp_path)
    first = next(cell for cell in json.loads((HERE / "S9.ipynb").read_text())["cells"] if cell["cell_type"] == "code")
    source = TransformerManager().transform_cell("".join(first["source"]))
    with pytest.raises(FileNotFoundError, match=missing) if missing else contextlib.nullcontext():
        exec(source, {})


def test_readme_shows_the_benchmark():
    text = (HERE / "README.md").read_text()
    results, short = (json.loads((HERE / "benchmarks" / f"{name}.json").read_text()) for name in ("results", "short"))
    for name, row in results["training step"].items():
        assert (f"| {name} | {row['median']:.0f} | {row['lowest']:.0f}, {row['highest']:.0f} | {row['peak_mb']:.0f} MB | "
                f"{row['ours_is_faster']:.2f} times |") in text
    for name, times in results["time to 85 %"]["ours_is_faster"].items():
        minutes = results["time to 85 %"]["minutes"][name]
        time = f"{minutes:.1f} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours"
        assert re.search(rf"\| {name} \| \d+ \| {time} \| {times:.0f} times \|", text)
    for name, row in results["input pipeline"].items():
        assert f"| {name} | {row['median']:.0f} | {row['lowest']:.0f}, {row['highest']:.0f} | {row['of_the_limit']:.0%} |" in text
    assert f"waits {results['waiting for data, %']:.1f} % of its time" in text
    assert f"takes\n{results['evaluation, seconds']['median']:.1f} s" in text
    rate, cost = results["rate of arithmetic, GFLOP/s"], results["cost of the training step, ms an image"]
    assert f"({rate['training step']:.0f} of {rate['matrix product']:.0f} GFLOP/s)" in text
    batches = [row["median"] for name, row in cost.items() if name.startswith("batch size")]
    assert f"({min(batches):.2f} to {max(batches):.2f} ms of a training step)" in text
    assert f"{cost['width times 2']['median'] / cost['width times 1']['median']:.1f} times\nas much" in text
    minutes = [run["seconds"] / 60 for run in short["runs"]]
    assert f"{min(minutes):.1f} to {max(minutes):.1f} minutes on two CPU cores" in text
    accuracies = [run["test_accuracy"] for run in short["runs"]]
    assert f"{' / '.join(f'{accuracy:.2f}' for accuracy in accuracies)} % with seeds 0, 1 and 2" in text
    assert short["mean_test_accuracy"] == pytest.approx(sum(accuracies) / 3) and f"**{sum(accuracies) / 3:.2f} %**" in text
    settings = json.dumps(short["schedule"])[1:-1].replace("null", "None")
    assert settings in text
    notebook = json.loads((HERE / "S9.ipynb").read_text())
    (hurry,) = ["".join(cell["source"]) for cell in notebook["cells"] if settings in "".join(cell["source"])]
    assert f"{sum(accuracies) / 3:.2f} %" in hurry


def test_readme_shows_the_tries():
    text, tries = (HERE / "README.md").read_text(), json.loads((HERE / "benchmarks" / "tries.json").read_text())
    for name, row in tries.items():
        assert (f"| {name} | {row['parameters']:,} | {row['macs'] / 1e6:.1f} M | {row['seconds_an_epoch']:.0f} | "
                f"{row['test_accuracy']:.2f} | {row['test_loss']:.3f} |") in text
