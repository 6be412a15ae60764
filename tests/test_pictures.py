"""Your own picture: any size and mode as a person would see it, and one line for what is none."""

import gc
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn

import dataset
from dataset import CLASSES, normalise
from pictures import classify, main, open_picture, plot_picture

HERE = Path(__file__).parent.parent
RED, BLUE = (200, 30, 20), (10, 40, 220)


@pytest.fixture
def halves():
    """A picture twice as wide as high: a red square in the middle, blue at both ends."""
    picture = np.empty((40, 80, 3), np.uint8)
    picture[:], picture[:, 20:60] = BLUE, RED
    return picture


def is_red(picture, tolerance=40):
    return (
        picture.dtype == np.uint8
        and picture.shape[2] == 3
        and np.abs(picture.astype(int) - RED).max() <= tolerance
    )


@pytest.mark.parametrize(
    "suffix, mode", [("png", "RGB"), ("jpeg", "CMYK"), ("gif", "P"), ("tiff", "RGBA")]
)
def test_files_of_all_modes_give_the_largest_centred_square(suffix, mode, halves, tmp_path):
    image, path = Image.fromarray(halves), tmp_path / f"picture.{suffix}"
    (image.quantize() if mode == "P" else image.convert(mode)).save(path)
    with Image.open(path) as opened:
        assert opened.mode == mode
        for source in (path, str(path), opened):
            picture = open_picture(source)
            assert picture.shape == (40, 40, 3) and is_red(picture[:, 4:-4])  # JPEG blurs the edge


def test_bytes_open_files_tensors_and_the_home_folder_are_taken(halves, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    Image.fromarray(halves).save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = open_picture(path)
    tensor = torch.from_numpy(halves).movedim(-1, 0)
    with open(path, "rb") as file:
        sources = (path.read_bytes(), io.BytesIO(path.read_bytes()), file, tensor, tensor / 255)
        for source in (*sources, "~/picture.png", Path("~/picture.png")):
            assert np.array_equal(open_picture(source), expected)
        assert not file.closed  # it is the caller's


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("ending", ["gif", "png", "tiff"])
def test_files_are_closed_again(ending, tmp_path):
    path = tmp_path / f"moving.{ending}"
    first, second = (Image.new("RGB", (9, 9), colour) for colour in (RED, BLUE))
    first.save(path, save_all=True, append_images=[second])
    gc.collect()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert is_red(open_picture(path), 0)
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) <= before


def test_an_array_of_16_bits_may_hold_values_of_8(halves):
    assert np.array_equal(open_picture(halves.astype(np.uint16)), open_picture(halves))


@pytest.mark.parametrize("address", ["https://example.org/cat.jpg", "file:///tmp/cat.jpg"])
def test_an_address_is_to_be_downloaded_first(address):
    with pytest.raises(ValueError, match="it is an address: download it first, and give the path"):
        open_picture(address)


def test_an_heic_photograph_is_named_with_the_remedy_whatever_its_ending(tmp_path, monkeypatch):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="HEIC photograph: save it as JPEG, or pip install pill"):
        open_picture(path)
    registered = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    with pytest.raises(ValueError, match="cannot identify image file"):  # this one is no picture
        open_picture(path)
    assert registered


def test_colours_of_another_profile_become_srgb(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (9, 9), RED)
    image.save(tmp_path / "same.png", icc_profile=srgb)
    image.save(tmp_path / "damaged.png", icc_profile=b"no profile")
    assert is_red(open_picture(tmp_path / "same.png"), 1)
    assert is_red(open_picture(tmp_path / "damaged.png"), 0)
    wide = tmp_path / "wide.png"
    image.save(wide, icc_profile=wide_gamut(srgb))
    red, green, blue = open_picture(wide)[0, 0].astype(int)
    assert red > RED[0] + 5 and green < RED[1]


def wide_gamut(profile):
    """Return an sRGB profile with the primaries of Display P3, the colorants of Apple's one."""
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    data = bytearray(profile)
    for entry in range(int.from_bytes(data[128:132], "big")):
        place = 132 + 12 * entry
        name, start = (
            bytes(data[place : place + 4]),
            int.from_bytes(data[place + 4 : place + 8], "big"),
        )
        if name in primaries:
            values = (round(value * 65536) for value in primaries[name])
            data[start + 8 : start + 20] = b"".join(
                value.to_bytes(4, "big", signed=True) for value in values
            )
    return bytes(data)


def test_a_high_picture_is_cropped_above_and_below(halves):
    assert is_red(open_picture(halves.transpose(1, 0, 2)), 0)


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: a / 255,
        lambda a: a.astype(np.uint16) * 257,
        lambda a: np.dstack([a, np.full(a.shape[:2], 255, np.uint8)]),
    ],
    ids=["uint8", "floats", "uint16", "alpha"],
)
def test_arrays_of_all_kinds_are_pictures(convert, halves):
    assert is_red(open_picture(convert(halves)), 1)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (9, 9), 100),
        Image.new("LA", (9, 9), (100, 255)),
        Image.new("I", (9, 9), 100 * 257),
        Image.new("I;16", (9, 9), 100 * 257),
        Image.new("F", (9, 9), 100 * 257),
        Image.new("I", (9, 9), 100),
        Image.new("F", (9, 9), 100),
        Image.new("F", (9, 9), 100.5 / 255),
        np.full((9, 9), 100, np.uint8),
        np.full((9, 9, 1), 100, np.uint8),
    ],
    ids=[
        "L",
        "LA",
        "I",
        "I;16",
        "F",
        "I of 8 bits",
        "F of 8 bits",
        "F to 1",
        "array",
        "array of one channel",
    ],
)
def test_greyscale_becomes_grey_and_16_bits_keep_their_brightness(image):
    assert (open_picture(image) == 100).all()


def test_what_is_transparent_becomes_white(tmp_path):
    clear = Image.new("RGBA", (9, 9), (*RED, 0))
    assert (open_picture(clear) == 255).all()
    clear.quantize().save(tmp_path / "palette.png", transparency=0)
    assert (open_picture(tmp_path / "palette.png") == 255).all()


def test_exif_orientation_is_obeyed(tmp_path):
    image = Image.fromarray(
        np.concatenate([np.full((8, 16, 3), 250, np.uint8), np.zeros((8, 16, 3), np.uint8)])
    )
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    picture = open_picture(tmp_path / "turned.png")
    assert (picture[:8] == 0).all() and (picture[8:] == 250).all()


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    first, second = (Image.new("RGB", (9, 9), colour) for colour in (RED, BLUE))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert is_red(open_picture(tmp_path / "moving.gif"), 0)


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "png")
    path.write_bytes(path.read_bytes()[:2000])
    return path


def containing(content):
    """Return a function that writes a file of this content and returns its path."""
    return lambda path: path.write_bytes(content) and path


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: path, "No such file"),
        (lambda path: path.parent, "directory|Permission"),
        (containing(b"no image"), "cannot identify"),
        (truncated, "truncated"),
        (containing(b"P6 20000 20000 255\n"), "exceeds limit of 178956970 pixels"),
        (lambda _: np.full((9, 9, 3), np.nan), "floats are not all from 0 to 1"),
        (lambda _: np.full((9, 9, 3), 2.0), "floats are not all from 0 to 1"),
        (lambda _: np.zeros((3, 9, 9), np.uint8), r"shape is \(3, 9, 9\)"),
        (lambda _: np.zeros((9, 9, 3), int), "type is int"),
        (lambda _: Image.new("RGB", (9, 0)), "empty, 9 x 0 pixels"),
        (lambda _: None, "no path, file, PIL image, array or tensor"),
        (
            lambda _: Image.new("F", (9, 9), float("nan")),
            "its values, of mode F, are not all from 0 to 65535",
        ),
        (
            lambda _: Image.new("I", (9, 9), -5),
            "its values, of mode I, are not all from 0 to 65535",
        ),
    ],
    ids=[
        "missing",
        "a folder",
        "text",
        "truncated",
        "absurdly large",
        "not a number",
        "out of range",
        "channels first",
        "integers",
        "no pixels",
        "nothing",
        "mode F of NaN",
        "mode I below 0",
    ],
)
def test_what_is_no_picture_is_refused_in_one_line_with_the_reason(make, reason, tmp_path):
    source = make(tmp_path / "picture")
    name = str(source) if isinstance(source, Path) else f"the {type(source).__name__}"
    with pytest.raises(
        ValueError, match=rf"can't be used as a picture \(.*({reason}).*\): give a path of"
    ) as error:
        open_picture(source)
    assert "\n" not in str(error.value) and str(error.value).startswith(name)


class Brightness(nn.Module):
    """Sees two classes: bright pictures are ships, dark ones trucks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        logits = torch.full((len(x), 10), -9.0)
        logits[:, 8], logits[:, 9] = self.scale * x.mean((1, 2, 3)), -self.scale * x.mean((1, 2, 3))
        return logits


def test_classify_one_and_many():
    model, bright, dark = Brightness(), np.full((50, 70), 255, np.uint8), np.zeros((33, 32, 3))
    one = classify(model, bright)
    assert (
        len(one) == 5 and [name for name, _ in one[:2]] == ["ship", "truck"] and not model.training
    )
    assert one[0][1] > 0.9 and sum(probability for _, probability in one) <= 1.0001
    many = classify(model, [bright, dark] * 10, count=1)
    assert [name for ((name, _),) in many] == ["ship", "truck"] * 10
    assert {name for name, _ in classify(model, dark, count=10)} == set(CLASSES)
    assert classify(model, bright, 1, classes=tuple("abcdefghij"))[0][0] == "i"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_take_the_type_of_the_network(dtype):
    model, bright = Brightness().to(dtype), np.full((9, 9), 255, np.uint8)
    seen = []
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].dtype))
    assert classify(model, bright, count=1)[0][0] == "ship" and seen == [dtype]


def test_a_network_without_parameters_and_a_wrapped_one_classify():
    bright = np.full((9, 9), 255, np.uint8)
    model = Brightness()
    expected = classify(model, bright)
    assert classify(nn.DataParallel(model), bright) == expected
    assert classify(torch.compile(model, backend="eager"), bright) == expected
    del model.scale
    model.scale = 1
    assert classify(model, bright) == expected


def test_a_temperature_divides_the_logits():
    sharp, soft = (
        dict(classify(Brightness(), np.full((9, 9), 255, np.uint8), 10, temperature))
        for temperature in (1.0, 4.0)
    )
    assert np.log(sharp["ship"] / sharp["truck"]) == pytest.approx(
        4 * np.log(soft["ship"] / soft["truck"]), rel=1e-3
    )
    with pytest.raises(ValueError, match="^temperature is 0: choose a number above 0$"):
        classify(Brightness(), np.zeros((9, 9), np.uint8), temperature=0)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"count": 11}, "^count is 11: choose 1 to 10, the number of classes$"),
        ({"count": -1}, "^count is -1: choose"),
        ({"count": "5"}, "^count is '5': choose 1 to 10"),
        (
            {"classes": ("cat", "dog"), "count": 2},
            "^the number of classes is 2: choose 10 names, one for each logit",
        ),
        (
            {"model": (Brightness(), {})},
            "^model is 'tuple': choose a network: the first of the pair that load returns$",
        ),
    ],
)
def test_arguments_of_classify_that_are_impossible_are_named(changes, text):
    with pytest.raises(ValueError, match=text):
        classify(**{"model": Brightness(), "sources": np.zeros((9, 9), np.uint8), **changes})


def test_the_network_sees_a_picture_as_it_sees_test_images():
    seen, model, noise = (
        [],
        Brightness(),
        np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8),
    )
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    classify(model, noise)
    assert torch.equal(seen[0], normalise(dataset.test_transform()(image=noise)["image"][None]))


def test_the_figure_shows_the_picture_what_the_network_sees_and_the_classes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    figure = plot_picture(noise, classify(Brightness(), noise), tmp_path / "img" / "picture.png")
    whole, small = (axis.images[0].get_array() for axis in figure.axes[:2])
    assert np.array_equal(whole, noise) and np.array_equal(
        small, dataset.test_transform()(image=noise)["image"]
    )
    assert len(figure.axes[2].patches) == 5 and (tmp_path / "img" / "picture.png").exists()


def test_the_command_names_the_classes_of_each_picture_and_goes_on_after_a_bad_one(
    tmp_path, capsys
):
    ship = str(HERE / "sample" / "ship.jpg")
    with pytest.raises(SystemExit) as end:
        main([ship, str(tmp_path / "missing.png"), ship])
    captured = capsys.readouterr()
    assert end.value.code == 1 and captured.out.count(f"{ship}: ship ") == 2
    assert "missing.png can't be used as a picture" in captured.err
    with pytest.raises(SystemExit) as end:
        main([ship, "--save", str(tmp_path / "figure.png")])
    assert end.value.code == 0 and (tmp_path / "figure.png").exists()
    with pytest.raises(SystemExit):
        main([ship, ship, "--save", "figure.png"])
    assert "--save draws one picture" in capsys.readouterr().err
