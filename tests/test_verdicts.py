"""The ruler of the ablations, against computations of another kind on made-up rows."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import ablations, verdicts
from benchmarks.verdicts import ACCURACY, LOSS, SCALED, judge, pooled_deviation

BASE = "10 epochs", "NetDilated"


def row(loss, corruption=0.0, teacher=None, **figures):
    return {LOSS: loss, **figures, "recipe": {"corruption": corruption, "teacher": teacher}}


@pytest.fixture
def made_up():
    return {
        "10 epochs": {
            "NetDilated": row(0.240),
            "NetDilated, seed 1": row(0.238),
            "NetDilated, seed 2": row(0.245),
            "wider": row(0.220),
            "wider, seed 1": row(0.223),
            "deeper": row(0.231),
            "noisy": row(0.300, corruption=0.2),
            "noisy, seed 1": row(0.270, corruption=0.2),
        },
        "30 epochs": {"long": row(0.180), "long, seed 7": row(0.189), "single": row(0.9)},
    }


def test_the_deviation_is_that_of_the_residuals_of_a_linear_model(made_up):
    losses = np.array([0.240, 0.238, 0.245, 0.220, 0.223, 0.180, 0.189])
    recipes = np.repeat(np.eye(3), [3, 2, 2], axis=0)
    _, (squares,), rank, _ = np.linalg.lstsq(recipes, losses)
    deviation, degrees = pooled_deviation(made_up, corrupted=False)
    assert degrees == len(losses) - rank == 4
    assert deviation == pytest.approx((squares / degrees) ** 0.5)
    assert pooled_deviation(made_up, corrupted=True) == (pytest.approx(0.03 / 2**0.5), 1)
    assert pooled_deviation(made_up, corrupted=False, key=ACCURACY) == (0, 0)


def test_two_recipes_alone_have_the_interval_of_the_t_test():
    base, wider = [0.240, 0.238, 0.245], [0.220, 0.223]
    rows = {f"NetDilated, seed {seed}": row(loss) for seed, loss in enumerate(base)}
    rows |= {f"wider, seed {seed}": row(loss) for seed, loss in enumerate(wider)}
    verdict = judge({"10 epochs": rows}, ("10 epochs", "wider"), BASE)
    assert verdict.difference == pytest.approx(np.mean(wider) - np.mean(base))
    at_the_edge = np.array(wider) - verdict.difference + verdict.half_width
    assert scipy.stats.ttest_ind(at_the_edge, base).pvalue == pytest.approx(0.05)
    assert verdict.word == "better" and verdict.seeds == 2


def test_a_single_run_has_a_wider_interval_and_a_question_mark(made_up):
    deviation, _ = pooled_deviation(made_up, corrupted=False)
    verdict = judge(made_up, ("10 epochs", "deeper"), BASE)
    assert verdict.half_width == pytest.approx(2.776445 * deviation * (4 / 3) ** 0.5)  # t, 4
    assert verdict.word == "inside"  # by 0.010, and ± 0.013
    made_up["10 epochs"]["deeper"] = row(0.2)
    assert judge(made_up, ("10 epochs", "deeper"), BASE).word == "better?"
    made_up["10 epochs"]["deeper"] = row(0.3)
    assert judge(made_up, ("10 epochs", "deeper"), BASE).word == "worse?"
    made_up["10 epochs"]["deeper, seed 1"] = row(0.3)
    assert judge(made_up, ("10 epochs", "deeper"), BASE).word == "worse"
    assert judge(made_up, ("10 epochs", "wider"), ("30 epochs", "single")).word == "better?"


def test_corruption_has_its_own_deviation(made_up):
    verdict = judge(made_up, ("10 epochs", "noisy"), BASE)
    assert verdict.half_width == pytest.approx(12.7062 * 0.03 / 2**0.5 * (5 / 6) ** 0.5, rel=1e-4)
    assert verdict.word == "inside" and verdict.difference == pytest.approx(0.285 - 0.241)
    assert judge(made_up, BASE, ("10 epochs", "noisy")).half_width == verdict.half_width


@pytest.mark.parametrize(
    "name, changes, corrupted",
    [
        ("corruption by noise", {}, True),  # a row without a recipe
        ("wider", {}, False),
        ("noisy", {"recipe": {"corruption": 0.2}}, True),
        ("without corruption", {"recipe": {"corruption": 0}}, False),
        ("an old row", {"recipe": {}}, False),
    ],
)
def test_corruption_is_known_from_the_recipe_or_else_from_the_name(name, changes, corrupted):
    assert verdicts.is_corrupted(name, changes) == corrupted


def test_a_teacher_is_judged_at_the_fitted_temperature_alone(made_up):
    made_up["10 epochs"]["taught"] = row(0.1, teacher="weights/teacher")
    assert judge(made_up, ("10 epochs", "taught"), BASE) is None
    made_up["10 epochs"]["taught"][SCALED] = 0.19
    assert judge(made_up, ("10 epochs", "taught"), BASE) is None  # the base lacks it
    for name, scaled in ("NetDilated", 0.21), ("NetDilated, seed 1", 0.22):
        made_up["10 epochs"][name][SCALED] = scaled
    assert judge(made_up, ("10 epochs", "taught"), BASE) is None  # so does one of its seeds
    made_up["10 epochs"]["NetDilated, seed 2"][SCALED] = 0.2
    verdict = judge(made_up, ("10 epochs", "taught"), BASE)
    assert verdict.difference == pytest.approx(0.19 - 0.21)
    assert verdict.half_width == pytest.approx(4.302653 * 0.01 * (4 / 3) ** 0.5)  # t, 2


def test_without_a_loss_or_a_recipe_of_several_seeds_there_is_no_verdict(made_up):
    del made_up["10 epochs"]["deeper"][LOSS]
    assert judge(made_up, ("10 epochs", "deeper"), BASE) is None
    rows = {"NetDilated": row(0.24), "wider": row(0.1)}
    assert judge({"10 epochs": rows}, ("10 epochs", "wider"), BASE) is None


def test_seeds_of_one_name_have_one_recipe():
    for rows in verdicts.ablations().values():
        for runs in verdicts.by_recipe(rows).values():
            recipes = [{**run.get("recipe", {}), "seed": None} for run in runs]
            assert all(recipe == recipes[0] for recipe in recipes)


def test_every_table_of_the_command_is_compared_with_a_base():
    assert set(ablations.RECIPES) <= {name for of in verdicts.COMPARED.values() for name in of}
    for table, name in verdicts.COMPARED:
        assert name in verdicts.by_recipe(verdicts.ablations()[table])
