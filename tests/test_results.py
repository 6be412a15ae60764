"""What is committed: weights, metrics, notebook and README tell the same story."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from IPython.core.inputtransformer2 import TransformerManager

import utils
from benchmarks import tables
from benchmarks.ablations import RECIPES
from checker.operations import count_macs, count_parameters, receptive_field
from checkpoint import labels_sha256, load, load_metrics
from dataset import MEAN, STD, data_folder, load_dataset, make_loader
from device import pick_device, to_device
from model import NETWORKS, build_network
from recipe import Recipe

HERE = Path(__file__).parent.parent
WEIGHTS = HERE / "weights"
NOTEBOOK = json.loads((HERE / "S9.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TESTED = [
    Path("weights", "NetDilated.pt"),
    *(Path("weights", "30-epochs", f"{name}.pt") for name in NETWORKS),
]
SAVED = [*TESTED, *(Path("weights", folder, "NetDilated.pt") for folder in ("teacher", "held-out"))]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]


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


@pytest.mark.parametrize("path", TESTED, ids=str)
def test_committed_weights_reach_the_accuracy_of_their_metrics(path, real_test_set):
    model, metrics = load(path.stem, HERE / path.parent)
    to_device(model, pick_device())  # as in training, and twice as fast
    loss, accuracy = utils.test(model, make_loader(real_test_set, 500))
    assert accuracy == pytest.approx(
        metrics["test_accuracy"], abs=0.021
    )  # two images: hardware rounds differently
    assert loss == pytest.approx(metrics["test_loss"], rel=1e-3)


@pytest.mark.parametrize("path", TESTED, ids=str)
def test_metrics_are_of_this_code(path):
    model, metrics = build_network(path.stem), load_metrics(path.stem, HERE / path.parent)
    measured = count_parameters(model), count_macs(model), receptive_field(model)
    assert measured == (metrics["parameters"], metrics["macs"], metrics["receptive_field"])
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
        table: {name: Recipe(**row["recipe"]) for name, row in tables.ablations()[table].items()}
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
    [("teacher", Recipe().teacher_recipe()), ("held-out", Recipe(validation_size=5000))],
)
def test_the_teacher_and_the_held_out_run_hold_out_the_same_images(folder, recipe):
    assert Recipe(**load_metrics("NetDilated", WEIGHTS / folder)["recipe"]) == recipe


def test_the_temperature_fits_the_held_out_images(real_test_set):
    model, metrics = load("NetDilated", WEIGHTS / "held-out")
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


def test_torch_hub_gives_the_committed_network_and_refuses_damaged_weights(tmp_path):
    hub = torch.hub.load(str(HERE), "net_dilated", source="local", pretrained=True)
    committed = load("NetDilated", WEIGHTS)[0].state_dict()
    assert (
        all(torch.equal(value, committed[key]) for key, value in hub.state_dict().items())
        and not hub.training
    )
    assert torch.hub.load(str(HERE), "net_dilated", source="local").training
    for name in ("hubconf.py", "weights/NetDilated.pt", "weights/NetDilated.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / name, tmp_path / name)
    path = tmp_path / "weights" / "NetDilated.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="NetDilated.pt is "):
        torch.hub.load(str(tmp_path), "net_dilated", source="local", pretrained=True)


@pytest.mark.parametrize("path", SAVED, ids=str)
def test_committed_weights_make_the_same_mistakes_on_the_sample(path):
    """Image for image. Hardware rounds differently, which may turn a few images that are a close
    decision.
    """
    model, metrics = load(path.stem, HERE / path.parent)
    to_device(model, pick_device())
    assert len(set(utils.sample_mistakes(model)) ^ set(metrics["sample_mistakes"])) <= 3


# ---------------------------------------------------------------- README and tables


def test_the_tables_are_up_to_date():
    for path in tables.FILES:
        text = path.read_text()
        assert tables.updated(text) == text, f"{path.name}: run `make tables`"


def test_a_table_that_is_not_up_to_date_is_noticed():
    text, parameters = (
        (HERE / "README.md").read_text(),
        f"{count_parameters(build_network('NetDilated')):,}",
    )
    stale = text.replace(parameters, "199,999")
    assert stale != text and tables.updated(stale) == text


def test_an_unknown_table_and_a_run_without_corruptions_are_named(monkeypatch):
    with pytest.raises(
        ValueError, match="^name of a table is 'resluts': choose one of headline, results, "
    ):
        tables.updated("<!-- resluts -->\n<!-- end -->")
    run = {
        key: value for key, value in tables.runs()[0].items() if key != "accuracy_under_corruptions"
    }
    monkeypatch.setattr(tables, "runs", lambda: [run])
    with pytest.raises(
        ValueError, match="^weights/NetDilated.json has no accuracy_under_corruptions: `make train`"
    ):
        tables.headline()


def test_the_charts_show_every_row(tmp_path):
    names = [
        label.get_text().replace("\n", " ")
        for label in tables.plot_ablations(tmp_path / "ablations.png").axes[0].get_yticklabels()
    ]
    rows = {
        name
        for table in ("10 epochs", "10 epochs, other code")
        for name in tables.ablations()[table]
    }
    assert set(names) == {name for name in rows if not name.startswith("NetDilated")}
    texts = [
        text.get_text()
        for text in tables.plot_comparison(tmp_path / "comparison.png").axes[0].texts
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


def test_the_readme_is_short():
    assert len((HERE / "README.md").read_text().splitlines()) <= 130


# ---------------------------------------------------------------- notebook


def test_the_notebook_was_run_from_top_to_bottom_and_shows_the_metrics():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert not [
        output
        for output in OUTPUTS
        if output.get("name") == "stderr" or output["output_type"] == "error"
    ]
    text = "".join("".join(output.get("text", "")) for output in OUTPUTS)
    assert (
        f"CIFAR-10: test accuracy {load_metrics('NetDilated', WEIGHTS)['test_accuracy']:.2f} %"
        in text
    )


def test_the_numbers_in_the_text_of_the_notebook_are_those_of_the_metrics():
    text = " ".join(
        " ".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"
    )
    text = " ".join(text.split())
    accuracy = {
        name: load_metrics(name, WEIGHTS / "30-epochs")["test_accuracy"] for name in NETWORKS
    }
    names = "PublishedDilated", "PublishedDepthwise"
    better = [accuracy[name] - float(utils.PUBLISHED[name][1].split()[-1]) for name in names]
    ahead = [accuracy["NetDilated"] - accuracy[name] for name in names]
    assert "by up to {:.1f} and by {:.1f} points, in".format(*better) in text
    assert "another {:.1f} and {:.1f} points better".format(*ahead) in text
    metrics = load_metrics("NetDilated", WEIGHTS)
    kinds = metrics["accuracy_under_corruptions"]
    lost = {kind: [values[0] - value for value in values] for kind, values in kinds.items()}
    assert max(lost, key=lambda kind: sum(lost[kind])) == "JPEG" and round(lost["JPEG"][1]) == 8
    assert (
        f"Noise of severity 2, whose standard deviation is 4 % of the scale, costs {lost['noise'][2]:.1f}."
        in text
    )
    assert max(lost["blur"][1], lost["brightness"][1], lost["darkness"][3]) <= 0.5
    before, after = metrics["history"]["test_accuracy"][89:91]  # the images reach their full size
    assert round(after - before) == 2


def test_the_settings_cell_spells_out_the_defaults():
    (source,) = [
        "".join(cell["source"]) for cell in CODE if "headline = Recipe(" in "".join(cell["source"])
    ]
    spelled = source[source.index("Recipe(") : source.index("\n)") + 2]
    assert eval(spelled) == Recipe()
    assert re.findall(r"^    (\w+)=", spelled, re.MULTILINE) == list(Recipe.__dataclass_fields__)


def test_every_code_cell_has_a_sentence_before_it_and_short_lines():
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    assert all(
        before == "markdown"
        for before, kind in zip(kinds, kinds[1:], strict=False)
        if kind == "code"
    )
    assert max(len(line) for cell in CODE for line in "".join(cell["source"]).splitlines()) <= 100


def test_every_figure_has_an_alternative_text_and_the_notebook_is_small():
    alternatives = [
        output["metadata"]["image/png"]["alt"]
        for output in OUTPUTS
        if "image/png" in output.get("data", {})
    ]
    assert len(alternatives) >= 8 and all(alternatives)
    assert (HERE / "S9.ipynb").stat().st_size < 2_000_000


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """The first cell as a function, in an empty folder that looks like Colab; the upload button
    gives a zip file.
    """
    source = TransformerManager().transform_cell("".join(CODE[0]["source"]))
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.chdir(tmp_path)

    def run(upload):
        monkeypatch.setitem(
            sys.modules, "google.colab", SimpleNamespace(files=SimpleNamespace(upload=upload))
        )
        exec(source, {})

    return run


def git_archive(*left_out):
    """Return what uploads a zip file of the repository as a code host makes it, without some of its
    files.
    """

    def upload():
        tree = subprocess.check_output(["git", "write-tree"], cwd=HERE, text=True).strip()
        arguments = [
            "git",
            "archive",
            "--prefix=S9-main/",
            "-o",
            Path("S9.zip").absolute(),
            tree,
            ".",
        ]
        subprocess.run([*arguments, *(f":!{name}" for name in left_out)], cwd=HERE, check=True)
        return {"S9.zip": b""}

    return upload


@pytest.mark.skipif(not (HERE / ".git").exists(), reason="this is no clone")
def test_the_first_cell_unpacks_the_repository_in_colab(first_cell, tmp_path):
    first_cell(git_archive())
    assert (
        Path.cwd() == tmp_path / "S9" / "S9-main" and Path("weights/teacher/NetDilated.pt").exists()
    )


@pytest.mark.skipif(not (HERE / ".git").exists(), reason="this is no clone")
def test_the_notebook_runs_in_colab_from_the_zip_alone(tmp_path):
    """The notebook in an empty folder with nothing but an upload button: it trains and saves in the
    unpacked copy.
    """
    stand_in = tmp_path / "packages" / "google" / "colab"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    (stand_in / "files.py").write_text("""from pathlib import Path
uploads = [{"S9.zip": b""}, {}]
def upload():
    return uploads.pop(0)
""")
    empty = tmp_path / "content"
    empty.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(empty)
        git_archive()()
    shutil.copy(HERE / "S9.ipynb", empty / "notebook.ipynb")
    settings = {
        **json.loads(os.environ["S9_SETTINGS"]),
        "epochs": 1,
        "teacher": None,
        "folder": "run",
    }
    command = "jupyter", "nbconvert", "--to", "notebook", "--execute", "notebook.ipynb"
    run = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=empty,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path / "packages"),
            "COLAB_RELEASE_TAG": "release",
            "S9_SETTINGS": json.dumps(settings),
        },
    )
    assert run.returncode == 0, run.stderr
    assert (empty / "S9" / "S9-main" / "run" / "NetDilated.pt").exists()


@pytest.mark.skipif(not (HERE / ".git").exists(), reason="this is no clone")
def test_the_first_cell_uses_the_copy_that_is_there(first_cell, tmp_path, monkeypatch):
    """As after a restart of the kernel."""
    first_cell(git_archive())
    monkeypatch.chdir(tmp_path)
    first_cell(lambda: pytest.fail("it asked"))
    assert Path.cwd() == tmp_path / "S9" / "S9-main"


@pytest.mark.skipif(not (HERE / ".git").exists(), reason="this is no clone")
def test_the_first_cell_says_what_an_old_repository_lacks(first_cell):
    with pytest.raises(
        FileNotFoundError, match="S9-main lacks recipe.py, sample/test.webp: take a whole copy"
    ):
        first_cell(git_archive("recipe.py", "sample/test.webp"))


def other_zip():
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("readme.txt", "something else")
    return {"other.zip": b""}


@pytest.mark.parametrize(
    "upload, message",
    [
        (other_zip, "S9 lacks checker, checkpoint.py, "),
        (dict, "no file is no zip file: choose that of the repository"),
    ],
)
def test_the_first_cell_says_that_a_file_is_not_the_repository(upload, message, first_cell):
    Path("S9").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        first_cell(upload)


def test_the_first_cell_clones_a_repository_that_has_an_address(first_cell, tmp_path, monkeypatch):
    source = "".join(CODE[0]["source"])
    assert source.count('REPOSITORY = ""') == 1
    lines = TransformerManager().transform_cell(
        source.replace('REPOSITORY = ""', 'REPOSITORY = "address"')
    )
    commands = []

    def system(command):
        commands.append(command)
        Path("S9").mkdir()
        Path("S9/S9.ipynb").touch()

    shell = SimpleNamespace(system=lambda command: system(command.format(REPOSITORY="address")))
    with pytest.raises(FileNotFoundError, match="S9 lacks"):
        exec(lines, {"get_ipython": lambda: shell})
    assert commands == ["git clone -q --depth 1 address S9"]


def test_elsewhere_the_first_cell_asks_for_nothing(first_cell, monkeypatch):
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    with pytest.raises(
        FileNotFoundError, match="lacks checker, .*: take a whole copy of the repository"
    ):
        first_cell(lambda: pytest.fail("it asked"))


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_demo_leaves_the_notebook_alone(tmp_path):
    """The command of `make demo`, on a notebook of one cell."""
    arguments = "-n", "--no-print-directory", "demo", f"RUN={sys.executable}"
    demo = subprocess.check_output(["make", *arguments], cwd=HERE, text=True)
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": "print(6 * 7)",
    }
    before = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (tmp_path / "S9.ipynb").write_text(before)
    subprocess.run(demo[demo.index("S9_SETTINGS=") :], shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "S9.ipynb").read_text() == before
    assert '"42\\n"' in (tmp_path / "demo" / "S9.ipynb").read_text()
