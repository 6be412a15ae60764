"""Your own picture: any size and mode as a person would see it, and one line for what is none."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import utils
from dataset import CLASSES

RED, BLUE = (200, 30, 20), (10, 40, 220)


@pytest.fixture
def halves():
    """A picture twice as wide as high: a red square in the middle, blue at both ends."""
    picture = np.empty((40, 80, 3), np.uint8)
    picture[:], picture[:, 20:60] = BLUE, RED
    return picture


def is_red(picture, tolerance=40):
    return picture.dtype == np.uint8 and picture.shape[2] == 3 and np.abs(picture.astype(int) - RED).max() <= tolerance


SAVED = {
    "jpeg": dict(), "png": dict(), "bmp": dict(), "webp": dict(lossless=True), "gif": dict(), "tiff": dict(),
    "ppm": dict(), "cmyk.jpeg": dict(mode="CMYK"), "palette.png": dict(mode="P"), "alpha.png": dict(mode="RGBA"),
}


@pytest.mark.parametrize("name", SAVED)
def test_ten_kinds_of_files_give_the_largest_centred_square(name, halves, tmp_path):
    options, image, path = dict(SAVED[name]), Image.fromarray(halves), tmp_path / f"picture.{name}"
    mode = options.pop("mode", "RGB")
    (image.quantize() if mode == "P" else image.convert(mode)).save(path, **options)
    for source in (path, str(path), Image.open(path)):
        picture = utils.open_picture(source)
        assert picture.shape == (40, 40, 3) and is_red(picture[:, 4:-4])  # JPEG blurs the edge


def test_a_high_picture_is_cropped_above_and_below(halves):
    assert is_red(utils.open_picture(halves.transpose(1, 0, 2)), 0)


@pytest.mark.parametrize("convert", [
    lambda a: a, lambda a: a / 255, lambda a: (a / 255).astype(np.float32), lambda a: a.astype(np.uint16) * 257,
    lambda a: np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]),
], ids=["uint8", "float64", "float32", "uint16", "alpha"])
def test_arrays(convert, halves):
    assert is_red(utils.open_picture(convert(halves)), 1)


@pytest.mark.parametrize("image", [
    Image.new("L", (9, 9), 100), Image.new("LA", (9, 9), (100, 255)), Image.new("I", (9, 9), 100 * 257),
    Image.new("I;16", (9, 9), 100 * 257), Image.new("F", (9, 9), 100 * 257), np.full((9, 9), 100, np.uint8),
    np.full((9, 9, 1), 100, np.uint8)], ids=["L", "LA", "I", "I;16", "F", "array", "array of one channel"])
def test_greyscale_becomes_grey(image):
    assert (utils.open_picture(image) == 100).all()


def test_16_bit_files_keep_their_brightness(tmp_path):
    Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (utils.open_picture(tmp_path / "deep.png") == 100).all()


def test_what_is_transparent_becomes_white(tmp_path):
    clear = Image.new("RGBA", (9, 9), (*RED, 0))
    assert (utils.open_picture(clear) == 255).all()
    clear.quantize().save(tmp_path / "palette.png", transparency=0)
    assert (utils.open_picture(tmp_path / "palette.png") == 255).all()


def test_exif_orientation_is_obeyed(tmp_path):
    image = Image.fromarray(np.concatenate([np.full((8, 16, 3), 250, np.uint8), np.zeros((8, 16, 3), np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    picture = utils.open_picture(tmp_path / "turned.png")
    assert (picture[:8] == 0).all() and (picture[8:] == 250).all()


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "png")
    path.write_bytes(path.read_bytes()[:2000])
    return path


def huge(path):
    Image.new("1", (20_000, 20_000)).save(path, "png")
    return path


BROKEN = {
    "missing": lambda path: path, "a folder": lambda path: path.parent,
    "empty": lambda path: path.write_bytes(b"") * 0 or path, "text": lambda path: path.write_text("no image") * 0 or path,
    "truncated": truncated, "absurdly large": huge, "not a number": lambda _: np.full((9, 9, 3), np.nan),
    "out of range": lambda _: np.full((9, 9, 3), 2.0), "channels first": lambda _: np.zeros((3, 9, 9), np.uint8),
    "no pixels": lambda _: np.zeros((0, 9, 3), np.uint8), "integers": lambda _: np.zeros((9, 9, 3), int),
    "nothing": lambda _: None, "a batch": lambda _: np.zeros((2, 9, 9, 3), np.uint8),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(ValueError, match="can't be used as a picture .*: give a path of a PNG or JPEG") as error:
        utils.open_picture(BROKEN[name](tmp_path / "picture"))
    assert "\n" not in str(error.value)


class Brightness(nn.Module):
    """Sees two classes: bright pictures are ships, dark ones trucks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        logits = torch.full((len(x), 10), -9.0)
        logits[:, 8], logits[:, 9] = self.scale * x.mean((1, 2, 3)), -self.scale * x.mean((1, 2, 3))
        return logits


def test_classify_one_and_many(tmp_path):
    bright, dark = np.full((50, 70), 255, np.uint8), np.zeros((33, 32, 3))
    one = utils.classify(Brightness(), bright)
    assert len(one) == 5 and [name for name, _ in one[:2]] == ["ship", "truck"]
    assert one[0][1] > 0.9 and sum(probability for _, probability in one) <= 1.0001
    many = utils.classify(Brightness(), [bright, dark] * 50, count=1)
    assert [name for ((name, _),) in many] == ["ship", "truck"] * 50
    softer = utils.classify(Brightness(), bright, temperature=4.0)
    assert 0.5 < softer[0][1] < one[0][1]
    with pytest.raises(ValueError, match="^temperature is 0: choose a number above 0$"):
        utils.classify(Brightness(), bright, temperature=0)
    assert {name for name, _ in utils.classify(Brightness(), dark, count=10)} == set(CLASSES)


def test_figure_shows_the_picture_what_the_network_sees_and_the_classes(halves, tmp_path):
    figure = utils.plot_picture(halves, utils.classify(Brightness(), halves), tmp_path / "img" / "picture.png")
    seen = [axis.images[0].get_array() for axis in figure.axes[:2]]
    assert [image.shape for image in seen] == [(40, 40, 3), (32, 32, 3)] and all(is_red(image, 0) for image in seen)
    assert len(figure.axes[2].patches) == 5 and (tmp_path / "img" / "picture.png").exists()


def test_a_large_picture_is_averaged_not_sampled(tmp_path):
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 200
    figure = utils.plot_picture(stripes, [("ship", 1.0)], tmp_path / "picture.png")
    assert np.abs(figure.axes[1].images[0].get_array().astype(int) - 100).max() <= 1
