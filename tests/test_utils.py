"""Training and testing, and metrics."""

import contextlib
import copy
import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.v2.functional import resize

import device
import train
import utils
from checkpoint import Checkpoint
from dataset import load_dataset, normalise
from device import autocast, make_scaler
from model import NetDilated
from recipe import Recipe, make_optimizer, make_scheduler, seed_everything
from tiny import HISTORY, SHORT, Run, Tiny, confident, equal, state


@pytest.fixture(scope="module")
def learned(root, tmp_path_factory):
    """A run of 450 steps without a teacher, and what it printed."""
    run = Run(root, tmp_path_factory.mktemp("learned"), teacher=False, epochs=30)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        history = run.fit()
    return SimpleNamespace(
        model=run.model.eval(),
        history=history,
        test_loader=run.loaders[1],
        lines=output.getvalue().splitlines(),
    )


@pytest.fixture(scope="module")
def test_set(root):
    return load_dataset("test", "sample", root=root)


def batch(size):
    torch.manual_seed(0)
    return torch.randint(256, (size, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (size,))


def take_step(model, images, labels, recipe=SHORT, epoch=0, lr=0.1, teacher=None):
    """Train on one batch by plain gradient descent, without corruption."""
    recipe = replace(recipe, corruption=0)
    return utils.train(
        model,
        [(images, labels)],
        recipe,
        epoch,
        torch.optim.SGD(model.parameters(), lr),
        teacher=teacher,
    )


# ---------------------------------------------------------------- training and testing


def test_loss_and_accuracy_are_means_over_samples_not_over_batches():
    """Batches of 8, 8 and 1: a mean of batch means would weigh the last sample eight times."""
    images, labels = batch(17)
    loader, model = (
        DataLoader(TensorDataset(images, labels), 8),
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)),
    )
    logits = model(normalise(images))
    expected = (
        F.cross_entropy(logits, labels).item(),
        100 * (logits.argmax(1) == labels).double().mean().item(),
    )
    assert utils.test(model, loader) == pytest.approx(expected, rel=1e-5)
    still = torch.optim.SGD(model.parameters(), lr=0)
    trained = utils.train(model, loader, Recipe(sizes=(32,), corruption=0), 0, still)
    assert trained == pytest.approx(expected, rel=0.005) and all(
        type(value) is float for value in trained
    )


def test_a_test_does_not_change_the_model(learned):
    before = state(learned.model.train())
    assert utils.test(learned.model, learned.test_loader) == utils.test(
        learned.model, learned.test_loader
    )
    assert equal(before, state(learned.model))


def test_training_learns_the_classes_and_returns_the_history(learned):
    history = learned.history
    assert list(history) == [
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
    ]
    assert all(
        len(column) == 30 and all(type(value) is float for value in column)
        for column in history.values()
    )
    assert history["test_accuracy"][-1] > 20  # ten classes: chance is 10
    tested = utils.test(learned.model, learned.test_loader)
    assert tested == pytest.approx(
        (history["test_loss"][-1], history["test_accuracy"][-1]), rel=1e-5
    )
    assert "a sample of CIFAR-10" in learned.lines[0] and len(learned.lines) == 32
    assert len({len(row) for row in learned.lines[1:]}) == 1  # the table is straight


def test_the_same_seed_gives_the_same_weights_and_another_one_others(root, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        run = Run(root, tmp_path / str(number), epochs=1, seed=seed)
        run.fit()
        weights.append(state(run.model))
    assert equal(weights[0], weights[1]) and not equal(weights[0], weights[2])


def test_training_images_have_the_size_of_the_epoch_and_test_images_their_own(root, tmp_path):
    run, seen = Run(root, tmp_path, teacher=False, batch_size=300, epochs=3, sizes=(8, 16, 24)), []
    run.model.register_forward_pre_hook(
        lambda model, inputs: seen.append((model.training, *inputs[0].shape[2:]))
    )
    run.fit()
    assert seen == [each for size in (8, 16, 24) for each in ((True, size, size), (False, 32, 32))]


def test_the_network_learns_from_corrupted_images_and_the_teacher_sees_them_clean():
    torch.manual_seed(0)
    model, teacher, seen, (images, labels) = Tiny(), Tiny().eval(), [], batch(20)
    for network in (model, teacher):
        network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    recipe = Recipe(sizes=(32,), corruption=1)
    utils.train(
        model,
        [(images, labels)],
        recipe,
        0,
        torch.optim.SGD(model.parameters(), 0.1),
        teacher=teacher,
    )
    assert (seen[0] != normalise(images)).flatten(1).any(1).all() and seen[1].equal(
        normalise(images)
    )


def test_the_distillation_loss_is_the_divergence_of_softened_probabilities():
    """Against the definition: the divergence at temperature 4, times 16. What is added to all
    logits does not count.
    """
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 6, 10, dtype=torch.float64) * 3
    logits.requires_grad_()
    ours, theirs = (F.softmax(values / 4, 1) for values in (logits, teacher_logits))
    expected = 16 * (theirs * (theirs / ours).log()).sum(1).mean()
    loss = utils.distillation_loss(logits, teacher_logits, 4)
    assert loss.item() == pytest.approx(expected.item())
    assert utils.distillation_loss(logits, logits + 5, 4).item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], 4 * (ours - theirs) / 6)


def test_nine_tenths_of_a_distilled_step_are_the_teachers():
    """Recomputed; the teacher sees the images at full size, the network smaller ones."""
    torch.manual_seed(0)
    one, teacher, seen, (images, labels) = Tiny(), Tiny().eval(), [], batch(20)
    one.layers[3].p, other = 0, copy.deepcopy(one)
    other.layers[3].p = 0
    teacher.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].shape))
    loss, _ = take_step(one, images, labels, teacher=teacher)
    images = normalise(images)
    with autocast(torch.device("cpu")):
        logits = other(resize(images, [16, 16])).float()
        teacher_logits = teacher(images).float().detach()
    entropy = F.cross_entropy(logits, labels)
    (0.1 * entropy + 0.9 * utils.distillation_loss(logits, teacher_logits, 4)).backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert loss == pytest.approx(entropy.item(), rel=1e-3) and seen[0] == (20, 3, 32, 32)
    assert all(
        torch.allclose(one.state_dict()[key], value, atol=1e-4)
        for key, value in other.state_dict().items()
    )


def test_a_distilled_network_comes_nearer_to_its_teacher_which_stays_as_it_is(
    root, tmp_path, learned
):
    before = state(learned.model.eval())
    teacher_logits = utils.predict(learned.model, learned.test_loader)[0]

    def distance(teacher, name):
        run = Run(root, tmp_path / name, teacher=False, epochs=10, seed=1)
        run.teacher = teacher
        run.fit()
        return utils.distillation_loss(
            utils.predict(run.model, learned.test_loader)[0], teacher_logits, 4
        ).item()

    assert distance(learned.model, "distilled") < 0.7 * distance(None, "alone")
    assert equal(before, state(learned.model)) and not learned.model.training


def test_too_little_gpu_memory_names_the_batch_size_and_a_smaller_one():
    """There is no small GPU to fill here, so the network itself raises what PyTorch would."""

    class Huge(Tiny):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(
        RuntimeError, match="^the memory of .* is too small for batch_size 100: try 50$"
    ):
        take_step(Huge(), *batch(100))


def test_a_gpu_without_room_for_the_momentum_suggests_half_the_batch_size(monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(
        RuntimeError, match="^the memory of .* is too small for batch_size 100: try 50$"
    ):
        take_step(Tiny(), *batch(100))


# ---------------------------------------------------------------- what a GPU does differently


@pytest.fixture
def fp16(monkeypatch):
    """The CPU trains as CUDA does: in fp16, with scaled gradients."""
    monkeypatch.setattr(device, "mixed_precision", lambda device: torch.float16)


def fp16_run(recipe, batches):
    """Return a run's network, optimizer, schedule and scaler, and its batches of one image of each
    class.
    """
    seed_everything(0)
    model = Tiny()
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(torch.device("cpu"))
    parts = SimpleNamespace(
        optimizer=optimizer, scheduler=make_scheduler(optimizer, recipe, batches), scaler=scaler
    )
    return model, parts, [batch(20) for _ in range(batches)]


@pytest.mark.parametrize("optimizer", ["SGD", "Muon"])
def test_a_step_whose_gradients_overflow_is_skipped_with_all_that_follows_it(optimizer, fp16):
    recipe = Recipe(optimizer=optimizer, epochs=1, batch_size=20, sizes=(16,), max_lr=0.05)
    model, parts, batches = fp16_run(recipe, 4)
    utils.train(model, batches[:2], recipe, 0, *vars(parts).values())
    before, momentum = state(model), copy.deepcopy(parts.optimizer.state_dict())
    parts.scaler.load_state_dict({**parts.scaler.state_dict(), "scale": 2.0**60})
    utils.train(model, batches[2:3], recipe, 0, *vars(parts).values())
    weights = {name for name, _ in model.named_parameters()}
    assert all(before[name].equal(value) for name, value in state(model).items() if name in weights)
    for name, value in momentum["state"].items():
        assert value["momentum_buffer"].equal(
            parts.optimizer.state_dict()["state"][name]["momentum_buffer"]
        )
    assert parts.scheduler.last_epoch == 2 and parts.scaler.get_scale() == 2.0**59
    parts.scaler.load_state_dict({**parts.scaler.state_dict(), "scale": 1024.0})
    utils.train(model, batches[3:], recipe, 0, *vars(parts).values())
    assert parts.scheduler.last_epoch == 3 and not before["layers.0.weight"].equal(
        model.layers[0].weight
    )


def test_an_fp16_run_goes_on_with_its_scale(root, tmp_path, fp16, monkeypatch):
    scalers, whole = [], Run(root, tmp_path / "whole")

    def make_fast_scaler(device):  # its scale grows within an epoch of 15 steps
        scalers.append(torch.amp.GradScaler("cpu", 1024, growth_interval=7))
        return scalers[-1]

    monkeypatch.setattr(train, "make_scaler", make_fast_scaler)
    whole.fit()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            Checkpoint, "save", lambda run, save=Checkpoint.save: interrupt_after(run, save)
        )
        Run(root, tmp_path / "parted").fit()
    again = Run(root, tmp_path / "parted")
    again.fit()
    assert equal(state(whole.model), state(again.model))
    assert scalers[0].get_scale() == scalers[2].get_scale() > 1024


def test_a_run_without_scaled_gradients_goes_on_with_them_as_on_a_gpu(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            Checkpoint, "save", lambda run, save=Checkpoint.save: interrupt_after(run, save)
        )
        Run(root, tmp_path).fit()
    monkeypatch.setattr(train, "make_scaler", lambda device: torch.amp.GradScaler("cpu", 1024))
    assert len(Run(root, tmp_path).fit()["seconds"]) == SHORT.epochs


def interrupt_after(run, save):
    """Save, and interrupt the run if an epoch is done."""
    save(run)
    if run.parts["log"].epochs_done():
        raise KeyboardInterrupt


def test_a_training_step_asks_the_device_for_no_number(monkeypatch):
    """On a GPU each of these calls would wait for it. They may happen once, at the end of the
    epoch.

    (In fp16, PyTorch's scaler of the gradients asks for some.)
    """
    model, recipe, asked = Tiny(), Recipe(sizes=(16,), batch_size=20), []
    optimizer = make_optimizer(model, recipe)

    def watch(name, call):
        monkeypatch.setattr(
            torch.Tensor, name, lambda tensor, *rest: asked.append(name) or call(tensor, *rest)
        )

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        watch(name, getattr(torch.Tensor, name))
    counts = []
    for steps in (1, 4):
        asked.clear()
        utils.train(
            model, [batch(20)] * steps, recipe, 0, optimizer, teacher=copy.deepcopy(model).eval()
        )
        counts.append(sorted(asked))
    assert counts[0] == counts[1] != []


# ---------------------------------------------------------------- metrics


def test_the_metrics_of_a_run_are_those_of_its_last_epoch_and_of_its_network():
    recipe, model = Recipe(seed=3), NetDilated()
    metrics = utils.run_metrics(model, recipe, HISTORY, "CIFAR-10")
    assert (metrics["test_accuracy"], metrics["train_loss"], metrics["seconds"]) == (
        80.0,
        0.7,
        17.5,
    )
    assert (metrics["network"], metrics["parameters"]) == (
        "NetDilated",
        utils.count_parameters(model),
    )
    assert metrics["data"] == "CIFAR-10" and metrics["macs"] / 1e6 == pytest.approx(94.5, abs=0.1)
    assert metrics["recipe"] == recipe.to_json() and metrics["history"] == HISTORY
    assert (
        metrics["hardware"]
        and metrics["date"]
        and metrics["versions"]["torch"] == torch.__version__
    )


def test_accuracy_by_class(test_set):
    labels = torch.tensor(test_set.targets)
    logits = F.one_hot(torch.where(labels == 4, 5, labels), 10).float()
    accuracies = utils.accuracy_by_class(test_set, logits)
    assert accuracies == {
        name: 0.0 if name == test_set.classes[4] else 100.0 for name in test_set.classes
    }


def test_calibration_error_is_the_distance_of_confidence_and_accuracy(test_set):
    assert utils.calibration_error(test_set, confident(test_set, 0.9, 900)) == pytest.approx(
        0, abs=1e-3
    )
    assert utils.calibration_error(test_set, confident(test_set, 0.9, 600)) == pytest.approx(
        30, abs=1e-3
    )


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_found_by_which_the_logits_were_multiplied(temperature):
    """Labels drawn from the probabilities themselves fit these best."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50_000, 10, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    assert utils.fit_temperature(temperature * logits, labels) == pytest.approx(
        temperature, rel=0.03
    )
