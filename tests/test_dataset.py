"""The data: what the transforms do, which random numbers they use, and what is said when something
is wrong.
"""

import copy
import hashlib
import http.server
import multiprocessing
import os
import pickle
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import set_spawning_popen
from pathlib import Path
from unittest.mock import Mock

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset
from torchvision import transforms

import dataset
import loader
from dataset import (
    FILL,
    MEAN,
    STD,
    TRAIN_CORRUPTIONS,
    corrupt,
    data_folder,
    load_dataset,
    mean_and_std,
    normalise,
    train_transform,
)
from recipe import Recipe
from tiny import Code

HERE = Path(__file__).parent.parent


@pytest.fixture
def train_set(root):
    return load_dataset("train", "sample", root=root)


def test_importing_all_modules_is_silent_and_touches_nothing(tmp_path):
    modules = {path.stem for path in HERE.glob("*.py")} - {"conftest", "hubconf"}
    code = (
        f"import sys, {', '.join(sorted(modules))}; dataset.train_transform(); "
        "assert not {'benchmarks', 'checker'} & set(sys.modules); "  # wings of their own
        "import checker.rules"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    environment.pop("NO_ALBUMENTATIONS_UPDATE", None)
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (run.returncode, run.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "version", ["1.4.24", "2.0.9", "2.1.0", "unknown", "2.0.8 of the successor"]
)
def test_another_albumentations_is_refused_with_the_command_that_installs_ours(
    version, monkeypatch
):
    if version == "2.0.8 of the successor":
        monkeypatch.setattr("importlib.metadata.distributions", lambda name: [name])
    else:
        monkeypatch.setattr(A, "__version__", version)
    with pytest.raises(ImportError) as error:
        runpy.run_path(dataset.__file__)
    assert str(error.value) == (
        f"this is not tested with albumentations {A.__version__}: pip uninstall -y albumentations "
        f"albumentationsx && pip install -r {HERE}/requirements.txt"
    )


@pytest.mark.parametrize("version", ["2.0.0", "2.0.8"])
def test_every_2_0_of_albumentations_will_do(version, monkeypatch):
    assert "albumentations==2.0.8" in (HERE / "requirements.txt").read_text()
    monkeypatch.setattr(A, "__version__", version)
    runpy.run_path(dataset.__file__)


# ---------------------------------------------------------------- transforms


def test_coarse_dropout_makes_one_hole_of_16x16_in_the_mean_colour():
    (hole,) = [
        step for step in train_transform(p=1).transforms if type(step).__name__ == "CoarseDropout"
    ]
    positions = set()
    for _ in range(50):
        image = hole(image=np.zeros((32, 32, 3), np.uint8))["image"]
        changed = image.any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert len(rows) == len(columns) == 16 and changed.sum() == 16 * 16
        assert (image[changed] == FILL).all()
        positions.add((rows[0], columns[0]))
    assert len(positions) > 10


def test_half_of_the_images_are_flipped_and_a_share_p_is_shifted_or_has_a_hole(train_set):
    for step, share in zip(train_transform(p=0.2).transforms, (0.5, 0.2, 0.2), strict=False):
        changed = [
            (step(image=train_set.data[0])["image"] != train_set.data[0]).any() for _ in range(400)
        ]
        assert np.mean(changed) == pytest.approx(share, abs=0.1)


def test_the_border_that_a_shift_uncovers_is_filled_by_reflection():
    shift, image = train_transform(p=1).transforms[1], np.full((32, 32, 3), 200, np.uint8)
    assert all((shift(image=image)["image"] == 200).all() for _ in range(20))


def test_transforms_make_32x32_uint8():
    for transform in (train_transform(), dataset.test_transform()):
        image = transform(image=np.zeros((48, 40, 3), np.uint8))["image"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8


def test_a_large_image_is_averaged_not_sampled():
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::4] = 200
    assert np.abs(dataset.test_transform()(image=stripes)["image"].astype(int) - 50).max() <= 1


def test_normalise_gives_mean_0_and_deviation_1_and_the_hole_becomes_zero():
    pixels = np.round(255 * np.array([np.add(MEAN, STD), np.subtract(MEAN, STD)])).astype(np.uint8)
    torch.testing.assert_close(
        normalise(pixels.reshape(1, 2, 1, 3)).flatten(2)[0],
        torch.tensor([[1.0, -1.0]] * 3),
        rtol=0,
        atol=0.01,
    )
    assert normalise(np.full((1, 32, 32, 3), FILL, np.uint8)).abs().max() < 0.01


def test_a_mirrored_view_is_normalised_as_its_copy_is(train_set):
    mirrored = train_set.data[:4, :, ::-1]
    assert torch.equal(normalise(mirrored), normalise(mirrored.copy()))
    assert torch.equal(normalise(mirrored), normalise(train_set.data[:4]).flip(3))


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((4, 3, 32, 32), torch.uint8),
        ((32, 32, 3), torch.uint8),
        ((4, 32, 32, 3), torch.float32),
        ((4, 3, 32, 32), torch.float32),
    ],
)
def test_images_of_another_type_or_shape_are_refused(shape, dtype):
    with pytest.raises(
        ValueError, match=rf"^images is '{dtype} of shape .*: choose torch.uint8 of"
    ):
        normalise(torch.zeros(shape, dtype=dtype))


# ---------------------------------------------------------------- splits


def test_the_validation_split_is_the_end_of_the_training_images_and_not_augmented(root):
    whole, train, validation = (
        load_dataset(split, "sample", size, root=root)
        for split, size in (("train", 0), ("train", 300), ("validation", 300))
    )
    assert (len(whole), len(train), len(validation)) == (2000, 1700, 300)
    assert (validation[0][0] == whole.data[1700]).all() and validation[299][1] == whole.targets[
        1999
    ]
    assert len({validation[0][0].tobytes() for _ in range(5)}) == 1
    assert len({train[0][0].tobytes() for _ in range(20)}) > 1


def test_the_sample_has_ten_classes_and_says_what_it_is(train_set, root):
    test_set = load_dataset("test", "sample", root=root)
    assert train_set.title == "a sample of CIFAR-10, 2,000 images"
    assert test_set.title == "a sample of CIFAR-10, 1,000 images"
    assert (
        load_dataset("validation", "sample", 300, root=root).title
        == "a sample of CIFAR-10, 300 images"
    )
    assert "Number of datapoints: 1000" in repr(test_set) and "Split: Test" in repr(test_set)
    assert not {image.tobytes() for image in train_set.data} & {
        image.tobytes() for image in test_set.data
    }
    assert sorted(set(test_set.targets)) == list(range(10)) and len(test_set.classes) == 10


def test_tiny_is_the_first_images_of_the_sample_20_of_each_class(root):
    for split in ("train", "test"):
        tiny, sample = (load_dataset(split, data, root=root) for data in ("tiny", "sample"))
        assert tiny.title == "a sample of CIFAR-10, 200 images"
        assert (tiny.data == sample.data[:200]).all() and tiny.targets == sample.targets[:200]
        assert np.bincount(tiny.targets).tolist() == [20] * 10
    assert len(load_dataset("train", "tiny", 50)) == 150


def test_a_tilde_is_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    assert load_dataset("test", "sample", root=f"~/{root.name}").root == root


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), Path.unlink],
    ids=["altered", "missing"],
)
def test_a_damaged_sample_is_named(damage, root, tmp_path):
    shutil.copytree(root, tmp_path / "sample")
    damage(tmp_path / "sample" / "test.webp")
    with pytest.raises(
        RuntimeError, match="test.webp is missing or damaged: take it from the repository again$"
    ):
        load_dataset("test", "sample", root=tmp_path / "sample")


def test_the_folder_comes_from_the_environment(cifar10_files, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(cifar10_files.parent))
    assert Path(load_dataset("test").root) == cifar10_files.parent


def test_the_folder_is_the_repository_s_wherever_a_program_starts(tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert data_folder() == HERE / "data"
    assert len(load_dataset("test", "sample")) == 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "training"}, "split is 'training': choose train, validation or test"),
        ({"data": "MNIST"}, "data is 'MNIST': choose one of CIFAR-10, sample, tiny"),
        ({"split": "validation"}, "validation_size is 0: choose 1 to 1999"),
        ({"validation_size": 2000}, "validation_size is 2000: choose 1 to 1999"),
        ({"validation_size": -1}, "validation_size is -1: choose 1 to 1999"),
        ({"data": []}, r"data is \[\]: choose one of"),
        ({"split": np.array(["train", "test"])}, "split is array"),
        ({"root": 3}, "root is 3: choose None or the path of a folder"),
        (
            {"transform": transforms.ToTensor()},
            "transform is 'ToTensor': choose None or a transform of albumentations",
        ),
        ({"transform": []}, "transform is 'list': choose None or a transform of albumentations"),
    ],
)
def test_impossible_splits_are_named(arguments, message, root):
    with pytest.raises(ValueError, match=message):
        load_dataset(**{"data": "sample", "root": root, **arguments})


# ---------------------------------------------------------------- processes that are not forked


@pytest.fixture
def spawning():
    """Pickle as for a process that is not forked."""
    set_spawning_popen(Mock())
    yield
    set_spawning_popen(None)


def test_a_process_that_is_not_forked_maps_the_images(train_set, spawning, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "get_temp_dir", lambda: tmp_path)
    train_set.data = train_set.data.transpose(0, 2, 1, 3)  # not contiguous, as torchvision's
    images = train_set.data.copy()
    wrapped = ConcatDataset([Subset(train_set, range(1000)), Subset(train_set, range(1000, 2000))])
    pickled = pickle.dumps(wrapped), pickle.dumps(wrapped)  # for two workers
    assert len(pickled[0]) < images.nbytes / 100
    (file,) = tmp_path.iterdir()  # the two share it
    one, other = (pickle.loads(each).datasets[0].dataset for each in pickled)
    assert (one.data == images).all() and one.targets == train_set.targets
    one.data[0] = 0  # reaches nobody else
    assert (other.data == images).all() and (train_set.data == images).all()
    train_set.data[1] = 0  # reaches a worker that starts later
    assert (pickle.loads(pickle.dumps(train_set)).data == train_set.data).all()
    assert set(tmp_path.iterdir()) > {file}


def test_the_process_that_wrote_the_images_removes_them(train_set):
    def write(sender):
        set_spawning_popen(Mock())
        sender.send(train_set.__getstate__()["data"])
        sender.poll(60)  # until the test has seen the file

    receiver, sender = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=write, args=(sender,))
    process.start()
    path = receiver.recv()
    assert np.load(path).shape == (2000, 32, 32, 3)
    receiver.send("seen")
    process.join()
    assert not path.parent.exists()


def test_any_other_copy_has_the_images(train_set):
    pickled = pickle.dumps(train_set)
    assert len(pickled) > train_set.data.nbytes
    for twin in (pickle.loads(pickled), copy.deepcopy(train_set)):
        assert (twin.data == train_set.data).all()


# ---------------------------------------------------------------- missing and damaged data


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setattr(
        urllib.request, "_opener", None
    )  # which remembers the proxies of its first use


@pytest.fixture
def cifar10_files(tmp_path, monkeypatch):
    """Write a small data set under CIFAR-10's own file names and have torchvision expect its MD5
    sums.
    """
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batch = pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": list(range(10))})
    md5 = hashlib.md5(batch).hexdigest()
    for name in ("train_list", "test_list"):
        files = [[file, md5] for file, _ in getattr(dataset.CIFAR10, name)]
        monkeypatch.setattr(dataset.CIFAR10, name, files)
        for file, _ in files:
            (folder / file).write_bytes(batch)
    meta = pickle.dumps({"label_names": list(dataset.CLASSES)})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(
        dataset.CIFAR10, "meta", {**dataset.CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()}
    )
    return folder


def archive_of(folder, monkeypatch):
    """Pack the files of a data set beside its folder and have torchvision expect the archive;
    return its path.
    """
    path = folder.parent / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, folder.name)
    monkeypatch.setattr(dataset.CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_no_data_and_no_network_is_one_line_with_the_remedy(tmp_path, no_network):
    with pytest.raises(RuntimeError) as error:
        load_dataset("train", root=tmp_path)
    text = str(error.value)
    assert "\n" not in text and "make demo" in text
    assert f"curl -C - -o {tmp_path}/cifar-10-python.tar.gz {dataset.CIFAR10.url}" in text
    assert "with the MD5 c58f30108f718f92721af3b95e74349a" in text
    assert error.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=300 * 2**20))
    with pytest.raises(RuntimeError, match="there is no room: 360 MB are needed"):
        load_dataset("train", root=tmp_path)


def test_whole_files_load_and_nothing_is_written(cifar10_files, no_network):
    """So a read-only folder will do."""

    def times():
        return {
            path: path.stat().st_mtime_ns
            for path in [cifar10_files.parent, *cifar10_files.parent.rglob("*")]
        }

    before = times()
    assert len(load_dataset("train", root=cifar10_files.parent)) == 50
    assert times() == before


@pytest.mark.parametrize(
    "name, damage",
    [
        ("data_batch_3", lambda path: path.write_bytes(path.read_bytes()[:100])),
        ("test_batch", lambda path: path.unlink()),
        (
            "batches.meta",
            lambda path: path.write_bytes(path.read_bytes().replace(b"frog", b"toad")),
        ),
    ],
    ids=["truncated", "missing", "altered"],
)
def test_a_damaged_batch_file_is_named(name, damage, cifar10_files, no_network):
    damage(cifar10_files / name)
    with pytest.raises(RuntimeError, match=f"{name} is missing or damaged") as error:
        load_dataset("train", root=cifar10_files.parent)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_a_file_that_is_not_the_expected_one_is_never_unpickled(
    name, cifar10_files, no_network, tmp_path
):
    trap, path = tmp_path / "trap", cifar10_files / name
    path.write_bytes(pickle.dumps(Code(trap)))
    with pytest.raises(RuntimeError, match=f"{name} is missing or damaged"):
        load_dataset("train", root=cifar10_files.parent)
    assert not dataset._readable(path, None)  # as of data whose MD5 nobody knows
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists()  # it was a trap


def test_labels_out_of_range_are_named(cifar10_files, no_network, monkeypatch):
    path = cifar10_files / "data_batch_2"
    path.write_bytes(pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": [10] * 10}))
    monkeypatch.setattr(
        dataset.CIFAR10,
        "train_list",
        [
            [name, hashlib.md5((cifar10_files / name).read_bytes()).hexdigest()]
            for name, _ in dataset.CIFAR10.train_list
        ],
    )
    with pytest.raises(
        RuntimeError, match="data_batch_2 is missing or damaged .images and labels do not fit"
    ):
        load_dataset("train", root=cifar10_files.parent)


def test_an_archive_put_there_by_hand_is_unpacked(cifar10_files, no_network, monkeypatch):
    archive_of(cifar10_files, monkeypatch)
    (cifar10_files / "data_batch_1").write_bytes(b"damaged")  # repaired from the archive
    assert len(load_dataset("train", root=cifar10_files.parent)) == 50


def test_an_archive_that_cannot_be_unpacked_is_not_called_damaged(
    cifar10_files, no_network, monkeypatch
):
    archive = archive_of(cifar10_files, monkeypatch)
    shutil.rmtree(cifar10_files)
    monkeypatch.setattr(dataset, "extract_archive", Mock(side_effect=OSError("the disk is full")))
    with pytest.raises(
        RuntimeError, match=f"^{archive} could not be unpacked .the disk is full.: run again$"
    ):
        load_dataset("train", root=archive.parent)


@pytest.mark.parametrize(
    "obstacle", ["a file in its place", "a read-only folder", "a folder that can't be searched"]
)
def test_a_folder_that_cannot_be_written_is_named(obstacle, tmp_path, no_network, monkeypatch):
    root = tmp_path / "data"
    if obstacle == "a file in its place":
        root.write_text("not a folder")
    else:
        root.mkdir()
        monkeypatch.setattr(dataset.os, "access", lambda path, mode: Path(path) != root)
    if obstacle == "a folder that can't be searched":  # Path.exists raises then, before Python 3.12
        monkeypatch.setattr(Path, "exists", Mock(side_effect=PermissionError))
    with pytest.raises(
        RuntimeError, match=f"^{root} can't be written .*: name another folder with CIFAR10_ROOT$"
    ):
        load_dataset("train", root=root)


@pytest.fixture
def server(cifar10_files, monkeypatch):
    """Serve the archive of a small data set at the address of CIFAR-10.

    It can be cut, goes on where it is asked to, and waits in the middle for a barrier.
    """
    content = archive_of(cifar10_files, monkeypatch).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.end_headers()
            half = len(content) // 2
            self.wfile.write(content[start:half])
            self.server.barrier.wait(20)
            if not self.server.is_cut:
                self.wfile.write(content[max(start, half) :])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.is_cut, server.barrier = False, threading.Barrier(1)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)
    address = f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
    monkeypatch.setattr(dataset.CIFAR10, "url", address)
    yield server
    server.shutdown()
    server.server_close()


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_download_that_is_cut_leaves_nothing_behind_and_the_next_one_is_whole(server, tmp_path):
    server.is_cut, root = True, tmp_path / "data"
    with pytest.raises(RuntimeError, match="^[^\n]*not there and could not .*the download was cut"):
        load_dataset("train", root=root)
    assert names(root) == set()
    server.is_cut = False
    assert len(load_dataset("train", root=root)) == 50
    assert names(root) == {"cifar-10-python.tar.gz", "cifar-10-batches-py"}


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_command_of_the_message_goes_on_where_a_download_was_cut(server, tmp_path):
    server.is_cut, root = True, tmp_path / "it's data"
    archive = root / "cifar-10-python.tar.gz"

    def command():
        with pytest.raises(RuntimeError) as error:
            load_dataset("train", root=root)
        return shlex.split(str(error.value).split("`")[1])

    assert subprocess.run([*command(), "-s"]).returncode != 0
    start = archive.stat().st_size
    line = command()  # which has not touched what is there
    assert 0 < start == archive.stat().st_size
    server.is_cut = False
    assert subprocess.run([*line, "-s"]).returncode == 0
    server.shutdown()
    assert len(load_dataset("train", root=root)) == 50


def test_two_downloads_at_once_are_both_whole(server, tmp_path):
    """Each waits for the other in the middle."""
    server.barrier, root = threading.Barrier(2), tmp_path / "data"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda split: load_dataset(split, root=root), ["train", "train"]))
    assert [len(train_set) for train_set in both] == [50, 50]
    assert names(root) == {"cifar-10-python.tar.gz", "cifar-10-batches-py"}


# ---------------------------------------------------------------- corruptions in training


def test_a_share_of_the_images_is_corrupted_and_the_others_stay_as_they_are():
    """Noise changes the pixels one by one, blur their differences, and the last their contrast."""
    torch.manual_seed(0)
    images = torch.randn(3000, 3, 8, 8)
    corrupted = corrupt(images, 0.3, Recipe.corruption_types)
    changed = (corrupted != images).flatten(1).any(1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (
        corrupt(images, 0, Recipe.corruption_types) is images
        and (corrupt(images, 1, Recipe.corruption_types) != images).flatten(1).any(1).all()
    )
    contrast = (corrupted.std((1, 2, 3)) / images.std((1, 2, 3)))[changed]
    assert contrast.max() < 1.15 and (contrast > 0.999).float().mean().item() == pytest.approx(
        1 / 3, abs=0.1
    )


def test_the_strengths_of_the_corruptions_are_those_of_the_docstring():
    """On edges from black to white. Noise differs within a side, low contrast lifts a side, blur
    only the edge.
    """
    torch.manual_seed(0)
    mean, std = mean_and_std(torch.device("cpu"))
    edges = (torch.arange(16) > 7).float().expand(3000, 3, 8, 16)
    seen = corrupt((edges - mean) / std, 1, Recipe.corruption_types) * std + mean
    left, right = (
        side.flatten(1) for side in (seen[..., :4], seen[..., -4:])
    )  # the blur reaches four pixels
    deviation, contrast = left.std(1), right.mean(1) - left.mean(1)
    noise = deviation > 1e-5
    low_contrast = ~noise & (contrast < 0.9999)
    blur = ~noise & ~low_contrast
    assert 0.09 < deviation[noise].max() < 0.125 and deviation[
        noise
    ].mean().item() == pytest.approx(0.1 / 3, abs=3e-3)
    contrast, grey = contrast[low_contrast], left.mean(1)[low_contrast]
    assert 0.19 < contrast.min() < 0.22 and contrast.mean().item() == pytest.approx(0.6, abs=0.03)
    assert (grey / (1 - contrast)).mean().item() == pytest.approx(0.5, abs=0.05)
    kernel = torch.exp(-(torch.arange(-4, 5) ** 2) / (2 * 1.2**2))
    beyond = (
        kernel[5:].sum() / kernel.sum()
    ).item()  # how much of the white side the last black pixel gets
    darkest = seen[blur][..., 7].mean((1, 2))
    assert darkest.max().item() == pytest.approx(beyond, abs=0.005)
    assert darkest.mean().item() == pytest.approx(beyond / 2, abs=0.01)


@pytest.fixture(scope="module")
def pixels():
    """200 test images of the sample, as (N, 3, 32, 32) values from 0 to 1."""
    return torch.from_numpy(load_dataset("test", "tiny").data).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("kind", TRAIN_CORRUPTIONS)
def test_each_kind_changes_images_and_is_seeded_by_torch(kind, pixels):
    mean, std = mean_and_std(torch.device("cpu"))
    images = (pixels - mean) / std

    def corrupted(seed):
        torch.manual_seed(seed)
        return corrupt(images, 1, [kind])

    assert corrupted(0).equal(corrupted(0)) and not corrupted(0).equal(corrupted(1))
    changed = (corrupted(0) - images).flatten(1).abs().mean(1)
    assert corrupted(0).shape == images.shape and (changed > 0).float().mean() > 0.9
    assert changed.mean() < 1  # a standard deviation: the image can still be seen


def only(kind, pixels):
    """Return all images after one kind of corruption, as values from 0 to 1."""
    torch.manual_seed(0)
    mean, std = mean_and_std(torch.device("cpu"))
    return corrupt((pixels - mean) / std, 1, [kind]) * std + mean


def test_shot_noise_is_that_of_50_to_500_photons_and_grows_with_the_square_root():
    for grey in (0.2, 0.8):
        deviation = only("shot_noise", torch.full((500, 3, 32, 32), grey)).std((1, 2, 3))
        photons = grey / deviation**2
        assert 45 < photons.min() < 55 and 450 < photons.max() < 550
        assert photons.log().mean().exp().item() == pytest.approx((50 * 500) ** 0.5, rel=0.1)


def test_very_low_contrast_keeps_a_tenth_to_a_half_of_the_differences_and_the_mean_colour(pixels):
    seen = only("very_low_contrast", pixels)
    ratio = seen.std((2, 3)) / pixels.std((2, 3))
    assert seen.mean((2, 3)).allclose(pixels.mean((2, 3)), atol=1e-4)
    assert 0.1 < ratio.min() < 0.12 and 0.48 < ratio.max() < 0.5


def test_impulses_are_black_or_white_values(pixels):
    seen = only("impulse_noise", pixels)
    hit = (seen - pixels).abs() > 1e-5
    assert ((seen[hit] < 1e-5) | (seen[hit] > 1 - 1e-5)).all()
    share = hit.float().mean((1, 2, 3))
    assert 0.07 < share.max() < 0.1 and share.mean().item() == pytest.approx(0.04, abs=0.005)


def test_glass_moves_pixels_by_little():
    """A black image with one white pixel: it stays near its place."""
    spot = torch.zeros(100, 3, 32, 32)
    spot[:, :, 16, 16] = 1
    seen = only("glass_blur", spot).mean(1)
    assert (seen[:, 16, 16] < 0.5).float().mean() > 0.5
    seen[:, 12:21, 12:21] = 0
    assert seen.abs().max() < 0.01


def test_pixelated_images_have_fewer_colours_and_the_same_mean(pixels):
    seen = only("pixelate", pixels)
    for image, before in zip(seen[:20], pixels, strict=False):
        assert len(image.flatten(1).unique(dim=1).T) < 0.92 * 32**2
        assert image.mean().item() == pytest.approx(before.mean().item(), abs=0.02)


@pytest.mark.parametrize("kind", ["jpeg", "augmix"])
def test_images_keep_their_places(kind, pixels):
    """Each is most like itself, of eight: also where four have the same operations."""
    seen, eight = only(kind, pixels[:8]).flatten(1), pixels[:8].flatten(1)
    assert torch.cdist(seen, eight).argmin(1).tolist() == list(range(8))
