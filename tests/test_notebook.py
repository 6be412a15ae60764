"""The notebook: what is committed, its first cell in Colab, and how it is executed."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from benchmarks import cifar10c, tables
from dataset import FILL, A, train_transform
from pretrained import load_metrics
from published import NETWORKS
from recipe import Recipe

HERE = Path(__file__).parent.parent
NOTEBOOK = json.loads((HERE / "S9.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SOURCES = ["".join(cell["source"]) for cell in CODE]
OUTPUTS = [output for cell in CODE for output in cell["outputs"]]
TEXT = "\n".join(
    "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"
)


def tracked_files():
    """Return the files of the repository; none where there is no git, or no clone of one's own."""
    if not shutil.which("git"):
        return []
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (HERE / name).is_file()]


TRACKED = tracked_files()
IS_CLONE = pytest.mark.skipif(not TRACKED, reason="git can't list the files of the repository")


# ---------------------------------------------------------------- what is committed


def test_it_was_run_from_top_to_bottom_and_shows_the_committed_network():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    kinds = [output.get("name", output["output_type"]) for output in OUTPUTS]
    assert not {"stderr", "error"} & set(kinds)
    text = "".join("".join(output.get("text", "")) for output in OUTPUTS)
    accuracy = load_metrics("NetDilated")["test_accuracy"]
    assert f"when it was trained: {accuracy:.2f} % of CIFAR-10" in text
    assert re.search("CIFAR-10: test accuracy [0-9.]+ %", text)


def test_the_table_on_top_shows_what_is_measured():
    cells = [line.split(" | ") for line in TEXT.splitlines() if line.endswith(" | ✓ |")]
    top = {asked.removeprefix("| "): ours for asked, ours, _ in cells}
    measured = dict(re.findall(r"^\| (.*?) \| (.*?) \|", tables.constraints(), re.MULTILINE))
    assert (
        top["C1C2C3C4O: four blocks of three convolutions"]
        == (measured["three convolutions in each"])
    )
    assert top["a receptive field above 44"] == measured["receptive field above 44"]
    pairs = measured["a depthwise-separable convolution"].split(",")[0]
    dilated = measured["a dilated convolution"]
    assert top["a depthwise-separable and a dilated convolution"] == f"{pairs} and {dilated}"
    assert top["fewer than 200,000 parameters"] == measured["fewer than 200,000 parameters"]
    assert top["at least 85 % test accuracy"] == measured["at least 85 % test accuracy"]
    assert len(top) == 8


def test_the_numbers_in_its_text_are_those_of_the_metrics():
    text = " ".join(TEXT.split())
    accuracy = {name: load_metrics(name, HERE / "weights" / "30-epochs") for name in NETWORKS}
    accuracy = {name: metrics["test_accuracy"] for name, metrics in accuracy.items()}
    names = "PublishedDilated", "PublishedDepthwise"
    better = [accuracy[name] - NETWORKS[name].published_accuracy for name in names]
    ahead = [accuracy["NetDilated"] - accuracy[name] for name in names]
    assert "by up to {:.1f} and by {:.1f} points".format(*better) in text
    assert f"gain up to {max(better):.1f} points" in text
    assert "another {:.1f} and {:.1f} points better".format(*ahead) in text
    metrics = load_metrics("NetDilated")
    kinds, taught = (
        cifar10c.by_kind(each["cifar10c"]["accuracies"])
        for each in (metrics, load_metrics("NetDilated", HERE / "weights" / "teacher"))
    )
    assert "Glass blur, which shuffles pixels, harms it most." in text
    assert min(kinds, key=kinds.get) == "glass_blur"
    assert "The training helps most against noise." in text
    both = kinds.keys() & taught.keys()
    assert "noise" in max(both, key=lambda kind: kinds[kind] - taught[kind])
    assert metrics["calibration_error_scaled"] < metrics["calibration_error"] / 2
    before, after = metrics["history"]["test_accuracy"][89:91]  # the images reach their full size
    assert round(after - before) == 2
    assert f"reach {tables.mean_and_deviation().split()[0]} % of the test set" in text


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_augmentation_in_its_cell_is_that_of_train_transform(p):
    (source,) = [source for source in SOURCES if source.startswith("def augmentation(p)")]
    scope = {"A": A, "FILL": FILL}
    with pytest.warns(UserWarning, match="ShiftScaleRotate is a special case of Affine"):
        exec(source[: source.index("\n\n\n")], scope)
        augmentation = scope["augmentation"](p)
    assert augmentation.to_dict() == train_transform(p).to_dict()


def test_every_code_cell_has_a_sentence_before_it_and_short_lines():
    kinds = [cell["cell_type"] for cell in NOTEBOOK["cells"]]
    pairs = zip(kinds, kinds[1:], strict=False)
    assert all(before == "markdown" for before, kind in pairs if kind == "code")
    assert max(len(line) for source in SOURCES for line in source.splitlines()) <= 100


def test_every_figure_has_an_alternative_text_and_nothing_is_a_widget():
    figures = [output for output in OUTPUTS if "image/png" in output.get("data", {})]
    assert len(figures) >= 8
    assert all(figure["metadata"]["image/png"]["alt"] for figure in figures)
    assert "widgets" not in NOTEBOOK["metadata"]
    assert not [output for output in OUTPUTS if "widget" in " ".join(output.get("data", {}))]


def test_links_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links and all((HERE / link).exists() for link in links)


# ---------------------------------------------------------------- the first cell


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """The first cell as a function, in an empty folder, with what the upload button gives."""
    source = TransformerManager().transform_cell(SOURCES[0])
    monkeypatch.chdir(tmp_path)

    def run(upload, repository=""):
        files = SimpleNamespace(upload=upload)
        monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace(files=files))
        line = 'REPOSITORY = ""'
        assert source.count(line) == 1
        exec(source.replace(line, f"REPOSITORY = {repository!r}"), {"get_ipython": shell})

    return run


def shell():
    """Return a stand-in for IPython, whose `!git clone` makes a folder that is no copy."""
    return SimpleNamespace(
        system=lambda command: (Path("S9").mkdir(), Path(f"S9/{command[:9]}").touch())
    )


def zip_of_the_repository(*left_out):
    """Return what uploads a zip file as a code host makes it, without some of its files."""

    def upload():
        with zipfile.ZipFile("S9.zip", "w") as archive:
            for name in set(TRACKED) - set(left_out):
                archive.write(HERE / name, f"S9-main/{name}")
        return {"S9.zip": b""}

    return upload


def other_zip():
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("readme.txt", "something else")
    return {"other.zip": b""}


COLAB = """
import os, sys, types
first, second = sys.argv[1:]
files = types.SimpleNamespace(upload=lambda: {"S9.zip": b""})
sys.modules["google.colab"] = types.SimpleNamespace(files=files)
exec(first, {})
exec(second, {})
print(os.getcwd())
"""


@IS_CLONE
def test_in_colab_it_imports_everything_from_the_zip_alone(tmp_path):
    """Its first two cells in an empty folder, with nothing but an upload button."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        zip_of_the_repository()()
    cells = [TransformerManager().transform_cell(source) for source in SOURCES[:2]]
    command = [sys.executable, "-c", COLAB, *cells]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split()[-1] == str(tmp_path / "S9" / "S9-main"), run.stderr


@IS_CLONE
def test_the_copy_that_is_there_is_used(first_cell, tmp_path, monkeypatch):
    """As after a restart of the kernel."""
    first_cell(zip_of_the_repository())
    monkeypatch.chdir(tmp_path)
    first_cell(lambda: pytest.fail("it asked"))
    assert Path.cwd() == tmp_path / "S9" / "S9-main"


@IS_CLONE
def test_a_copy_that_lacks_files_is_asked_for_again_and_the_old_one_goes(first_cell, tmp_path):
    with pytest.raises(RuntimeError, match="^this is no whole copy of the repository: run the"):
        first_cell(zip_of_the_repository("sample/test.webp"))
    (tmp_path / "S9" / "old").touch()
    first_cell(zip_of_the_repository())
    assert Path.cwd() == tmp_path / "S9" / "S9-main" and not (tmp_path / "S9" / "old").exists()


@pytest.mark.parametrize("upload", [dict, lambda: {"notes.txt": b""}, lambda: {}[0]])
def test_an_upload_that_fails_says_what_to_set(upload, first_cell):
    with pytest.raises(RuntimeError, match="no zip file .* here: choose one, or set REPOSITORY"):
        first_cell(upload)


def test_another_zip_is_no_copy(first_cell):
    with pytest.raises(RuntimeError, match="^this is no whole copy of the repository"):
        first_cell(other_zip)


def test_a_repository_with_an_address_is_cloned(first_cell, tmp_path):
    with pytest.raises(RuntimeError, match="^this is no whole copy of the repository"):
        first_cell(lambda: pytest.fail("it asked"), repository="address")
    assert (tmp_path / "S9" / "git clone").exists()


# ---------------------------------------------------------------- the commands


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_the_demo_leaves_the_notebook_alone_and_names_every_setting(tmp_path):
    """The command of `make demo`, on a notebook of one cell."""
    arguments = "-n", "--no-print-directory", "demo", f"PY={sys.executable}"
    demo = subprocess.check_output(["make", *arguments], cwd=HERE, text=True)
    command = demo[demo.index("S9_SETTINGS=") :].replace("tools/", f"{HERE}/tools/")
    settings = json.loads(
        re.search("S9_SETTINGS='(.*?)'", command, re.DOTALL)[1].replace("\\\n", "")
    )
    assert set(settings) == set(Recipe.__dataclass_fields__) and Recipe(**settings)
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": "print('test accuracy', 6 * 7)",
    }
    before = json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    (tmp_path / "S9.ipynb").write_text(before)
    run = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "S9.ipynb").read_text() == before
    assert "test accuracy 42" in (tmp_path / "demo" / "S9.ipynb").read_text()
    assert "cell  1 of 1" in run.stdout and "test accuracy 42\nopen demo/S9.ipynb" in run.stdout
    assert run.stderr == ""


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("name, folder", [("headline", "weights"), ("seed-7", "weights/seed-7")])
def test_a_finished_run_is_published(name, folder, tmp_path):
    shutil.copy(HERE / "Makefile", tmp_path)
    make = ["make", "publish", f"RUN={name}"]
    refused = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode and f"runs/{name} has no finished run" in refused.stdout
    (tmp_path / "runs" / name).mkdir(parents=True)
    for ending in ("pt", "json", "ckpt"):
        (tmp_path / "runs" / name / f"NetDilated.{ending}").write_text(ending)
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    copied = sorted(path.name for path in (tmp_path / folder).iterdir())
    assert copied == ["NetDilated.json", "NetDilated.pt"]


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_python_that_is_too_old_is_named_before_anything_is_installed(tmp_path):
    """Simulated: this Python says that it is 3.9."""
    shutil.copy(HERE / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    old = "import sys\nsys.version_info, sys.version = (3, 9, 2, 'final', 0), '3.9.2 (main)'\n"
    (tmp_path / "sitecustomize.py").write_text(old)
    make = ["make", "demo", f"PYTHON={sys.executable}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, env=environment)
    line = f"Python 3.11 or later is needed, {sys.executable} is 3.9.2: make PYTHON=python3.12"
    assert run.returncode and run.stderr.splitlines()[0] == line
    assert not (tmp_path / ".venv").exists()


COMMANDS = """
import evaluate, train
mine, folder = ["--network", "tests/tiny.py:Tiny"], sys.argv[1]
data = ["--data", "tiny"]
train.main(["--quick", *data, *mine, "--batch-size", "50", "--sizes", "8", "--folder", folder])
evaluate.main([folder, *data, *mine, "--corruptions"])
train.main(["--help"])
"""


def test_everything_that_the_commands_print_can_be_printed_under_windows(tmp_path):
    """In cp1252, which lacks arrows."""
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "TQDM_DISABLE": ""}
    command = [sys.executable, "-c", f"import sys{COMMANDS}", str(tmp_path)]
    run = subprocess.run(command, cwd=HERE, capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr.decode("cp1252")
    assert b"CIFAR-10-C" in run.stdout and b"--muon-lr-ratio" in run.stdout
