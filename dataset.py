"""CIFAR-10 with augmentations and corruptions, and a sample of it for machines without CIFAR-10."""

import hashlib
import os
import pickle
import random
import re
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache, partial
from importlib.metadata import distributions
from multiprocessing.context import get_spawning_popen
from pathlib import Path

# Importing a module should not ask the network for news. So albumentations is imported here only.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import gaussian_blur

from checks import one_of, require, whole
from device import memory_format
from loader import entropy, write_for_workers

HERE = Path(__file__).parent
# Others would ignore the colour of the hole, or have no ShiftScaleRotate; from 2.0.9 on, it is
# AlbumentationsX, which is imported under the same name.
if not re.fullmatch(r"2\.0\.[0-8]", A.__version__) or any(distributions(name="albumentationsx")):
    raise ImportError(
        f"this is not tested with albumentations {A.__version__}: pip uninstall -y albumentations "
        f"albumentationsx && pip install -r {shlex.quote(str(HERE / 'requirements.txt'))}"
    )

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images, by channel, 0 to 1
STD = (0.2470, 0.2435, 0.2616)
FILL = tuple(round(255 * channel) for channel in MEAN)  # the mean colour of the uint8 images


def train_transform(p: float = 0.5) -> A.Compose:
    """Return the assignment's augmentations: uint8 (H, W, 3) to uint8 (32, 32, 3).

    Half of the images are mirrored. With probability p an image is shifted by up to a tenth of its
    side, scaled by 0.9 to 1.1 and rotated by up to 15 degrees, and again with probability p it gets
    the hole. The border that a shift uncovers is filled by reflection; the hole of CoarseDropout
    (DeVries and Taylor, Cutout, https://arxiv.org/abs/1708.04552) with the training set's mean
    colour, which normalises to zero.
    """
    with warnings.catch_warnings():
        # albumentations prefers Affine, but the assignment names ShiftScaleRotate
        warnings.filterwarnings("ignore", message="ShiftScaleRotate is a special case of Affine")
        return A.Compose(
            [
                A.HorizontalFlip(p=0.5),
                A.ShiftScaleRotate(
                    shift_limit=0.1,
                    scale_limit=0.1,
                    rotate_limit=15,
                    p=p,
                    border_mode=cv2.BORDER_REFLECT_101,
                ),
                A.CoarseDropout(
                    num_holes_range=(1, 1),
                    hole_height_range=(16, 16),
                    hole_width_range=(16, 16),
                    fill=FILL,
                    p=p,
                ),
                A.Resize(32, 32),  # the assignment asks for it; images of 32x32 stay as they are
            ]
        )


def test_transform() -> A.Compose:
    """Return the transform of images that are not augmented: uint8 (H, W, 3) to uint8 (32, 32, 3).

    A larger image is averaged over areas, so that no detail of it turns into noise.
    """
    return A.Compose([A.Resize(32, 32, area_for_downscale="image")])


def normalise(images: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return uint8 (N, H, W, 3) images as float32 (N, 3, H, W) of mean 0 and deviation 1.

    The result has the `memory_format` of its device.

    Raises:
        ValueError: the images are of another shape or type, as normalised ones are.
    """
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images)  # PyTorch knows no negative strides, as of a mirror
    images = torch.as_tensor(images)
    is_rgb = images.ndim == 4 and images.shape[3] == 3 and images.dtype == torch.uint8
    allowed = "torch.uint8 of shape (N, H, W, 3), as make_loader's loaders deliver them"
    require("images", f"{images.dtype} of shape {tuple(images.shape)}", allowed, is_rgb)
    # Whole rows of pixels at once are three times as fast as pixels of three channels.
    width = images.shape[2]
    mean, std = (255 * each.flatten().repeat(width) for each in mean_and_std(images.device))
    rows = images.flatten(2).to(torch.float32, copy=True).sub_(mean).div_(std)
    normalised = rows.view(images.shape).permute(0, 3, 1, 2)  # a view, in channels_last
    return normalised.contiguous(memory_format=memory_format(images.device))


@cache
def mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation by channel, (3, 1, 1) each; cached per device."""
    return tuple(torch.tensor(each, device=device).view(3, 1, 1) for each in (MEAN, STD))


def corrupt(images: torch.Tensor, probability: float, types: Sequence[str]) -> torch.Tensor:
    """Return normalised (N, 3, H, W) images, some of them corrupted.

    Each image is corrupted with `probability`, by one of the types, names of `TRAIN_CORRUPTIONS`.
    From "glass_blur" on, that happens on the CPU, image by image.
    """
    if not probability:
        return images
    # drawn on the CPU, which need not wait for a GPU
    hit, drawn = torch.rand(len(images)) < probability, torch.randint(len(types), (len(images),))
    images = images.clone()
    for number, name in enumerate(types):
        chosen = torch.where(hit & (drawn == number))[0]
        if len(chosen):
            chosen = chosen.to(images.device, non_blocking=True)
            images[chosen] = TRAIN_CORRUPTIONS[name](images[chosen])
    return images


def _gaussian_noise(images):
    """Add Gaussian noise of a deviation up to 0.1 of the range of pixels, mostly weak."""
    _, std = mean_and_std(images.device)
    return images + 0.1 * _random_strength(images) ** 2 / std * torch.randn_like(images)


def _shot_noise(images):
    """Count 50 to 500 photons in each channel of a pixel where it is white."""
    mean, std = mean_and_std(images.device)
    photons = 50 * 10 ** _random_strength(images)
    return _pixels(torch.poisson((images * std + mean).clamp(0, 1) * photons) / photons)


def _gaussian_blur(images):
    """Mix with the Gaussian blur of 1.2 pixels."""
    return torch.lerp(images, gaussian_blur(images, 9, 1.2), _random_strength(images))


def _low_contrast(images):
    """Mix with one random grey from black to white, at most 80 % of it."""
    return torch.lerp(images, _pixels(_random_strength(images)), 0.8 * _random_strength(images))


def _impulse_noise(images):
    """Make up to 8 % of the values 0 or 1: salt and pepper."""
    hit = torch.rand_like(images) < 0.08 * _random_strength(images)
    return torch.where(hit, _pixels(torch.rand_like(images).round()), images)


def _augmix(images):
    """Apply AugMix, https://arxiv.org/abs/1912.02781, with the same operations to four images."""
    mix = v2.AugMix(all_ops=False)
    return _as_uint8(images, lambda pixels: torch.cat([mix(four) for four in pixels.split(4)]))


def _apply(transform, images):
    """Apply a transform of albumentations to each image, seeded by PyTorch."""
    transform.set_random_seed(torch.randint(2**31, ()).item())

    def each(image):
        array = transform(image=image.permute(1, 2, 0).numpy())["image"]
        return torch.from_numpy(array).permute(2, 0, 1)

    return _as_uint8(images, lambda pixels: torch.stack([each(one) for one in pixels]))


def _as_uint8(images, change):
    """Apply a function of uint8 (N, 3, H, W) images on the CPU to normalised ones."""
    mean, std = mean_and_std(images.device)
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).to("cpu", torch.uint8)
    return normalise(change(pixels).permute(0, 2, 3, 1).to(images.device))


def _random_strength(images):
    """Return a random number from 0 to 1 for each image, (N, 1, 1, 1)."""
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def _pixels(values):
    """Return (N, 1 or 3, H, W) values from 0 to 1, normalised."""
    mean, std = mean_and_std(values.device)
    return (values - mean) / std


BOXES = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}
GLASS = [A.GlassBlur(sigma=0.35, max_delta=1, iterations=each) for each in (1, 2, 2)]
TRAIN_CORRUPTIONS = {  # name -> function of normalised (N, 3, H, W) images
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "gaussian_blur": _gaussian_blur,
    "low_contrast": _low_contrast,
    "very_low_contrast": lambda x: x.lerp(x.mean((2, 3), True), 0.5 + 0.4 * _random_strength(x)),
    "impulse_noise": _impulse_noise,
    "glass_blur": partial(_apply, A.OneOf(GLASS, p=1)),
    "motion_blur": partial(_apply, A.MotionBlur(blur_limit=(3, 9), p=1)),
    "pixelate": partial(_apply, A.Downscale((0.6, 0.95), BOXES, p=1)),
    "jpeg": partial(_apply, A.ImageCompression(quality_range=(35, 85), p=1)),
    "augmix": _augmix,
}


class CIFAR10(torchvision.datasets.CIFAR10):
    """CIFAR-10 as uint8 (32, 32, 3) arrays with an albumentations transform.

    Items are (array, class number).

    torchvision downloads, checks and decodes. A RuntimeError says in one line what is missing or
    damaged.
    """

    title = "CIFAR-10"
    required_bytes = 360 * 2**20  # of the archive and what is unpacked

    def __init__(self, root=None, train=True, transform=None, seed=0):
        self.seed = seed
        root = Path(root or data_folder()).expanduser()
        try:
            super().__init__(root, train, transform, download=True)
            if not _consistent(self.data, self.targets):
                raise ValueError("images and labels do not fit together")
        except Exception as error:
            raise RuntimeError(self._trouble(root, error)) from error

    def download(self) -> None:
        """Download and unpack the data, unless they are there.

        Both happen aside, and only whole files are moved to their places. So several runs can do it
        at once, and one that is cut leaves nothing behind.

        Raises:
            OSError: there is no room for them, or they are not what was asked for.
        """
        if self._check_integrity():
            return
        archive = Path(self.root, self.filename)
        batches = Path(self.root, self.base_folder)
        batches.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix="download-") as folder:
            if not check_integrity(archive, self.tgz_md5):
                print(f"downloading {self.title} to {self.root}: 170 MB, 350 MB with its contents")
                if shutil.disk_usage(folder).free < self.required_bytes:
                    raise OSError(f"there is no room: {self.required_bytes // 2**20} MB are needed")
                download = Path(folder, self.filename)
                torch.hub.download_url_to_file(self.url, str(download))
                if not check_integrity(download, self.tgz_md5):
                    raise OSError("the download was cut, or is another file")
                os.replace(download, archive)
            extract_archive(archive, folder)
            batches.mkdir(exist_ok=True)
            for path in Path(folder, self.base_folder).iterdir():
                os.replace(path, batches / path.name)

    def __getitem__(self, index):
        self._seed()
        return self._item(index)

    def __getitems__(self, indices):
        """Return the items of one batch; DataLoader calls this."""
        self._seed(indices)
        return [self._item(index) for index in indices]

    def _seed(self, indices=None):
        """Seed the augmentations of a batch, or of one image: see `entropy`."""
        if self.transform:
            seed = np.random.SeedSequence([self.seed, *entropy(indices)])
            self.transform.set_random_state(
                np.random.default_rng(seed), random.Random(int(seed.generate_state(1)[0]))
            )

    def _item(self, index):
        image = self.data[index]
        if self.transform:
            image = self.transform(image=image)["image"]
        return image, self.targets[index]

    def __getstate__(self):
        """Return what is pickled: for a process that is being started, without the images.

        In their place it gets the path of a file, which that process maps into its memory. So the
        workers of a loader share the images also where they are not forked: on macOS, on Windows,
        and everywhere from Python 3.14 on. Any other pickle or copy has the images.
        """
        state = self.__dict__.copy()
        if get_spawning_popen():
            self.data = np.ascontiguousarray(self.data)  # once, not for each worker
            state["data"] = write_for_workers(self.data)
        return state

    def __setstate__(self, state):
        if isinstance(state["data"], Path):  # "c": a change stays in this process
            state["data"] = np.asarray(np.load(state["data"], mmap_mode="c"))
        self.__dict__.update(state)

    def _trouble(self, root: Path, error: Exception) -> str:
        """Say in one line why the data could not be loaded and what to do."""
        folder, archive = root / self.base_folder, root / self.filename
        cause = " ".join(str(error).split())
        files = [*self.train_list, *self.test_list, (self.meta["filename"], self.meta["md5"])]
        for name, md5 in files:
            if os.path.exists(folder) and not _readable(folder / name, md5):
                return (
                    f"{folder / name} is missing or damaged ({cause}): remove {folder} and run "
                    f"again to download {self.title}, or unpack {self.filename} there again"
                )
        existing = next(path for path in (root, *root.resolve().parents) if os.path.exists(path))
        if not (os.path.isdir(existing) and os.access(existing, os.W_OK)):
            return f"{root} can't be written ({cause}): name another folder with CIFAR10_ROOT"
        if check_integrity(archive, self.tgz_md5):
            return f"{archive} could not be unpacked ({cause}): run again"
        state = "is incomplete or damaged" if os.path.exists(archive) else "is not there"
        return (
            f"{archive} {state} and could not be downloaded ({cause}): run again; or run "
            f"`curl -C - -o {shlex.quote(str(archive))} {self.url}`, again where it is cut, which "
            f"goes on from there; or put {self.filename} there from anywhere else, with the MD5 "
            f"{self.tgz_md5}; or run `make demo`, which needs no download"
        )


class CIFAR10Sample(CIFAR10):
    """2,000 training and 1,000 test images of CIFAR-10, in two image sheets of `sample/`."""

    sha256 = {
        "train": "5e62859400fa739b1b81139231aee1a41dbffd4fc18eacbd6ade3778bff8a341",
        "test": "6a0c0d71f4bcecc0f3534cc83abdb44053ce9acdcce7c21f9afd6d5c84e37011",
    }
    columns = 50  # images in a row of a sheet

    def __init__(self, root=None, train=True, transform=None, seed=0):
        root = Path(root or HERE / "sample").expanduser()
        split = "train" if train else "test"
        torchvision.datasets.VisionDataset.__init__(self, root, transform=transform)
        self.train, self.seed, self.classes = train, seed, list(CLASSES)
        path = root / f"{split}.webp"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != self.sha256[split]:
            raise RuntimeError(f"{path} is missing or damaged: take it from the repository again")
        sheet = np.asarray(Image.open(path).convert("RGB"))
        images = sheet.reshape(-1, 32, self.columns, 32, 3).swapaxes(1, 2)
        self.data = images.reshape(-1, 32, 32, 3).copy()
        self.targets = [number % len(CLASSES) for number in range(len(self.data))]

    @property
    def title(self) -> str:
        """What figures and metrics call the data."""
        return f"a sample of CIFAR-10, {len(self):,} images"


class CIFAR10Tiny(CIFAR10Sample):
    """The first 200 training and 200 test images of the sample, to try a training in seconds."""

    def __init__(self, root=None, train=True, transform=None, seed=0):
        super().__init__(root, train, transform, seed)
        self.data, self.targets = self.data[:200], self.targets[:200]


DATASETS = {"CIFAR-10": CIFAR10, "sample": CIFAR10Sample, "tiny": CIFAR10Tiny}


def data_folder() -> Path:
    """Return the folder of CIFAR-10: `CIFAR10_ROOT`, or `data` in the repository."""
    return Path(os.environ.get("CIFAR10_ROOT") or HERE / "data")


def load_dataset(
    split: str = "train",
    data: str = "CIFAR-10",
    validation_size: int = 0,
    transform: A.Compose | None = None,
    seed: int = 0,
    root: str | Path | None = None,
) -> CIFAR10:
    """Return one split of a data set.

    Args:
        split: "train" (without the last `validation_size` training images), "validation" (those),
            or "test".
        data: "CIFAR-10", "sample" for 3,000 images of it, or "tiny" for 400 of those.
        validation_size: how many training images are held out.
        transform: an albumentations transform; `train_transform()` for "train" and
            `test_transform()` otherwise if None.
        seed: of the augmentations.
        root: the folder of the data; by default `data_folder()`, or `sample` of the repository.

    Raises:
        ValueError: an argument is not one of those allowed.
        RuntimeError: the data are missing or damaged.
    """
    require("data", data, f"one of {', '.join(DATASETS)}", one_of(DATASETS)(data))
    splits = ("train", "validation", "test")
    require("split", split, "train, validation or test", one_of(splits)(split))
    is_path = root is None or isinstance(root, (str, Path))
    require("root", root, "None or the path of a folder", is_path)
    if transform is None:
        transform = train_transform() if split == "train" else test_transform()
    require(
        "transform",
        type(transform).__name__,
        "None or a transform of albumentations, as A.Compose([...])",
        isinstance(transform, (A.BasicTransform, A.BaseCompose)),
    )
    dataset = DATASETS[data](root, split != "test", transform, seed)
    if split == "test" or (split == "train" and not validation_size):
        return dataset
    require(
        "validation_size",
        validation_size,
        f"1 to {len(dataset) - 1}, some of the training images",
        whole(1, len(dataset) - 1)(validation_size),
    )
    split_index = len(dataset) - validation_size
    part = slice(split_index) if split == "train" else slice(split_index, None)
    dataset.data, dataset.targets = dataset.data[part], dataset.targets[part]
    return dataset


def _readable(path, md5):
    """Return whether a batch file is there and unharmed, and its images and labels fit together.

    A pickle can run code, so it is only opened if its MD5 is the expected one.
    """
    if md5 is None or not check_integrity(path, md5):
        return False
    batch = pickle.loads(path.read_bytes(), encoding="latin1")
    if "data" not in batch:  # the names of the classes
        return True
    return _consistent(batch["data"].reshape(-1, 3, 32, 32), batch["labels"])


def _consistent(images, labels):
    """Return whether there is one label, 0 to 9, for each image."""
    return len(images) == len(labels) > 0 and 0 <= min(labels) and max(labels) < len(CLASSES)
