"""How fast: `python benchmarks/bench.py` measures both sides of every comparison in turn, on this machine, in one run.

Prints tables and writes them to benchmarks/results.json. Rates are medians of the repeats, with the lowest and the
highest beside them; ratios are medians of the ratios within each repeat, so that a machine that slows down slows
both sides. Each side of the training step is a process of its own, since memory settings and peaks are a process's.
"""
import argparse
import copy
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import albumentations as A
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Dataset, Subset

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils
from dataset import CORES, MEAN, STD, load_dataset, make_loader, normalise, train_transform
from model import Dropout, build_network, count_macs
from short import SCHEDULE
from tries import LARGE, Try

OURS, SHORT = "NetDilated", "NetDilated, short schedule"
RECIPE, DEFAULTS = "NetDilated, as the notebook trains it", "NetDilated, PyTorch's defaults"
SIDES = {  # network, batch size, sizes of images step by step, whether trained as here or with PyTorch's defaults, with what
    OURS: ("NetDilated", 256, 4 * [32], True, "Muon"),
    RECIPE: ("NetDilated", 256, [20, 24, 28, 32], True, "Muon", True),
    SHORT: ("NetDilated", SCHEDULE["batch_size"], 2 * SCHEDULE["sizes"], True, SCHEDULE["optimizer"]),
    DEFAULTS: ("NetDilated", 256, 4 * [32], False, "Muon"),
    "PublishedDilated, as published": ("PublishedDilated", 256, 4 * [32], False, "SGD"),
    "PublishedDepthwise, as published": ("PublishedDepthwise", 512, 2 * [32], False, "SGD"),
}
PUBLISHED_EPOCHS = {"PublishedDilated, as published": 150, "PublishedDepthwise, as published": 98}  # to 85 %


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement, at least")
    parser.add_argument("--images", type=int, default=50000, help="images that the loaders deliver, and the largest batch")
    parser.add_argument("--data", default="CIFAR-10", help="CIFAR-10 or built-in")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    options = parser.parse_args(arguments)
    device = utils.pick_device()
    results = {"hardware": utils.hardware(device), "data": options.data, "date": date.today().isoformat(),
               "versions": utils.versions(), "repeats": options.repeats, "seconds": options.seconds,
               "images": options.images}
    print(f"{results['hardware']}, {options.data}, medians of {options.repeats}")
    results["training step"] = training_step(options)
    results["time to 85 %"] = time_to_85(results["training step"], HERE / "short.json")
    results["input pipeline"] = input_pipeline(options)
    results["waiting for data, %"] = waiting(options, device)
    results["evaluation, seconds"] = evaluation(options, device)
    results["cost of the training step, ms an image"] = growth(options, device)
    results["rate of arithmetic, GFLOP/s"] = arithmetic(results["training step"], device)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {options.output}")
    return results


# ---------------------------------------------------------------- 1. training step

def training_step(options):
    """Images a second of each side, measured in turn, peak memory, and how many times faster ours is."""
    processes = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        processes.set_forkserver_preload(["torchvision", "albumentations", "torchmetrics", "matplotlib.pyplot"])  # once
    sides = {}
    for name, side in SIDES.items():
        pipe, other = processes.Pipe()
        process = processes.Process(target=serve_side, args=(other, options, *side), daemon=True)
        process.start()
        sides[name] = pipe, process
    for pipe, _ in sides.values():
        pipe.recv()  # it is warm
    rates = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, (pipe, _) in sides.items():
            pipe.send("measure")
            rates[name].append(pipe.recv())
    rows = {}
    print(f"\n{'training step':38} images/s  lowest  highest  peak MB  ours is faster")
    for name, (pipe, process) in sides.items():
        pipe.send("memory")
        ratio = statistics.median(ours / other for ours, other in zip(rates[OURS], rates[name]))
        rows[name] = {**spread(rates[name]), "peak_mb": pipe.recv(), "ours_is_faster": ratio}
        print("{:38} {:8.0f} {:7.0f} {:8.0f} {:8.0f} {:10.2f} times".format(name, *rows[name].values()))
        process.terminate()
    return rows


def serve_side(pipe, options, network, batch_size, sizes, ours, optimizer, taught=False):
    """Measure one side whenever asked, in a process of its own: the rate over steps of these sizes."""
    batch_size = min(batch_size, options.images)
    if ours:
        device = utils.pick_device()
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        utils.mixed_precision, utils.normalise = lambda device: None, lambda images: images  # their loaders did
        Dropout.forward = torch.nn.Dropout.forward
    train = trainer(build_network(network), batch_size, sizes, device,
                    torch.channels_last if ours else torch.contiguous_format, optimizer, taught)
    train()
    pipe.send("ready")
    while True:
        if pipe.recv() == "measure":
            pipe.send(len(sizes) * batch_size / seconds(train, options.seconds))
        elif device.type == "cuda":
            pipe.send(torch.cuda.max_memory_allocated() / 2**20)
        else:
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def trainer(model, batch_size, sizes, device, memory_format, optimizer="SGD", taught=False):
    """Return a function that trains the model for a step at each of the sizes on one random batch, with the training
    loop itself; if it is to be taught, by another one like it."""
    model.to(device, memory_format=memory_format)
    teacher = copy.deepcopy(model).eval() if taught else None
    batch = torch.randint(256, (batch_size, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (batch_size,))
    if memory_format == torch.contiguous_format:
        batch = normalise(batch[0]).contiguous(), batch[1]
    optimizer = utils.make_optimizer(model, 0.01, 5e-4, optimizer)
    return lambda: [utils.train(model, [batch] * count, optimizer, size=size, teacher=teacher)
                    for size, count in Counter(sizes).items()]


# ---------------------------------------------------------------- 2. time to 85 %

def time_to_85(steps, path):
    """Minutes of training steps until 85 %: 50,000 images an epoch, times the epochs. Ours are those of the short
    schedule, whose three runs `benchmarks/short.py` made."""
    short = json.loads(path.read_text()) if path.exists() else {}
    if short.get("schedule") != SCHEDULE or short["mean_test_accuracy"] < 85:
        print(f"\ntime to 85 %: {path.name} is missing, of another schedule or below 85 %: run benchmarks/short.py first")
        return None
    epochs = {SHORT: SCHEDULE["epochs"], **PUBLISHED_EPOCHS}
    minutes = {name: count * 50_000 / steps[name]["median"] / 60 for name, count in epochs.items()}
    print(f"\n{'time to 85 %':38} epochs  minutes  ours is faster")
    for name, value in minutes.items():
        print(f"{name:38} {epochs[name]:6} {value:8.1f} {value / minutes[SHORT]:10.1f} times")
    return {"minutes": minutes, "ours_is_faster": {name: value / minutes[SHORT] for name, value in minutes.items()}}


# ---------------------------------------------------------------- 3. input pipeline

class StudentDataset(Dataset):
    """The usual pattern: normalise and convert each image by itself."""

    def __init__(self, data, targets):
        self.data, self.targets = data, targets
        self.transform = A.Compose([*train_transform().transforms, A.Normalize(MEAN, STD), ToTensorV2()])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.transform(image=self.data[index])["image"], self.targets[index]


def input_pipeline(options):
    """Images a second that loaders deliver, against as many processes that only call albumentations in a loop."""
    train_set = load_dataset("train", options.data)
    images = range(min(options.images, len(train_set)))
    dataset, student = (Subset(whole, images) for whole in (train_set, StudentDataset(train_set.data, train_set.targets)))
    sides, limits, batch_size = {}, {}, min(256, len(images))
    for workers in range(1, min(2, CORES) + 1):
        number = f"{workers} worker{'s' * (workers > 1)}"
        limit = f"albumentations alone, {number}"
        sides[limit] = bare(train_set.data[:len(images)], workers)
        ours = make_loader(dataset, batch_size, True, workers)
        theirs = DataLoader(student, batch_size, shuffle=True, num_workers=workers, persistent_workers=True)
        for name, loader in (("ours", ours), ("student's", theirs)):
            sides[f"{name}, {number}"] = lambda loader=loader: sum(len(labels) for _, labels in loader)
        limits |= dict.fromkeys(list(sides)[-3:], limit)
    for deliver in sides.values():
        deliver()  # starts the workers
    rates = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, deliver in sides.items():
            start = time.perf_counter()
            count = deliver()
            rates[name].append(count / (time.perf_counter() - start))
    print(f"\n{'input pipeline':38} images/s  lowest  highest  of the limit")
    rows = {}
    for name, values in rates.items():
        share = statistics.median(one / limit for one, limit in zip(values, rates[limits[name]]))
        rows[name] = {**spread(values), "of_the_limit": share}
        print("{:38} {:8.0f} {:7.0f} {:8.0f} {:10.0%}".format(name, *rows[name].values()))
    return rows


def bare(images, workers):
    """Return a function that has as many processes each augment all of the images, and returns how many that were."""
    processes, pipes = multiprocessing.get_context("spawn" if sys.platform == "win32" else "fork"), []
    for _ in range(workers):
        pipe, other = processes.Pipe()
        processes.Process(target=serve_bare, args=(other, images), daemon=True).start()
        pipes.append(pipe)

    def deliver():
        for pipe in pipes:
            pipe.send("augment")
        return sum(pipe.recv() for pipe in pipes)

    return deliver


def serve_bare(pipe, images):
    """Augment the images whenever asked, in a process of its own."""
    transform = train_transform()
    while pipe.recv():
        for image in images:
            transform(image=image)
        pipe.send(len(images))


def waiting(options, device):
    """The share of an epoch that the training loop spends waiting for its loader, in percent."""
    train_set = load_dataset("train", options.data)
    loader, model = make_loader(train_set, 256, True), build_network("NetDilated")
    model.to(device, memory_format=torch.channels_last)
    optimizer, waits = utils.make_optimizer(model, 0.01, 5e-4), []

    def watched():
        iterator = iter(loader)
        for _ in range(max(1, min(options.images, len(train_set)) // 256)):
            start = time.perf_counter()
            batch = next(iterator)
            waits.append(time.perf_counter() - start)
            yield batch

    start = time.perf_counter()
    utils.train(model, watched(), optimizer)
    share = 100 * sum(waits[1:]) / (time.perf_counter() - start)  # the first one starts the workers
    print(f"\nwaiting for data: {share:.1f} % of the training loop's time, {loader.num_workers} workers")
    return share


# ---------------------------------------------------------------- 4. evaluation

def evaluation(options, device):
    """Seconds to test the network on the whole test set."""
    loader = make_loader(load_dataset("test", options.data), 500)
    model = build_network("NetDilated").to(device, memory_format=torch.channels_last)
    row = spread([seconds(lambda: utils.test(model, loader)) for _ in range(options.repeats)])
    print(f"\nevaluation of {len(loader.dataset):,} images: {row['median']:.1f} s ({row['lowest']:.1f} to {row['highest']:.1f})")
    return {"images": len(loader.dataset), **row}


# ---------------------------------------------------------------- 5. how cost grows

def growth(options, device):
    """Milliseconds a training step takes for each image, over the batch size and over the width."""
    trainers = {f"batch size {size}": (build_network("NetDilated"), size) for size in (32, 64, 128, 256, 512, 1024)}
    trainers |= {f"width times {factor}": (widened(factor), 256) for factor in (0.5, 1, 1.5, 2)}
    print(f"\n{'training step':38} ms/image  lowest  highest")
    rows = {}
    for name, (model, size) in trainers.items():
        size = min(size, options.images)
        steps = max(1, min(options.images, 512) // size)
        train = trainer(model, size, steps * [32], device, torch.channels_last)
        train()
        times = [1000 * seconds(train, options.seconds / 3) / (steps * size) for _ in range(min(3, options.repeats))]
        rows[name] = spread(times)
        print("{:38} {:8.3f} {:7.3f} {:8.3f}".format(name, *rows[name].values()))
    return rows


def widened(factor):
    """Return NetDilated with `factor` times its channels."""
    first, widths = ([round(factor * width / 8) * 8 for width in LARGE[name]] for name in ("first", "widths"))
    return Try(enlarge=LARGE["enlarge"], first=first, widths=widths)


# ---------------------------------------------------------------- 6. how near the limit

def arithmetic(steps, device):
    """The rate of the training step's multiply-accumulates (forward, and twice that backward; two operations each)
    against that of a large matrix product in the same type."""
    dtype = utils.mixed_precision(device) or torch.float32
    a, b = (torch.randn(4096, 4096, device=device, dtype=dtype) for _ in range(2))
    product = 2 * 4096**3 / min(seconds(lambda: a @ b) for _ in range(5)) / 1e9
    step = 6 * count_macs(build_network("NetDilated")) * steps[OURS]["median"] / 1e9
    print(f"\ntraining step: {step:.0f} GFLOP/s, {step / product:.0%} of a matrix product's {product:.0f} in {dtype}")
    return {"training step": step, "matrix product": product, "type": str(dtype), "share": step / product}


def seconds(function, least=0):
    """Time calls for at least so many seconds, on all cores (a Timer's own default is one) and to the end of what they
    ask of a GPU; return the median of a call."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median


def spread(values):
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


if __name__ == "__main__":
    main()
