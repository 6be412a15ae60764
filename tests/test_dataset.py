"""The data: what the transforms do, which random numbers they use, and what is said when something is wrong."""
import hashlib
import http.server
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
from dataset import FILL, MEAN, STD, load_dataset, make_loader, normalise, train_transform, unnormalise

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def train_set(root):
    return load_dataset("train", "built-in", root=root)


def epoch(loader):
    return torch.cat([images for images, _ in loader])


def test_import_is_silent_and_touches_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import dataset, model, utils; utils.train_transform"
    code = code.replace("utils.train_transform", "dataset.train_transform(); dataset.test_transform()")
    run = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (run.returncode, run.stdout) == (0, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", [0, 255])
def test_coarse_dropout_makes_one_hole_of_16x16_in_the_mean_colour(base):
    names = [type(step).__name__ for step in train_transform().transforms]
    hole = train_transform(p=1).transforms[names.index("CoarseDropout")]
    positions = set()
    for _ in range(50):
        image = hole(image=np.full((32, 32, 3), base, np.uint8))["image"]
        changed = (image != base).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert len(rows) <= 16 and len(columns) <= 16 and changed.sum() == len(rows) * len(columns)
        assert len(rows) == 16 or rows[0] == 0 or rows[-1] == 31  # shorter only where the border cuts it
        assert len(columns) == 16 or columns[0] == 0 or columns[-1] == 31
        assert (image[changed] == FILL).all()
        positions.add((rows[0], columns[0]))
    assert len(positions) > 10


def test_the_hole_normalises_to_zero():
    assert normalise(np.full((1, 32, 32, 3), FILL, np.uint8)).abs().max() < 0.01


def test_unnormalise_is_the_inverse():
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert (unnormalise(normalise(images)) == images).all()


def test_normalise_gives_mean_0_and_deviation_1():
    pixels = 255 * np.array([np.add(MEAN, STD), np.subtract(MEAN, STD)], np.float32).reshape(1, 2, 1, 3)
    torch.testing.assert_close(normalise(pixels).flatten(2)[0], torch.tensor([[1.0, -1.0]] * 3))


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (32, 32, 3), (4, 32, 32, 1)])
def test_images_that_are_normalised_already_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape of the images is \(.*\): choose \(N, H, W, 3\)"):
        normalise(torch.zeros(shape))


def test_transforms_make_32x32_uint8():
    for transform in (train_transform(), dataset.test_transform()):
        image = transform(image=np.zeros((48, 40, 3), np.uint8))["image"]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8


def test_flip_and_shift_change_about_half_of_the_images(train_set):
    image = train_set.data[0]
    flip, shift = train_transform(p=0.5).transforms[:2]
    for step in (flip, shift):
        changed = np.mean([(step(image=image)["image"] != image).any() for _ in range(400)])
        assert 0.4 < changed < 0.6


def test_batches_are_the_same_at_any_number_of_workers(train_set):
    cores = len(os.sched_getaffinity(0))
    epochs = [epoch(make_loader(train_set, 256, True, workers, seed=3)) for workers in {0, 1, min(2, cores)}]
    assert epochs[0].shape == (2000, 32, 32, 3) and epochs[0].dtype == torch.uint8
    assert all(torch.equal(epochs[0], other) for other in epochs[1:])


def test_no_epoch_batch_or_worker_repeats_a_stream_of_augmentations(root):
    """One image, over and over: any two that come out alike would be a repeated draw."""
    train_set = load_dataset("train", "built-in", transform=train_transform(p=1), root=root)
    train_set.data[:] = train_set.data[0]
    loader = make_loader(train_set, 250, True)
    batches = [images for _ in range(2) for images, _ in loader]
    fingerprints = [tuple(images.flatten(1).double().sum(1).tolist()) for images in batches]
    assert len(set(fingerprints)) == len(batches) == 16
    starts = [batch[:3] for batch in fingerprints]  # not even the first draws of a batch are another's
    assert len(set(starts)) == len(starts)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_workers_need_no_shared_memory(root, tmp_path):
    code = f"""import sys; sys.path.insert(0, {str(HERE)!r})
from dataset import load_dataset, make_loader
loader = make_loader(load_dataset("train", "built-in", root={str(root)!r}), 256, True, 1)
print("workers:", loader.num_workers, sum(len(labels) for _, labels in loader))"""
    (tmp_path / "code.py").write_text(code)
    run = subprocess.run(["unshare", "--mount", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "
                          f"{sys.executable} {tmp_path / 'code.py'}"], text=True, capture_output=True)
    if "mount" in run.stderr or "unshare" in run.stderr:
        pytest.skip("mounting is not allowed here")
    assert "workers: 1 2000" in run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can widen a pipe")
def test_a_batch_fits_into_the_pipe_from_the_workers(train_set):
    import fcntl
    loader = make_loader(train_set, 256, True, 1)
    images, _ = next(iter(loader))
    assert fcntl.fcntl(loader._iterator._worker_result_queue._reader.fileno(), fcntl.F_GETPIPE_SZ) > images.nbytes


def test_workers_do_without_a_wider_pipe(train_set, monkeypatch):
    expected = epoch(make_loader(train_set, 256, True, 0))
    monkeypatch.setattr(dataset, "fcntl", None)  # as on Windows
    assert torch.equal(epoch(make_loader(train_set, 256, True, 1)), expected)


def test_a_worker_that_dies_is_named(root):
    code = f"""import os, signal, sys; sys.path.insert(0, {str(HERE)!r})
from dataset import load_dataset, make_loader
loader = make_loader(load_dataset("train", "built-in", root={str(root)!r}), 50, True, num_workers=1)
batches = iter(loader)
next(batches)
worker = loader._iterator._workers[0].pid
os.kill(worker, signal.SIGKILL)
print(worker, flush=True)
list(batches)"""
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert run.returncode
    assert re.search(rf"DataLoader worker \(pid.* {run.stdout.strip()}\)", run.stderr.splitlines()[-1])


def test_seed_decides_order_and_augmentation(root):
    def first(loader_seed, data_seed):
        loader = make_loader(load_dataset("train", "built-in", seed=data_seed, root=root), 64, True, 0, loader_seed)
        return next(iter(loader))

    images, labels = first(0, 0)
    assert torch.equal(images, first(0, 0)[0])
    assert not torch.equal(labels, first(1, 0)[1])
    other_images, other_labels = first(0, 1)
    assert torch.equal(labels, other_labels) and not torch.equal(images, other_images)


def test_validation_split_is_the_end_of_the_training_images_and_not_augmented(root):
    whole, train, validation = (load_dataset(split, "built-in", size, root=root)
                                for split, size in (("train", 0), ("train", 300), ("validation", 300)))
    assert (len(whole), len(train), len(validation)) == (2000, 1700, 300)
    assert (validation[0][0] == whole.data[1700]).all() and validation[299][1] == whole.targets[1999]
    assert len({validation[0][0].tobytes() for _ in range(5)}) == 1
    assert len({train[0][0].tobytes() for _ in range(20)}) > 1


def test_built_in_data_say_that_they_are_not_cifar10(train_set, root):
    assert "NOT CIFAR-10" in train_set.title
    test_set = load_dataset("test", "built-in", root=root)
    assert not {image.tobytes() for image in train_set.data} & {image.tobytes() for image in test_set.data}
    assert sorted(set(test_set.targets)) == list(range(10)) and len(test_set.classes) == 10


def test_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CIFAR10_ROOT", str(tmp_path))
    load_dataset("test", "built-in")
    assert (tmp_path / "built-in-shapes" / "test_batch").exists()
    monkeypatch.delenv("CIFAR10_ROOT")
    assert dataset.data_folder().as_posix() == "data"


@pytest.mark.parametrize("arguments, message", [
    (dict(split="training"), "split is 'training': choose train, validation or test"),
    (dict(data="MNIST"), "data is 'MNIST': choose one of CIFAR-10, built-in"),
    (dict(split="validation"), "validation_size is 0: choose 1 to 1999"),
    (dict(validation_size=2000), "validation_size is 2000: choose 1 to 1999"),
])
def test_impossible_splits_are_named(arguments, message, root):
    with pytest.raises(ValueError, match=message):
        load_dataset(**{"data": "built-in", "root": root, **arguments})


@pytest.mark.parametrize("arguments, message", [
    (dict(batch_size=0), "batch_size is 0: choose 1 to 2000"),
    (dict(batch_size=2001), "batch_size is 2001: choose 1 to 2000"),
    (dict(num_workers=-1), "num_workers is -1: choose 0 to"),
    (dict(num_workers=10_000), "num_workers is 10000: choose 0 to"),
])
def test_impossible_loaders_are_named(arguments, message, train_set):
    with pytest.raises(ValueError, match=message):
        make_loader(train_set, **arguments)


@pytest.fixture
def no_network(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setattr(urllib.request, "_opener", None)  # which remembers the proxies of its first use


@pytest.fixture
def cifar10_files(tmp_path, monkeypatch):
    """Write a small data set under CIFAR-10's own file names and have torchvision expect its MD5 sums."""
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
    monkeypatch.setattr(dataset.CIFAR10, "meta", {**dataset.CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return folder


def test_no_data_and_no_network_is_one_line_with_the_remedy(tmp_path, no_network):
    with pytest.raises(RuntimeError) as error:
        load_dataset("train", root=tmp_path)
    text = str(error.value)
    assert "\n" not in text and str(tmp_path) in text
    assert "cifar-10-python.tar.gz" in text and "make demo" in text
    assert error.value.__cause__ is not None


def test_whole_files_load(cifar10_files, no_network):
    assert len(load_dataset("train", root=cifar10_files.parent)) == 50


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(path.read_bytes()[:100]), lambda path: path.write_bytes(b""), lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes().replace(b"data", b"dada").replace(b"label", b"lapel")),
], ids=["truncated", "empty", "missing", "altered"])
def test_damaged_batch_file_is_named(name, damage, cifar10_files, no_network):
    damage(cifar10_files / name)
    with pytest.raises(RuntimeError, match=f"{name} is missing or damaged") as error:
        load_dataset("train", root=cifar10_files.parent)
    assert "\n" not in str(error.value)


def test_labels_out_of_range_are_named(cifar10_files, no_network, monkeypatch):
    batch = pickle.dumps({"data": np.zeros((10, 3072), np.uint8), "labels": [10] * 10})
    (cifar10_files / "data_batch_2").write_bytes(batch)
    monkeypatch.setattr(dataset.CIFAR10, "train_list", [
        [name, hashlib.md5((cifar10_files / name).read_bytes()).hexdigest()] for name, _ in dataset.CIFAR10.train_list])
    with pytest.raises(RuntimeError, match="data_batch_2 is missing or damaged .images and labels do not fit"):
        load_dataset("train", root=cifar10_files.parent)


def test_a_partial_download_is_named_and_does_not_block(tmp_path, no_network, monkeypatch):
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"the first bytes of a download that broke off")
    with pytest.raises(RuntimeError, match="cifar-10-python.tar.gz is incomplete or damaged .*: run again"):
        load_dataset("train", root=tmp_path)


def test_an_archive_put_there_by_hand_is_unpacked(cifar10_files, no_network, monkeypatch):
    root = cifar10_files.parent
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(cifar10_files, "cifar-10-batches-py")
    md5 = hashlib.md5((root / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(dataset.CIFAR10, "tgz_md5", md5)
    (cifar10_files / "data_batch_1").write_bytes(b"damaged")  # repaired from the archive
    assert len(load_dataset("train", root=root)) == 50


def test_a_folder_that_cannot_be_written_is_named(tmp_path, no_network):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="can't be written .*: name another folder with CIFAR10_ROOT"):
        load_dataset("train", root=tmp_path / "file" / "data")


def as_nobody(function):
    """Call the function in a process that is not root, whom file modes don't bind; return the text of its error."""
    def call(texts):
        os.setuid(65534)
        try:
            function()
        except RuntimeError as error:
            texts.put(str(error))
        texts.put("no error")

    context = multiprocessing.get_context("fork")
    texts = context.SimpleQueue()
    process = context.Process(target=call, args=(texts,))
    process.start()
    process.join()
    return texts.get()


@pytest.fixture
def open_folder():
    """A folder whose parents everybody may pass, unlike those of `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="becoming somebody else needs root")
def test_a_read_only_folder_is_named_but_serves_what_is_in_it(open_folder, cifar10_files, no_network):
    open_folder.chmod(0o555)
    text = as_nobody(lambda: load_dataset("train", root=open_folder))
    assert text.startswith(f"{open_folder} can't be written") and text.endswith("name another folder with CIFAR10_ROOT")
    shutil.copytree(cifar10_files, open_folder / cifar10_files.name)
    assert as_nobody(lambda: load_dataset("train", root=open_folder)) == "no error"


def test_a_download_that_breaks_off_does_not_block_the_next_try(cifar10_files, monkeypatch):
    """A real server that closes the connection half way, at first."""
    archive, root = cifar10_files.parent / "server.tar.gz", cifar10_files.parent / "data"
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar10_files, cifar10_files.name)
    content = archive.read_bytes()
    answer = content[: len(content) // 2]

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(answer)

        log_message = lambda *_: None

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(urllib.request, "_opener", None)
    monkeypatch.setattr(dataset.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
    monkeypatch.setattr(dataset.CIFAR10, "tgz_md5", hashlib.md5(content).hexdigest())
    with pytest.raises(RuntimeError, match="cifar-10-python.tar.gz is incomplete or damaged .*: run again") as error:
        load_dataset("train", root=root)
    assert "\n" not in str(error.value)
    answer = content
    assert len(load_dataset("train", root=root)) == 50
    server.shutdown()
