"""The tables of CIFAR-10-C, from the metrics beside the weights."""

from benchmarks.cifar10c import Accuracies, mean, published
from benchmarks.corruptions import CORRUPTIONS, similar_to_training
from checker.tables import markdown_table
from pretrained import WEIGHTS, load_metrics
from recipe import Recipe

FOLDERS = {"seed 0": "", "teacher": "teacher"}  # network -> in weights/
PUBLISHED = ("WRN-28-10", "WRN-40-2, AugMix", "WRN-18-2, LRR")


def measured() -> dict[str, tuple[Accuracies, list[str]]]:
    """Return the accuracies of the networks of `FOLDERS`, all under the same corruptions.

    With each are the names of the corruptions that are similar to those of its training. A
    ValueError says which network was not measured.
    """
    every = {}
    for network, name in FOLDERS.items():
        metrics = load_metrics("NetDilated", WEIGHTS / name)
        if "cifar10c" not in metrics:
            folder = f"weights/{name}".rstrip("/")
            raise ValueError(
                f"{folder}/NetDilated.json has no cifar10c: "
                f"`python evaluate.py {folder} --corruptions --save` adds it"
            )
        every[network] = metrics
    accuracies = {network: each["cifar10c"]["accuracies"] for network, each in every.items()}
    kinds = [kind for kind in CORRUPTIONS if all(kind in each for each in accuracies.values())]
    return {
        network: (
            {kind: accuracies[network][kind] for kind in kinds},
            similar_to_training(Recipe(**each["recipe"])),
        )
        for network, each in every.items()
    }


def corruptions() -> str:
    """The accuracy under the corruptions of CIFAR-10-C in sentences."""
    (ours, similar), (teacher, _) = measured().values()
    unseen = [kind for kind in ours if kind not in similar]
    return (
        f"Under {len(ours)} of [CIFAR-10-C](benchmarks/README.md#cifar-10-c)'s "
        f"{len(CORRUPTIONS)} kinds, seed 0 has {mean(ours):.1f} % accuracy, "
        f"{mean(ours, unseen):.1f} % under the {len(unseen)}\n"
        "unlike those in training. Published: AugMix (WRN-40-2, trained on none) "
        f"{mean(published(), ours):.1f} %. The teacher, trained on none: {mean(teacher):.1f} %."
    )


def cifar10c() -> str:
    """The accuracy under each kind, with a star where it is in training, beside published ones."""
    columns = {**measured(), **{name: (published(name), []) for name in PUBLISHED}}
    kinds, similar = columns["seed 0"]
    unseen = [kind for kind in kinds if kind not in similar]
    rows = []
    for kind in kinds:
        cells = (
            f"{mean(accuracies, [kind]):.1f}" + "\\*" * (kind in seen)
            for accuracies, seen in columns.values()
        )
        rows.append((kind.replace("_", " "), *cells))
    for title, some in (
        (f"**mean of {len(kinds)}**", kinds),
        (f"**mean of the {len(unseen)} unseen by seed 0**", unseen),
    ):
        rows.append((title, *(f"{mean(each, some):.1f}" for each, _ in columns.values())))
    return markdown_table(("accuracy, %", *(f"{name}:" for name in columns)), rows)
