"""The page in a real browser, opened as a file: its network, pictures of all kinds, bad files."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import dataset
from dataset import CLASSES, load_dataset, normalise
from export.page import TEMPLATE, write_page
from model import NetDilated
from pictures import classify, open_picture
from pretrained import load
from test_pictures import wide_gamut

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), 0
)
if not BROWSER:
    pytest.skip("there is no chromium or google-chrome", allow_module_level=True)

HERE = Path(__file__).parent.parent
PAGE, SHIP = HERE / "page" / "index.html", HERE / "sample" / "ship.jpg"
QUIET = "--no-sandbox --disable-background-networking --disable-component-update".split()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """The page in a tab of its own, which asks for nothing else and reports no error."""
    tab = browser.new_page()
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: errors.append(message.text))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(PAGE.as_uri())
    yield tab
    assert not errors
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [PAGE.as_uri()]
    tab.close()


@pytest.fixture(scope="module")
def trained():
    """The committed network and its metrics."""
    return load(NetDilated)


def choose(tab, *paths):
    for path in paths:
        tab.get_by_label("Choose a picture").set_input_files(path)


def status(tab):
    """Return what the page says once it has read the picture."""
    playwright.expect(tab.get_by_role("status")).not_to_have_text(re.compile("^Reading"))
    return " ".join(tab.get_by_role("status").text_content().split())


def seen(tab):
    """Return the 32x32 pixels of the page."""
    assert tab.locator("#result").is_visible(), status(tab)
    return np.array(tab.evaluate("Array.from(seen)"), np.uint8).reshape(32, 32, 4)[..., :3]


def distance(tab, trained, source):
    """Return the largest difference of the page's probabilities and those of pictures.py."""
    assert "is seen as" in status(tab)
    model, metrics = trained
    expected = dict(classify(model, source, 10, metrics["temperature"]))
    values = tab.evaluate("probabilities(seen)")
    return max(abs(expected[name] - value) for name, value in zip(CLASSES, values, strict=True))


def pixels_apart(tab, path):
    """Return the largest difference of what the page's network sees and what ours does."""
    expected = dataset.test_transform()(image=open_picture(path))["image"]
    return np.abs(np.subtract(seen(tab), expected, dtype=int)).max()


def saved(image, path, **options):
    image.save(path, **options)
    return path


def ship(width, height, mode="RGB"):
    with Image.open(SHIP) as image:
        return image.resize((width, height)).convert(mode)


# ---------------------------------------------------------------- the network and the file


def network_distance(tab, model, temperature, count):
    """Return the largest difference of the page's probabilities and PyTorch's on test images."""
    images = load_dataset("test", "sample").data[:count]
    rgba = np.concatenate([images, np.full_like(images[..., :1], 255)], -1)
    script = """(text) => {
      const bytes = Uint8ClampedArray.from(atob(text), (each) => each.charCodeAt(0));
      const starts = Array.from({ length: bytes.length / 4096 }, (_, i) => 4096 * i);
      return starts.map((start) => probabilities(bytes.subarray(start, start + 4096)));
    }"""
    with torch.no_grad():
        expected = (model(normalise(images)) / temperature).softmax(1).numpy()
    return np.abs(np.array(tab.evaluate(script, base64.b64encode(rgba).decode())) - expected).max()


def test_the_network_in_the_page_is_the_committed_one(tab, trained):
    assert network_distance(tab, trained[0], trained[1]["temperature"], 100) < 1e-3


def test_the_committed_page_is_made_of_the_committed_weights(trained, tmp_path):
    write_page(*trained, tmp_path / "index.html")
    assert (tmp_path / "index.html").read_bytes() == PAGE.read_bytes()
    assert len(TEMPLATE.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_page_states_what_the_metrics_say(tab, trained):
    text, metrics = " ".join(tab.locator("main").inner_text().split()), trained[1]
    assert f"{metrics['parameters']:,} parameters" in text
    assert (
        f"classifies {metrics['test_accuracy']:.1f} % of CIFAR-10's test images correctly" in text
    )
    assert f"knows 10 classes only, and calls everything one of them: {', '.join(CLASSES)}" in text
    assert "picture stays on this machine" in text


def test_of_weights_that_nobody_tested_no_accuracy_is_claimed(browser, tmp_path):
    torch.manual_seed(0)
    model, path = NetDilated().eval(), tmp_path / "index.html"
    write_page(model, {}, path)
    tab = browser.new_page()
    tab.goto(path.as_uri())
    assert network_distance(tab, model, 1, 5) < 1e-3
    assert "test images" not in tab.locator("main > p").first.inner_text()
    assert "wrong" not in tab.locator("main").inner_text()
    tab.close()


def test_the_policy_forbids_the_page_to_send_anything(browser):
    tab = browser.new_page()
    tab.goto(PAGE.as_uri())
    script = """new Promise((resolve) => {
      document.onsecuritypolicyviolation = (event) => resolve(event.effectiveDirective);
      fetch("https://example.org/", { method: "POST", body: "picture" }).catch(() => {});
    })"""
    assert tab.evaluate(script) == "connect-src"
    tab.close()


# ---------------------------------------------------------------- ways to give a picture

HAND_OVER = """([content, name, event, key]) => {
  const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
  const files = new DataTransfer();
  if (name) files.items.add(new File([bytes], name));
  const Type = event === "drop" ? DragEvent : ClipboardEvent;
  const options = { [key]: files, bubbles: true, cancelable: true };
  return document.body.dispatchEvent(new Type(event, options));
}"""


def hand_over(tab, path, event):
    """Drop or paste a file, or text where there is none; return whether the browser acts, too."""
    content = base64.b64encode(path.read_bytes()).decode() if path else ""
    key = "dataTransfer" if event == "drop" else "clipboardData"
    return tab.evaluate(HAND_OVER, [content, path.name if path else "", event, key])


def test_a_chosen_picture_has_the_probabilities_of_pictures_py(tab, trained):
    choose(tab, SHIP)
    assert distance(tab, trained, SHIP) < 1e-3
    likeliest = classify(trained[0], SHIP, 5, trained[1]["temperature"])
    rows = [" ".join(row.split()) for row in tab.get_by_role("listitem").all_inner_texts()]
    assert rows == [f"{name} {100 * probability:.1f} %" for name, probability in likeliest]
    assert status(tab) == f"ship.jpg is seen as {likeliest[0][0]}, {rows[0].split(' ', 1)[1]}."


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(event, tab, trained):
    acts = hand_over(tab, SHIP, event)
    assert distance(tab, trained, SHIP) < 1e-3
    assert acts is (event == "paste")  # a dropped file does not take the page's place
    hand_over(tab, None, event)
    assert status(tab) == "That is empty: choose another picture."


def test_a_photograph_is_taken_by_a_button_of_its_own(tab, trained):
    camera = tab.get_by_label("Take a photo")
    assert camera.get_attribute("capture") == "environment"
    camera.set_input_files(SHIP)
    assert distance(tab, trained, SHIP) < 1e-3


def test_the_same_file_can_be_chosen_twice(tab):
    choose(tab, SHIP)
    first = status(tab)
    assert tab.get_by_label("Choose a picture").input_value() == ""  # or nothing would change
    tab.locator("#samples button").first.click()
    assert status(tab) != first
    choose(tab, SHIP)
    assert status(tab) == first


def test_the_mirror_image_does_not_move_the_bars(tab):
    choose(tab, SHIP)
    status(tab)
    before, image = tab.locator("#bars").inner_text(), seen(tab)
    widths = (
        "[...document.querySelectorAll('#bars i')].map(bar => parseFloat(bar.style.backgroundSize))"
    )
    bars = tab.evaluate(widths)
    tab.get_by_role("button", name="Mirror it").click()
    assert np.array_equal(seen(tab), image[:, ::-1]) and not np.array_equal(seen(tab), image)
    moved = np.subtract(tab.locator("#bars i").evaluate_all(widths), bars)
    assert np.abs(moved).max() < 1e-6 and bars[0] > 50
    assert tab.locator("#bars").inner_text() == before
    drawn = (
        "Array.from(document.getElementById('seen').getContext('2d').getImageData(0,0,32,32).data)"
    )
    pixels = np.array(tab.evaluate(drawn), np.uint8).reshape(32, 32, 4)
    assert np.array_equal(pixels[..., :3], seen(tab))


def test_samples_have_their_answers_and_some_are_mistakes(tab):
    buttons, wrong = tab.locator("#samples button"), 0
    for number, name in enumerate(CLASSES):
        buttons.nth(number).click()
        text = status(tab)
        assert text.endswith(f"The right answer is {name}.")
        wrong += f"is seen as {name}," not in text
    assert number == 9 and 1 <= wrong <= 5


@pytest.mark.parametrize("slow", ["slow.png", "bad.png"])
def test_a_newer_picture_wins_over_one_that_is_still_being_read(slow, tab, tmp_path):
    tab.evaluate("""() => {
      const decode = createImageBitmap;
      window.createImageBitmap = (file) => file.name === "fast.png" ? decode(file)
        : new Promise((resolve) => { window.release = resolve; }).then(
            () => file.name === "bad.png" ? Promise.reject() : decode(file));
    }""")
    choose(tab, saved(ship(50, 50), tmp_path / slow))
    tab.evaluate("""async () => {
      while (!window.release) await new Promise((done) => setTimeout(done, 10));
    }""")
    choose(tab, saved(ship(40, 40), tmp_path / "fast.png"))
    text = status(tab)
    tab.evaluate("async () => { release(); await new Promise((done) => setTimeout(done, 300)); }")
    assert status(tab) == text and text.startswith("fast.png is seen as")


# ---------------------------------------------------------------- the same as pictures.py


@pytest.mark.parametrize(
    "size",
    [(1000, 701), (333, 500), (2100, 2000), (64, 64), (40, 91), (32, 32), (31, 20), (7, 5), (1, 1)],
    ids=str,
)
def test_pictures_of_any_size_are_shrunk_as_pictures_py_does(size, tab, trained, tmp_path):
    path = saved(ship(*size), tmp_path / "ship.png")
    choose(tab, path)
    assert distance(tab, trained, path) < 1e-3
    assert pixels_apart(tab, path) == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_any_mode_are_read_as_pictures_py_does(mode, tab, trained, tmp_path):
    image = ship(200, 150, mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = saved(image, tmp_path / "ship.png")
    choose(tab, path)
    assert distance(tab, trained, path) < 1e-3 and pixels_apart(tab, path) <= 1


def test_exif_orientation_is_obeyed(tab, trained, tmp_path):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        path = saved(ship(120, 80), tmp_path / f"{orientation}.jpg", exif=exif, quality=95)
        choose(tab, path)
        assert distance(tab, trained, path) < 1e-3 and pixels_apart(tab, path) <= 1


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("profile", [wide_gamut(SRGB), SRGB], ids=["Display P3", "sRGB"])
def test_colours_of_a_profile_become_srgb(profile, ending, tab, trained, tmp_path):
    path = saved(ship(300, 200), tmp_path / f"ship.{ending}", icc_profile=profile)
    choose(tab, path)
    assert distance(tab, trained, path) < 0.01 and pixels_apart(tab, path) <= 4


# ---------------------------------------------------------------- bad files


def cut(form):
    """Return the first half of a picture file."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.fromarray(noise).save(buffer, form, exif=exif)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def large():
    """Return a small file of 56 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (8000, 7000)).save(buffer, "png")
    return buffer.getvalue()


DAMAGED = "is damaged, or no picture that this browser can read: save it as JPEG or PNG"


@pytest.mark.parametrize(
    "name, content, text",
    [
        ("notes.txt", b"no picture", DAMAGED),
        ("empty.png", b"", "is empty: choose another picture"),
        ("cut.jpg", cut("jpeg"), DAMAGED),
        ("cut.png", cut("png"), DAMAGED),
        ("head.jpg", cut("jpeg")[:300] + bytes(3000), DAMAGED),
        (
            "photo.heic",
            b"\0\0\0\x18ftypheic" + bytes(100),
            "is an HEIC photograph, which this browser can't read: save it as JPEG",
        ),
        ("large.png", large(), "has 56.0 megapixels: make it 50 at most"),
    ],
    ids=["text", "empty", "JPEG cut", "PNG cut", "JPEG damaged", "HEIC", "too large"],
)
def test_bad_files_get_one_line_and_the_page_goes_on(name, content, text, tab, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    choose(tab, path)
    assert status(tab) == f"{name} {text}."
    assert tab.locator("#result").is_hidden()
    choose(tab, SHIP)
    assert status(tab).startswith("ship.jpg is seen as ship, ")
    assert tab.locator("#result").is_visible()


def test_some_browsers_show_the_rest_of_a_cut_file_so_its_end_is_looked_for(tab):
    script = "files => files.map((text) => isCut(new TextDecoder('x-user-defined').decode("
    script += "Uint8Array.from(atob(text), (each) => each.charCodeAt(0)))))"
    files = [cut("jpeg"), cut("png"), SHIP.read_bytes(), SHIP.read_bytes() + bytes(99), b"GIF89a"]
    texts = [base64.b64encode(file).decode() for file in files]
    assert tab.evaluate(script, texts) == [True, True, False, False, False]


# ---------------------------------------------------------------- for everybody


def test_a_phone_needs_no_sideways_scrolling(tab):
    tab.set_viewport_size({"width": 360, "height": 740})
    choose(tab, SHIP)
    status(tab)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_everything_is_reached_by_the_keyboard(tab):
    choose(tab, SHIP)
    status(tab)
    reached = []
    for _ in range(13):
        tab.keyboard.press("Tab")
        script = "document.activeElement.labels?.[0]?.innerText ?? document.activeElement.innerText"
        reached.append(tab.evaluate(script).strip())
    assert reached == ["Choose a picture", "Take a photo", "Mirror it", *CLASSES]
    tab.keyboard.press("Enter")
    assert status(tab).endswith("The right answer is truck.")
