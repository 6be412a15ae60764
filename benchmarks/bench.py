"""Speed: `python -m benchmarks.bench` measures both sides of every comparison in turn, in one run.

It prints tables and writes them to benchmarks/bench.json. Rates are medians of the repeats, with
their minimum and maximum. Ratios are medians of the ratios within each repeat, so that a machine
that slows down slows both sides. Each side of the training step is a process of its own, since
memory settings and peaks are a process's.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset, Subset

import utils
from dataset import MEAN, STD, A, load_dataset, train_transform
from device import (
    hardware,
    keep_freed_memory,
    memory_format,
    mixed_precision,
    pick_device,
    to_device,
    versions,
)
from loader import CORES, make_loader
from model import NetDilated
from pretrained import write_json
from published import PublishedDepthwise, PublishedDilated
from recipe import Recipe, make_optimizer

HERE = Path(__file__).resolve().parent
OURS, QUICK, HEADLINE = "NetDilated", "NetDilated, quick recipe", "NetDilated, headline recipe"
TEACHER = "NetDilated, its teacher's recipe"
PLAIN = Recipe(sizes=(32,), teacher=None, corruption=0)
SIDES = {  # network, batch size, and the recipe of our training step; None: a plain PyTorch loop
    OURS: (NetDilated, 256, PLAIN),
    HEADLINE: (NetDilated, 256, Recipe()),
    TEACHER: (NetDilated, 256, Recipe().teacher_recipe()),
    QUICK: (NetDilated, 128, Recipe.quick()),
    "NetDilated, PyTorch's defaults": (NetDilated, 256, None),
    "PublishedDilated, PyTorch's defaults": (PublishedDilated, 256, None),
    "PublishedDepthwise, PyTorch's defaults": (PublishedDepthwise, 512, None),
}
PUBLISHED = "PublishedDepthwise, PyTorch's defaults"
PUBLISHED_EPOCHS = 98  # in which the published PublishedDepthwise first passed 85 %


def main(arguments: list[str] | None = None) -> dict:
    """Measure everything; return what is written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement, at least")
    parser.add_argument("--images", type=int, default=50000, help="images that the loaders deliver")
    parser.add_argument("--data", default="CIFAR-10")
    parser.add_argument("--output", type=Path, default=HERE / "bench.json")
    options = parser.parse_args(arguments)
    device = options.device = pick_device()
    results = {
        "hardware": hardware(device),
        "data": options.data,
        "date": date.today().isoformat(),
        "versions": versions(),
        "repeats": options.repeats,
        "seconds": options.seconds,
    }
    print(f"{results['hardware']}, {options.data}, medians of {options.repeats}")
    load_dataset("train", options.data)  # missing data are named before anything is measured
    results["training step"] = training_step(options)
    results["whole runs, minutes"] = whole_runs(results["training step"], HERE / "quick.json")
    results["input pipeline"] = input_pipeline(options)
    results["waiting for data, %"] = waiting(options, device)
    results["evaluation, seconds"] = evaluation(options, device)
    results["latency"] = latency(options, device)
    results["rate of arithmetic, GFLOP/s"] = arithmetic(results["training step"], device)
    write_json(options.output, results)
    print(f"\nwritten to {options.output}")
    return results


# ---------------------------------------------------------------- training step


def training_step(options: argparse.Namespace) -> dict:
    """Measure images a second and peak memory of each side, in turn, and the ratio to ours."""
    sides = {name: serve(serve_side, options, *side) for name, side in SIDES.items()}
    rates = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, pipe in sides.items():
            pipe.send("measure")
            rates[name].append(pipe.recv())
    rows = {}
    print(f"\n{'training step':40} images/s     min      max  peak MB  ours is faster")
    for name, pipe in sides.items():
        pipe.send("memory")
        rows[name] = {
            **spread(rates[name]),
            "peak_mb": pipe.recv(),
            "speedup": median_ratio(rates[OURS], rates[name]),
        }
        print(
            "{:40} {:8.0f} {:7.0f} {:8.0f} {:8.0f} {:10.2f} times".format(
                name, *rows[name].values()
            )
        )
        pipe.send(None)
    return rows


def serve_side(pipe, options, build, batch_size, recipe):
    """Measure one side whenever asked: the rate over steps of all the recipe's image sizes."""
    device = options.device
    if recipe:  # PyTorch's defaults don't
        keep_freed_memory()
    model = build().to(device)
    steps = our_steps(model, batch_size, recipe) if recipe else plain_steps(model, batch_size)
    images = batch_size * (len(set(recipe.sizes)) if recipe else 1)
    steps()
    pipe.send("ready")
    while request := pipe.recv():
        if request == "measure":
            pipe.send(images / seconds(steps, options.seconds))
        elif device.type == "cuda":
            pipe.send(torch.cuda.max_memory_allocated() / 2**20)
        else:
            import resource  # which Windows lacks

            unit = 2**20 if sys.platform == "darwin" else 2**10
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def our_steps(model: torch.nn.Module, batch_size: int, recipe: Recipe) -> Callable[[], None]:
    """Return a function that trains for one step at each image size, on one random batch."""
    device = next(model.parameters()).device
    to_device(model, device)
    batch = (
        torch.randint(256, (batch_size, 32, 32, 3), dtype=torch.uint8),
        torch.randint(10, (batch_size,)),
    )
    optimizer = make_optimizer(model, recipe)
    teacher = to_device(NetDilated(), device).eval() if recipe.teacher else None
    sizes = [recipe.image_size(epoch) for epoch in range(recipe.epochs)]
    epochs = [sizes.index(size) for size in dict.fromkeys(recipe.sizes)]
    return lambda: [
        utils.train(model, [batch], recipe, epoch, optimizer, teacher=teacher) for epoch in epochs
    ]


def plain_steps(model: torch.nn.Module, batch_size: int) -> Callable[[], None]:
    """Return a function that makes one training step with PyTorch's defaults.

    That is fp32 and channels first, with SGD.
    """
    device = next(model.parameters()).device
    images, labels = (
        torch.randn(batch_size, 3, 32, 32).to(device),
        torch.randint(10, (batch_size,)).to(device),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


# ---------------------------------------------------------------- whole runs


def whole_runs(steps: dict, path: Path) -> dict | None:
    """Return the minutes of the training steps of whole runs.

    They are those to 85 %, by the quick recipe and as published, and those of the headline and its
    teacher. That the quick recipe passes 85 % is known from the three runs of
    `benchmarks/quick.py`.
    """
    results = json.loads(path.read_text()) if path.exists() else {}
    quick = results.get("test", {"runs": []})
    if (
        not quick["runs"]
        or quick["mean_accuracy"] < 85
        or any(
            Recipe(**run["recipe"]) != Recipe.quick(seed=run["recipe"]["seed"])
            for run in quick["runs"]
        )
    ):
        print(
            f"\nwhole runs: {path.name} is missing, of another recipe or below 85 %: run "
            "`python -m benchmarks.quick` first"
        )
        return None
    images = {
        name: SIDES[name][2].epochs * (50_000 - SIDES[name][2].validation_size)
        for name in (QUICK, HEADLINE, TEACHER)
    } | {PUBLISHED: PUBLISHED_EPOCHS * 50_000}
    minutes = {name: count / steps[name]["median"] / 60 for name, count in images.items()}
    runs = {
        "NetDilated, quick recipe, to 85 %": minutes[QUICK],
        f"NetDilated, headline run of {SIDES[HEADLINE][2].epochs} epochs and its teacher of "
        f"{SIDES[TEACHER][2].epochs}": minutes[HEADLINE] + minutes[TEACHER],
        f"{PUBLISHED}, to 85 %": minutes[PUBLISHED],
    }
    print(f"\n{'whole runs':66} minutes")
    for name, value in runs.items():
        print(f"{name:66} {value:7.1f}")
    return runs


# ---------------------------------------------------------------- input pipeline


class PerImageDataset(Dataset):
    """The usual pattern: normalise and convert each image by itself."""

    def __init__(self, data, targets):
        self.data, self.targets = data, targets
        self.transform = A.Compose(
            [*train_transform().transforms, A.Normalize(MEAN, STD), A.ToTensorV2()]
        )

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.transform(image=self.data[index])["image"], self.targets[index]


def input_pipeline(options: argparse.Namespace) -> dict:
    """Measure images a second of loaders, and of processes that only call albumentations."""
    train_set = load_dataset("train", options.data)
    images = range(min(options.images, len(train_set)))
    usual = PerImageDataset(train_set.data, train_set.targets)
    ours, per_image = (Subset(whole, images) for whole in (train_set, usual))
    sides, limits, batch_size = {}, {}, min(256, len(images))
    for workers in range(1, min(2, CORES) + 1):
        number = f"{workers} worker{'s' * (workers > 1)}"
        limit = f"albumentations alone, {number}"
        sides[limit] = bare(train_set.data[: len(images)], workers)
        for name, loader in (
            ("ours", make_loader(ours, batch_size, True, workers)),
            (
                "normalised per image",
                DataLoader(
                    per_image,
                    batch_size,
                    shuffle=True,
                    num_workers=workers,
                    persistent_workers=True,
                ),
            ),
        ):
            sides[f"{name}, {number}"] = lambda loader=loader: sum(
                len(labels) for _, labels in loader
            )
        limits |= dict.fromkeys(list(sides)[-3:], limit)
    for deliver in sides.values():
        deliver()  # starts the workers
    rates = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, deliver in sides.items():
            start = time.perf_counter()
            count = deliver()
            rates[name].append(count / (time.perf_counter() - start))
    print(f"\n{'input pipeline':40} images/s     min      max  of the limit")
    rows = {}
    for name, values in rates.items():
        rows[name] = {**spread(values), "of_the_limit": median_ratio(values, rates[limits[name]])}
        print("{:40} {:8.0f} {:7.0f} {:8.0f} {:10.0%}".format(name, *rows[name].values()))
    return rows


def bare(images, workers: int) -> Callable[[], int]:
    """Return a function that has processes each augment all images, and counts these."""
    pipes = [serve(serve_bare, images) for _ in range(workers)]

    def deliver():
        for pipe in pipes:
            pipe.send("augment")
        return sum(pipe.recv() for pipe in pipes)

    return deliver


def serve_bare(pipe, images):
    """Augment the images whenever asked."""
    transform = train_transform()
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the other end is closed
        while pipe.recv():
            for image in images:
                transform(image=image)
            pipe.send(len(images))


def waiting(options: argparse.Namespace, device: torch.device) -> float:
    """The share of an epoch that the training loop spends waiting for its loader, in percent."""
    train_set = load_dataset("train", options.data)
    batch_size = min(256, options.images)
    loader, model = make_loader(train_set, batch_size, True), NetDilated()
    to_device(model, device)
    waits = []

    def watched():
        iterator = iter(loader)
        for _ in range(max(2, min(options.images, len(train_set)) // batch_size)):
            start = time.perf_counter()
            batch = next(iterator)
            waits.append(time.perf_counter() - start)
            yield batch

    start = time.perf_counter()
    utils.train(model, watched(), PLAIN, 0, make_optimizer(model, PLAIN))
    share = (
        100 * sum(waits[1:]) / (time.perf_counter() - start - waits[0])
    )  # the first one starts the workers
    print(
        f"\nwaiting for data: {share:.1f} % of the training loop's time, "
        f"{loader.num_workers} workers"
    )
    return share


# ---------------------------------------------------------------- evaluation and arithmetic


def evaluation(options: argparse.Namespace, device: torch.device) -> dict:
    """Seconds to test the network on the test set."""
    test_set = load_dataset("test", options.data)
    loader = make_loader(
        Subset(test_set, range(min(options.images, len(test_set)))), min(500, options.images)
    )
    model = to_device(NetDilated(), device)
    row = spread([seconds(lambda: utils.test(model, loader)) for _ in range(options.repeats)])
    print(
        "\nevaluation of {:,} images: {:.1f} s, {:.1f} to {:.1f}".format(
            len(loader.dataset), *row.values()
        )
    )
    return {"images": len(loader.dataset), **row}


def latency(options: argparse.Namespace, device: torch.device) -> dict:
    """Milliseconds for one image and for a batch of 256, and images a second, without gradients."""
    model, rows = to_device(NetDilated(), device).eval(), {}
    for name, count in (("one image", 1), ("a batch of 256 images", 256)):
        images = torch.randn(count, 3, 32, 32).to(device, memory_format=memory_format(device))
        with torch.inference_mode():
            took = seconds(lambda images=images: model(images), options.seconds)
        rows[name] = {"ms": 1000 * took, "images_per_second": count / took}
        print(f"\nlatency of {name}: {1000 * took:.1f} ms, {count / took:.0f} images/s")
    return {"hardware": hardware(device), "rows": rows}


def arithmetic(steps: dict, device: torch.device, side: int = 4096) -> dict:
    """Compare the arithmetic rate of our training step with that of a large matrix product.

    A step is counted as its multiply-accumulates forward, and twice that backward, of two
    operations each.
    """
    dtype = mixed_precision(device) or torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = 2 * side**3 / min(seconds(lambda: a @ b) for _ in range(5)) / 1e9
    step = 6 * utils.count_macs(NetDilated()) * steps[OURS]["median"] / 1e9
    print(
        f"\ntraining step: {step:.0f} GFLOP/s, {step / product:.0%} of a matrix product's "
        f"{product:.0f} in {dtype}"
    )
    return {
        "training step": step,
        "matrix product": product,
        "type": str(dtype),
        "share": step / product,
    }


def serve(target: Callable, *arguments):
    """Start a function in a process of its own; return the pipe to it once it is ready."""
    processes = multiprocessing.get_context("spawn")
    pipe, other = processes.Pipe()
    processes.Process(target=target, args=(other, *arguments), daemon=True).start()
    other.close()  # so that a side that dies ends the wait for it
    pipe.recv()
    return pipe


def seconds(function: Callable, least: float = 0) -> float:
    """Return the median time of a call, over at least so many seconds, on all cores."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def median_ratio(rates: list[float], others: list[float]) -> float:
    """Return the median of the ratios within each repeat."""
    return statistics.median(rate / other for rate, other in zip(rates, others, strict=True))


if __name__ == "__main__":
    main()
