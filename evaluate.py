"""Test saved weights: `python evaluate.py weights/teacher --corruptions`."""

import argparse
import os
import sys

from torch import nn

import utils
from dataset import CIFAR10, DATASETS, load_dataset
from device import keep_freed_memory, pick_device, to_device
from loader import make_loader
from pretrained import WEIGHTS, add_metrics, load, load_metrics
from published import find_network
from recipe import Recipe


def evaluate(model: nn.Module, dataset: CIFAR10, temperature: float = 1.0) -> dict:
    """Measure a network on the images of a data set, and return what `evaluate.py --save` saves.

    Args:
        model: a network from (N, 3, 32, 32) normalised images to (N, 10) logits.
        dataset: the test images.
        temperature: what the logits are divided by for the second calibration error.

    Returns:
        loss, accuracies and calibration errors (in percent), and the mistakes on the sample.
    """
    logits, labels = utils.predict(model, make_loader(dataset, min(500, len(dataset))))
    loss, accuracy = utils.loss_and_accuracy(logits, labels)
    return {
        "test_loss": loss,
        "test_accuracy": accuracy,
        "accuracy_by_class": utils.accuracy_by_class(dataset, logits),
        "temperature": temperature,
        "calibration_error": utils.calibration_error(dataset, logits),
        "calibration_error_scaled": utils.calibration_error(dataset, logits / temperature),
        "sample_mistakes": utils.sample_mistakes(model),
    }


def measure_corruptions(
    model: nn.Module, dataset: CIFAR10, metrics: dict, folder: str | None, root: str | None
) -> None:
    """Measure CIFAR-10-C, and print a line for each kind of corruption.

    With a folder, the metrics there get each kind as soon as it is measured, and what they have
    already is only shown. `root` is the folder of the official files, if they are there.
    """
    from benchmarks import cifar10c  # nothing else here needs the benchmarks

    known = metrics.get("cifar10c") if folder else None
    print(cifar10c.HEAD)
    for kind, results in cifar10c.measure(model, dataset, known, root):
        if folder:
            add_metrics(metrics, folder, cifar10c=results)
        print(cifar10c.row(kind, results["accuracies"][kind]), flush=True)
    print(cifar10c.summary(results))


def temperature_of(metrics: dict) -> float:
    """Return the temperature that calibrates a network, given its metrics; 1 if none is known.

    A run that held out images has its own. That of NetDilated after the headline recipe comes from
    the committed run that held out some.
    """
    recipe = Recipe(**metrics["recipe"])
    if metrics["network"] == "NetDilated" and recipe == Recipe(seed=recipe.seed):
        return load_metrics("NetDilated", WEIGHTS / "held-out")["temperature"]
    return metrics.get("temperature", 1.0)


def report(results: dict, title: str) -> str:
    """Return the result of `evaluate` as lines for a person."""
    lines = [f"{title}: {results['test_accuracy']:.2f} %, loss {results['test_loss']:.4f}"]
    for name, accuracy in results["accuracy_by_class"].items():
        lines.append(f"    {name:12}{accuracy:6.1f} %")
    lines.append(
        f"expected calibration error {results['calibration_error']:.1f} %, at temperature "
        f"{results['temperature']:.3g} {results['calibration_error_scaled']:.1f} %"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Evaluate the weights that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", nargs="?", default=WEIGHTS, help="of the weights and metrics (default weights)"
    )
    parser.add_argument(
        "--network", default="NetDilated", help="a name of published.py, or FILE.py:CLASS"
    )
    parser.add_argument("--data", default="CIFAR-10", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument(
        "--corruptions", action="store_true", help="under CIFAR-10-C, too: 70 times the test set"
    )
    parser.add_argument(
        "--save", action="store_true", help="add the results to the metrics beside the weights"
    )
    options = parser.parse_args(arguments)
    try:
        if options.save and options.data != "CIFAR-10":
            raise ValueError("only results on CIFAR-10 are saved: leave out --save or --data")
        keep_freed_memory()
        model, metrics = load(find_network(options.network), options.folder)
        to_device(model, pick_device(options.device))
        dataset = load_dataset("test", options.data)
        results = evaluate(model, dataset, temperature_of(metrics))
        print(report(results, f"{metrics['network']} on {dataset.title}"))
        if options.save:  # loss and accuracy stay as the run itself measured them
            new = {key: value for key, value in results.items() if key not in metrics["history"]}
            metrics = add_metrics(metrics, options.folder, **new)
            print(f"saved in {options.folder}/{metrics['network']}.json")
        if options.corruptions:
            folder = options.folder if options.save else None
            root = os.environ.get("CIFAR10C_ROOT") if options.data == "CIFAR-10" else None
            measure_corruptions(model, dataset, metrics, folder, root)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
