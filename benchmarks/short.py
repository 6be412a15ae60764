"""The short schedule: three runs of NetDilated, whose mean test accuracy is to pass 85 %; writes benchmarks/short.json.

`python benchmarks/short.py` goes on where it was interrupted.
"""
import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import utils

SCHEDULE = {"epochs": 3, "batch_size": 128, "augmentation": 0.1, "sizes": [16, 24, 32], "optimizer": "Muon",
            "teacher": None}
SEEDS = (0, 1, 2)


def main():
    runs = []
    for seed in SEEDS:
        folder = HERE.parent / "checkpoints" / f"short-{seed}"
        runs.append(utils.run(**SCHEDULE, seed=seed, checkpoint=folder / "checkpoint.pt", folder=folder)[1])
    accuracies = [run["test_accuracy"] for run in runs]
    result = {"schedule": SCHEDULE, "mean_test_accuracy": statistics.mean(accuracies),
              "deviation": statistics.stdev(accuracies), "runs": runs}
    (HERE / "short.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{SCHEDULE}, seeds {SEEDS}: {result['mean_test_accuracy']:.2f} +- {result['deviation']:.2f} %")


if __name__ == "__main__":
    main()
