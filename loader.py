"""Loaders whose batches are the same at any number of workers, and workers that end with their
run.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

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
    order = None
    if shuffle:
        order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
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
        generator=torch.Generator(),  # of the workers' own seeds, which nothing here uses
    )


class _Loader(DataLoader):
    """Makes tensors of the arrays that workers hand over.

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


def _init_worker(worker):
    """Leave Ctrl-C, which reaches every process, to the main one, and end with it if it is
    killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Wait for the end of the main process, and end this one at once, whatever it is doing: it may
    be writing into a pipe that nobody reads any more.
    """
    parent, starter = multiprocessing.parent_process(), os.getppid()
    while parent.is_alive() and os.getppid() == starter:
        # Waits for a pipe to close, which a process that was forked later may hold open.
        parent.join(timeout=1)
    os._exit(1)


def _collate(items):
    images, labels = zip(*items, strict=True)
    return np.array(images), labels
