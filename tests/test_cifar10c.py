"""CIFAR-10-C: the corruptions have their published properties, and what is measured is kept."""

import colorsys
import json

import cv2
import numpy as np
import pytest
from scipy import ndimage

from benchmarks import cifar10c, corruptions
from benchmarks.corruptions import CORRUPTIONS, corrupt
from dataset import load_dataset
from tiny import Tiny

COUNT = 20
SEVERITIES = range(1, 6)


@pytest.fixture(scope="module")
def images():
    return load_dataset("test", "tiny").data[:COUNT]


@pytest.fixture(scope="module")
def results(images, tmp_path_factory):
    """All corruptions of the images at all severities, (5, N, 32, 32, 3) by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corruptions, "BLOCK", COUNT)
        patch.setenv("FROST_ROOT", str(make_frost(tmp_path_factory.mktemp("frost"))))
        yield {
            name: np.stack([corrupt(images, name, severity) for severity in SEVERITIES])
            for name in CORRUPTIONS
        }


@pytest.fixture
def frost_root(tmp_path, monkeypatch):
    monkeypatch.setenv("FROST_ROOT", str(make_frost(tmp_path)))


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch):
    """The folders of whoever runs the tests don't count."""
    for name in ("FROST_ROOT", "CIFAR10C_ROOT"):
        monkeypatch.delenv(name, raising=False)


def make_frost(folder):
    """Write five blue pictures, (40, 100, 200), with a different side each."""
    for number, name in enumerate(corruptions.FROST):
        cv2.imwrite(str(folder / name), np.full((200, 200 + number, 3), (200, 100, 40), np.uint8))
    return folder


def flat(*colour):
    return np.full((COUNT, 32, 32, 3), colour, np.uint8)


def severities(name, images):
    """Return what a corruption makes of images at each severity."""
    return [CORRUPTIONS[name](images, each, np.random.default_rng(each)) for each in SEVERITIES]


# ---------------------------------------------------------------- what all have in common


def test_there_are_the_fifteen_kinds():
    assert len(CORRUPTIONS) == 15 and list(CORRUPTIONS)[4] == "glass_blur"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_uint8_of_their_shape_and_others_come_with_each_severity(name, images, results):
    assert results[name].dtype == np.uint8 and results[name].shape == (5, *images.shape)
    for before, after in zip([images, *results[name]], results[name], strict=False):
        assert (before != after).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_depends_on_seed_and_number_and_not_on_what_follows(
    name, images, results, monkeypatch, frost_root
):
    monkeypatch.setattr(corruptions, "BLOCK", COUNT)
    first, other = corrupt(images[:7], name, 4), corrupt(images[:7], name, 4, seed=1)
    assert (first == results[name][3][:7]).all()
    steady = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    if name != "frost":  # these pictures of it are flat
        assert (first == other).all() == (name in steady)


def test_each_block_has_random_numbers_of_its_own(monkeypatch):
    monkeypatch.setattr(corruptions, "BLOCK", 10)
    noise = corrupt(flat(128), "gaussian_noise", 1)
    assert (noise[:10] != noise[10:]).any() and (noise[0] != noise[1]).any()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_it_gets_worse_with_severity_where_the_parameters_do(name, images, results):
    """Errors are compared from one severity to the next, as far as the parameters rise.

    Of glass blur, each of two strengths gets worse with a second round, and more blur hides what it
    does; waves of elastic_transform take over from larger shifts; from 3 to 4, motion blur only
    has a larger radius, which is far beyond the Gaussian's deviation.
    """
    errors = ((results[name].astype(float) - images) ** 2).mean((1, 2, 3, 4))
    rising = {
        "glass_blur": [(2, 4), (3, 5)],
        "motion_blur": [(1, 2), (2, 3), (3, 5)],
        "elastic_transform": [],
        "frost": [],  # these pictures are darker than many images
    }.get(name, [(1, 2), (2, 3), (3, 4), (4, 5)])
    assert all(errors[low - 1] < errors[high - 1] for low, high in rising) and errors.all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("rain", 1), "corruption is 'rain': choose one of gaussian_noise, shot_noise"),
        (("fog", 0), "severity is 0: choose 1 to 5"),
        (("fog", 6), "severity is 6: choose 1 to 5"),
        (("fog", 1, -1), "seed is -1: choose a whole number from 0"),
        (("frost", 1), "frost needs frost1.png, a picture of at least 165 x 165 pixels: name"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message, images):
    with pytest.raises((ValueError, OSError)) as error:
        corrupt(images, *arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [np.zeros((2, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8)])
def test_other_images_give_one_line(wrong):
    with pytest.raises(ValueError, match=r"choose uint8 \(N, 32, 32, 3\)"):
        corrupt(wrong, "fog", 1)


# ---------------------------------------------------------------- each by itself


def test_bytes_are_cut_off():
    values = np.array([-1, 0, 0.999 / 255, 1.999 / 255, 254.999 / 255, 1, 2])
    assert corruptions.truncate(values).tolist() == [0, 0, 0, 1, 254, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    assert (corruptions.truncate(every / 255) == every).all()


def test_noise_has_its_deviation():
    for noisy, deviation in zip(
        severities("gaussian_noise", flat(128)), (0.04, 0.06, 0.08, 0.09, 0.1), strict=True
    ):
        assert noisy.std() == pytest.approx(255 * deviation, rel=0.01)
        assert noisy.mean() == pytest.approx(127.5, abs=0.3)  # half a step is cut off
    for noisy, photons in zip(
        severities("shot_noise", flat(128)), (500, 250, 100, 75, 50), strict=True
    ):
        assert noisy.std() == pytest.approx(np.sqrt(128 * 255 / photons), rel=0.02)
        assert noisy.mean() == pytest.approx(127.5, abs=0.4)


def test_impulses_are_black_or_white_channels_in_their_share():
    for noisy, share in zip(
        severities("impulse_noise", flat(128)), (0.01, 0.02, 0.03, 0.05, 0.07), strict=True
    ):
        assert set(np.unique(noisy)) == {0, 128, 255}
        assert [(noisy == value).mean() for value in (0, 255)] == pytest.approx(
            [share / 2, share / 2], rel=0.15
        )
        assert len(np.unique(noisy.reshape(-1, 3), axis=0)) > 5  # channels one by one


def test_the_disk_of_defocus_blur():
    pixel = cv2.getGaussianKernel(3, 0.4)
    assert corruptions.disk(0.3, 0.4)[3:6, 3:6] == pytest.approx(pixel @ pixel.T)
    large = corruptions.disk(1.5, 0.1)  # nine pixels, hardly blurred
    assert large[3:6, 3:6] == pytest.approx(np.full((3, 3), 1 / 9), abs=1e-6)
    assert large.sum() == pytest.approx(1)


@pytest.mark.parametrize("severity, rounds", [(1, 1), (4, 2)])
def test_glass_blur_copies_where_it_means_to_swap(severity, rounds, monkeypatch):
    """Pixel by pixel, as published: the right side is two views of what is being overwritten."""
    monkeypatch.setattr(corruptions, "_gaussian", lambda images, sigma: images)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    result = corruptions.glass_blur(image, severity, np.random.default_rng(1))
    rng, expected = np.random.default_rng(1), image[0].copy()
    for _ in range(rounds):
        dy, dx = rng.integers(-1, 1, (2, 30, 30))
        for h in range(31, 1, -1):
            for w in range(31, 1, -1):
                other = h + dy[h - 2, w - 2], w + dx[h - 2, w - 2]
                expected[h, w], expected[other] = expected[other], expected[h, w]
    assert (result[0] == expected).all() and (result != image).any()
    assert len(np.unique(expected.reshape(-1, 3), axis=0)) < 800  # of 1,024: a swap loses none


def test_the_kernel_of_motion_blur_is_one_sided_and_sums_to_1():
    weights = corruptions.half_gaussian(6, 2)
    assert len(weights) == 13 and weights.sum() == pytest.approx(1)
    assert weights[:4] / weights[0] == pytest.approx(np.exp([0, -1 / 8, -4 / 8, -9 / 8]))


@pytest.mark.parametrize("angle, step", [(0, (0, -1)), (90, (-1, 0)), (-90, (1, 0))])
def test_a_point_is_smeared_to_one_side(angle, step):
    image = np.zeros((1, 32, 32, 1), np.uint8)
    image[0, 16, 16] = 255
    smeared = corruptions.smear(image, 6, 2, np.array([angle]))[0, ..., 0]
    line = [smeared[16 + i * step[0], 16 + i * step[1]] for i in range(13)]
    assert line == np.floor(255 * corruptions.half_gaussian(6, 2) + 0.5 / 257).tolist()
    assert smeared.sum() == sum(line)


def test_steps_along_a_diagonal_are_as_long_as_others():
    """Steps 1 and 2 end on the same pixel of it, since a pixel of it is 1.41 long."""
    image = np.zeros((1, 32, 32, 1), np.uint8)
    image[0, 16, 16] = 255
    smeared = corruptions.smear(image, 6, 2, np.array([45]))[0, ..., 0]
    weights = corruptions.half_gaussian(6, 2)
    assert smeared[16, 16] == int(255 * weights[0])
    assert smeared[15, 15] == int(255 * weights[1:3].sum())
    assert smeared.sum() == np.trace(smeared)


def test_beyond_the_border_its_pixels_count():
    image = np.zeros((1, 32, 32, 1), np.uint8)
    image[0, :, 31] = 200
    assert (corruptions.smear(image, 6, 2, np.array([0.0]))[0, :, 31] == 200).all()


@pytest.mark.parametrize("factor", [1, 1.07, 1.25, 2.25])
def test_a_zoom_is_scipys_of_the_middle(factor):
    plane = np.random.default_rng(0).random((32, 32))
    side = int(np.ceil(32 / factor))
    start = (32 - side) // 2
    large = ndimage.zoom(plane[start : start + side, start : start + side], factor, order=1)
    start = (len(large) - 32) // 2
    expected = large[start : start + 32, start : start + 32]
    assert corruptions.zoom(plane, factor) == pytest.approx(expected)


def test_zoom_blur_takes_the_published_number_of_zooms(monkeypatch):
    """A step more than the limits say for the first two, by the rounding of np.arange."""
    factors = []
    monkeypatch.setattr(corruptions, "zoom", lambda planes, factor: factors.append(factor) or 0)
    lengths = []
    for severity in SEVERITIES:
        corruptions.zoom_blur(flat(128), severity, None)
        lengths.append(len(factors))
        factors.clear()
    assert lengths == [7, 12, 16, 21, 26]


def test_snow_whitens_and_falls_the_same_upside_down():
    for snowy, least in zip(severities("snow", flat(0)), (6, 12, 12, 19, 25), strict=True):
        assert snowy.min() == least < snowy.max()
        assert (snowy == snowy[:, ::-1, ::-1]).all() and (snowy == snowy[..., :1]).all()


def test_frost_is_laid_over(frost_root):
    colours = [result[0, 0, 0].tolist() for result in severities("frost", flat(100, 150, 250))]
    assert colours[0] == [108, 170, 255] and colours[4] == [93, 157, 255]  # 75 + 0.45 * 40 ...


def test_fog_keeps_the_brightest_value_and_leaves_black():
    assert not severities("fog", flat(0))[4].any()
    for foggy, strength in zip(severities("fog", flat(255)), (0.2, 0.5, 0.75, 1, 1.5), strict=True):
        assert foggy.max() == 255 and foggy.min() == int(255 / (1 + strength))


def test_plasma_is_rough_at_a_low_decay():
    rough, smooth = (
        np.abs(np.diff(corruptions.plasma(50, decay, np.random.default_rng(0)))).mean()
        for decay in (1.75, 3)
    )
    assert rough > 1.3 * smooth
    maps = corruptions.plasma(3, 3, np.random.default_rng(0))
    assert (maps.min((1, 2)) == 0).all() and (maps.max((1, 2)) == 1).all()
    assert np.ptp(maps - maps[:1]) > 0  # each image has its own


@pytest.mark.parametrize("colour", [(200, 100, 50), (10, 30, 20), (0, 0, 0), (255, 3, 0)])
def test_brightness_is_added_to_the_value_of_hsv(colour):
    for bright, more in zip(
        severities("brightness", flat(*colour)), (0.05, 0.1, 0.15, 0.2, 0.3), strict=True
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*np.divide(colour, 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1))
        cut_off = 255 * np.array(expected) - bright[0, 0, 0]
        assert (cut_off > -1e-9).all() and (cut_off < 1 + 1e-9).all()


def test_contrast_is_about_each_channels_mean():
    image = flat(0, 100, 60)
    image[:, :16] = 255, 110, 80
    weak = severities("contrast", image)[4]
    assert weak[0, 0, 0].tolist() == [146, 105, 71]  # 146.625, 105.75, 71.5
    assert weak[0, 31, 0].tolist() == [108, 104, 68]  # 108.375, 104.25, 68.5


def test_elastic_transform_samples_along_the_waves():
    image = np.random.default_rng(0).random((32, 32, 3)).astype(np.float32)
    place = np.mgrid[:32, :32] + np.array([0.5, 0])[:, None, None]
    sampled = corruptions._sample(image, place)
    assert sampled[:-1] == pytest.approx((image[:-1] + image[1:]) / 2, abs=1e-6)
    assert sampled[-1] == pytest.approx(image[-1], abs=1e-6)  # mirrored
    assert all(np.abs(each - 99.5).max() < 1 for each in severities("elastic_transform", flat(100)))


def test_pixelate_leaves_so_many_rows_and_columns():
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    for result, side in zip(severities("pixelate", image), (30, 28, 27, 24, 20), strict=True):
        assert [len(np.unique(result[0], axis=axis).swapaxes(0, axis)) for axis in (0, 1)] == [
            side,
            side,
        ]


def test_jpeg_is_as_coarse_as_opencvs(images):
    for result, quality in zip(
        severities("jpeg_compression", images[:1]), (80, 65, 58, 50, 40), strict=True
    ):
        file = cv2.imencode(".jpg", images[0, ..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        assert np.abs(result[0] - cv2.imdecode(file, 1)[..., ::-1].astype(float)).mean() < 1


# ---------------------------------------------------------------- the official files


@pytest.fixture
def official_root(tmp_path, monkeypatch):
    """Files of three images at each severity; fog at severity s is all s, the labels 0, 1, 2."""
    root = tmp_path / "CIFAR-10-C"
    root.mkdir()
    levels = np.repeat(np.arange(1, 6), 3).astype(np.uint8)
    np.save(root / "fog.npy", np.broadcast_to(levels[:, None, None, None], (15, 32, 32, 3)))
    np.save(root / "labels.npy", np.tile(np.arange(3), 5).astype(np.uint8))
    monkeypatch.setenv("CIFAR10C_ROOT", str(root))
    return root


def test_official_files_are_read_by_severity(official_root):
    for severity in SEVERITIES:
        images, labels = cifar10c.official("fog", severity, official_root)
        assert images.shape == (3, 32, 32, 3) and (images == severity).all()
        assert labels.tolist() == [0, 1, 2]


def test_wrong_official_files_give_one_line(official_root):
    with pytest.raises(OSError, match="snow.npy is not there: name the folder of CIFAR-10-C"):
        cifar10c.official("snow", 1, official_root)
    np.save(official_root / "snow.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"shape of snow.npy is .*\(10, .*choose .*\(15, 32"):
        cifar10c.official("snow", 1, official_root)
    (official_root / "snow.npy").write_bytes(b"\x93NUMPY no more")
    with pytest.raises(ValueError, match="snow.npy is damaged"):
        cifar10c.official("snow", 1, official_root)


# ---------------------------------------------------------------- measuring


@pytest.fixture
def measured(monkeypatch):
    """The kinds that are measured, in a moment."""
    kinds = []

    def accuracies_of(model, kind, images, labels, root):
        kinds.append(kind)
        return [50.0 + severity for severity in SEVERITIES]

    monkeypatch.setattr(cifar10c, "accuracies_of", accuracies_of)
    return kinds


def measure(**options):
    return cifar10c.measure(Tiny(), load_dataset("test", "tiny"), **options)


def test_accuracies_are_those_on_the_corrupted_images(images):
    model = Tiny().eval()
    labels = load_dataset("test", "tiny").targets[:COUNT]
    logits = model(cifar10c.utils.normalise(corrupt(images, "fog", 3)))
    expected = 100 * np.mean(logits.argmax(1).numpy() == labels)
    assert cifar10c.accuracies_of(model, "fog", images, labels)[2] == pytest.approx(expected)


def test_all_that_is_known_is_there_after_each_kind(measured):
    steps = measure()
    kind, known = next(steps)
    assert kind == "gaussian_noise" and known["accuracies"] == {kind: [51, 52, 53, 54, 55]}
    assert known["images"] == 200 and known["source"] == "made with seed 0"
    assert 0 <= known["clean"] <= 100 and {"hardware", "date"} <= set(known)
    assert {"scipy", "opencv", "pillow", "torch"} <= set(known["versions"])
    assert len(measured) == 1
    assert [kind for kind, _ in steps] == cifar10c.kinds_to_make()[1:] == measured[1:]


def test_what_is_known_is_not_measured_again(measured):
    _, known = next(measure())
    known["accuracies"] = {"frost": 5 * [80.0], **known["accuracies"]}  # it was made elsewhere
    kinds = [kind for kind, _ in measure(known=known)]
    assert kinds == list(CORRUPTIONS) == list(dict.fromkeys(["gaussian_noise", *kinds]))
    assert len(measured) == 14 and known["accuracies"]["frost"] == 5 * [80.0]


def test_what_is_known_of_other_images_is_refused(measured):
    _, known = next(measure())
    with pytest.raises(ValueError, match='with images 100 instead of 200: remove their "cifar10c"'):
        next(measure(known={**known, "images": 100}))
    with pytest.raises(ValueError, match="with source made with seed 0 instead of official files"):
        next(measure(known=known, root="anywhere"))


def test_without_pictures_of_frost_there_are_fourteen(frost_root, monkeypatch):
    assert corruptions.kinds_to_make() == list(CORRUPTIONS)
    monkeypatch.delenv("FROST_ROOT")
    assert set(CORRUPTIONS) - set(corruptions.kinds_to_make()) == {"frost"}


def test_official_files_are_measured_where_they_are_named(images, official_root, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cifar10c, "accuracy", lambda _, images, labels: seen.append((images[0].max(), *labels)) or 5
    )
    assert cifar10c.accuracies_of(None, "fog", images[:2], None, official_root) == 5 * [5]
    assert seen == [(severity, 0, 1) for severity in SEVERITIES]


def test_all_fifteen_official_files_are_read_without_pictures_of_frost(measured):
    known = [known for _, known in measure(root="anywhere")][-1]
    assert list(known["accuracies"]) == list(CORRUPTIONS) and known["source"] == "official files"


# ---------------------------------------------------------------- means and tables

ACCURACIES = {"fog": [90.0, 80.0, 70.0, 60.0, 50.0], "snow": 5 * [80.0]}


def test_a_mean_is_over_severities_and_kinds():
    assert cifar10c.mean(ACCURACIES) == 75 and cifar10c.mean(ACCURACIES, {"snow"}) == 80
    assert cifar10c.by_kind(ACCURACIES) == {"fog": 70, "snow": 80}


def test_a_table_says_of_how_many_kinds_and_images_a_mean_is():
    results = {"images": 200, "source": "official files", "clean": 95, "accuracies": ACCURACIES}
    line = cifar10c.row("fog", ACCURACIES["fog"])
    assert line == "fog                    90.0   80.0   70.0   60.0   50.0   70.0     91.5"
    mean, images, missing = cifar10c.summary(results).splitlines()
    assert mean == f"mean of 2 of 15 kinds{'':34}   75.0     90.6"
    assert {len(mean), len(line)} == {len(cifar10c.HEAD)}
    assert images == "200 images, official files; clean 95.0" and missing.startswith("frost needs")
    full = {**results, "accuracies": {kind: 5 * [80] for kind in CORRUPTIONS}}
    assert len(cifar10c.summary(full).splitlines()) == 2


def test_published_means_are_those_of_their_kinds():
    rows = json.loads(cifar10c.REFERENCES.read_text())
    for row in rows:
        if "accuracies" in row:
            assert list(row["accuracies"]) == list(CORRUPTIONS)
            assert row["mean"] == pytest.approx(cifar10c.mean(row["accuracies"]), abs=0.01)
        assert row["source"].startswith("https://") and row["paper"].startswith("https://")
    assert cifar10c.published()["glass_blur"] == 82.94
    assert cifar10c.published("WRN-18-2, LRR")["glass_blur"] == 82.81
