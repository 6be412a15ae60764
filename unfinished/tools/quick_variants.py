"""Shorter quick recipes, judged on 5,000 held-out images: prints a row each.

With the patch applied, from the root of the repository: `PYTHONPATH=. python unfinished/tools/quick_variants.py`.
"""
from recipe import Recipe
from train import run

VARIANTS = [{"epochs": 2, "sizes": (16, 24)}, {"epochs": 3, "sizes": (16, 16, 20)}, {"epochs": 2, "sizes": (20, 24)},
            {"epochs": 3, "sizes": (16, 16, 24)}, {"epochs": 2, "sizes": (16, 28)}]
for number, changes in enumerate(VARIANTS):
    metrics = run(Recipe.quick(validation_size=5000, folder=f"checkpoints/quick-variants/{number}", **changes))[1]
    print(changes, f"{metrics['validation_accuracy']:.2f} % in {metrics['seconds']:.0f} s", flush=True)
