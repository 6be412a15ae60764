"""The recipe: what its settings may be, and the optimizer and schedule that follow from it."""

import copy
import json
import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import MirrorConv2d, NetDilated
from published import NETWORKS, conv
from recipe import (
    Recipe,
    make_optimizer,
    make_scheduler,
    seed_everything,
    zeropower_via_newtonschulz5,
)

# ---------------------------------------------------------------- settings

IMPOSSIBLE = {  # what is allowed, and values that are not
    "network": (
        "one of NetDilated, PublishedDilated, PublishedDepthwise",
        ["ResNet", (), np.array(["a", "b"])],
    ),
    "data": ("one of CIFAR-10, sample, tiny", ["MNIST", None, {}]),
    "validation_size": ("a whole number, 0 or more", [-1, 0.1]),
    "epochs": ("a whole number, 1 to 100000", [0, True, 2**70]),
    "batch_size": ("a whole number, 2 or more", [1, "256"]),
    "optimizer": ("SGD or Muon", ["Adam", None, np.array(["SGD", "Muon"])]),
    "max_lr": ("a number above 0", [0, float("inf")]),
    "muon_lr_ratio": ("a number above 0", [0, "0.1"]),
    "warmup": ("a number above 0 and below 1", [0.0, 1]),
    "momentum": (
        "a pair of numbers above 0 and below 1",
        [(0.85,), (0.85, 1.1), 0.9, np.array([0.85, 0.95])],
    ),
    "weight_decay": ("a number, 0 or more", [-1e-4, float("nan")]),
    "augmentation": ("a probability, 0 to 1", [-0.1, 1.1]),
    "corruption": ("a probability, 0 to 1", [-0.1, 1.1, "0.3"]),
    "corruption_types": (
        "some of gaussian_noise, shot_noise, gaussian_blur, low_contrast, very_low_contrast, "
        "impulse_noise, glass_blur, motion_blur, pixelate, jpeg, augmix",
        [(), ("fog",), "jpeg"],
    ),
    "sizes": (
        "sizes in pixels, each 8 to 1024, such as 32 or 16,32",
        [32, (), (32, 7), (16.0,), (2**70,)],
    ),
    "teacher": ("None or the path of a folder", [3, __file__, ""]),
    "wise_ft_alpha": ("None, or a number, 0 to 1", [-0.1, 1.1, "yes"]),
    "distillation_weight": ("a number, 0 to 1", [-0.1, 1.1]),
    "distillation_temperature": ("a number above 0", [0, "4"]),
    "seed": ("a whole number, 0 to 4294967295", [-1, 2**32]),
    "num_workers": ("None, or a whole number, 0 or more", [-1, 0.5]),
    "device": (
        "auto, cpu, mps, cuda, or one GPU of several, such as cuda:1",
        ["gpu", "cuda:", None, 0],
    ),
    "folder": ("the path of a folder", [None, __file__]),
}


@pytest.mark.parametrize("name", [each.name for each in fields(Recipe)])
def test_an_impossible_setting_is_named_in_one_line_with_what_is_allowed(name):
    allowed, values = IMPOSSIBLE[name]
    for value in values:
        with pytest.raises(ValueError) as error:
            Recipe(**{name: value})
        assert str(error.value) == f"{name} is {value!r}: choose {allowed}"


def test_an_unknown_setting_is_named():
    with pytest.raises(TypeError, match="'epoch'"):
        Recipe(epoch=3)


def test_settings_at_their_limits_are_possible():
    low = Recipe(
        validation_size=0,
        epochs=1,
        batch_size=2,
        weight_decay=0,
        augmentation=0,
        sizes=(8,),
        teacher=None,
        distillation_weight=0,
        seed=0,
        num_workers=0,
        max_lr=1e-9,
    )
    high = Recipe(
        augmentation=1,
        distillation_weight=1.0,
        seed=2**32 - 1,
        num_workers=64,
        momentum=(0.9, 0.99),
    )
    assert low.sizes == (8,) and high.seed == 2**32 - 1


def test_a_run_without_a_teacher_has_no_recipe_for_it():
    with pytest.raises(ValueError, match="^teacher is None: choose the folder of the teacher$"):
        Recipe.quick().teacher_recipe()


def test_fine_tuning_needs_weights_to_begin_with():
    with pytest.raises(ValueError, match="^teacher is None: choose the folder of the weights to"):
        Recipe(wise_ft_alpha=1, teacher=None)


def test_lists_become_tuples_and_paths_become_strings():
    recipe = Recipe(
        sizes=[16, 32], momentum=[0.8, 0.9], folder=Path("weights/new"), teacher=Path("weights")
    )
    assert (recipe.sizes, recipe.momentum) == ((16, 32), (0.8, 0.9))
    assert (recipe.folder, recipe.teacher) == (str(Path("weights/new")), "weights")


def test_recipes_are_equal_if_they_give_the_same_result():
    assert Recipe(folder="elsewhere", num_workers=0) == Recipe()
    assert Recipe(seed=1) != Recipe() and Recipe(teacher=None) != Recipe()


def test_numbers_of_numpy_are_numbers():
    recipe = Recipe(max_lr=np.float32(1.25), epochs=np.int64(3), momentum=[np.float64(0.8), 0.9])
    assert json.loads(json.dumps(recipe.to_json()))["max_lr"] == 1.25 and type(recipe.epochs) is int
    assert recipe.momentum == (0.8, 0.9)


def test_a_long_value_stays_one_line():
    for setting in ({"max_lr": np.zeros((40, 40))}, {"folder": "long" * 80}):
        with pytest.raises(ValueError, match=": choose ") as error:
            Recipe(**setting)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_recipe_cannot_be_changed():
    with pytest.raises(AttributeError):
        Recipe().epochs = 0


def test_a_recipe_comes_back_from_json_without_the_settings_that_do_not_matter():
    recipe = Recipe.quick(momentum=(0.8, 0.9), folder="elsewhere", num_workers=0)
    values = json.loads(json.dumps(recipe.to_json()))
    assert Recipe(**values) == recipe
    assert {each.name for each in fields(Recipe)} - set(values) == {
        "folder",
        "num_workers",
        "device",
    }


def test_the_recipe_of_a_teacher_has_fewer_epochs_no_teacher_and_no_corruption():
    student = Recipe(epochs=8, corruption=0.3, max_lr=0.1, teacher="there", folder="here")
    teacher = Recipe(epochs=6, corruption=0, max_lr=0.1, teacher=None, validation_size=100)
    assert Recipe.robust().teacher_recipe().wise_ft_alpha is None
    assert (
        student.teacher_recipe(100) == teacher and student.teacher_recipe().folder == "runs/teacher"
    )
    assert Recipe(epochs=1).teacher_recipe().epochs == 1


def test_the_quick_recipe_has_two_epochs_and_no_teacher_and_takes_changes():
    quick = Recipe.quick()
    assert (quick.epochs, quick.teacher) == (2, None)
    assert Recipe.quick(epochs=5, seed=1).to_json() == {**quick.to_json(), "epochs": 5, "seed": 1}


@pytest.mark.parametrize(
    "epochs, sizes, seen",
    [
        (3, (32,), [32, 32, 32]),
        (4, (16, 32), [16, 16, 32, 32]),
        (2, (16, 24, 32), [24, 32]),
        (3, (8, 24), [8, 8, 24]),
    ],
)
def test_each_size_has_an_equal_share_of_the_epochs_and_the_last_one_comes_last(
    epochs, sizes, seen
):
    recipe = Recipe(epochs=epochs, sizes=sizes)
    assert [recipe.image_size(epoch) for epoch in range(epochs)] == seen


def test_a_seed_decides_what_all_random_generators_draw():
    def draw(seed):
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, other = draw(3), draw(4)
    assert first == draw(3) and not set(first) & set(other)


# ---------------------------------------------------------------- optimizer


def test_weights_decay_but_not_norms_and_biases():
    model = NetDilated()
    decayed, others = make_optimizer(model, Recipe(optimizer="SGD", weight_decay=0.01)).param_groups
    assert decayed["weight_decay"] == 0.01 and all(
        parameter.ndim > 1 for parameter in decayed["params"]
    )
    assert others["weight_decay"] == 0 and all(
        parameter.ndim == 1 for parameter in others["params"]
    )
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["NetDilated", "PublishedDilated"])
def test_muon_has_each_parameter_once_and_makes_the_updates_of_hidden_convolutions_orthogonal(name):
    model = NETWORKS[name]()
    groups = make_optimizer(model, Recipe(optimizer="Muon", weight_decay=0.01)).param_groups
    assert sorted(id(each) for group in groups for each in group["params"]) == sorted(
        map(id, model.parameters())
    )
    (orthogonal,) = [group for group in groups if group.get("orthogonal")]
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    hidden = [
        f"{key}.weight"
        for key, module in model.named_modules()
        if isinstance(module, MirrorConv2d)
        or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    hidden = (
        hidden if name == "NetDilated" else hidden[:-1]
    )  # the last one of PublishedDilated makes the logits
    assert [names[id(each)] for each in orthogonal["params"]] == hidden and orthogonal[
        "weight_decay"
    ] == 0
    (decayed,) = [group for group in groups if group["weight_decay"]]
    assert {names[id(each)] for each in decayed["params"]} == {
        key for key, parameter in model.named_parameters() if parameter.ndim > 1
    } - set(hidden)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_newton_schulz_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    left, values, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), False
    )
    values = torch.linspace(0.05, 1, len(values))
    for scale in (1e-3, 1e3):
        turned = left.T @ zeropower_via_newtonschulz5(scale * (left * values) @ right) @ right.T
        assert turned.diagonal().min() > 0.6 and turned.diagonal().max() < 1.3
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


def test_newton_schulz_treats_each_matrix_of_a_batch_as_if_it_were_alone():
    matrices = torch.randn(3, 8, 12)
    torch.testing.assert_close(
        zeropower_via_newtonschulz5(matrices),
        torch.stack([zeropower_via_newtonschulz5(each) for each in matrices]),
    )


def test_two_steps_of_muon():
    """Recomputed: SGD for the linear layer, an orthogonal step of a tenth of the rate for the
    convolution.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    with torch.no_grad():
        model[0].weight.mul_(5)  # whatever its norm is
    recipe = Recipe(optimizer="Muon", max_lr=0.2, momentum=(0.8, 0.9), weight_decay=0.01)
    muon, other = make_optimizer(model, recipe), copy.deepcopy(model[4])
    sgd = torch.optim.SGD(
        [{"params": [other.weight], "weight_decay": 0.01}, {"params": [other.bias]}],
        0.2,
        momentum=0.9,
        nesterov=True,
    )
    images, labels, velocity = torch.randn(20, 3, 8, 8), torch.randint(10, (20,)), 0
    for _ in range(2):
        state, muon = muon.state_dict(), make_optimizer(model, recipe)
        muon.load_state_dict(state)  # as a run that goes on does
        muon.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        other.weight.grad, other.bias.grad = (
            model[4].weight.grad.clone(),
            model[4].bias.grad.clone(),
        )
        gradient, before = model[0].weight.grad.clone(), model[0].weight.detach().clone()
        muon.step()
        sgd.step()
        velocity = 0.9 * velocity + gradient
        update = zeropower_via_newtonschulz5((gradient + 0.9 * velocity).flatten(1)).view_as(before)
        torch.testing.assert_close(
            model[0].weight, before * 8**0.5 / before.norm() - 0.1 * 0.2 * update
        )
        torch.testing.assert_close(model[4].weight, other.weight)
        torch.testing.assert_close(model[4].bias, other.bias)
    assert torch.equal(muon.state[model[0].weight]["momentum_buffer"], velocity)


def test_weights_that_are_zero_are_updated_by_muon_and_stay_finite():
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 10))
    nn.init.zeros_(model[0].weight)
    optimizer = make_optimizer(model, Recipe(optimizer="Muon"))
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
        model[0].weight.grad = torch.randn(model[0].weight.shape)
        optimizer.step()
    assert model[0].weight.isfinite().all() and model[0].weight.abs().sum() > 0


def test_a_step_of_muon_without_gradients_changes_nothing():
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10))
    before = copy.deepcopy(model.state_dict())
    make_optimizer(model, Recipe(optimizer="Muon")).step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("optimizer", ["SGD", "Muon"])
def test_the_learning_rate_peaks_after_the_warmup_and_the_momentum_does_the_opposite(optimizer):
    recipe = Recipe(optimizer=optimizer, epochs=4, max_lr=0.2, warmup=0.25, momentum=(0.8, 0.9))
    optimizer, rates, momenta = make_optimizer(NetDilated(), recipe), [], []
    scheduler = make_scheduler(optimizer, recipe, steps_per_epoch=10)
    for _ in range(40):
        assert len({group["momentum"] for group in optimizer.param_groups}) == 1
        for group in optimizer.param_groups:
            ratio = 0.1 if group.get("orthogonal") else 1
            assert group["lr"] == pytest.approx(ratio * optimizer.param_groups[0]["lr"])
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    peak = int(np.argmax(rates))
    assert peak == 9 and rates[peak] == pytest.approx(0.2) and momenta[peak] == pytest.approx(0.8)
    assert momenta[0] == pytest.approx(0.9) and momenta[-1] == pytest.approx(0.9)
    assert rates[0] < 0.02 and rates[-1] < 1e-5
    assert (np.sign(np.diff(rates)) == [1] * 9 + [-1] * 30).all()
    assert (np.sign(np.diff(momenta)) == [-1] * 9 + [1] * 30).all()


def test_in_fine_tuning_each_epoch_is_a_cycle_from_0_to_the_peak_and_back():
    recipe = Recipe.robust(epochs=2, max_lr=0.2, warmup=0.25, momentum=(0.8, 0.9))
    optimizer, rates, momenta = make_optimizer(NetDilated(), recipe), [], []
    scheduler = make_scheduler(optimizer, recipe, steps_per_epoch=8)
    for _ in range(16):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0, 0.1, 0.2]) and rates[7] == pytest.approx(0.2 / 6)
    assert rates[8:] == pytest.approx(rates[:8]) and momenta[8:] == pytest.approx(momenta[:8])
    assert momenta == pytest.approx([0.9 - 0.5 * rate for rate in rates])


def test_the_shortest_run_has_three_steps():
    recipe, rates = Recipe(epochs=1, max_lr=0.2, warmup=0.25), []
    optimizer = make_optimizer(NetDilated(), recipe)
    with pytest.raises(
        ValueError, match="^the number of steps is 2: choose more epochs or a smaller batch_size"
    ):
        make_scheduler(optimizer, recipe, steps_per_epoch=2)
    with pytest.raises(ValueError, match="^the number of steps is 2: choose a smaller batch_size"):
        make_scheduler(optimizer, Recipe.robust(epochs=9), steps_per_epoch=2)  # of each epoch
    for steps in (3, 4):
        scheduler = make_scheduler(optimizer, recipe, steps)
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert [rate > 0.19 for rate in rates] == [False, True, False, False, True, False, False]
