"""Loaders whose batches don't depend on the number of workers, which end with their run."""

import copy
import hashlib
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler

from checks import require, whole

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def make_loader(
    dataset: Dataset,
    batch_size: int = 256,
    shuffle: bool = False,
    num_workers: int | None = None,
    seed: int = 0,
) -> DataLoader:
    """Return a DataLoader of uint8 (N, 32, 32, 3) images and int64 (N,) labels.

    The batches are the same at any number of workers. `train` and `predict` normalise them where
    the network is: bytes are a quarter of the memory, and a whole batch is normalised much faster
    than image by image.

    Args:
        shuffle: whether each epoch has an order of its own, drawn from `loader.sampler.generator`.
        num_workers: processes that augment. By default one for each core, but no more than 8, for
            a shuffled loader, and none otherwise: there is nothing to augment.
        seed: of the order.

    Raises:
        ValueError: the batch size is not between 1 and the size of the data set.
    """
    require(
        "batch_size",
        batch_size,
        f"1 to {len(dataset)}, the size of the data set",
        whole(1, len(dataset))(batch_size),
    )
    order = _Shuffled(dataset, batch_size, seed) if shuffle else _InOrder(dataset)
    if num_workers is None:
        num_workers = min(CORES, 8) if shuffle else 0
    return _Loader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_collate,
        persistent_workers=num_workers > 0,
        worker_init_fn=_init_worker,
        # Of the workers' own seeds: PyTorch would draw them from the generator of the training.
        generator=torch.Generator(),
    )


class _Loader(DataLoader):
    """Reads a data set through `_Batches`, and makes tensors of the arrays that workers hand over.

    Workers would take longer to hand over tensors, and need shared memory, of which Docker has
    little. After an epoch that was broken off, as by Ctrl-C, the next one starts new workers.
    """

    complete = True  # whether the last epoch was

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if not self.complete:
            self._iterator = None
        self.complete = False
        for images, labels in super().__iter__():
            batch = torch.from_numpy(images), torch.tensor(labels)
            if torch.cuda.is_available():  # so that the copy to the GPU need not be waited for
                batch = tuple(part.pin_memory() for part in batch)
            yield batch
        self.complete = True

    def _get_iterator(self):
        loader = copy.copy(self)  # so that `dataset` stays what `make_loader` was given
        vars(loader)["dataset"] = _Batches(self.dataset)  # DataLoader lets nobody set it
        return DataLoader._get_iterator(loader)


class _Batch(NamedTuple):
    """What `entropy` needs to know of the batch that one of our loaders is reading."""

    indices: list[int]
    epoch: list[int]  # its number, where every epoch may have a batch of these indices; else empty
    images: Iterator[int]  # counts them


_BATCH: ContextVar[_Batch | None] = ContextVar("_BATCH", default=None)


def entropy(indices: list[int] | None = None) -> list[int]:
    """Return the numbers that seed the augmentations of a batch, or of one image without indices.

    They are others in each epoch.

    In a loader of `make_loader`, the indices of the batch are those numbers. So they don't depend
    on the number of workers, and they are the same after a resume. In any other loader, they come
    from PyTorch's own generator, which every worker has seeded for itself.
    """
    batch = _BATCH.get()
    if batch is None:
        return torch.randint(2**63 - 1, (1,)).tolist()
    if indices is not None and len(indices) == len(batch.indices):
        return [*indices, *batch.epoch]
    # A data set around ours, such as ConcatDataset, asks for one image after the other.
    return [*batch.indices, *batch.epoch, next(batch.images)]


class _Batches:
    """The data set as our loaders read it: `entropy` knows the batch.

    A sampler may add a multiple of the size of the data set to an index, to say in which epoch.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, numbers):
        size = len(self.dataset)
        epoch, indices = numbers[0] // size, [number % size for number in numbers]
        token = _BATCH.set(_Batch(indices, [epoch] if epoch else [], itertools.count()))
        try:
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(indices)
            return [self.dataset[index] for index in indices]
        finally:
            _BATCH.reset(token)


class _Shuffled(RandomSampler):
    """A new order in each epoch.

    A batch of one image would have the same indices again: its number says which epoch it is, by
    the state of the generator.
    """

    def __init__(self, dataset, batch_size, seed):
        super().__init__(dataset, generator=torch.Generator().manual_seed(seed))
        self.batch_size = batch_size

    def __iter__(self):
        order = list(super().__iter__())
        if len(order) == 1:
            torch.rand(1, generator=self.generator)  # an order of one image has drawn nothing
        alone = 0  # how many images at the end are batches of their own
        if self.batch_size == 1:
            alone = len(order)
        elif len(order) % self.batch_size == 1:
            alone = 1
        epoch = zlib.crc32(self.generator.get_state().numpy())
        yield from order[: len(order) - alone]
        for index in order[len(order) - alone :]:
            yield index + epoch * len(order)


class _InOrder(SequentialSampler):
    """The same order in each epoch, with numbers that say which epoch it is, counted from 0."""

    epoch = 0

    def __iter__(self):
        start = self.epoch * len(self)
        self.epoch += 1
        return iter(range(start, start + len(self)))


def write_for_workers(images: np.ndarray) -> Path:
    """Write images to a file that other processes map, unless it is there; return its path.

    The file lies in the temporary folder of `multiprocessing`, which this process removes when it
    ends; if it is killed, it is left to whoever cleans the system's temporary folder.
    """
    path = Path(get_temp_dir(), f"{hashlib.sha256(images).hexdigest()}.npy")
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, images)
        os.replace(file.name, path)  # whole or not at all, whatever other threads do
    return path


def refuse_while_importing() -> None:
    """Refuse to train where a worker that is not forked only imports the user's script.

    Raises:
        RuntimeError: this is such a process.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as Python itself asks
        raise RuntimeError(
            "a worker process imports this script, and must not train: write what the script does "
            'below `if __name__ == "__main__":`'
        )


def _init_worker(worker):
    """Leave Ctrl-C, which reaches every process, to the main one, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Wait for the end of the main process, and end this one at once, whatever it is doing.

    It may be writing into a pipe that nobody reads any more.
    """
    parent, starter = multiprocessing.parent_process(), os.getppid()
    while parent.is_alive() and os.getppid() == starter:
        # Waits for a pipe to close, which a process that was forked later may hold open.
        parent.join(timeout=1)
    os._exit(1)


def _collate(items):
    images, labels = zip(*items, strict=True)
    return np.array(images), labels
