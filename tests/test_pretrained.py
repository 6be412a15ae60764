"""Trained weights and their metrics: saved and loaded, damaged, foreign, and by torch.hub."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pretrained
import utils
from model import NetDilated
from pretrained import add_metrics, load, load_metrics, save, write_file
from recipe import seed_everything
from tiny import SHORT, Code, Tiny, equal, state

HERE = Path(__file__).parent.parent
HISTORY = {"train_loss": [2.0, 1.0], "test_accuracy": [21.0, 65.0], "seconds": [3.0, 4.0]}
METRICS = {
    "network": "NetDilated",
    "hardware": "this machine",
    "test_accuracy": 65.0,
    "recipe": SHORT.to_json(),
    "history": HISTORY,
}


def unreadable(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_saved_weights_and_metrics_come_back(tmp_path):
    seed_everything(0)
    model = NetDilated()
    metrics = save(model, METRICS, tmp_path / "new")
    loaded, loaded_metrics = load(NetDilated, tmp_path / "new")
    assert equal(state(model), state(loaded)) and not loaded.training
    assert loaded_metrics == load_metrics("NetDilated", tmp_path / "new") == metrics
    assert METRICS.items() <= json.loads((tmp_path / "new" / "NetDilated.json").read_text()).items()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "NetDilated.json",
        "NetDilated.pt",
    ]


def test_weights_and_metrics_of_different_runs_are_told_apart(tmp_path):
    for folder in ("one", "other"):
        save(NetDilated(), METRICS, tmp_path / folder)
    (tmp_path / "other" / "NetDilated.pt").replace(
        tmp_path / "one" / "NetDilated.pt"
    )  # as if killed in between
    with pytest.raises(
        ValueError, match="^.*NetDilated.pt is not the file that NetDilated.json tells of: [^\n]*$"
    ):
        load(NetDilated, tmp_path / "one")


def test_weights_that_are_missing_or_of_another_network_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="^.*NetDilated.pt is not there: train NetDilated first[^\n]*$"
    ):
        load(NetDilated, tmp_path)
    torch.save(Tiny().state_dict(), tmp_path / "NetDilated.pt")
    with pytest.raises(
        ValueError, match="^.*NetDilated.pt is damaged or holds another network than NetD[^\n]*$"
    ):
        load(NetDilated, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"\xff"],
    ids=["empty", "cut off", "an empty dictionary", "a list", "not UTF-8"],
)
def test_metrics_that_are_none_are_named(content, tmp_path):
    save(NetDilated(), METRICS, tmp_path)
    (tmp_path / "NetDilated.json").write_bytes(content)
    with pytest.raises(
        ValueError,
        match="^.*NetDilated.json holds no metrics [^\n]*: train NetDilated again[^\n]*$",
    ):
        load(NetDilated, tmp_path)


def test_metrics_that_are_missing_are_named(tmp_path):
    save(NetDilated(), METRICS, tmp_path)
    (tmp_path / "NetDilated.json").unlink()
    with pytest.raises(
        FileNotFoundError, match="^.*NetDilated.json is not there: train NetDilated again[^\n]*$"
    ):
        load(NetDilated, tmp_path)


@pytest.mark.parametrize("thing", ["NetDilated", NetDilated(), [], dict])
def test_what_makes_no_network_is_refused(thing):
    with pytest.raises(TypeError, match=r" makes no network: give its class, as in load\(NetDil"):
        load(thing)


def test_a_network_of_ones_own_comes_back_by_its_class_or_a_builder(tmp_path):
    model = Tiny()
    save(model, {**METRICS, "network": "Tiny"}, tmp_path)
    for build in (Tiny, lambda: Tiny()):
        loaded, metrics = load(build, tmp_path)
        assert equal(state(model), state(loaded)) and metrics["network"] == "Tiny"


def test_of_a_wrapped_network_the_inner_one_is_saved(tmp_path):
    model = Tiny()
    for number, wrapped in enumerate(
        (nn.DataParallel(model), torch.compile(nn.DataParallel(model), backend="eager"))
    ):
        metrics = utils.run_metrics(wrapped, SHORT, {"seconds": [1.0]}, "data")
        assert metrics["network"] == "Tiny"
        save(wrapped, metrics, tmp_path / str(number))
        assert equal(state(load(Tiny, tmp_path / str(number))[0]), state(model))


def whole_model():
    buffer = io.BytesIO()
    torch.save(Tiny(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"not one of ours", pickle.dumps(print, protocol=2), whole_model()]
)
def test_a_foreign_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "NetDilated.pt").write_bytes(content)
    message = "^.*NetDilated.pt is damaged or holds another network [^\n]*$"
    with pytest.raises(ValueError, match=message) as error:
        load(NetDilated, tmp_path)
    reason = re.search(r"\((.*)\): train it again", str(error.value))[1]
    assert re.search("[A-Za-z]{4}", reason) and "\x1b" not in reason and len(reason) <= 200


def test_a_file_that_would_run_code_is_refused(tmp_path):
    trap = tmp_path / "trap"
    torch.save({"weight": Code(trap)}, tmp_path / "NetDilated.pt")
    with pytest.raises(ValueError, match="is damaged or .*[Ww]eights.only"):
        load(NetDilated, tmp_path)
    assert not trap.exists()


def test_a_run_saved_again_keeps_its_metrics_unless_a_file_is_harmed(tmp_path):
    model, again = NetDilated(), {**METRICS, "hardware": "another machine"}
    metrics = save(model, METRICS, tmp_path)
    metrics = add_metrics(metrics, tmp_path, temperature=1.5)
    assert metrics["temperature"] == 1.5 and METRICS.items() <= metrics.items()
    assert save(model, again, tmp_path) == load(NetDilated, tmp_path)[1] == metrics
    for name, content in (
        ("NetDilated.pt", b"damaged"),
        ("NetDilated.json", b"{"),
        ("NetDilated.json", b"{}"),
    ):
        save(model, METRICS, tmp_path)
        (tmp_path / name).write_bytes(content)
        assert save(model, again, tmp_path)["hardware"] == "another machine"
        assert equal(state(model), state(load(NetDilated, tmp_path)[0]))
    other = {**METRICS, "history": {**HISTORY, "seconds": [3.0, 5.0]}}
    assert save(model, other, tmp_path)["history"] == other["history"]


def test_weights_that_cannot_be_read_are_not_taken_for_damaged_ones(tmp_path, monkeypatch):
    save(NetDilated(), METRICS, tmp_path)
    monkeypatch.setattr(pretrained.torch, "load", lambda path, **options: unreadable(path))
    with pytest.raises(PermissionError, match="NetDilated.pt"):
        load(NetDilated, tmp_path)


def test_nothing_is_overwritten_before_its_replacement_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(descriptor):
        assert (tmp_path / "figure.png.new").read_bytes() == b"new" and path.read_bytes() == b"old"
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full: '.*figure.png'"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_file(path, b"new", keep=tmp_path / "kept.png")
    assert path.read_bytes() == b"new" and (tmp_path / "kept.png").read_bytes() == b"old"


def test_where_the_old_file_cannot_be_replaced_both_are_kept_and_named(tmp_path, monkeypatch):
    """As where a virus scanner or OneDrive holds it, on Windows."""
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def denied(old, new):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(OSError, match="Access is denied: the old file stays, the new one is .*new"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert path.with_name("figure.png.new").read_bytes() == b"new"
    assert pretrained.advice(OSError(errno.EACCES, "")) == ""
    assert pretrained.advice(OSError(errno.ENOSPC, "")) == "; make room"


# ---------------------------------------------------------------- torch.hub


STRANGER = """
import sys
import torch
if sys.argv[2] == "before":
    import model, pretrained, checks, recipe
hub = torch.hub.load(sys.argv[1], "net_dilated", source="local", pretrained=True)
assert torch.hub.load(sys.argv[1], "net_dilated", source="local").training
import model, pretrained, checks, recipe  # the stranger's own
assert {module.mine for module in (model, pretrained, checks, recipe)} == {True}
heavy = {"torchvision", "albumentations", "cv2", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
torch.save([hub.training, hub.state_dict()], "hub.pt")
"""


@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_torch_hub_gives_the_committed_network_to_a_program_with_modules_of_these_names(
    when, tmp_path
):
    for name in ("model", "pretrained", "checks", "recipe"):
        (tmp_path / f"{name}.py").write_text("mine = True\n")
    (tmp_path / "program.py").write_text(STRANGER)
    command = [sys.executable, "program.py", str(HERE), when]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    training, weights = torch.load(tmp_path / "hub.pt", weights_only=True)
    assert not training and equal(weights, state(load(NetDilated)[0]))


def test_torch_hub_refuses_damaged_weights(tmp_path):
    for name in (
        "hubconf.py",
        "model.py",
        "pretrained.py",
        "weights/NetDilated.pt",
        "weights/NetDilated.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(HERE / name, tmp_path / name)
    path = tmp_path / "weights" / "NetDilated.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="NetDilated.pt is "):
        torch.hub.load(str(tmp_path), "net_dilated", source="local", pretrained=True)
