"""The rows about augmentation."""

import albumentations as A
import pytest
from albumentations.pytorch import ToTensorV2
from torchvision import transforms

import dataset
from answers import TINY, table
from checker.blocks import NUM_CLASSES
from checker.rules import check_rules
from checker.transforms import MEAN_COLOUR, record_arguments
from dataset import FILL, train_transform

HOLE = {
    "num_holes_range": (1, 1),
    "hole_height_range": (16, 16),
    "hole_width_range": (16, 16),
    "fill": FILL,
}


def replaced(name, *steps):
    """Return our training transform with other steps in the place of one of its own."""
    kept = [step for step in train_transform().transforms if type(step).__name__ != name]
    return A.Compose([*kept[:2], *steps, *kept[2:]])


def hole(**changes):
    return replaced("CoarseDropout", A.CoarseDropout(**{**HOLE, **changes}))


@pytest.mark.parametrize(
    "rule, measured, transform",
    [
        ("HorizontalFlip", "missing", replaced("HorizontalFlip")),
        (
            "HorizontalFlip",
            "changes 0% of the images",
            replaced("HorizontalFlip", A.HorizontalFlip(p=0)),
        ),
        ("ShiftScaleRotate", "missing", replaced("ShiftScaleRotate", A.Affine(p=0.5))),
        ("CoarseDropout: one 16x16 hole", "missing", replaced("CoarseDropout")),
        ("CoarseDropout: one 16x16 hole", "none or of another shape", hole(num_holes_range=(2, 2))),
        ("CoarseDropout: one 16x16 hole", "never", hole(p=0)),
        (
            "CoarseDropout: one 16x16 hole",
            "2 of them",
            replaced("CoarseDropout", A.CoarseDropout(), A.CoarseDropout(**HOLE)),
        ),
        (
            "CoarseDropout: one 16x16 hole",
            "never",
            replaced("CoarseDropout", A.Sequential([A.CoarseDropout(**HOLE)], p=0)),
        ),
        ("CoarseDropout: one 16x16 hole", "8x16", hole(hole_height_range=(8, 8))),
        ("CoarseDropout: one 16x16 hole", "16x20", hole(hole_width_range=(20, 20))),
        ("CoarseDropout: one 16x16 hole", "2x16 to 16x16", hole(hole_height_range=(2, 16))),
        (
            "... filled with the mean colour",
            "0 0 0: the scale is 0 to 255",
            hole(fill=(0.4914, 0.4822, 0.4465)),
        ),
        ("... filled with the mean colour", "128 128 128", hole(fill=128)),
    ],
)
def test_a_transform_that_breaks_a_rule_fails_its_row(rule, measured, transform):
    text, holds = table(TINY, transform)[rule]
    assert measured in text and holds is not None and not holds


def test_a_black_hole_of_the_right_size_breaks_only_the_rule_of_its_colour():
    rows = table(TINY, hole(fill=0))
    assert rows["CoarseDropout: one 16x16 hole"] == ("16x16", True)
    assert rows["... filled with the mean colour"] == ("0 0 0", False)


def test_a_plain_transform_fails_all_rows_but_resize():
    rows = check_rules(TINY, dataset.test_transform())[-5:]
    assert [row.verdict for row in rows] == ["BROKEN"] * 4 + ["holds"]


@pytest.mark.parametrize(
    "transform, flips",
    [
        (A.HorizontalFlip(p=0.5), "changes 51% of the images"),
        (A.Compose([]), "missing"),
        (
            A.Compose([A.OneOf([A.HorizontalFlip(p=0.5), A.Blur(p=0.5)])]),
            "changes 23% of the images",
        ),
        (
            A.Compose([A.OneOf([A.HorizontalFlip(p=0.5), A.Blur(p=0.5)], p=0)]),
            "changes 0% of the images",
        ),
        (
            A.Compose([A.HorizontalFlip(p=0.5), A.Resize(32, 32), A.Normalize(), ToTensorV2()]),
            "changes 51% of the images",
        ),
    ],
    ids=["no Compose", "empty", "nested", "nested, never", "to tensor"],
)
def test_any_transform_of_albumentations_is_measured(transform, flips):
    rows = table(TINY, transform)
    assert rows["HorizontalFlip"][0] == flips
    assert rows["Resize"] == (
        ("40x40 becomes 32x32", True)
        if "ToTensorV2" in str(transform)
        else ("40x40 becomes 40x40", "optional")
    )


@pytest.mark.parametrize(
    "step, text",
    [
        (A.CenterCrop(32, 32), "40x40 becomes 32x32"),
        (A.Resize(28, 28), "40x40 becomes 28x28"),
        (A.NoOp(), "40x40 becomes 40x40"),
    ],
)
def test_resize_only_informs(step, text):
    assert table(TINY, replaced("Resize", step))["Resize"] == (text, "optional")


OLD = {
    "max_holes": 1,
    "max_height": 16,
    "max_width": 16,
    "min_holes": 1,
    "min_height": 16,
    "min_width": 16,
    "fill_value": FILL,
    "mask_fill_value": None,
}
NEW = "CoarseDropout(num_holes_range=(1, 1), hole_height_range=(16, 16), hole_width_range=(16, 16)"


@pytest.mark.filterwarnings("ignore:Argument")
def test_old_argument_names_of_a_finished_hole_are_the_reason_why_it_is_broken():
    rows = table(TINY, replaced("CoarseDropout", A.CoarseDropout(**OLD, p=1)))
    text, holds = rows["CoarseDropout: one 16x16 hole"]
    assert not holds and "this albumentations ignores the old arguments max_holes, max_h" in text


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(A.CoarseDropout, "__init__", A.CoarseDropout.__init__)
    record_arguments()


@pytest.mark.filterwarnings("ignore:Argument")
@pytest.mark.parametrize(
    "changes, size, colour",
    [
        ({}, ("16x16", True), ("125 123 114", True)),
        ({"min_holes": None, "min_height": None}, ("16x16", True), ("125 123 114", True)),
        ({"max_height": 0.5, "min_height": 0.5}, ("16x16", True), ("125 123 114", True)),
        ({"min_height": 8}, ("8x16 to 16x16", False), ("125 123 114", True)),
        ({"max_holes": 3}, ("1 to 3 holes", False), ("125 123 114", True)),
        ({"fill_value": 0}, ("16x16", True), ("0 0 0", False)),
        ({"fill_value": [0.4914, 0.4822, 0.4465]}, ("16x16", True), ("0 0 0: the", False)),
    ],
)
def test_recorded_arguments_count_and_their_new_names_are_told(recorded, changes, size, colour):
    rows = table(TINY, replaced("CoarseDropout", A.CoarseDropout(**{**OLD, **changes}, p=1)))
    for (text, holds), rule in zip((size, colour), list(rows)[-3:-1], strict=True):
        assert rows[rule][0].startswith(text) and rows[rule][1] is holds
    assert "albumentations 2 ignores" in rows["CoarseDropout: one 16x16 hole"][0]
    if not changes:
        text = rows["CoarseDropout: one 16x16 hole"][0]
        assert f"{NEW}, fill=(125, 123, 114))" in text
        assert table(TINY, hole())["CoarseDropout: one 16x16 hole"] == ("16x16", True)


@pytest.mark.parametrize(
    "mean, holds", [((0.4914, 0.4822, 0.4465), True), ((0.5, 0.5, 0.5), False)]
)
def test_after_normalize_zero_is_the_mean(mean, holds):
    steps = A.Normalize(mean, (0.2, 0.2, 0.2)), A.CoarseDropout(**{**HOLE, "fill": 0})
    rows = table(TINY, A.Compose([A.Sequential(list(steps)), ToTensorV2()]))
    assert rows["CoarseDropout: one 16x16 hole"] == ("16x16", True)
    text = "125 123 114" if holds else "128 128 128"
    assert rows["... filled with the mean colour"] == (text, holds)


@pytest.mark.parametrize(
    "transform, text",
    [
        (
            transforms.Compose([transforms.ToTensor()]),
            "transform is torchvision.transforms.transforms.Compose: choose a",
        ),
        ([], "transform is builtins.list: choose a transform of albumentations"),
        (A.Compose([A.RandomCrop(64, 64)]), "transform fails on a uint8 image .*: it has to take"),
    ],
    ids=["torchvision", "a list", "fails"],
)
def test_another_transform_is_refused_in_one_line(transform, text):
    with pytest.raises(ValueError, match=text) as error:
        check_rules(TINY, transform)
    assert "\n" not in str(error.value)


def test_the_checker_has_constants_of_its_own_and_they_are_the_data_sets():
    assert (len(dataset.CLASSES), dataset.FILL) == (NUM_CLASSES, MEAN_COLOUR)
