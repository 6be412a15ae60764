"""The whole experiment, `train.run`, and the command line."""

import multiprocessing
import os
import runpy
import signal
import sys
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import nn

import tiny
import train
import utils
from dataset import load_dataset, train_transform
from loader import make_loader
from model import NetDilated
from pretrained import inner_network, load, load_metrics, save
from published import NETWORKS
from recipe import Recipe
from tiny import SHORT, Tiny, equal, state


@pytest.fixture(autouse=True)
def one_thread_and_no_clock(monkeypatch):
    monkeypatch.setitem(NETWORKS, "NetDilated", Tiny)
    monkeypatch.setattr(train, "announce", lambda recipe, build: "a while")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exit_of(*arguments):
    """Return what the program says, or its number, when it ends itself."""
    with pytest.raises(SystemExit) as end:
        train.main(list(arguments))
    return end.value.code


TINY = (
    "--data",
    "sample",
    "--teacher",
    "None",
    "--batch-size",
    "100",
    "--num-workers",
    "0",
    "--epochs",
    "1",
)


# ---------------------------------------------------------------- the clock


def test_the_clock_times_two_steps_at_each_size_and_leaves_the_random_generators_alone(monkeypatch):
    """A step takes a second and a second more at each size: 3 epochs of 10 steps at 8 pixels, and 1
    of 16.
    """
    now, steps = [0.0], []

    def slow(model, batches, recipe, epoch, optimizer, teacher):
        assert bool(teacher) == bool(recipe.teacher)
        steps.append(recipe.image_size(epoch))
        now[0] += len(batches) * recipe.image_size(epoch)
        torch.rand(1)

    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(utils, "train", slow)
    before = torch.get_rng_state()
    recipe = Recipe(epochs=4, sizes=(8, 8, 8, 16), batch_size=100)
    assert train.estimate(recipe, 1000, torch.device("cpu")) == 3 * 10 * 8 + 1 * 10 * 16
    assert sorted(steps) == [8, 8, 16, 16] and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "seconds, text", [(49.6, "50 s"), (119, "2 min"), (3599, "1 h 0 min"), (11_400, "3 h 10 min")]
)
def test_a_time_is_said_as_a_person_would(seconds, text):
    assert train.duration(seconds) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (80, "80 s of training steps on some processor"),
        (
            7200,
            "2 h 0 min of training steps on some processor; Recipe.quick() takes minutes (--quick)",
        ),
    ],
)
def test_a_run_is_announced_in_one_line(seconds, text, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(train, "estimate", lambda *_: seconds)
    monkeypatch.setattr(train, "hardware", lambda device: "some processor")
    recipe = replace(SHORT, teacher=None)
    assert train.announce(recipe) == f"a whole run of 4 epochs: about {text}"
    assert "of 1 epoch:" in train.announce(replace(recipe, epochs=1))


def test_a_batch_that_is_too_large_is_refused_before_anything_is_timed(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(train, "estimate", lambda *arguments: pytest.fail("it is timed"))
    with pytest.raises(
        ValueError, match="^batch_size is 2001: choose 1 to 2000, the size of the data set$"
    ):
        train.announce(replace(SHORT, teacher=None, batch_size=2001))


# ---------------------------------------------------------------- the whole experiment


def test_a_held_out_run_is_measured_on_the_validation_images_and_saved(tmp_path):
    recipe = replace(SHORT, epochs=2, validation_size=1700, teacher=None, folder=str(tmp_path))
    model, metrics = train.run(recipe, build=Tiny)
    assert [column for column in metrics["history"] if "test" in column] == []
    validation = make_loader(load_dataset("validation", "sample", 1700), 500)
    logits, labels = utils.predict(model, validation)
    assert (metrics["validation_loss"], metrics["validation_accuracy"]) == pytest.approx(
        utils.test(model, validation), rel=1e-5
    )
    assert metrics["temperature"] == pytest.approx(utils.fit_temperature(logits, labels), rel=1e-5)
    assert metrics["recipe"] == recipe.to_json() and "a sample of CIFAR-10" in metrics["data"]
    assert load_metrics("Tiny", tmp_path) == metrics
    assert equal(torch.load(tmp_path / "Tiny.pt", weights_only=True), state(model.cpu()))


def test_a_finished_run_is_loaded_with_its_metrics(tmp_path, monkeypatch):
    recipe = Recipe.quick(data="sample", epochs=1, batch_size=200, num_workers=0, folder=tmp_path)
    model, metrics = train.run(recipe)
    assert (
        metrics["test_accuracy"] == metrics["history"]["test_accuracy"][-1]
        and "temperature" not in metrics
    )
    monkeypatch.setattr(utils, "train", lambda *arguments: pytest.fail("it trains again"))
    monkeypatch.setattr(utils, "hardware", lambda device: "another machine")
    again, same = train.run(recipe)
    assert same == metrics and equal(state(again), state(model))


def test_a_run_learns_from_the_teacher_in_the_folder_that_its_recipe_names(tmp_path, monkeypatch):
    recipe, given = replace(SHORT, teacher=str(tmp_path / "teacher"), folder=str(tmp_path)), []
    with pytest.raises(
        FileNotFoundError,
        match="^teacher is .*teacher', which lacks NetDilated.pt or NetDilated.json",
    ):
        train.run(recipe)
    teacher, history = NetDilated(), {"test_accuracy": [10.0], "seconds": [1.0]}
    save(teacher, utils.run_metrics(teacher, SHORT, history, "sample"), recipe.teacher)
    monkeypatch.setattr(train, "fit", lambda *arguments: given.append(arguments[4]) or history)
    train.run(recipe)
    assert equal(state(given[0]), state(teacher)) and not given[0].training


def test_fine_tuning_begins_with_the_teacher_and_ends_between_it_and_the_mean_of_all_epochs(
    tmp_path, monkeypatch
):
    """Each of four epochs adds 1 to all weights. The second one is interrupted once."""
    teacher, metrics = Tiny().eval(), {"history": {}, "recipe": SHORT.to_json()}
    save(teacher, {**metrics, "network": "Tiny"}, tmp_path / "teacher")
    save(NetDilated(), {**metrics, "network": "NetDilated"}, tmp_path / "teacher")
    recipe = replace(SHORT, teacher=str(tmp_path / "teacher"), folder=str(tmp_path))
    recipe = replace(recipe, epochs=4, wise_ft_alpha=0.25)
    with pytest.raises(ValueError, match="^network is 'Tiny': choose NetDilated, the teacher's"):
        train.run(recipe)
    monkeypatch.setattr(train, "NetDilated", Tiny)
    seen = []

    def learn(model, *_):
        seen.append(state(model))
        for value in model.state_dict().values():
            value += 1
        if len(seen) == 2:
            raise KeyboardInterrupt
        return 1.0, 50.0

    monkeypatch.setattr(utils, "train", learn)
    with pytest.raises(KeyboardInterrupt):
        train.run(recipe)
    model, metrics = train.run(recipe)
    assert equal(seen[0], state(teacher)) and equal(seen[2], seen[1]) and len(seen) == 5
    for mine, start in zip(state(model).values(), state(teacher).values(), strict=True):
        if mine.is_floating_point():  # not the number of batches
            assert mine.allclose(start + 0.25 * (1 + 2 + 3 + 4) / 4)
    loader = make_loader(load_dataset("test", SHORT.data), 500)
    assert utils.test(model, loader)[1] == metrics["test_accuracy"]
    again, _ = train.run(recipe)  # from the checkpoint of the finished run
    assert equal(state(again), state(model)) and len(seen) == 5


METRICS = {"network": "NetDilated", "recipe": SHORT.to_json(), "history": {"seconds": [1.0]}}
LABELS = [number % 10 for number in range(2000)]


def test_a_teacher_is_one_of_the_same_data(tmp_path):
    model = NetDilated()
    save(model, METRICS, tmp_path)
    recipe = replace(SHORT, teacher=str(tmp_path))
    teacher = train.load_teacher(recipe, LABELS)
    assert equal(state(teacher), state(model)) and not teacher.training
    with pytest.raises(
        ValueError,
        match=f"^teacher is {str(tmp_path)!r}: choose None, or the folder of one trained on "
        "CIFAR-10, not on sample$",
    ):
        train.load_teacher(replace(recipe, data="CIFAR-10"), LABELS)


def test_a_teacher_has_not_seen_what_its_student_holds_out(tmp_path):
    metrics = {**METRICS, "recipe": {**METRICS["recipe"], "validation_size": 500}}
    save(NetDilated(), {**metrics, "labels_sha256": train.labels_sha256(LABELS[:1500])}, tmp_path)
    recipe = replace(SHORT, teacher=str(tmp_path), validation_size=500)
    train.load_teacher(recipe, LABELS[:1500])
    train.load_teacher(replace(recipe, validation_size=400), LABELS[:1600])
    train.load_teacher(replace(recipe, validation_size=0), LABELS[::-1])
    with pytest.raises(
        ValueError,
        match="choose None, or the folder of one that held out 501 training images, as the "
        "student does, not 500$",
    ):
        train.load_teacher(replace(recipe, validation_size=501), LABELS[:1499])
    with pytest.raises(ValueError, match="this one may have seen those that are held out"):
        train.load_teacher(recipe, LABELS[500:][::-1])


# ---------------------------------------------------------------- the command line


def test_the_help_names_every_setting_with_its_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    assert exit_of("--help") == 0
    text = capsys.readouterr().out
    for each in fields(Recipe):
        option = each.name.replace("_", "-")
        assert f"--{option} VALUE" in text and f"{each.metadata['meaning']} (default " in text
        assert each.metadata["allowed"] in text
    assert "(default 20,24,28,32; sizes in pixels" in text
    assert "--quick" in text and "--medium" in text


def test_the_command_trains_the_recipe_that_its_arguments_name(tmp_path, capsys, monkeypatch):
    train.main(["--quick", *TINY, "--sizes", "8,16", "--max-lr", "0.2", "--folder", str(tmp_path)])
    metrics = load_metrics("Tiny", tmp_path)
    expected = Recipe.quick(data="sample", batch_size=100, epochs=1, sizes=(8, 16), max_lr=0.2)
    assert metrics["recipe"] == expected.to_json()
    result = (
        f"a sample of CIFAR-10, 1,000 images: test accuracy {metrics['test_accuracy']:.2f} %, in"
    )
    assert capsys.readouterr().out.endswith(f"{result} {tmp_path}/\n")
    ran = []
    monkeypatch.setattr(
        train,
        "run",
        lambda recipe, build: (
            ran.append(recipe) or (None, {"data": "some images", "validation_accuracy": 12.5})
        ),
    )
    train.main(["--robust", "--corruption-types", "jpeg,augmix", "--validation-size", "10"])
    assert ran.pop() == Recipe.robust(corruption_types=("jpeg", "augmix"), validation_size=10)
    capsys.readouterr()
    train.main(["--validation-size", "10"])
    assert ran == [Recipe(validation_size=10)]
    assert (
        capsys.readouterr().out
        == "a while\nsome images: validation accuracy 12.50 %, in runs/headline/\n"
    )


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("5e-4", 5e-4),
        ("None", None),
        ("True", True),
        ("16,24,32", (16, 24, 32)),
        ("CIFAR-10", "CIFAR-10"),
        ("sample", "sample"),
        ("weights/seed-1", "weights/seed-1"),
        ("", ""),
    ],
)
def test_an_argument_is_a_number_none_a_list_or_the_text_itself(text, value):
    assert train.parse(text) == value and type(train.parse(text)) is type(value)


def test_a_single_size_is_a_list_of_one_and_more_workers_than_cores_are_allowed(monkeypatch):
    ran, metrics = [], {"data": "some images", "test_accuracy": 12.5}
    monkeypatch.setattr(train, "run", lambda recipe, build: (ran.append(recipe), metrics))
    train.main(["--sizes", "32", "--num-workers", "64"])
    assert ran == [Recipe(sizes=(32,))] and ran[0].num_workers == 64


def test_a_network_of_ones_own_is_trained_and_comes_back(tmp_path):
    train.main([*TINY, "--network", f"{tiny.__file__}:Tiny", "--folder", str(tmp_path)])
    assert load(Tiny, tmp_path)[1]["network"] == "Tiny"


def test_a_wrapped_network_is_trained_and_saved_without_its_wrapper(tmp_path):
    recipe = replace(SHORT, epochs=1, batch_size=200, teacher=None, folder=str(tmp_path))
    wrap = [nn.DataParallel, partial(torch.compile, backend="eager")]
    for number, wrapper in enumerate(wrap):
        folder = tmp_path / str(number)
        recipe = replace(recipe, folder=folder)
        model, metrics = train.run(recipe, build=lambda wrapper=wrapper: wrapper(Tiny()))
        assert metrics["network"] == "Tiny" and (folder / "Tiny.ckpt").exists()
        assert equal(state(load(Tiny, folder)[0]), state(inner_network(model)))


def test_the_metrics_tell_of_a_transform_of_ones_own(tmp_path):
    recipe = replace(SHORT, epochs=1, batch_size=200, teacher=None, folder=str(tmp_path))
    metrics = train.run(recipe, Tiny, transform=train_transform(0.25))[1]
    assert metrics["transform"] == str(train_transform(0.25)).splitlines()
    with pytest.raises(ValueError, match="is of another run .augmentations: "):
        train.run(recipe, Tiny)
    assert "transform" not in train.run(recipe, Tiny, restart=True)[1]


def test_a_worker_that_imports_a_script_does_not_train_in_it(tmp_path, monkeypatch):
    """As where workers are not forked and the script has no `if __name__ == "__main__":`."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    recipe = replace(SHORT, teacher=None, folder=str(tmp_path))
    for action in (lambda: train.run(recipe), lambda: train.fit(Tiny(), recipe, None, None)):
        with pytest.raises(RuntimeError, match='below `if __name__ == "__main__":`$'):
            action()
    assert list(tmp_path.iterdir()) == []


def test_the_command_works_from_another_folder(tmp_path, monkeypatch):
    """Teacher and sample are found in the repository; the run is written where the user stands."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="folder of one trained on sample, not on CIFAR-10"):
        train.load_teacher(SHORT, [])
    train.main([*TINY, "--folder", "runs/mine"])
    assert (tmp_path / "runs" / "mine" / "Tiny.pt").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "epochs is 0: choose a whole number, 1 to 100000"),
        (["--network", "ResNet"], "network is 'ResNet': choose one of NetDilated"),
        (
            [*TINY, "--batch-size", "9999"],
            "batch_size is 9999: choose 1 to 2000, the size of the data set",
        ),
        (
            [*TINY, "--teacher", "nowhere"],
            "teacher is 'nowhere', which lacks NetDilated.pt or NetDilated.json: choose",
        ),
        ([*TINY, "--max-lr", "1e30"], "epoch 1: the training loss is "),
    ],
    ids=["setting", "text", "data", "file", "loss"],
)
def test_what_cannot_be_done_is_one_line(arguments, message, tmp_path):
    text = exit_of(*arguments, "--folder", str(tmp_path / "new"))
    assert text.startswith(f"train.py: {message}") and "\n" not in text


def test_an_unknown_option_is_named(capsys):
    assert exit_of("--epoch-count", "3") == 2
    assert "unrecognized arguments: --epoch-count 3" in capsys.readouterr().err


def test_ctrl_c_ends_the_program_as_it_ends_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(utils, "train", lambda *arguments: os.kill(os.getpid(), signal.SIGINT))
    assert exit_of(*TINY, "--folder", str(tmp_path)) == 130
    assert "keeps 0 of 1 epochs, run again to go on" in capsys.readouterr().out


def test_the_file_is_a_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "0"])
    with pytest.raises(SystemExit, match="^train.py: epochs is 0"):
        runpy.run_path(train.__file__, run_name="__main__")
