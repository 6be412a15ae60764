"""The figures: what they show, and that they are written."""

import errno
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import diagrams
import plots
from checker.layout import receptive_fields
from dataset import load_dataset
from model import NetDilated
from pretrained import load
from recipe import Recipe
from tiny import HISTORY, confident
from utils import calibration_error


@pytest.fixture(scope="module")
def test_set(root):
    return load_dataset("test", "sample", root=root)


ACCURACIES = {"fog": 91.0, "glass_blur": 68.0, "snow": 88.0}
RIVALS = {"the teacher": {"fog": 80.0, "snow": 70.0}, "AugMix": {"rain": 1.0, "glass_blur": 82.0}}
CURVES = Recipe(epochs=4, sizes=(16, 32))
PLOTS = {  # of the training set, the test set and the path
    "augmentations": lambda train, test, path: plots.plot_augmentations(train, path),
    "loss": lambda train, test, path: plots.plot_loss(HISTORY, path, CURVES, test.title),
    "accuracy": lambda train, test, path: plots.plot_accuracy(HISTORY, path, CURVES, test.title),
    "misclassified": lambda train, test, path: plots.plot_misclassified(
        test, confident(test, 0.9, 600), path
    ),
    "confusion": lambda train, test, path: plots.plot_confusion(
        test, confident(test, 0.9, 600), path
    ),
    "reliability": lambda train, test, path: plots.plot_reliability(
        test, confident(test, 0.9, 600), path
    ),
    "corruptions": lambda train, test, path: plots.plot_corruptions(
        ACCURACIES, RIVALS, path, ["glass_blur"], test.title
    ),
    "corrupted images": lambda train, test, path: plots.plot_corrupted_images(
        {f"glass_{number}": test.data[number] for number in range(9)}, 4, path, test.title
    ),
    "schedule": lambda train, test, path: plots.plot_schedule(CURVES, path),
    "receptive field": lambda train, test, path: plots.plot_receptive_field(
        NetDilated(), receptive_fields(NetDilated()), test, path, 1
    ),
    "kernels": lambda train, test, path: plots.plot_kernels(
        {"plain": NetDilated().C3[0].conv.depthwise, "dilated": NetDilated().C3[1].conv.depthwise},
        path,
    ),
    "mirror": lambda train, test, path: plots.plot_mirror(load(NetDilated)[0], test, path),
    "network": lambda train, test, path: diagrams.plot_network(NetDilated(), path),
    "mirrored pair": lambda train, test, path: diagrams.plot_mirrored_pair(
        NetDilated(), test, path
    ),
}


@pytest.fixture(scope="module")
def figures(root, test_set, tmp_path_factory):
    """Every plot, drawn once: its figure and its path."""
    torch.manual_seed(0)
    folder, train_set = (
        tmp_path_factory.mktemp("figures"),
        load_dataset("train", "sample", root=root),
    )
    paths = {name: folder / "img" / f"{name}.png" for name in PLOTS}
    return {
        name: (plot(train_set, test_set, paths[name]), paths[name]) for name, plot in PLOTS.items()
    }


def test_a_plot_may_have_one_image_only(root, test_set, tmp_path):
    layer, train_set = NetDilated().C3[0].conv.depthwise, load_dataset("train", "sample", root=root)
    for figure in (
        plots.plot_augmentations(train_set, tmp_path / "1.png", columns=1),
        plots.plot_misclassified(test_set, confident(test_set, 0.9, 600), tmp_path / "2.png", 1, 1),
        plots.plot_kernels({"plain": layer}, tmp_path / "3.png"),
    ):
        assert figure.axes[0].images


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_written_and_is_its_figure_and_says_whose_data_it_shows(name, figures):
    figure, path = figures[name]
    image = Image.open(path)
    assert np.asarray(image.convert("L")).std() > 5 and image.width >= 600  # not blank
    shown, about = figure._repr_mimebundle_()
    assert shown == {"image/png": path.read_bytes()} and not plt.fignum_exists(
        figure.number
    )  # it is shown only once
    titles = [
        title
        for title in (figure.get_suptitle(), *(axis.get_title() for axis in figure.axes))
        if title
    ]
    assert titles and all(title in about["image/png"]["alt"] for title in titles[:10])
    if name not in (
        "schedule",
        "receptive field",
        "kernels",
        "network",
        "mirrored pair",
    ):  # which are not of data
        assert any("a sample of CIFAR-10" in title for title in titles)


def test_a_full_disk_loses_only_the_file_of_a_figure(tmp_path, monkeypatch, capsys):
    plots.plot_loss(HISTORY, tmp_path / "loss.png", CURVES)
    before = (tmp_path / "loss.png").read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    figure = plots.plot_loss(HISTORY, tmp_path / "loss.png", CURVES, "other data")
    assert (
        f"{tmp_path / 'loss.png'} could not be written (No space left on device)"
        in capsys.readouterr().out
    )
    assert (
        (tmp_path / "loss.png").read_bytes() == before != figure._repr_mimebundle_()[0]["image/png"]
    )


def test_the_curves_are_those_of_the_history_with_marks_where_the_training_changes(
    figures, tmp_path
):
    axis = figures["loss"][0].axes[0]
    train, test, start, resize = axis.lines
    assert [list(line.get_ydata()) for line in (train, test)] == [
        HISTORY["train_loss"],
        HISTORY["test_loss"],
    ]
    assert [list(line.get_xdata()) for line in (train, start, resize)] == [
        [1, 2, 3, 4],
        [0.5, 0.5],
        [2.5, 2.5],
    ]
    assert [text.get_text() for text in axis.texts] == ["16 pixels", "32 pixels"]
    assert [train.get_label(), test.get_label()] == [
        "train (augmented, some corrupted): 0.7000 at the end",
        "test: 0.6000 at the end",
    ]
    plain = Recipe(epochs=4, sizes=(32,), corruption=0)
    held_out = {column.replace("test", "validation"): values for column, values in HISTORY.items()}
    axis = plots.plot_accuracy(held_out, tmp_path / "accuracy.png", plain).axes[0]
    labels = [line.get_label() for line in axis.lines[:2]]
    assert labels == ["train (augmented): 75.00 at the end", "validation: 80.00 at the end"]


def test_an_image_and_its_mirror_image_have_bars_of_one_height_and_another_image_has_not(figures):
    image_axis, mirrored_axis, bars = figures["mirror"][0].axes
    image, mirror_image, another = torch.tensor([bar.get_height() for bar in bars.patches]).view(
        3, 10
    )
    torch.testing.assert_close(image, mirror_image, rtol=1e-3, atol=1e-4)
    assert (image - another).abs().max() > 0.02
    image, mirrored = (axis.images[0].get_array() for axis in (image_axis, mirrored_axis))
    assert (image == mirrored[:, ::-1]).all()


def test_the_schedule_rises_to_max_lr_in_the_warmup_and_the_images_grow(figures):
    upper, lower = figures["schedule"][0].axes
    epochs, rates = upper.lines[0].get_data()
    assert (
        rates.max() == pytest.approx(CURVES.max_lr, rel=1e-3) and rates[-1] < 1e-3 * CURVES.max_lr
    )
    assert len(rates) == 400 and epochs[rates.argmax()] == pytest.approx(
        CURVES.warmup * CURVES.epochs, abs=0.02
    )
    assert list(lower.lines[0].get_ydata()) == [16, 16, 32, 32, 32]


def test_misclassified_shows_prediction_confidence_and_truth_the_most_confident_first_if_asked(
    test_set, tmp_path
):
    labels = torch.tensor(test_set.targets)
    logits = 9.0 * F.one_hot(labels, 10)
    for index, height in ((7, 2), (8, 5), (9, 3)):
        logits[index] = torch.eye(10)[(labels[index] + 1) % 10] * height
    for most_confident, order in ((False, (7, 8, 9)), (True, (8, 9, 7))):
        figure = plots.plot_misclassified(
            test_set, logits, tmp_path / "wrong.png", 1, 4, most_confident
        )
        for axis, index in zip(figure.axes, order, strict=False):
            predicted = test_set.classes[(labels[index] + 1) % 10]
            assert (axis.images[0].get_array() == test_set.data[index]).all()
            assert axis.get_title() == f"{predicted} {logits[index].softmax(0).max():.1%}"
            assert axis.texts[0].get_text() == f"is {test_set.classes[labels[index]]}"
        assert not figure.axes[3].images and "3 of 1,000" in figure.get_suptitle()


def test_the_confusion_matrix_has_a_row_for_each_true_class(figures, test_set):
    """The last 400 of 1,000 images, 40 of each class, are taken for the next class."""
    texts = [float(text.get_text()) for text in figures["confusion"][0].axes[0].texts]
    np.testing.assert_array_equal(
        np.reshape(texts, (10, 10)), 60 * np.eye(10) + 40 * np.roll(np.eye(10), 1, 1)
    )


def test_the_reliability_diagram_shows_the_logits_as_they_are_and_at_a_temperature(
    figures, test_set, tmp_path
):
    # nine other classes share what is left of 90 and of 62 %
    temperature = np.log(9 * 90 / 10) / np.log(9 * 62 / 38)
    logits = confident(test_set, 0.9, 620)
    figure = plots.plot_reliability(test_set, logits, tmp_path / "both.png", temperature)
    points = figure.axes[0].collections
    assert [each.get_offsets().tolist() for each in points] == [
        [[pytest.approx(90), pytest.approx(62)]],
        [[pytest.approx(62), pytest.approx(62)]],
    ]
    assert "ECE 28.0 %" in points[0].get_label() and "ECE 0.0 %" in points[1].get_label()
    assert len(figures["reliability"][0].axes[0].collections) == 1
    with pytest.raises(ValueError, match="^temperature is 0: choose a number above 0$"):
        plots.plot_reliability(test_set, confident(test_set, 0.9, 600), tmp_path / "none.png", 0)


def test_the_corruptions_are_bars_the_best_on_top_and_pale_where_they_are_near_training(figures):
    axis = figures["corruptions"][0].axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["glass blur  68.0", "snow  88.0", "fog  91.0"]
    unlike, near = axis.containers
    middles = [bar.get_y() + bar.get_height() / 2 for bar in (*near, *unlike)]
    assert middles == pytest.approx([0, 1, 2])
    assert [bar.get_width() for bar in (*near, *unlike)] == [68, 88, 91]
    assert near[0].get_alpha() < unlike[0].get_alpha()
    points = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert points == {"the teacher": [[70, 1], [80, 2]], "AugMix": [[82, 0]]}


def test_without_kinds_near_training_all_bars_are_alike(tmp_path):
    axis = plots.plot_corruptions(ACCURACIES, RIVALS, tmp_path / "corruptions.png").axes[0]
    (bars,) = axis.containers
    assert len(bars) == 3


def test_the_versions_of_an_image_are_drawn_by_name(figures, test_set):
    axes = figures["corrupted images"][0].axes
    assert [axis.get_title() for axis in axes] == [f"glass {number}" for number in range(9)] + 7 * [
        ""
    ]
    for number, axis in enumerate(axes[:9]):
        assert (axis.images[0].get_array() == test_set.data[number]).all()
    assert "of severity 4" in figures["corrupted images"][0].get_suptitle()


def test_the_figure_of_the_receptive_field_outlines_what_the_gradients_reach(figures):
    axes = figures["receptive field"][0].axes
    sides = [axis.patches[0].get_width() for axis in axes]
    assert sides == [3, 4, 5.5, 7.5, 9.5, 12.5, 16.5, 24.5, 30.5, 38.5, 46.5, 58.5]
    for axis, side in zip(axes, sides, strict=True):
        reached = axis.images[0].get_array() > 0
        assert reached.any(0).sum() == reached.any(1).sum() and abs(reached.any(0).sum() - side) < 1
        assert abs(axis.patches[0].get_x() - np.flatnonzero(reached.any(0))[0] + 0.5) <= 0.5


def test_the_figure_of_the_kernels_shows_their_taps(figures):
    taps = [np.argwhere(axis.images[0].get_array()).tolist() for axis in figures["kernels"][0].axes]
    assert taps == [
        [[row, column] for row in places for column in places] for places in ((3, 4, 5), (2, 4, 6))
    ]


def test_the_area_of_a_marker_is_the_number_of_images_and_the_error_is_torchmetrics(
    test_set, tmp_path
):
    logits = confident(test_set, 0.9, 620)
    logits[:250] = confident(test_set, 0.5, 100)[:250]
    figure = plots.plot_reliability(test_set, logits, tmp_path / "two.png")
    (points,) = figure.axes[0].collections
    assert points.get_sizes().tolist() == pytest.approx([75, 225])
    assert f"ECE {calibration_error(test_set, logits):.1f} %" in points.get_label()


def test_the_accuracy_has_a_line_at_85_and_an_axis_that_shows_long_runs(tmp_path):
    history = {column: 3 * values for column, values in HISTORY.items()}
    short, long = (
        plots.plot_accuracy(history, tmp_path / "accuracy.png", Recipe(epochs=epochs)).axes[0]
        for epochs in (2, 12)
    )
    assert short.get_ylim()[0] < 30 and long.get_ylim() == (60, 100)
    assert 85 in [line.get_ydata()[0] for line in long.lines]


def test_the_diagram_has_every_map_with_its_channels_and_side(figures):
    texts = [text.get_text() for text in figures["network"][0].axes[0].texts]
    maps = [text for text in texts if "x" in text.split("\n")[-1] and text[0].isdigit()]
    assert [text for text in maps if text.split("\n")[0] in ("3", "16", "64", "96")][:6] == [
        "3\n32x32",
        "3\n64x64",
        "16\n64x64",
        "16\n64x64",
        "64\n32x32",
        "96\n32x32",
    ]
    assert "3x3 +\ndilation 2" in texts and texts.count("4x4\nstride 2") == 4
    assert {"C1", "C2", "C3", "C4"} <= set(texts)


def test_the_second_kernels_of_a_pair_are_the_first_ones_in_the_mirror(figures):
    axes = figures["mirrored pair"][0].axes
    a, b, b_mirrored, a_mirrored = (
        np.asarray(axes[place].images[0].get_array()) for place in (1, 2, 6, 7)
    )
    assert (a == a_mirrored[:, ::-1]).all() and (b == b_mirrored[:, ::-1]).all()
    assert abs(a).max() > 0 and abs(b).max() > 0
