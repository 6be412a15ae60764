"""Training, the rules, saving and the figures."""
import contextlib
import copy
import errno
import json
import os
import pickle
import signal
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import utils
from dataset import load_dataset, make_loader, normalise, test_transform as plain_transform, train_transform
from model import NetDilated, Unit, build_network, conv


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


class Tiny(nn.Module):
    """A small network that trains in a moment, with the parts that training has to get right."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(conv(3, 16, stride=2), nn.BatchNorm2d(16), nn.SiLU(), nn.Dropout(0.1),
                                    conv(16, 32, stride=2), nn.BatchNorm2d(32), nn.SiLU(),
                                    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, x):
        return self.layers(x)


def loaders(root, batch_size=100, num_workers=0, seed=0):
    train_set, test_set = (load_dataset(split, "built-in", root=root) for split in ("train", "test"))
    return make_loader(train_set, batch_size, True, num_workers, seed), make_loader(test_set, 500)


def fit_tiny(root, epochs=3, **arguments):
    utils.seed_everything(0)
    model = Tiny()
    return model, utils.fit(model, *loaders(root), epochs, device="cpu", **arguments)


@contextlib.contextmanager
def after_step(number, action):
    """Call `action(model)` after each step of that number in a whole run, or after every one if None."""
    train = utils.train

    def watched(model, loader, optimizer, scheduler, scaler, on_step, *rest):
        def step():
            if number in (None, scheduler.last_epoch):
                action(model)
            on_step()
        return train(model, loader, optimizer, scheduler, scaler, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "train", watched)
        yield


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- training

def test_loss_and_accuracy_are_means_over_samples_not_over_batches():
    """Batches of 8, 8 and 1: a mean of batch means would weigh the last sample eight times."""
    torch.manual_seed(0)
    images, labels = torch.randint(256, (17, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (17,))
    loader, model = DataLoader(TensorDataset(images, labels), 8), Tiny().eval()
    with torch.no_grad():
        logits = model(normalise(images))
    expected = F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()
    assert utils.test(model, loader) == pytest.approx(expected, rel=1e-5)
    still = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    optimizer = torch.optim.SGD(still.parameters(), lr=0)
    logits = still(normalise(images))
    expected = F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()
    result = utils.train(still, loader, optimizer)
    assert result == pytest.approx(expected, rel=0.02) and all(type(value) is float for value in result)


def test_a_test_does_not_change_the_model(root):
    model, (_, test_loader) = Tiny(), loaders(root)
    before = state(model)
    assert utils.test(model, test_loader) == utils.test(model, test_loader)
    assert equal(before, state(model))


def test_fit_learns_the_built_in_classes_and_returns_the_history(root, capsys):
    model, history = fit_tiny(root, epochs=6)
    assert list(history) == ["train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"]
    assert all(len(column) == 6 and all(type(value) is float for value in column) for column in history.values())
    assert history["test_accuracy"][-1] > 40  # ten classes: chance is 10
    assert (history["test_loss"][-1], history["test_accuracy"][-1]) == utils.test(model, loaders(root)[1])
    lines = capsys.readouterr().out.splitlines()
    assert "NOT CIFAR-10" in lines[0]
    rows = lines[2:]
    assert len(rows) == 6 and len({len(row) for row in rows}) == 1


def test_the_same_seed_gives_the_same_weights(root):
    assert equal(state(fit_tiny(root, 1)[0]), state(fit_tiny(root, 1)[0]))


@pytest.mark.parametrize("epochs, sizes, seen", [(3, None, [32, 32, 32]), (4, [16, 32], [16, 16, 32, 32]), (2, [16, 24, 32], [24, 32]),
                                                 (3, [8, 24], [8, 8, 24]), (3, [16, 24, 32], [16, 24, 32])])
def test_training_images_have_the_sizes_asked_for_and_test_images_their_own(epochs, sizes, seen, root):
    shapes = {True: [], False: []}  # by whether the network is being trained

    class Watched(Tiny):
        def forward(self, x):
            shapes[self.training].append(x.shape[2:])
            return super().forward(x)

    train_loader, test_loader = loaders(root, 500)
    utils.fit(Watched(), train_loader, test_loader, epochs, device="cpu", sizes=sizes)
    assert shapes[True] == [(size, size) for size in seen for _ in train_loader]
    assert shapes[False] == [(32, 32)] * epochs


def test_smaller_images_are_averages_of_the_larger_ones():
    images, seen = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8), []
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    model.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    utils.train(model, [(images, torch.tensor([0, 1]))], torch.optim.SGD(model.parameters(), lr=0), size=16)
    expected = F.interpolate(normalise(images), (16, 16), mode="bilinear", antialias=True)
    assert torch.equal(seen[0], expected)
    assert seen[0].std() < 0.8 * F.interpolate(normalise(images), (16, 16)).std()  # it averages, it does not skip


def test_flipped_predictions_are_those_of_both_images():
    model, images, labels = Tiny(), torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8), torch.arange(6)
    mirrored = images.flip(2)
    plain, other, both = (utils.predict(model, [(shown, labels)], flip)[0]
                          for shown, flip in ((images, False), (mirrored, False), (images, True)))
    assert not torch.allclose(plain, other)
    torch.testing.assert_close(both, (plain + other) / 2)


def test_weights_decay_but_not_norms_and_biases():
    decayed, others = utils.make_optimizer(NetDilated(), 0.1, 5e-4).param_groups
    assert decayed["weight_decay"] == 5e-4 and all(parameter.ndim > 1 for parameter in decayed["params"])
    assert others["weight_decay"] == 0 and all(parameter.ndim == 1 for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(NetDilated().parameters()))


@pytest.mark.parametrize("name", ["NetDilated", "PublishedDilated", "PublishedDepthwise"])
def test_muon_has_each_parameter_once_and_makes_the_steps_of_hidden_convolutions_orthogonal(name):
    model = build_network(name)
    groups = utils.make_optimizer(model, 0.1, 5e-4, "Muon").param_groups
    assert sorted(id(each) for group in groups for each in group["params"]) == sorted(map(id, model.parameters()))
    (orthogonal,) = [group["params"] for group in groups if group.get("orthogonal")]
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    hidden = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1][
        :None if name == "NetDilated" else -1]  # the last one of the published networks makes the logits
    assert [names[id(each)] for each in orthogonal] == [f"{key}.weight" for key in hidden]


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_orthogonalise_keeps_the_singular_vectors_and_brings_the_values_near_one(shape):
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), False)
    values = torch.linspace(0.05, 1, len(values))
    for scale in (1e-3, 1e3):
        turned = left.T @ utils.orthogonalise(scale * (left * values) @ right) @ right.T
        assert turned.diagonal().min() > 0.6 and turned.diagonal().max() < 1.3
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-3


def test_a_step_of_muon(root):
    """Recomputed: SGD for the linear layer, an orthogonal step of a tenth of the rate for the convolution."""
    torch.manual_seed(0)
    one = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    other = copy.deepcopy(one)
    muon = utils.make_optimizer(one, 0.2, 0.01, "Muon")
    sgd = torch.optim.SGD(other.parameters(), 0.2, momentum=0.9, nesterov=True, weight_decay=0.01)
    batch = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (20,))
    before = one[0].weight.detach().clone()
    utils.train(one, [batch], muon)
    utils.train(other, [batch], sgd)
    assert torch.equal(one[4].weight, other[4].weight)
    gradient = other[0].weight.grad  # at the same weights
    step = before * 8**0.5 / before.norm() - one[0].weight
    torch.testing.assert_close(step, 0.02 * utils.orthogonalise(gradient.flatten(1)).view_as(step), rtol=0.02, atol=1e-4)
    assert one[0].weight.norm().item() == pytest.approx(8**0.5, rel=0.02)
    muon.zero_grad()
    trained = copy.deepcopy(one.state_dict())
    muon.step()  # without gradients: there is nothing to do
    assert all(torch.equal(trained[name], value) for name, value in one.state_dict().items())


def test_the_distance_from_a_teacher_is_that_of_softened_probabilities():
    """Against the definition: the divergence at temperature 4, times 16. Its gradient is that of logits at a distance of
    a quarter, whatever is added to all of them."""
    torch.manual_seed(0)
    logits, aims = torch.randn(2, 6, 10, dtype=torch.float64) * 3
    logits.requires_grad_()
    ours, theirs = (F.softmax(values / 4, 1) for values in (logits, aims))
    expected = 16 * (theirs * (theirs / ours).log()).sum(1).mean()
    assert utils.distance(logits, aims).item() == pytest.approx(expected.item())
    assert utils.distance(logits, logits + 5).item() == pytest.approx(0, abs=1e-9)
    (gradient,) = torch.autograd.grad(utils.distance(logits, aims), logits)
    torch.testing.assert_close(gradient, 4 * (ours - theirs) / 6)


def test_a_distilled_network_comes_nearer_to_its_teacher_which_stays_as_it_is(root):
    teacher, test_loader = fit_tiny(root, 4)[0].train(), loaders(root)[1]
    before, aims = state(teacher), utils.predict(copy.deepcopy(teacher), test_loader)[0]
    teacher.train()

    def distance_after(**arguments):
        utils.seed_everything(1)
        model = Tiny()
        utils.fit(model, *loaders(root), 4, device="cpu", **arguments)
        return utils.distance(utils.predict(model, test_loader)[0], aims).item()

    assert distance_after(teacher=teacher) < 0.5 * distance_after()
    assert equal(before, state(teacher)) and teacher.training


def test_nine_tenths_of_a_distilled_step_are_the_teachers(root):
    """Recomputed; the teacher sees the images at full size, the network smaller ones."""
    torch.manual_seed(0)
    one, teacher, seen = Tiny(), Tiny().eval(), []
    one.layers[3].p, other = 0, copy.deepcopy(one)
    other.layers[3].p = 0
    teacher.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0].shape))
    batch = torch.randint(256, (20, 32, 32, 3), dtype=torch.uint8), torch.randint(10, (20,))
    loss, _ = utils.train(one, [batch], torch.optim.SGD(one.parameters(), 0.1), size=16, teacher=teacher)
    images = normalise(batch[0])
    with torch.autocast("cpu", utils.mixed_precision(torch.device("cpu")), enabled=bool(utils.mixed_precision(torch.device("cpu")))):
        logits = other(F.interpolate(images, (16, 16), mode="bilinear", antialias=True)).float()
        aims = teacher(images).float().detach()
    entropy = F.cross_entropy(logits, batch[1])
    (0.1 * entropy + 0.9 * utils.distance(logits, aims)).backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert loss == pytest.approx(entropy.item(), rel=1e-3) and seen[0] == (20, 3, 32, 32)
    assert all(torch.allclose(one.state_dict()[key], value, atol=1e-4) for key, value in other.state_dict().items())


def test_a_distilled_run_goes_on_with_the_same_teacher_only(root, tmp_path):
    torch.manual_seed(0)
    teacher, other = Tiny(), Tiny()
    whole, _ = fit_tiny(root, 2, teacher=teacher)
    checkpoint = tmp_path / "checkpoint.pt"
    with after_step(25, lambda model: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        fit_tiny(root, 2, teacher=teacher, checkpoint=checkpoint)
    for another in (None, other):
        with pytest.raises(ValueError, match="is of another run \\(teacher: [0-9a-f]{64} there, [0-9a-fNone]+ here\\)"):
            fit_tiny(root, 2, teacher=another, checkpoint=checkpoint)
    assert equal(state(fit_tiny(root, 2, teacher=copy.deepcopy(teacher), checkpoint=checkpoint)[0]), state(whole))


@pytest.mark.parametrize("vendor, flags, dtype", [
    ("GenuineIntel", "avx2", None), ("GenuineIntel", "avx512_bf16", None),
    ("GenuineIntel", "avx512_bf16 amx_bf16", torch.bfloat16),
    ("AuthenticAMD", "avx2", None), ("AuthenticAMD", "avx512_bf16", torch.bfloat16),
])
def test_a_cpu_trains_in_bf16_where_that_is_faster(vendor, flags, dtype, monkeypatch):
    monkeypatch.setattr(utils, "_cpuinfo", lambda: f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    assert utils.mixed_precision(torch.device("cpu")) is dtype
    assert utils.mixed_precision(torch.device("mps")) is None and utils.mixed_precision(torch.device("cuda")) is torch.float16


IMPOSSIBLE = {
    "network": ["ResNet", 3, None, []], "data": ["MNIST", None, {}], "epochs": [0, -1, 1.5, "3", True, None],
    "batch_size": [0, 2.0, "256"], "max_lr": [0, -0.1, float("nan"), float("inf"), "0.1", True],
    "weight_decay": [-1e-4, float("nan"), None], "augmentation": [-0.1, 1.1, "half"],
    "seed": [-1, 2**32, 1.0, None], "num_workers": [-1, 10_000, 1.0], "validation_size": [-1, 0.1],
    "device": ["gpu", "cuda:99999" if not torch.cuda.is_available() else "tpu", 3], "folder": [None, 3, __file__],
    "retrain": ["PublishedDilated", ["NetDilated"], None], "retrain_epochs": [0], "restart": [1, "yes", None],
    "checkpoint": [3, ["file"], True], "picture": [3, ["file"]], "sizes": [32, [], [7], [16.0], (16, 32)],
    "optimizer": ["Adam", None, []], "temperature": [0, -1.0, float("inf"), "1.2", None],
    "teacher": [3, __file__, True],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in IMPOSSIBLE.items() for value in values])
def test_impossible_settings_are_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError) as error:
        utils.check_settings(**{name: value})
    assert str(error.value).startswith(f"{name} is {value!r}: choose ") and "\n" not in str(error.value)


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="setting is 'epoch': choose from network, data, epochs"):
        utils.check_settings(epoch=3)


def test_possible_settings_pass():
    utils.check_settings(network="NetDilated", data="CIFAR-10", epochs=1, batch_size=1, max_lr=1, weight_decay=0,
                         augmentation=1, seed=2**32 - 1, num_workers=None, validation_size=0, device="cpu",
                         folder="weights", retrain=["PublishedDilated"], retrain_epochs=1, restart=True,
                         checkpoint="checkpoints/NetDilated.pt", temperature=1, picture=None, sizes=[32], optimizer="Muon",
                         teacher="weights/teacher")


@pytest.mark.parametrize("name", ["network", "data", "epochs", "batch_size", "max_lr", "weight_decay", "augmentation",
                                  "seed", "num_workers", "validation_size", "device", "folder", "checkpoint",
                                  "restart", "sizes", "optimizer", "teacher"])
def test_run_refuses_impossible_settings_before_it_loads_data(name, monkeypatch):
    monkeypatch.setattr(utils, "load_dataset", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(ValueError, match=f"^{name} is "):
        utils.run(**{"epochs": 1, name: IMPOSSIBLE[name][0]})


def test_run_refuses_a_checkpoint_that_its_weights_would_replace(tmp_path):
    with pytest.raises(ValueError, match="^checkpoint is .*: choose another path, this is where the weights are saved$"):
        utils.run("NetDilated", "built-in", 1, checkpoint=str(tmp_path / "NetDilated.pt"), folder=tmp_path)


def test_fit_refuses_impossible_settings(root):
    for arguments in ({"epochs": 0}, {"epochs": 1, "max_lr": 0}, {"epochs": 1, "weight_decay": -1},
                      {"epochs": 1, "device": "gpu"}, {"epochs": 1, "checkpoint": 3}, {"epochs": 1, "restart": 1},
                      {"epochs": 1, "sizes": 16}, {"epochs": 1, "optimizer": "Adam"}):
        with pytest.raises(ValueError, match=f"^{list(arguments)[-1]} is "):
            utils.fit(Tiny(), *loaders(root), **arguments)


def test_fit_refuses_a_loader_whose_order_it_could_not_restore(root):
    for loader in (loaders(root)[1], DataLoader(load_dataset("train", "built-in", root=root), 100, shuffle=True)):
        with pytest.raises(ValueError, match=r"train_loader is .*: choose one of make_loader\(dataset, shuffle=True\)"):
            utils.fit(Tiny(), loader, loaders(root)[1], 1)


def test_a_loss_that_is_not_finite_stops_the_training(root):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d+: the loss is (nan|inf) at learning rate .*: try a max_lr below 1e"):
        fit_tiny(root, max_lr=1e30)


def spoil(model):
    with torch.no_grad():
        model.layers[0].weight.fill_(float("nan"))


@pytest.mark.parametrize("after, text", [(43, "step 4: the loss is nan at learning rate"),
                                         (60, "after its last step: the loss is nan")])
def test_a_loss_that_turns_nan_keeps_the_last_good_checkpoint(after, text, root, tmp_path):
    """The weights are spoilt in epoch 3 (of 20 steps each), by its third or by its last step."""
    checkpoint = tmp_path / "checkpoint.pt"
    with after_step(after, spoil), pytest.raises(FloatingPointError, match=f"^epoch 3, {text}.*: try a max_lr below 0.1$"):
        fit_tiny(root, 4, max_lr=0.1, checkpoint=checkpoint)
    assert len(utils.load_history(checkpoint)["seconds"]) == 2
    assert equal(state(fit_tiny(root, 4, max_lr=0.1, checkpoint=checkpoint)[0]), state(fit_tiny(root, 4, max_lr=0.1)[0]))


def test_an_interrupt_keeps_no_spoilt_weights(root, tmp_path):
    """The interrupt comes behind the very step that spoils them, before a loss could tell."""
    def spoil_and_interrupt(model):
        spoil(model)
        os.kill(os.getpid(), signal.SIGINT)

    checkpoint = tmp_path / "checkpoint.pt"
    with after_step(43, spoil_and_interrupt), pytest.raises(KeyboardInterrupt):
        fit_tiny(root, 4, checkpoint=checkpoint)
    assert equal(state(fit_tiny(root, 4, checkpoint=checkpoint)[0]), state(fit_tiny(root, 4)[0]))


def test_too_little_gpu_memory_names_the_batch_size_and_a_smaller_one(root):
    """There is no small GPU to fill here, so the network itself raises what PyTorch would."""
    class Huge(Tiny):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="too small for batch_size 100: try 50"):
        utils.fit(Huge(), *loaders(root), 1, device="cpu")


def test_an_interrupt_at_any_step_is_gone_on_from_to_the_same_weights(root, tmp_path):
    """An epoch has 20 batches. The interrupts come in its first, middle and last one, and again in the next epoch."""
    whole, history = fit_tiny(root, 2)
    checkpoint = tmp_path / "checkpoint.pt"
    for stop in (1, 10, 20, 21, 35):
        with after_step(stop, lambda model: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
            fit_tiny(root, 2, checkpoint=checkpoint)
    resumed, resumed_history = fit_tiny(root, 2, checkpoint=checkpoint)
    assert equal(state(whole), state(resumed))
    assert history["train_loss"] == resumed_history["train_loss"] and history["test_loss"] == resumed_history["test_loss"]


def test_a_run_with_muon_goes_on_to_the_same_weights(root, tmp_path):
    settings = {"optimizer": "Muon", "max_lr": 0.1}
    whole, history = fit_tiny(root, 2, **settings)
    with after_step(27, lambda model: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        fit_tiny(root, 2, **settings, checkpoint=tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="optimizer: Muon there, SGD here"):
        fit_tiny(root, 2, max_lr=0.1, optimizer="SGD", checkpoint=tmp_path / "checkpoint.pt")
    resumed = fit_tiny(root, 2, **settings, checkpoint=tmp_path / "checkpoint.pt")[0]
    assert equal(state(whole), state(resumed)) and history["test_accuracy"][-1] > 20


def average(states):
    """Return the moving average of tiny runs of 40 steps; what counts batches is left out."""
    mean = {key: value for key, value in states[0].items() if value.is_floating_point()}
    for other in states[1:]:
        mean = {key: value.lerp(other[key], 20 / 40) for key, value in mean.items()}
    return mean


def test_the_weights_are_averaged_in_the_second_half(root):
    """Recomputed from the weights after every step."""
    after = []
    with after_step(None, lambda model: after.append(state(model))):
        model, history = fit_tiny(root, 2)
    for key, value in average(after[20:]).items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert utils.test(model, loaders(root)[1]) == (history["test_loss"][-1], history["test_accuracy"][-1])


def test_behind_an_interrupt_the_network_has_the_averaged_weights(root, tmp_path):
    """So it is as good as the history says, and the run still goes on with the weights as they were."""
    after = []

    def look(model):
        after.append(state(model))
        if len(after) == 30:
            os.kill(os.getpid(), signal.SIGINT)

    utils.seed_everything(0)
    model = Tiny()
    with after_step(None, look), pytest.raises(KeyboardInterrupt):
        utils.fit(model, *loaders(root), 2, device="cpu", checkpoint=tmp_path / "checkpoint.pt")
    for key, value in average(after[20:]).items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    utils.fit(model, *loaders(root), 2, device="cpu", checkpoint=tmp_path / "checkpoint.pt")
    assert equal(state(model), state(fit_tiny(root, 2)[0]))


def test_a_checkpoint_of_another_run_is_refused_by_name(root, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    fit_tiny(root, 1, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="is of another run .*max_lr: 0.3 there, 0.2 here"):
        fit_tiny(root, 1, max_lr=0.2, checkpoint=checkpoint)


def test_a_checkpoint_of_other_layers_or_augmentations_is_refused_with_the_first_difference(root, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    fit_tiny(root, 1, checkpoint=checkpoint)
    written, wider = checkpoint.read_bytes(), Tiny()
    wider.layers[0].stride = (1, 1)  # the same parameters, another network
    with pytest.raises(ValueError, match=r"layers: \(0\): Conv2d.*stride=\(2, 2\).* there, .*stride=\(1, 1\).* here"):
        utils.fit(wider, *loaders(root), 1, device="cpu", checkpoint=checkpoint)
    train_set = load_dataset("train", "built-in", transform=train_transform(0.25), root=root)
    with pytest.raises(ValueError, match=r"augmentations: ShiftScaleRotate\(p=0.5.* there, ShiftScaleRotate\(p=0.25"):
        utils.fit(Tiny(), make_loader(train_set, 100, True, 0), loaders(root)[1], 1, device="cpu", checkpoint=checkpoint)
    assert checkpoint.read_bytes() == written


def test_a_finished_run_shows_its_epochs_again(root, tmp_path, capsys):
    fit_tiny(root, 2, checkpoint=tmp_path / "checkpoint.pt")
    first = capsys.readouterr().out
    fit_tiny(root, 2, checkpoint=tmp_path / "checkpoint.pt")
    again = capsys.readouterr().out.splitlines()
    assert again[0].endswith("finished before, loaded") and again[1:] == first.splitlines()[1:]


def test_restart_starts_afresh(root, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    fit_tiny(root, 1, checkpoint=checkpoint)
    _, history = fit_tiny(root, 2, checkpoint=checkpoint, restart=True)
    assert len(history["seconds"]) == 2 and utils.load_history(checkpoint) == history


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps(print, protocol=2)], ids=["empty", "text", "code"])
def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(content, root, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged or no checkpoint"):
        fit_tiny(root, 1, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content


def test_run_is_the_whole_experiment(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    monkeypatch.setitem(utils.build_network.__globals__["NETWORKS"], "Tiny", lambda classes: Tiny())
    model, facts = utils.run("Tiny", "built-in", 2, 100, 0.1, num_workers=0, validation_size=400, folder=tmp_path)
    assert facts["settings"] == {"epochs": 2, "batch_size": 100, "max_lr": 0.1, "weight_decay": 5e-4, "augmentation": 0.5,
                                 "sizes": None, "optimizer": "Muon", "teacher": None, "seed": 0, "validation_size": 400}
    validation = make_loader(load_dataset("validation", "built-in", 400), 400)
    assert (facts["test_loss"], facts["test_accuracy"]) == pytest.approx(utils.test(model, validation))
    assert facts["temperature"] == utils.fit_temperature(*utils.predict(model, validation))
    assert facts["flip_accuracy"] == utils.score(*utils.predict(model, validation, flip=True))[1]
    assert utils.load_facts("Tiny", tmp_path) == facts
    assert "temperature" not in utils.run("Tiny", "built-in", 1, 100, 0.1, num_workers=0, folder=tmp_path)[1]


def test_a_run_takes_its_teacher_from_a_folder_and_only_one_of_the_same_data(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_ROOT", str(root))
    for name in ("Tiny", "NetDilated"):
        monkeypatch.setitem(utils.build_network.__globals__["NETWORKS"], name, lambda classes: Tiny())
    settings = {"data": "built-in", "epochs": 1, "batch_size": 100, "num_workers": 0}
    with pytest.raises(FileNotFoundError, match="teacher.NetDilated.pt is not there: train NetDilated first"):
        utils.run("Tiny", **settings, folder=tmp_path, teacher=tmp_path / "teacher")
    history = {"seconds": [1.0], "test_accuracy": [10.0]}
    teacher = type("NetDilated", (Tiny,), {})()
    utils.save(teacher, history, {}, load_dataset("test", "built-in", root=root).title, tmp_path / "teacher")
    given = []
    monkeypatch.setattr(utils, "fit", lambda *arguments, fit=utils.fit: given.append(arguments[-1]) or fit(*arguments))
    facts = utils.run("Tiny", **settings, folder=tmp_path, teacher=tmp_path / "teacher")[1]
    assert facts["settings"]["teacher"] == str(tmp_path / "teacher") and equal(state(given[0]), state(teacher))
    assert "| Tiny, distilled |" in utils.comparison_table([facts])
    utils.save(teacher, history, {}, "CIFAR-10", tmp_path / "other")
    with pytest.raises(ValueError, match="^teacher is .*other'\\)?: choose None, or the folder of one trained on built-in "
                                         "shapes, NOT CIFAR-10, not on CIFAR-10$"):
        utils.run("Tiny", **settings, folder=tmp_path, teacher=tmp_path / "other")


# ---------------------------------------------------------------- the rules

def holds(rows, rule):
    (result,) = [row for row in rows if row[0].startswith(rule)]
    return result[2]


def test_ours_keeps_every_rule():
    assert all(row[2] for row in utils.check_rules(NetDilated(), train_transform()))


def broken(change):
    model = NetDilated()
    change(model)
    return model


class Pooled(NetDilated):
    def forward(self, x):
        return super().forward(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2))


def shrink_kernels(model):
    for block in (model.C2, model.C3, model.C4):
        for unit in block:
            unit[0] = conv(unit[0][0].in_channels, unit[0][1].out_channels, 1, unit[0][1].stride)


def no_pairs(model):
    for block in (model.C2, model.C3, model.C4):
        for unit in block:
            unit[0] = conv(unit[0][0].in_channels, unit[0][1].out_channels, 3, unit[0][1].stride)


def set_head(*layers):
    return lambda model: setattr(model, "O", nn.Sequential(*layers))


BROKEN_NETWORKS = {
    "four blocks": lambda: broken(lambda model: setattr(model.C3[2][0][1], "stride", (1, 1))),
    "three convolutions": lambda: broken(lambda model: model.C2.insert(1, Unit(conv(96, 96), 96))),
    "stride 2": lambda: broken(lambda model: setattr(model.C4[2][0][1], "stride", (1, 1))),
    "no pooling": Pooled,
    "receptive field": lambda: broken(shrink_kernels),
    "a depthwise-separable": lambda: broken(no_pairs),
    "a dilated": lambda: broken(lambda model: setattr(model.C3[1][0][1], "dilation", (1, 1))
                                or setattr(model.C3[1][0][1], "padding", (1, 1))),
    "global average": lambda: broken(set_head(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(176, 10))),
    "then at most": lambda: broken(set_head(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(176, 9), nn.Linear(9, 10))),
    "fewer than": lambda: broken(lambda model: setattr(model, "more", nn.Parameter(torch.zeros(20_000)))),
}


@pytest.mark.parametrize("rule", BROKEN_NETWORKS)
def test_a_network_that_breaks_a_rule_fails_its_row(rule):
    assert not holds(utils.check_rules(BROKEN_NETWORKS[rule](), train_transform()), rule)


def test_a_network_without_global_pooling_fails_its_row():
    rows = utils.check_rules(broken(set_head(nn.Flatten(), nn.Linear(2816, 10))), train_transform())
    assert not holds(rows, "global average")


def replace(name, *steps):
    kept = [step for step in train_transform().transforms if type(step).__name__ != name]
    return A.Compose([*kept[:2], *steps, *kept[2:]])


HOLE = {"num_holes_range": (1, 1), "hole_height_range": (16, 16), "hole_width_range": (16, 16), "fill": utils.FILL}
BROKEN_TRANSFORMS = {
    "HorizontalFlip": [replace("HorizontalFlip"), replace("HorizontalFlip", A.HorizontalFlip(p=0))],
    "ShiftScaleRotate": [replace("ShiftScaleRotate"), replace("ShiftScaleRotate", A.Affine(p=0.5))],
    "CoarseDropout": [replace("CoarseDropout"),
                      *(replace("CoarseDropout", A.CoarseDropout(**{**HOLE, **change})) for change in (
                          {"num_holes_range": (2, 2)}, {"hole_height_range": (8, 8)}, {"hole_width_range": (20, 20)}))],
    "... filled": [replace("CoarseDropout", A.CoarseDropout(**{**HOLE, "fill": fill}))
                   for fill in ((0.4914, 0.4822, 0.4465), 0, 128)],
    "Resize": [replace("Resize"), replace("Resize", A.Resize(28, 28))],
}


@pytest.mark.parametrize("rule, transform", [(rule, one) for rule, several in BROKEN_TRANSFORMS.items() for one in several])
def test_a_transform_that_breaks_a_rule_fails_its_row(rule, transform):
    assert not holds(utils.check_rules(NetDilated(), transform), rule)


def test_a_plain_transform_fails_all_rows_but_resize():
    rows = utils.check_rules(NetDilated(), plain_transform())[-5:]
    assert [row[2] for row in rows] == [False] * 4 + [True]


def test_broken_rules_stand_out_in_the_table():
    text = utils.format_rules(utils.check_rules(Pooled(), train_transform()))
    assert sum("BROKEN" in line for line in text.splitlines()) == 1
    assert "avg_pool2d" in text


# ---------------------------------------------------------------- saving

HISTORY = {"train_loss": [2.0, 1.0], "train_accuracy": [20.0, 60.0], "test_loss": [2.1, 0.9],
           "test_accuracy": [21.0, 65.0], "seconds": [3.0, 4.0]}


def test_saved_weights_and_facts_come_back(tmp_path):
    torch.manual_seed(0)
    model = NetDilated()
    facts = utils.save(model, HISTORY, {"epochs": 2}, "nothing", tmp_path / "new")
    loaded, loaded_facts = utils.load("NetDilated", tmp_path / "new")
    assert equal(state(model), state(loaded)) and not loaded.training
    assert loaded_facts == json.loads(json.dumps(facts))
    assert (facts["test_accuracy"], facts["train_loss"], facts["seconds"]) == (65.0, 1.0, 7.0)
    assert (facts["parameters"], facts["network"]) == (utils.count_parameters(model), "NetDilated")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["NetDilated.json", "NetDilated.pt"]


class Code:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_would_run_code_are_refused(root, tmp_path):
    trap = tmp_path / "trap"
    torch.save({"recipe": {}, "history": {}, "random": Code(trap)}, tmp_path / "checkpoint.pt")
    torch.save({"weight": Code(trap)}, tmp_path / "NetDilated.pt")
    with pytest.raises(ValueError, match="checkpoint.pt is damaged or no checkpoint of this program .*[Ww]eights.only"):
        fit_tiny(root, 1, checkpoint=tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="NetDilated.pt is damaged or holds another network than NetDilated .*[Ww]eights.only"):
        utils.load("NetDilated", tmp_path)
    assert not trap.exists()
    torch.load(tmp_path / "NetDilated.pt", weights_only=False)
    assert trap.exists()  # it was a trap


@pytest.mark.parametrize("content", [b"", b"not a state dict", pickle.dumps(print, protocol=2)], ids=["empty", "text", "code"])
def test_a_foreign_or_damaged_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "NetDilated.pt").write_bytes(content)
    with pytest.raises(ValueError, match="NetDilated.pt is damaged or holds another network") as error:
        utils.load("NetDilated", tmp_path)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "NetDilated.pt")
    with pytest.raises(ValueError, match="holds another network than NetDilated"):
        utils.load("NetDilated", tmp_path)


def test_a_run_saved_again_keeps_its_facts_unless_a_file_is_harmed(tmp_path, monkeypatch):
    model = NetDilated()
    facts = utils.save(model, HISTORY, {"epochs": 2}, "nothing", tmp_path)
    monkeypatch.setattr(utils, "hardware", lambda device: "another machine")
    assert utils.save(model, HISTORY, {"epochs": 2}, "nothing", tmp_path) == facts
    for name, content in (("NetDilated.pt", b"damaged"), ("NetDilated.json", b"{"), ("NetDilated.json", b"{}")):
        (tmp_path / name).write_bytes(content)
        assert utils.save(model, HISTORY, {"epochs": 2}, "nothing", tmp_path)["hardware"] == "another machine"
        assert equal(state(model), state(utils.load("NetDilated", tmp_path)[0]))
    other = {**HISTORY, "seconds": [3.0, 5.0]}
    assert utils.save(model, other, {"epochs": 2}, "nothing", tmp_path)["history"] == other


def test_facts_are_added_and_kept_when_the_run_is_saved_again(tmp_path):
    model = NetDilated()
    facts = utils.add_facts(utils.save(model, HISTORY, {"epochs": 2}, "nothing", tmp_path), tmp_path, calibration_error=1.5)
    assert facts["calibration_error"] == 1.5 and facts["test_accuracy"] == 65.0
    assert utils.load("NetDilated", tmp_path)[1] == facts == utils.save(model, HISTORY, {"epochs": 2}, "nothing", tmp_path)


def test_weights_and_facts_of_different_runs_are_told_apart(tmp_path):
    for folder in ("one", "other"):
        utils.save(NetDilated(), HISTORY, {"epochs": 2}, "nothing", tmp_path / folder)
    (tmp_path / "other" / "NetDilated.pt").replace(tmp_path / "one" / "NetDilated.pt")  # as if killed in between
    with pytest.raises(ValueError, match="NetDilated.pt is not the file that NetDilated.json tells of: save both again"):
        utils.load("NetDilated", tmp_path / "one")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="NetDilated.pt is not there: train NetDilated first"):
        utils.load("NetDilated", tmp_path)


def test_nothing_is_overwritten_before_its_replacement_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(descriptor):
        assert (tmp_path / "figure.png.new").read_bytes() == b"new" and path.read_bytes() == b"old"
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(utils.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full: '.*figure.png'"):
        utils._replace(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- the figures

def test_figures_are_written_and_say_whose_data_they_show(root, tmp_path):
    train_set, test_set = (load_dataset(split, "built-in", root=root) for split in ("train", "test"))
    logits = F.one_hot(torch.tensor(test_set.targets).roll(1), 10).float()
    figures = {
        "patch": utils.plot_augmentations(train_set, tmp_path / "img" / "patch.png"),
        "loss": utils.plot_loss(HISTORY, tmp_path / "img" / "loss.png", test_set.title),
        "accuracy": utils.plot_accuracy(HISTORY, tmp_path / "img" / "accuracy.png", test_set.title),
        "wrong": utils.plot_misclassified(test_set, logits, tmp_path / "img" / "wrong.png"),
        "confusion": utils.plot_confusion(test_set, logits, tmp_path / "img" / "confusion.png"),
    }
    for name, figure in figures.items():
        titles = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
        assert any("NOT CIFAR-10" in title for title in titles)
        assert np.asarray(Image.open(tmp_path / "img" / f"{name}.png").convert("L")).std() > 5  # not blank
        assert Image.open(tmp_path / "img" / f"{name}.png").width >= 800
        shown, about = figure._repr_mimebundle_()
        assert shown["image/png"] == (tmp_path / "img" / f"{name}.png").read_bytes()
        assert "NOT CIFAR-10" in about["image/png"]["alt"]


def test_misclassified_shows_prediction_confidence_and_truth(root, tmp_path):
    test_set = load_dataset("test", "built-in", root=root)
    labels = torch.tensor(test_set.targets)
    logits = 9.0 * F.one_hot(labels, 10)
    logits[7] = torch.eye(10)[(labels[7] + 1) % 10] * 2
    figure = utils.plot_misclassified(test_set, logits, tmp_path / "wrong.png")
    first, second = figure.axes[:2]
    probability = logits[7].softmax(0).max()
    assert first.get_title() == f"{test_set.classes[(labels[7] + 1) % 10]} {probability:.0%}"
    assert first.texts[0].get_text() == f"is {test_set.classes[labels[7]]}"
    assert (first.images[0].get_array() == test_set.data[7]).all()
    assert not second.images and "1 of 500" in figure.get_suptitle()


def test_accuracy_by_class(root):
    test_set = load_dataset("test", "built-in", root=root)
    labels = torch.tensor(test_set.targets)
    logits = F.one_hot(torch.where(labels == 4, 5, labels), 10).float()
    accuracies = utils.accuracy_by_class(test_set, logits)
    assert accuracies == {name: 0.0 if name == test_set.classes[4] else 100.0 for name in test_set.classes}


def test_the_most_confident_mistakes_come_first(root, tmp_path):
    test_set = load_dataset("test", "built-in", root=root)
    labels = torch.tensor(test_set.targets)
    logits = 9.0 * F.one_hot(labels, 10)
    for index, height in ((7, 2), (8, 5), (9, 3)):
        logits[index] = torch.eye(10)[(labels[index] + 1) % 10] * height
    figure = utils.plot_misclassified(test_set, logits, tmp_path / "wrong.png", most_confident=True)
    for axis, index in zip(figure.axes, (8, 9, 7)):
        assert (axis.images[0].get_array() == test_set.data[index]).all()


def confident(dataset, confidence, right):
    """Logits whose likeliest class has that probability, and is the true one for the first `right` of the images."""
    labels = torch.tensor(dataset.targets)
    labels[right:] = (labels[right:] + 1) % 10
    return torch.where(F.one_hot(labels, 10).bool(), confidence, (1 - confidence) / 9).log()


def test_calibration_error_is_the_distance_between_confidence_and_accuracy(root, tmp_path):
    test_set = load_dataset("test", "built-in", root=root)
    assert utils.calibration_error(test_set, confident(test_set, 0.9, 450)) == pytest.approx(0, abs=1e-3)
    assert utils.calibration_error(test_set, confident(test_set, 0.9, 300)) == pytest.approx(30, abs=1e-3)


def test_the_reliability_diagram_shows_the_logits_as_they_are_and_at_a_temperature(root, tmp_path):
    test_set = load_dataset("test", "built-in", root=root)
    logits = confident(test_set, 0.9, 300)
    divisor = np.log(9 * 9) / np.log(1.5 * 9)  # nine other classes share what is left: 10 %, and then 40 %
    _, *curves = utils.plot_reliability(test_set, logits, tmp_path / "reliability.png", divisor).axes[0].lines
    assert [list(curve.get_ydata()) for curve in curves] == [pytest.approx([60])] * 2
    assert [list(curve.get_xdata()) for curve in curves] == [pytest.approx([90]), pytest.approx([60])]
    assert "error 30.0 %" in curves[0].get_label() and "error 0.0 %" in curves[1].get_label()
    assert (tmp_path / "reliability.png").exists()
    assert len(utils.plot_reliability(test_set, logits, tmp_path / "plain.png").axes[0].lines) == 2  # with the diagonal


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_by_which_the_logits_were_multiplied(temperature):
    """Labels drawn from the probabilities themselves fit these best."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50_000, 10, generator=generator)
    labels = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    assert utils.fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_corruptions_harm_more_with_their_strength(root):
    image = load_dataset("test", "built-in", root=root).data[0]
    for name, transforms in utils.CORRUPTIONS.items():
        harm = [np.abs(A.Compose([step], seed=0)(image=image)["image"].astype(float) - image).mean() for step in transforms]
        assert len(harm) == 5 and 0 < harm[0] and (np.diff(harm) > 0).all(), name


def test_accuracy_under_corruptions_is_of_corrupted_images(root, tmp_path):
    class Brightness(nn.Module):
        """Says class 1 of every image that is clearly brighter than the clean ones are on average, else class 0."""

        def __init__(self, dataset):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.limit = normalise(dataset.data).mean()

        def forward(self, x):
            bright = (x.mean((1, 2, 3)) > self.limit + 0.5).long()
            return F.one_hot(bright, 10).float()

    test_set = load_dataset("test", "built-in", root=root)
    clean = test_set.transform
    accuracies = utils.accuracy_under_corruptions(Brightness(test_set), test_set, 200)
    assert list(accuracies) == list(utils.CORRUPTIONS) and test_set.transform is clean
    assert len({values[0] for values in accuracies.values()}) == 1 and all(len(values) == 6 for values in accuracies.values())
    assert accuracies["brightness"][5] != accuracies["brightness"][0]
    figure = utils.plot_corruptions(accuracies, tmp_path / "corruptions.png", test_set.title)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert drawn == accuracies and "NOT CIFAR-10" in figure.axes[0].get_title()


def test_the_figure_of_the_receptive_field_outlines_what_the_gradients_reach(root, tmp_path):
    torch.manual_seed(0)
    figure = utils.plot_receptive_field(NetDilated(), load_dataset("test", "built-in", root=root), tmp_path / "field.png", 1)
    sides = [axis.patches[0].get_width() for axis in figure.axes]
    assert sides == [3, 4, 5, 7, 9, 11, 15, 23, 27, 35, 43, 51] and (tmp_path / "field.png").exists()
    for axis, side in zip(figure.axes, sides):
        reached = axis.images[0].get_array() > 0
        assert reached.any(0).sum() == reached.any(1).sum() == side
        columns = np.flatnonzero(reached.any(0))
        assert axis.patches[0].get_x() == columns[0] - 0.5


def test_the_figure_of_the_kernels_shows_their_taps(tmp_path):
    network = NetDilated()
    figure = utils.plot_kernels({"plain": network.C3[0][0][1], "dilated": network.C3[1][0][1]}, tmp_path / "kernels.png")
    taps = [np.argwhere(axis.images[0].get_array()).tolist() for axis in figure.axes]
    assert taps == [[[row, column] for row in places for column in places] for places in ((3, 4, 5), (2, 4, 6))]
