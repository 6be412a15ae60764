"""The loaders: the same batches whoever augments them, and workers that end with their run."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from multiprocessing.util import get_temp_dir
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    random_split,
)

from dataset import load_dataset, train_transform
from loader import CORES, make_loader, refuse_while_importing


@pytest.fixture
def train_set(root):
    return load_dataset("train", "tiny", root=root)


def epoch(loader):
    """Return the images of an epoch, in order."""
    return torch.cat([images for images, _ in loader])


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("batch_size", [0, 201, 2.0])
def test_a_batch_size_that_does_not_fit_the_data_is_named(batch_size, train_set):
    with pytest.raises(ValueError, match=f"^batch_size is {batch_size}: choose 1 to 200, the size"):
        make_loader(train_set, batch_size)


def test_a_loader_that_shuffles_has_up_to_eight_workers_and_one_that_does_not_keeps_the_order(
    train_set,
):
    assert make_loader(train_set, shuffle=True, batch_size=50).num_workers == min(CORES, 8)
    loader = make_loader(Subset(train_set, range(50)), 20)
    labels = [labels for _, labels in loader]
    assert loader.num_workers == 0 and [len(batch) for batch in labels] == [20, 20, 10]
    assert torch.cat(labels).tolist() == train_set.targets[:50]


@pytest.mark.parametrize(
    "transform",
    [None, A.Sequential([A.RandomBrightnessContrast(p=1)]), A.GaussNoise(p=1)],
    ids=["ours", "Sequential", "no composition"],
)
def test_batches_are_the_same_at_any_number_of_workers(transform, root):
    train_set = load_dataset("train", "tiny", transform=transform, root=root)
    one, other = (epoch(make_loader(train_set, 64, True, workers, seed=3)) for workers in (0, 2))
    assert one.shape == (200, 32, 32, 3) and one.dtype == torch.uint8
    assert torch.equal(one, other)


def test_the_seeds_decide_order_and_augmentation(root):
    def first(loader_seed, data_seed):
        train_set = load_dataset("train", "tiny", seed=data_seed, root=root)
        return next(iter(make_loader(train_set, 64, True, 0, loader_seed)))

    images, labels = first(0, 0)
    assert torch.equal(images, first(0, 0)[0])
    assert not torch.equal(labels, first(1, 0)[1])
    other_images, other_labels = first(0, 1)
    assert torch.equal(labels, other_labels) and not torch.equal(images, other_images)


def test_no_epoch_batch_or_worker_repeats_a_stream_of_augmentations(root):
    """One image, over and over: any two that come out alike would be a repeated draw."""
    train_set = load_dataset("train", "sample", transform=train_transform(p=1), root=root)
    train_set.data[:] = train_set.data[0]
    loader = make_loader(Subset(train_set, range(800)), 100, True, 2)
    batches = [images for _ in range(2) for images, _ in loader]
    fingerprints = [tuple(images.flatten(1).double().sum(1).tolist()) for images in batches]
    assert len(set(fingerprints)) == len(batches) == 16
    # Not even the first draws of a batch are another's.
    assert len({batch[:3] for batch in fingerprints}) == 16


def test_the_indices_of_a_batch_seed_its_augmentations(root):
    """The committed runs depend on it."""
    train_set = load_dataset("train", "tiny", seed=5, root=root)
    part = Subset(train_set, range(40, 90))
    loader = make_loader(part, 12, True, 0, seed=3)
    order = list(RandomSampler(part, generator=torch.Generator().manual_seed(3)))
    for start, (images, _) in zip(range(0, 48, 12), loader, strict=False):
        indices = [40 + index for index in order[start : start + 12]]
        seed = np.random.SeedSequence([5, *indices])
        transform = train_transform()
        transform.set_random_state(
            np.random.default_rng(seed), random.Random(int(seed.generate_state(1)[0]))
        )
        expected = [transform(image=train_set.data[index])["image"] for index in indices]
        assert (images.numpy() == np.array(expected)).all()


# ---------------------------------------------------------------- whatever wraps the data set


@pytest.fixture
def noisy_set(root):
    """21 images, each with its number for a label, and noise that no two draws share."""
    train_set = load_dataset("train", "tiny", transform=A.GaussNoise(p=1), root=root)
    train_set.data, train_set.targets = train_set.data[:21], list(range(21))
    return train_set


class OneByOne(Dataset):
    """As people wrap a data set to change something about each image."""

    def __init__(self, whole):
        self.whole = whole

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, index):
        ((image, label),) = self.whole.__getitems__([index])
        return image, label


WRAPPERS = {
    "as it is": lambda whole: whole,
    "random_split": lambda whole: random_split(whole, [21, 0], torch.Generator())[0],
    "ConcatDataset": lambda whole: ConcatDataset(
        [Subset(whole, range(8)), Subset(whole, range(8, 21))]
    ),
    "one by one": OneByOne,
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def augmented(loader):
    """Return each image of an epoch as bytes, by its label."""
    images = {}
    for batch, labels in loader:
        labels = torch.as_tensor(labels).reshape(-1).tolist()
        images |= zip(
            labels, (each.numpy().tobytes() for each in batch.view(-1, 3072)), strict=True
        )
    assert len(images) == 21
    return images


def shares_an_image(one, other):
    return any(one[label] == other[label] for label in one)


@every_wrapper
@pytest.mark.parametrize("batch_size, num_workers", [(None, 0), (1, 0), (8, 0), (8, 2)])
def test_other_loaders_repeat_no_augmentation(wrap, batch_size, num_workers, noisy_set):
    loader = DataLoader(wrap(noisy_set), batch_size, num_workers=num_workers)
    torch.manual_seed(0)
    one, other = augmented(loader), augmented(loader)
    assert not shares_an_image(one, other) and len(set(one.values())) == 21
    torch.manual_seed(0)
    assert augmented(loader) == one  # PyTorch's seed is theirs


@every_wrapper
@pytest.mark.parametrize(
    "batch_size, shuffle",
    [(1, True), (4, True), (8, True), (8, False)],
    ids=["ones", "the last is one", "none is one", "in order"],
)
def test_our_loader_repeats_no_augmentation_and_can_be_resumed_at_any_number_of_workers(
    wrap, batch_size, shuffle, noisy_set
):
    random_state = torch.get_rng_state()
    loader, by_worker, resumed = (
        make_loader(wrap(noisy_set), batch_size, shuffle, workers) for workers in (0, 1, 0)
    )
    one = augmented(loader)
    if shuffle:
        resumed.sampler.generator.set_state(loader.sampler.generator.get_state())
    other = augmented(loader)
    assert not shares_an_image(one, other) and len(set(one.values())) == 21
    assert augmented(by_worker) == one and augmented(by_worker) == other
    assert augmented(resumed) == (other if shuffle else one)
    assert torch.equal(torch.get_rng_state(), random_state)  # it is the training's


def test_one_image_by_itself_is_augmented_anew_in_each_epoch(noisy_set):
    loader = make_loader(Subset(noisy_set, [3]), 1, True, 0)
    assert len({epoch(loader).numpy().tobytes() for _ in range(10)}) == 10
    assert loader.dataset.dataset is noisy_set


# ---------------------------------------------------------------- workers


def test_workers_hand_over_no_tensors_which_would_need_shared_memory(train_set):
    loader = make_loader(Subset(train_set, range(20)), 20)
    ((images, labels),) = DataLoader.__iter__(loader)  # as workers hand it over
    assert type(images) is np.ndarray and {type(label) for label in labels} == {int}
    ((images, labels),) = loader
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


def workers_of(loader):
    """Return the process numbers of a loader's workers."""
    return [worker.pid for worker in loader._iterator._workers]


def test_an_epoch_that_was_broken_off_can_be_repeated_with_new_workers(train_set):
    plain, loader = (make_loader(train_set, 50, True, workers) for workers in (0, 1))
    order = loader.sampler.generator.get_state()
    for _ in loader:
        workers = workers_of(loader)
        break
    loader.sampler.generator.set_state(order)  # as `Checkpoint` does
    assert torch.equal(epoch(loader), epoch(plain))
    assert workers_of(loader) != workers
    workers = workers_of(loader)
    assert torch.equal(epoch(loader), epoch(plain))
    assert workers_of(loader) == workers  # the epoch before was whole, so they go on


def test_an_epoch_in_a_thread_that_ends_leaves_the_workers_alive(train_set):
    loader = make_loader(train_set, 50, True, 1)
    thread = threading.Thread(target=epoch, args=(loader,))
    thread.start()
    thread.join()
    workers = workers_of(loader)
    assert len(epoch(loader)) == 200 and workers_of(loader) == workers


def test_a_worker_that_dies_is_named_and_the_next_epoch_is_whole(train_set):
    loader = make_loader(train_set, 10, True, num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = workers_of(loader)
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid.* {worker}\)"):
        os.kill(worker, signal.SIGKILL)
        list(batches)
    assert len(epoch(loader)) == 200


def test_an_interrupt_does_not_stop_the_workers(train_set):
    loader = make_loader(train_set, 10, True, num_workers=1)
    batches = iter(loader)
    next(batches)
    os.kill(workers_of(loader)[0], signal.SIGINT)
    assert len(list(batches)) == 19


def is_running(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def first_step(method, root, sender):
    """In a process of its own, say what workers that start by a method deliver; then stand still.

    Two workers of two batches each: the pipe is full, and somebody writes into it.
    """
    # What a fork server would import is what takes the time: once is enough.
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "albumentations"])
    loader = make_loader(load_dataset("train", "sample", root=root), 256, True, 2)
    loader.multiprocessing_context = method
    for images, _ in loader:
        # A process that is forked later has the pipes by which workers see the end of this one.
        late = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        if method == "fork":
            late.start()
        sender.send((workers_of(loader), late.pid, images.numpy(), get_temp_dir()))
        time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and reads /proc")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_start_by_any_method_and_end_with_a_main_process_that_is_killed(method, root):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=first_step, args=(method, root, sender))
    process.start()
    assert receiver.poll(120)
    workers, late, images, folder = receiver.recv()
    files = list(Path(folder).glob("*.npy"))
    assert len(workers) == 2 and all(map(is_running, workers))
    process.kill()
    process.join()
    end = time.monotonic() + 5
    while any(map(is_running, workers)):
        assert time.monotonic() < end
        time.sleep(0.01)
    if late:
        os.kill(late, signal.SIGKILL)
    shutil.rmtree(folder)
    assert len(files) == (method != "fork")  # where memory is copied, nothing is written
    train_set = load_dataset("train", "sample", root=root)
    assert (images == next(iter(make_loader(train_set, 256, True, 0)))[0].numpy()).all()


def test_a_script_that_trains_while_it_is_imported_is_told_what_to_write(monkeypatch):
    process = multiprocessing.current_process()
    monkeypatch.setattr(process, "_inheriting", True, raising=False)  # as in spawn and forkserver
    with pytest.raises(RuntimeError, match='below `if __name__ == "__main__":`$'):
        refuse_while_importing()


def test_a_process_of_the_user_may_train():
    refuse_while_importing()
    process = multiprocessing.get_context("fork").Process(target=refuse_while_importing)
    process.start()
    process.join()
    assert process.exitcode == 0
