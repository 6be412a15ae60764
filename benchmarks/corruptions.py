"""The fifteen corruptions of CIFAR-10-C at five severities, for uint8 (N, 32, 32, 3) images.

Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
perturbations, https://arxiv.org/abs/1903.12261, with the parameters and the steps by which
https://github.com/hendrycks/robustness made its files, slips included.

Frost needs the frost pictures of that repository, frost1.png to frost3.png, frost4.jpg and
frost5.jpg, in the folder that the environment variable `FROST_ROOT` names.
"""

import functools
import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from checks import require, whole
from recipe import Recipe

BLOCK = 100  # images that share a generator of random numbers
FROST = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


def corrupt(images: np.ndarray, name: str, severity: int, seed: int = 0) -> np.ndarray:
    """Return corrupted images: uint8 (N, 32, 32, 3) to uint8 (N, 32, 32, 3).

    The first images of a data set come out the same, however many follow them.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the random numbers, which also depend on the other arguments and on the number of
            the image.

    Raises:
        ValueError: an argument is not one of those allowed.
        OSError: there are no frost pictures.
    """
    require("corruption", name, f"one of {', '.join(CORRUPTIONS)}", name in CORRUPTIONS)
    require("severity", severity, "1 to 5", whole(1, 5)(severity))
    require("seed", seed, "a whole number from 0", whole(0)(seed))
    require(
        "images",
        f"{images.dtype} {images.shape}",
        "uint8 (N, 32, 32, 3)",
        images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3),
    )
    result = np.empty_like(images)
    for start in range(0, len(images), BLOCK):
        part = images[start : start + BLOCK]
        block = np.zeros((BLOCK, 32, 32, 3), np.uint8)  # always as many random numbers
        block[: len(part)] = part
        rng = np.random.default_rng([seed, list(CORRUPTIONS).index(name), severity, start])
        result[start : start + BLOCK] = CORRUPTIONS[name](block, severity, rng)[: len(part)]
    return result


def truncate(images: np.ndarray) -> np.ndarray:
    """Return floats from 0 to 1 as bytes; as published, cut off and not rounded."""
    return (255 * np.clip(images, 0, 1)).astype(np.uint8)


# ---------------------------------------------------------------- noise
# Each corruption takes uint8 (N, 32, 32, 3) images, a severity from 1 to 5 and a generator.


def gaussian_noise(images, severity, rng):
    """Add normal noise."""
    deviation = (0.04, 0.06, 0.08, 0.09, 0.1)[severity - 1]
    return truncate(images / 255 + rng.normal(0, deviation, images.shape))


def shot_noise(images, severity, rng):
    """Count so many photons in each channel of a pixel where it is white."""
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return truncate(rng.poisson(images / 255 * photons) / photons)


def impulse_noise(images, severity, rng):
    """Replace a share of the values by 0 or 255."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    hit, white = rng.random((2, *images.shape))
    return np.where(hit <= share, np.where(white <= 0.5, 255, 0), images).astype(np.uint8)


# ---------------------------------------------------------------- blur


def defocus_blur(images, severity, rng):
    """Convolve with a disk that is blurred itself."""
    radius, sigma = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    kernel = disk(radius, sigma)
    return truncate(np.stack([cv2.filter2D(image / 255, -1, kernel) for image in images]))


def disk(radius: float, sigma: float) -> np.ndarray:
    """Return the (9, 9) kernel of `defocus_blur`, of sum 1."""
    y, x = np.mgrid[-4:5, -4:5]
    kernel = (x**2 + y**2 <= radius**2).astype(np.float32)
    return cv2.GaussianBlur(kernel / kernel.sum(), (3, 3), sigma)


def glass_blur(images, severity, rng):
    """Blur, copy pixels from neighbours, blur again.

    The published code means to swap each pixel with a neighbour above or to the left of it, but
    swaps two views of one array, which copies the neighbour. It goes backwards through the image,
    so that no copy is copied in the same round.
    """
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[severity - 1]
    images = truncate(_gaussian(images / 255, sigma))
    number = np.arange(len(images))[:, None, None]
    y, x = np.mgrid[2:32, 2:32]
    for _ in range(rounds):
        dy, dx = rng.integers(-1, 1, (2, len(images), 30, 30))  # -1 or 0
        images[:, 2:, 2:] = images[number, y + dy, x + dx]
    return truncate(_gaussian(images / 255, sigma))


def _gaussian(images, sigma):
    """Blur as scikit-image does: over four deviations, with the border's pixels beyond it."""
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest", truncate=4)


def motion_blur(images, severity, rng):
    """Smear along a line within 45 degrees of the horizontal."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return smear(images, radius, sigma, rng.uniform(-45, 45, len(images)))


def smear(images: np.ndarray, radius: int, sigma: float, angles: np.ndarray) -> np.ndarray:
    """Return uint8 (N, 32, 32, C) images after ImageMagick's MotionBlurImage, by (N,) degrees.

    A pixel becomes the weighted mean of those from it along the angle, to one side only. The
    border's pixels count beyond it. The result is rounded to 16 bits and cut off to 8, as in the
    PNG files through which the published code takes it.
    """
    weights = half_gaussian(radius, sigma)
    steps = np.arange(len(weights))
    sine, cosine = (each(np.radians(angles))[:, None] for each in (np.sin, np.cos))
    dy, dx = (np.ceil(steps * each - 0.5).astype(int)[..., None] for each in (sine, cosine))
    y, x = (np.clip(np.arange(32) + each, 0, 31) for each in (dy, dx))  # (N, steps, 32)
    number = np.arange(len(images))[:, None, None]
    result = np.full(images.shape, 0.5 / 257)  # 65535 is 257 * 255
    for step in steps[weights > 1e-6]:
        result += weights[step] * images[number, y[:, step, :, None], x[:, step, None]]
    return result.astype(np.uint8)


def half_gaussian(radius: int, sigma: float) -> np.ndarray:
    """Return the (2 radius + 1,) weights of `smear`, of sum 1, which begin at the maximum."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def zoom_blur(images, severity, rng):
    """Average the image and zooms of it; the first zoom is by 1, which is the image again."""
    limit = (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1]
    factors = np.arange(1, limit, 0.01)  # as published: by rounding it reaches 1.06, not 1.16
    planes = np.moveaxis(images, 3, 1) / 255
    total = planes + sum(zoom(planes, factor) for factor in factors)
    return truncate(np.moveaxis(total, 1, 3) / (len(factors) + 1))


def zoom(planes: np.ndarray, factor: float) -> np.ndarray:
    """Zoom into the middle of (..., 32, 32) planes, linearly between pixels."""
    side = int(np.ceil(32 / factor))
    start = (32 - side) // 2
    rows = ndimage.zoom(np.eye(32)[start : start + side], (factor, 1), order=1)
    start = (len(rows) - 32) // 2
    rows = rows[start : start + 32]
    return rows @ planes @ rows.T


# ---------------------------------------------------------------- weather


def snow(images, severity, rng):
    """Whiten the image, and let smeared flakes fall."""
    mean, deviation, factor, threshold, radius, sigma, share = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]
    flakes = zoom(rng.normal(mean, deviation, images.shape[:3]), factor)
    flakes = truncate(np.where(flakes < threshold, 0, flakes))[..., None]
    flakes = smear(flakes, radius, sigma, rng.uniform(-135, -45, len(images))) / 255
    images = images / 255
    grey = (images @ (0.299, 0.587, 0.114))[..., None]
    white = np.maximum(images, 1.5 * grey + 0.5)
    return truncate(share * images + (1 - share) * white + flakes + flakes[:, ::-1, ::-1])


def frost(images, severity, rng):
    """Lay a part of a frost picture over the image."""
    share, ice = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    pictures = frost_pictures()
    parts = []
    for number in rng.integers(len(pictures), size=len(images)):
        height, width, _ = pictures[number].shape
        top, left = rng.integers(0, (height - 32, width - 32))
        parts.append(pictures[number][top : top + 32, left : left + 32])
    return np.minimum(share * images + ice * np.stack(parts), 255).astype(np.uint8)


def frost_pictures() -> list[np.ndarray]:
    """Return the five frost pictures, uint8 (H, W, 3), each at a fifth of its size.

    There is a sixth, frost6.jpg, which the published code never takes.

    Raises:
        OSError: one of them is not there.
    """
    return _read_pictures(os.environ.get("FROST_ROOT") or "")


@functools.cache
def _read_pictures(folder):
    pictures = []
    for name in FROST:
        picture = cv2.imread(str(Path(folder, name))) if folder else None
        if picture is None or min(picture.shape[:2]) < 165:
            raise OSError(
                f"frost needs {name}, a picture of at least 165 x 165 pixels: name the folder of "
                "frost1.png to frost5.jpg, of hendrycks/robustness on GitHub, with FROST_ROOT"
            )
        pictures.append(cv2.resize(picture, (0, 0), fx=0.2, fy=0.2)[..., ::-1])  # BGR to RGB
    return pictures


def fog(images, severity, rng):
    """Add a cloud, and scale the sum so that the brightest value may stay."""
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    images = images / 255
    brightest = images.max((1, 2, 3), keepdims=True)
    cloud = strength * plasma(len(images), decay, rng)[..., None]
    return truncate((images + cloud) * brightest / (brightest + strength))


def plasma(count: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Return plasma fractals, (count, 32, 32) from 0 to 1, by the diamond-square algorithm.

    From one corner on, which is all corners, since the map wraps around, the middle of a square
    becomes the mean of its corners and that of an edge the mean of its ends and of the middles
    beside it, plus noise that is weaker at each halving by the square of the decay.
    """
    maps = np.zeros((count, 32, 32))
    step, noise = 32, 100

    def noisy(total):
        return total / 4 + noise * rng.uniform(-noise, noise, total.shape)

    while step > 1:
        half = step // 2
        corners = maps[:, ::step, ::step]
        edges = corners + np.roll(corners, -1, 1)
        maps[:, half::step, half::step] = noisy(edges + np.roll(edges, -1, 2))
        middles = maps[:, half::step, half::step]
        beside = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 2)
        maps[:, ::step, half::step] = noisy(beside)
        beside = middles + np.roll(middles, 1, 2) + corners + np.roll(corners, -1, 1)
        maps[:, half::step, ::step] = noisy(beside)
        step, noise = half, noise / decay
    maps -= maps.min((1, 2), keepdims=True)
    return maps / maps.max((1, 2), keepdims=True)


def brightness(images, severity, rng):
    """Add to the value of HSV, the largest channel: it scales all of them. Black becomes grey."""
    more = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1]
    images = images / 255
    value = images.max(3, keepdims=True)
    colour = np.divide(images, value, out=np.ones_like(images), where=value > 0)
    return truncate(colour * np.minimum(value + more, 1))


# ---------------------------------------------------------------- digital


def contrast(images, severity, rng):
    """Pull each channel towards its mean."""
    share = (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]
    images = images / 255
    means = images.mean((1, 2), keepdims=True)
    return truncate((images - means) * share + means)


def elastic_transform(images, severity, rng):
    """Move three points of the image at random, and the rest with them; then make waves."""
    alpha, sigma, shift = 32 * np.array(
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    )[severity - 1]  # fmt: skip
    points = np.float32([[26, 26], [26, 6], [6, 6]])
    moved = (points + rng.uniform(-shift, shift, (len(images), 3, 2))).astype(np.float32)
    waves = rng.uniform(-1, 1, (len(images), 2, 32, 32))
    waves = alpha * ndimage.gaussian_filter(waves, (0, 0, sigma, sigma), truncate=3)
    y_and_x = np.mgrid[:32, :32] + waves
    results = []
    for image, corners, place in zip(images.astype(np.float32) / 255, moved, y_and_x, strict=True):
        affine = cv2.getAffineTransform(points, corners)
        image = cv2.warpAffine(image, affine, (32, 32), borderMode=cv2.BORDER_REFLECT_101)
        results.append(_sample(image, place))
    return truncate(np.stack(results))


def _sample(image, place):
    """Return a (32, 32, 3) image as it is at other places, (2, 32, 32) rows and columns."""
    channels = np.moveaxis(image, 2, 0)
    sampled = [ndimage.map_coordinates(each, place, order=1, mode="reflect") for each in channels]
    return np.stack(sampled, 2)


def pixelate(images, severity, rng):
    """Shrink the image and enlarge it again, each by averages over boxes."""
    side = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])

    def pixelated(image):
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
        return small.resize((32, 32), Image.Resampling.BOX)

    return np.stack([pixelated(image) for image in images])


def jpeg_compression(images, severity, rng):
    """Save the image as JPEG."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compressed(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return Image.open(file)

    return np.stack([compressed(image) for image in images])


NOISE = (gaussian_noise, shot_noise, impulse_noise)
BLUR = (defocus_blur, glass_blur, motion_blur, zoom_blur)
WEATHER = (snow, frost, fog, brightness)
DIGITAL = (contrast, elastic_transform, pixelate, jpeg_compression)
CORRUPTIONS = {each.__name__: each for each in NOISE + BLUR + WEATHER + DIGITAL}
SIMILAR = {  # name in `dataset.TRAIN_CORRUPTIONS` -> those here that are similar
    "gaussian_noise": (gaussian_noise, shot_noise),
    "shot_noise": (gaussian_noise, shot_noise),
    "gaussian_blur": BLUR,
    "low_contrast": (contrast,),
    "very_low_contrast": (contrast,),
    "impulse_noise": (impulse_noise,),
    "glass_blur": (glass_blur,),
    "motion_blur": (motion_blur,),
    "pixelate": (pixelate,),
    "jpeg": (jpeg_compression,),
    "augmix": (),
}


def similar_to_training(recipe: Recipe) -> list[str]:
    """Return the names of `CORRUPTIONS` that are similar to those of a training run.

    What the weights saw that a run fine-tunes is not known here.
    """
    types = recipe.corruption_types if recipe.corruption else ()
    similar = {each.__name__ for name in types for each in SIMILAR[name]}
    return [name for name in CORRUPTIONS if name in similar]


def kinds_to_make() -> list[str]:
    """Return the names of `CORRUPTIONS`, without frost unless `FROST_ROOT` is set."""
    return [name for name in CORRUPTIONS if name != "frost" or os.environ.get("FROST_ROOT")]
