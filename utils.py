"""Training, testing, the rules, saving and the figures."""
import contextlib
import copy
import ctypes
import hashlib
import io
import itertools
import json
import os
import platform
import random
import signal
import threading
import time
import zipfile
from collections import Counter
from datetime import date
from pathlib import Path

import albumentations as A
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix
from tqdm.auto import tqdm

from dataset import (CLASSES, CORES, DATASETS, FILL, is_number, load_dataset, make_loader, normalise, require,
                     test_transform, train_transform)
from model import (NETWORKS, build_network, count_macs, count_parameters, gradient_of_the_middle,
                   measure_receptive_field, receptive_field, trace)

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt
    fcntl = None

COLOURS = BLUE, ORANGE, *_ = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"  # Okabe and Ito: safe for all eyes
CORRUPTIONS = {  # of test images, at five strengths
    "noise": [A.GaussNoise((strength, strength), p=1) for strength in (0.02, 0.04, 0.06, 0.08, 0.1)],
    "blur": [A.GaussianBlur(0, (sigma, sigma), p=1) for sigma in (0.4, 0.6, 0.8, 1, 1.2)],
    "JPEG": [A.ImageCompression("jpeg", (quality, quality), p=1) for quality in (80, 65, 50, 35, 20)],
    "brightness": [A.RandomBrightnessContrast((more, more), 0, p=1) for more in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "contrast": [A.RandomBrightnessContrast(0, (-less, -less), p=1) for less in (0.2, 0.35, 0.5, 0.65, 0.8)],
}
PARAMETER_LIMIT, RECEPTIVE_FIELD_LIMIT = 200_000, 44  # the assignment's "fewer than" and "above"


# ---------------------------------------------------------------- settings and machine

def check_settings(**settings):
    """Refuse impossible settings before any work begins: a ValueError names the setting, its value and what is
    allowed. (What depends on the data, as the largest batch size, is checked with them.)"""
    for name, value in settings.items():
        require("setting", name, f"from {', '.join(ALLOWED)}", name in ALLOWED)
        allowed, holds = ALLOWED[name]
        require(name, value, allowed, holds(value))


def _whole(low, high=float("inf")):
    return lambda value: type(value) is int and low <= value <= high


ALLOWED = {
    "network": (f"one of {', '.join(NETWORKS)}", lambda value: value in list(NETWORKS)),
    "data": (f"one of {', '.join(DATASETS)}", lambda value: value in list(DATASETS)),
    "epochs": ("a whole number, 1 or more", _whole(1)),
    "batch_size": ("a whole number, 1 or more", _whole(1)),
    "optimizer": ("SGD or Muon", lambda value: value in ("SGD", "Muon")),
    "max_lr": ("a number above 0", lambda value: is_number(value) and value > 0),
    "weight_decay": ("a number, 0 or more", lambda value: is_number(value) and value >= 0),
    "augmentation": ("a probability, 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
    "sizes": ("None or a list of sizes in pixels, each 8 or more",
              lambda value: value is None or (isinstance(value, list) and value and all(map(_whole(8), value)))),
    "teacher": ("None or the path of a folder, that of the saved teacher",
                lambda value: value is None or isinstance(value, (str, Path)) and not Path(value).is_file()),
    "seed": ("a whole number, 0 to 4294967295", _whole(0, 2**32 - 1)),
    "num_workers": (f"None, or 0 to {CORES}, the number of cores",
                    lambda value: value is None or _whole(0, CORES)(value)),
    "validation_size": ("a whole number, 0 or more", _whole(0)),
    "device": ("None or a device of this machine, such as cpu",
               lambda value: value is None or str(value).split(":")[0] in _devices()),
    "folder": ("the path of a folder", lambda value: isinstance(value, (str, Path)) and not Path(value).is_file()),
    "checkpoint": ("None or the path of a file", lambda value: value is None or isinstance(value, (str, Path))),
    "temperature": ("a number above 0", lambda value: is_number(value) and value > 0),
    "picture": ("None or the path of a picture", lambda value: value is None or isinstance(value, (str, Path))),
    "restart": ("True or False", lambda value: isinstance(value, bool)),
    "retrain": (f"a list of published networks, of {', '.join(list(NETWORKS)[1:])}",
                lambda value: isinstance(value, list) and all(name in list(NETWORKS)[1:] for name in value)),
    "retrain_epochs": ("a whole number, 1 or more", _whole(1)),
}


def seed_everything(seed):
    """Seed the random generators of Python, NumPy and PyTorch; a ValueError names a seed that NumPy can't take."""
    check_settings(seed=seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name=None):
    """Return the named torch.device, or the best one here: CUDA, then MPS, then CPU. A ValueError names others."""
    check_settings(device=name)
    name = _devices()[0] if name is None else str(name)
    if name == "cpu" and platform.libc_ver()[0] == "glibc":
        # glibc hands every large activation back to the system, which clears its pages anew for the next batch.
        # Keeping them makes the training step 1.4 (NetDilated) to 2 (PublishedDepthwise) times as fast.
        mallopt, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return torch.device(name)


def _devices():
    """Return the kinds of device that this machine has, the best first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind in there if there[kind]]


def mixed_precision(device):
    """Return the 16-bit type to train in on this device, or None where fp32 is the better choice.

    CUDA: fp16, which every GPU has, with scaled gradients. CPU: bf16 where it pays, with Intel's AMX or AMD's
    AVX512-BF16; with AVX512-BF16 alone, Intel's processors are slower in it than in fp32.
    """
    if device.type == "cuda":
        return torch.float16
    cpu = _cpuinfo() if device.type == "cpu" else ""
    return torch.bfloat16 if "amx_bf16" in cpu or ("avx512_bf16" in cpu and "AuthenticAMD" in cpu) else None


def hardware(device):
    """Return the name of the device, for the facts."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _cpuinfo():
    """Return what Linux says of its processors, or nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def versions():
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "albumentations": A.__version__, "numpy": np.__version__}


# ---------------------------------------------------------------- training

def train(model, loader, optimizer, scheduler=None, scaler=None, on_step=None, begun=None, size=None, teacher=None):
    """Train one epoch on the batches of a `make_loader` and return its (loss, accuracy): means over the samples, accuracy
    in percent.

    The forward pass runs in `mixed_precision` of the model's device. `scheduler` steps after each batch;
    `on_step()` is called then as well. `begun`, a Counter, holds the sums of the batches so far: those that it counts
    when the epoch begins are skipped. The images are resized to `size` x `size` pixels, if there is one. With a
    `teacher`, a trained network, which sees them before that, nine tenths of what is minimised is the `distance` to its
    logits; the loss that is returned is the cross entropy all the same.

    Raises:
        FloatingPointError: the loss is no longer finite. RuntimeError: the GPU's memory is too small for the batch.
    """
    device = next(model.parameters()).device
    dtype = mixed_precision(device)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    model.train()
    begun = Counter() if begun is None else begun
    for images, labels in itertools.islice(loader, begun["batches"], None):
        try:
            images, labels = normalise(images.to(device)), labels.to(device)
            if teacher:
                with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                    aims = teacher(images).float()
            if size and size != images.shape[-1]:
                images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            scaler.scale(0.1 * loss + 0.9 * distance(logits.float(), aims) if teacher else loss).backward()
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"the memory of {hardware(device)} is too small for batch_size {len(labels)}: "
                               f"try {max(1, len(labels) // 2)}") from error
        if not loss.isfinite():  # scaler.step waits for the GPU in any case
            step, rate = begun["batches"] + 1, optimizer.param_groups[0]["lr"]
            raise FloatingPointError(f"step {step}: the loss is {loss.item()} at learning rate {rate:.2g}")
        scaler.step(optimizer)
        scaler.update()
        if scheduler:
            scheduler.step()
        begun.update(batches=1, images=len(labels), loss=loss.item() * len(labels),
                     correct=(logits.argmax(1) == labels).sum().item())
        if on_step:
            on_step()
    return begun["loss"] / begun["images"], 100 * begun["correct"] / begun["images"]


def distance(logits, aims, temperature=4):
    """Return how far (N, classes) logits are from those of a teacher: the mean Kullback-Leibler divergence of their
    probabilities at that temperature, times its square. Hinton et al., Distilling the knowledge in a neural network,
    https://arxiv.org/abs/1503.02531."""
    logits, aims = (F.log_softmax(values / temperature, 1) for values in (logits, aims))
    return temperature**2 * F.kl_div(logits, aims, reduction="batchmean", log_target=True)


@torch.no_grad()
def predict(model, loader, flip=False):
    """Return the (N, classes) logits and the (N,) labels of a whole `make_loader`, on the CPU, computed in fp32. With
    `flip` (test-time augmentation) the logits are the means of those of the image and of its mirror image."""
    device = next(model.parameters()).device
    model.eval()
    batches = []
    for images, labels in loader:
        images = normalise(images.to(device))
        logits = (model(images) + model(images.flip(3))) / 2 if flip else model(images)
        batches.append((logits.cpu(), labels))
    logits, labels = zip(*batches)
    return torch.cat(logits), torch.cat(labels)


def test(model, loader):
    """Return the (loss, accuracy) on a loader: means over the samples, accuracy in percent, computed in fp32."""
    return score(*predict(model, loader))


def score(logits, labels):
    """Return the mean cross entropy and the accuracy in percent of (N, classes) logits."""
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).float().mean().item()


def make_optimizer(model, max_lr, weight_decay, name="SGD"):
    """Return SGD with Nesterov momentum 0.9, or `Muon`; weights decay, but not norms and biases."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    mixing = [weight for weight in weights[:-1] if weight.ndim == 4 and weight.shape[1] > 1] if name == "Muon" else []
    decayed = [weight for weight in weights if id(weight) not in map(id, mixing)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups += [{"params": mixing, "weight_decay": 0.0, "orthogonal": True}] if mixing else []
    return OPTIMIZERS[name](groups, lr=max_lr, momentum=0.9, nesterov=True)


class Muon(torch.optim.SGD):
    """SGD whose steps for the parameters of "orthogonal" groups are orthogonal matrices.

    Such a parameter is the weight of a convolution that mixes channels and has a batch norm behind it, which makes its
    size meaningless: its norm is kept at the root of its outputs. Each step is its momentum, made orthogonal, times
    `ratio` of the learning rate, so that all directions change equally fast, those of small gradients too. Jordan et al.,
    https://kellerjordan.github.io/posts/muon/ (`torch.optim.Muon` takes no convolutions).
    """

    ratio = 0.1

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"] if group.get("orthogonal") else []:
                if parameter.grad is None:  # as SGD does
                    continue
                state, momentum = self.state[parameter], group["momentum"]
                state["average"] = momentum * state.get("average", 0) + parameter.grad
                step = orthogonalise((parameter.grad + momentum * state["average"]).flatten(1)).view_as(parameter)
                parameter.mul_(len(parameter)**0.5 / parameter.norm()).sub_(step, alpha=self.ratio * group["lr"])
                parameter.grad = None  # SGD passes over it
        return super().step(closure)


def orthogonalise(matrix):
    """Return the matrix with its singular values all brought near 1 (0.6 to 1.3, those that are not tiny): five steps of
    Jordan's Newton-Schulz iteration, https://kellerjordan.github.io/posts/muon/."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.775 * square) @ matrix
    return matrix


OPTIMIZERS = {"SGD": torch.optim.SGD, "Muon": Muon}


ROW = "{:5d}  {:10.4f}  {:11.2f}  {:9.4f}  {:10.2f}  {:7.1f}"


def fit(model, train_loader, test_loader, epochs, max_lr=0.3, weight_decay=5e-4, device=None, checkpoint=None,
        restart=False, sizes=None, optimizer="Muon", teacher=None):
    """Train with a one-cycle schedule and return the history: a list for each column, an entry for each epoch. The
    loaders are those of `make_loader`, the first one shuffled.

    Smith and Topin, Super-convergence, https://arxiv.org/abs/1708.07120: the learning rate rises to `max_lr` over
    the first quarter of the steps and falls to nearly zero. In the second half an exponential moving average of the
    weights is kept, over about a twentieth of the run: from then on it is what is tested, and what `model` holds in the
    end or behind an interrupt. The test set is only looked at, never chosen on: the last epoch is the result.

    `optimizer` is "SGD" or "Muon"; see `Muon`. `teacher` is None, or a trained network to learn from; see `train`.

    `sizes` are those of the training images in pixels, each for an equal share of the epochs, and only the last ones if
    there are fewer epochs than sizes: a run is faster if it begins with small images and ends with those of full size.
    Tests are always at full size. Tan and Le, EfficientNetV2, https://arxiv.org/abs/2104.00298.

    With a `checkpoint` path, the whole state is written there after every epoch and at an interrupt, which waits for
    the end of a step (a second one does not). A run that was interrupted or killed goes on from it, to the same weights
    as if nothing had happened, and a finished one is loaded; `restart` starts afresh. After an interrupt `load_history`
    has the epochs so far.

    Raises:
        ValueError: a setting is impossible, or the checkpoint is damaged or of another run.
        RuntimeError: another process is training with this checkpoint, or the GPU's memory is too small.
        FloatingPointError: the loss is no longer finite.
    """
    check_settings(epochs=epochs, max_lr=max_lr, weight_decay=weight_decay, checkpoint=checkpoint, restart=restart,
                   sizes=sizes, optimizer=optimizer)
    require("train_loader", train_loader, "one of make_loader(dataset, shuffle=True)",
            getattr(train_loader.sampler, "generator", None) is not None)
    device = pick_device(device)
    model.to(device, memory_format=torch.channels_last)
    teacher = teacher and copy.deepcopy(teacher).eval().to(device, memory_format=torch.channels_last)
    run = _Run(model, train_loader, epochs, max_lr, weight_decay, checkpoint, sizes, optimizer, teacher)
    with _alone(checkpoint), _interrupts_noted() as interrupts:
        if checkpoint and not restart:
            run.resume()
        if run.steps_done() < run.steps:
            print(f"{epochs} epochs on {hardware(device)}, data: {run.recipe['data']}")
        print("epoch  train loss  train acc %  test loss  test acc %  seconds")
        for epoch, row in enumerate(zip(*run.history.values()), 1):
            print(ROW.format(epoch, *row))
        quiet = bool(os.environ.get("TQDM_DISABLE"))  # which tqdm itself obeys outside notebooks only
        with tqdm(total=run.steps, initial=run.steps_done(), unit="batch", leave=False, disable=quiet) as bar:
            def on_step():
                bar.update()
                run.average_weights()
                if interrupts:
                    raise KeyboardInterrupt

            for epoch in range(len(run.history["seconds"]) + 1, epochs + 1):
                try:
                    print(ROW.format(epoch, *run.train_epoch(test_loader, on_step)), flush=True)
                    run.write()
                except FloatingPointError as error:
                    raise FloatingPointError(f"epoch {epoch}, {error}: try a max_lr below {max_lr}") from error
                except KeyboardInterrupt:
                    kept = run.stop(at_a_step=len(interrupts) == 1)
                    print(f"interrupted in epoch {epoch}: {kept}", flush=True)
                    model.load_state_dict(run.result().state_dict())
                    raise
    model.load_state_dict(run.result().state_dict())
    return run.history


class _Run:
    """A training run and all of its state, which its checkpoint keeps."""

    def __init__(self, model, loader, epochs, max_lr, weight_decay, checkpoint, sizes, optimizer, teacher):
        device, data = next(model.parameters()).device, _base(loader.dataset)
        self.loader, self.checkpoint, self.teacher, self.steps = loader, checkpoint, teacher, epochs * len(loader)
        decay = max(0.0, 1 - 20 / self.steps)
        steps = make_optimizer(model, max_lr, weight_decay, optimizer)
        self.parts = {
            "model": model, "optimizer": steps,
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(steps, max_lr, total_steps=self.steps, pct_start=0.25),
            "scaler": torch.amp.GradScaler(device.type, 1024, enabled=mixed_precision(device) == torch.float16),
            "average": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True),
        }
        self.recipe = {
            "network": type(model).__name__, "data": data.title, "images": len(loader.dataset), "epochs": epochs,
            "batch_size": loader.batch_size, "optimizer": optimizer, "max_lr": max_lr, "weight_decay": weight_decay,
            "averaging decay": decay, "sizes": sizes, "augmentations": str(data.transform).splitlines(), "seed": data.seed,
            "layers": str(model).splitlines(), "teacher": _fingerprint(teacher),
        }
        self.history = {name: [] for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")}
        self.begun = Counter()  # what there is of the epoch that has begun
        self.order = loader.sampler.generator.get_state()  # from which that epoch, or the next one, is shuffled

    def steps_done(self):
        return self.parts["scheduler"].last_epoch

    def average_weights(self):
        """Take the weights behind a step into the average, in the second half of the run."""
        if self.steps_done() > self.steps / 2:
            self.parts["average"].update_parameters(self.parts["model"])

    def result(self):
        """Return the network with the averaged weights, or as it is as long as there are none."""
        average = self.parts["average"]
        return average.module if average.n_averaged else self.parts["model"]

    def size(self):
        """Return the size of the training images in the epoch that begins, or None where they stay as they are."""
        sizes, epochs, epoch = self.recipe["sizes"], self.recipe["epochs"], len(self.history["seconds"])
        return sizes[max(epoch * len(sizes) // epochs, len(sizes) - epochs + epoch)] if sizes else None

    def train_epoch(self, test_loader, on_step):
        """Train one epoch, or the rest of the one that has begun, and test; return its row of the history."""
        self.start, self.order = time.perf_counter() - self.begun["seconds"], self.loader.sampler.generator.get_state()
        parts = (self.parts[name] for name in ("optimizer", "scheduler", "scaler"))
        losses = train(self.parts["model"], self.loader, *parts, on_step, self.begun, self.size(), self.teacher)
        row = *losses, *test(self.result(), test_loader), time.perf_counter() - self.start
        if not np.isfinite(row).all():  # the last step of the epoch spoilt the weights
            raise FloatingPointError(f"after its last step: the loss is {row[2]}")
        for column, value in zip(self.history.values(), row):
            column.append(value)
        self.begun, self.order = Counter(), self.loader.sampler.generator.get_state()
        return row

    def stop(self, at_a_step):
        """Keep what can be kept at an interrupt, the epoch that has begun only behind a whole step; say what it is."""
        self.loader._iterator = None  # the next run starts new workers
        if not self.checkpoint:
            return "nothing is kept"
        kept = f"{len(self.history['seconds'])} epochs are"
        if at_a_step and all(weights.isfinite().all() for weights in self.parts["model"].parameters()):
            self.begun["seconds"] = time.perf_counter() - self.start
            self.write()
            kept = f"{self.begun['batches']} of {len(self.loader)} batches; everything is"
        return f"{kept} kept in {self.checkpoint}: run again to go on"

    def write(self):
        """Write the checkpoint, if there is to be one; the one before it stays until then, and after."""
        if not self.checkpoint:
            return
        path, state = Path(self.checkpoint), {name: part.state_dict() for name, part in self.parts.items()}
        state.update(recipe=self.recipe, history=self.history, begun=dict(self.begun), random=_random_state(self.order))
        try:
            _replace(path, _serialised(state), keep=_previous(path))
        except OSError as error:
            print(f"{path} could not be written ({error.strerror}): training goes on, and the checkpoint before it is "
                  "kept; make room to keep the next epochs", flush=True)

    def resume(self):
        """Put the state of the checkpoint, if there is one yet, back in its places."""
        path, state = self.checkpoint, _read_checkpoint(self.checkpoint)
        if state is None:
            return
        differences = [_difference(name, state["recipe"].get(name), value) for name, value in self.recipe.items()
                       if state["recipe"].get(name) != value]
        if differences:
            raise ValueError(f"{path} is of another run ({'; '.join(differences)}): choose another path, "
                             "or restart=True to start afresh")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        _set_random_state(self.loader, state["random"])
        self.history, self.begun = state["history"], Counter(state["begun"])
        done = len(self.history["seconds"])
        going_on = f"going on with epoch {done + 1}" + (f", batch {self.begun['batches'] + 1}" if self.begun else "")
        print(f"{path}: {'finished before, loaded' if done == self.recipe['epochs'] else going_on}")


# ---------------------------------------------------------------- checkpoints

def load_history(checkpoint):
    """Return the history of the epochs that a checkpoint holds."""
    state = _read_checkpoint(checkpoint)
    if state is None:
        raise FileNotFoundError(f"{checkpoint} is not there: no epoch was finished with it")
    return state["history"]


def _previous(path):
    return path.with_name(path.name + ".previous")


def _read_checkpoint(path):
    """Return the newest checkpoint that is whole, or None if there is none yet; never runs code from the file."""
    path, trouble = Path(path), None
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            with zipfile.ZipFile(candidate) as archive:
                if archive.testzip():
                    raise ValueError("a checksum differs")
            state = torch.load(candidate, map_location="cpu", weights_only=True)
            state["recipe"], state["history"], state["random"]
        except Exception as error:
            trouble = error
            continue
        if candidate != path:
            print(f"{path} is damaged or missing: going back to the checkpoint before it")
            os.replace(candidate, path)
        return state
    if trouble:
        reason = " ".join(str(trouble).split())[:200]
        raise ValueError(f"{path} is damaged or no checkpoint of this program ({reason}): "
                         "move it away to start afresh") from trouble
    return None


def _fingerprint(model):
    """Return a hash of the network's state, or None if there is none."""
    if model is None:
        return None
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())).hexdigest()


def _difference(name, there, here):
    """Say how a setting differs; of lists of lines, where they begin to."""
    if isinstance(there, list) and isinstance(here, list):
        pairs = itertools.zip_longest(there, here, fillvalue="nothing")
        there, here = next((old.strip(), new.strip()) for old, new in pairs if old != new)
    return f"{name}: {there} there, {here} here"


def _random_state(order):
    """Return the states of all random generators. Augmentations have none: the batch's indices seed them."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "order": order}


def _set_random_state(loader, state):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    loader.sampler.generator.set_state(state["order"])


@contextlib.contextmanager
def _interrupts_noted():
    """Write an interrupt into a list instead of raising it anywhere within a step; a second one is raised at once."""
    def note(signal_number, frame):
        interrupts.append(signal_number)
        if len(interrupts) > 1:
            raise KeyboardInterrupt

    interrupts = []
    if threading.current_thread() is not threading.main_thread():  # others get no interrupts
        yield interrupts
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts:  # it came after the last step
        raise KeyboardInterrupt


@contextlib.contextmanager
def _alone(path):
    """Refuse a second process that would train with the same checkpoint. The lock ends with the process."""
    if path is None:
        yield
        return
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "a")
    except OSError as error:
        raise RuntimeError(f"{path.parent} can't be written ({error.strerror}): choose another folder") from error
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would hold that one too
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise RuntimeError(f"another process is training with {path}: wait for it, stop it, "
                               "or choose another folder") from error
        yield


def run(network="NetDilated", data="CIFAR-10", epochs=90, batch_size=256, max_lr=0.3, weight_decay=5e-4,
        augmentation=0.5, sizes=None, optimizer="Muon", teacher=None, seed=0, num_workers=None, validation_size=0,
        device=None, checkpoint=None, restart=False, folder="weights"):
    """Train one network from scratch, save it with its facts in `folder`, and return the model and the facts.

    The whole experiment in one call, as the notebook does it step by step. `augmentation` is the probability that
    `train_transform` takes, `teacher` the folder of a saved NetDilated to learn from; the other settings are those of
    `fit`, `make_loader` and `load_dataset`. With a `validation_size` the last training images take the place of the
    test set, and the facts have the temperature that fits them best.
    """
    settings = {"epochs": epochs, "batch_size": batch_size, "max_lr": max_lr, "weight_decay": weight_decay,
                "augmentation": augmentation, "sizes": sizes, "optimizer": optimizer, "teacher": teacher, "seed": seed,
                "validation_size": validation_size}
    check_settings(network=network, data=data, num_workers=num_workers, device=device, folder=folder,
                   checkpoint=checkpoint, restart=restart, **settings)
    require("checkpoint", checkpoint, "another path, this is where the weights are saved",
            checkpoint is None or Path(checkpoint) != Path(folder, f"{network}.pt"))
    seed_everything(seed)
    train_set = load_dataset("train", data, validation_size, train_transform(augmentation), seed)
    test_set = load_dataset("validation" if validation_size else "test", data, validation_size)
    train_loader = make_loader(train_set, batch_size, True, num_workers, seed)
    test_loader = make_loader(test_set, min(500, len(test_set)))
    model = build_network(network)
    history = fit(model, train_loader, test_loader, epochs, max_lr, weight_decay, device, checkpoint, restart, sizes,
                  optimizer, teacher and load_teacher(teacher, title_of(test_set)))
    settings["teacher"] = teacher and str(teacher)
    facts = save(model, history, settings, title_of(test_set), folder)
    facts = add_facts(facts, folder, flip_accuracy=score(*predict(model, test_loader, flip=True))[1])
    if validation_size:
        facts = add_facts(facts, folder, temperature=fit_temperature(*predict(model, test_loader)))
    return model, facts


def title_of(dataset):
    """Return the name of the data, which says so where they are not CIFAR-10."""
    return _base(dataset).title


# ---------------------------------------------------------------- saving

def save(model, history, settings, data, folder="weights"):
    """Write the state dict to `folder/NAME.pt` and the facts to `folder/NAME.json`; return the facts.

    Each file is written aside and renamed, so that an old one is there until its replacement is complete. A run that is
    saved already, as one that was loaded from its checkpoint, keeps its facts: the hardware and the day are its own.
    """
    name, folder = type(model).__name__, Path(folder)
    saved = _saved_facts(name, folder)
    if saved and saved["history"] == history:
        return saved
    last = {column: values[-1] for column, values in history.items() if column != "seconds"}
    facts = {
        "network": name, "data": data, "parameters": count_parameters(model), "macs": count_macs(model),
        "receptive_field": receptive_field(model), **last, "seconds": sum(history["seconds"]),
        "hardware": hardware(next(model.parameters()).device), "date": date.today().isoformat(),
        "versions": versions(), "settings": settings, "history": history,
    }
    _replace(folder / f"{name}.pt", _serialised({key: value.cpu() for key, value in model.state_dict().items()}))
    facts["sha256"] = _sha256(folder / f"{name}.pt")
    return add_facts(facts, folder)


def add_facts(facts, folder="weights", **more):
    """Add what was measured since to the facts of a saved network, in their file as well; return them all."""
    facts = {**facts, **more}
    _replace(Path(folder) / f"{facts['network']}.json", (json.dumps(facts, indent=1) + "\n").encode())
    return facts


def load(name, folder="weights"):
    """Return the named network with its saved weights, and its facts.

    Raises:
        ValueError: the network is unknown, or the file is not one of its state dicts, or not the one that the facts
            tell of. FileNotFoundError: no file.
    """
    model, path = build_network(name), Path(folder) / f"{name}.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: train {name} first, or take it from the repository")
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or holds another network than {name} ({reason}): "
                         "train it again, or take it from the repository") from error
    facts = load_facts(name, folder)
    if facts["sha256"] != _sha256(path):
        raise ValueError(f"{path} is not the file that {name}.json tells of: save both again (a finished run's cells, "
                         "run again, do), or take them from the repository")
    return model.eval(), facts


def load_teacher(folder, data):
    """Return the NetDilated saved in the folder, a ValueError where it was trained on other data than those of that title."""
    teacher, facts = load("NetDilated", folder)
    require("teacher", folder, f"None, or the folder of one trained on {data}, not on {facts['data']}",
            facts["data"] == data)
    return teacher


def _saved_facts(name, folder):
    """Return the facts of a network whose two files are whole and belong together, or None."""
    try:
        facts = load_facts(name, folder)
        return facts if facts["sha256"] == _sha256(folder / f"{name}.pt") else None
    except (OSError, ValueError, KeyError):
        return None


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_facts(name, folder="weights"):
    """Return the facts of a saved network."""
    return json.loads((Path(folder) / f"{name}.json").read_text())


def _serialised(state):
    """Return a state as the bytes of its file: torch.save does not tell a full disk from other trouble."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _replace(path, content, keep=None):
    """Write a new file aside, then put it in the place of `path` at once; `keep` gets the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # a full disk does not say of itself which file it is about
        new.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(new, path)


# ---------------------------------------------------------------- pictures

def open_picture(source):
    """Return a picture as the uint8 (side, side, 3) array of its largest centred square, as a person sees it.

    Args:
        source: the path of an image file, a PIL image, or an array: uint8 or uint16 of (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4), or floats of these shapes from 0 to 1. EXIF orientation is obeyed; what is transparent becomes
            white; greyscale, palette, 16-bit and CMYK pictures become RGB; of an animation the first picture is taken.

    Raises:
        ValueError: it is none of these, is damaged, empty or larger than 179 megapixels.
    """
    name = str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
    try:
        image = _from_array(source) if isinstance(source, np.ndarray) else source
        if isinstance(source, (str, Path)):
            image = Image.open(source)
        if not isinstance(image, Image.Image):
            raise ValueError("it is no path, PIL image or array")
        if not min(image.size):
            raise ValueError(f"it is empty, {image.width} x {image.height} pixels")
        rgb = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # PIL's decoders raise errors of many kinds on damaged files
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} can't be used as a picture ({reason}): give a path of a PNG or JPEG file, a PIL image, "
                         "or an array of shape (H, W) or (H, W, 3), uint8 or floats from 0 to 1") from error
    side = min(rgb.shape[:2])
    top, left = ((length - side) // 2 for length in rgb.shape[:2])
    return rgb[top:top + side, left:left + side]


def _from_array(array):
    """Return an array as a PIL image."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"its shape is {array.shape}")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and 0 <= array.min(initial=0) and array.max(initial=0) <= 1):
            raise ValueError("its floats are not all from 0 to 1")
        array = np.round(255 * array).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"its type is {array.dtype}")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _to_rgb(image):
    """Return a PIL image of any mode as RGB, on white where it is transparent."""
    if image.mode == "F" or image.mode.startswith("I"):  # 16 bits, in one of the ways that PIL keeps them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def classify(model, sources, count=5, temperature=1.0, classes=CLASSES):
    """Classify pictures of any size: return the `count` likeliest (class, probability) pairs of each, the likeliest
    first.

    Args:
        sources: a list of what `open_picture` takes, from which a progress bar is made if it is long, or one of them.
        temperature: what the logits are divided by, to calibrate the probabilities; see Guo et al., On calibration of
            modern neural networks, https://arxiv.org/abs/1706.04599.
        classes: the names of the classes, if they are not CIFAR-10's.

    Returns:
        a list of lists, or, for one picture, its list.

    Raises:
        ValueError: a source is no picture, or the temperature is not above 0.
    """
    check_settings(temperature=temperature)
    if not isinstance(sources, list):
        return classify(model, [sources], count, temperature, classes)[0]
    device, shrink = next(model.parameters()).device, test_transform()
    model.eval()
    results = []
    for source in tqdm(sources, unit="picture", leave=False, disable=len(sources) < 10):
        small = shrink(image=open_picture(source))["image"]
        with torch.no_grad():
            logits = model(normalise(small[None]).to(device))[0].float().cpu()
        probabilities, numbers = (logits / temperature).softmax(0).topk(count)
        results.append([(classes[number], probability) for number, probability in
                        zip(numbers.tolist(), probabilities.tolist())])
    return results


# ---------------------------------------------------------------- the rules

def convolution_units(steps):
    """Return the convolutions as tuples of steps: a depthwise one and the pointwise one that works on its result, in
    either order, are one unit."""
    units = []
    for step in steps:
        if step.kind != "convolution":
            continue
        if units and len(units[-1]) == 1 and {_role(units[-1][0]), _role(step)} == {"depthwise", "pointwise"} and (
                step.source >= 0 and steps[step.source] is units[-1][0]):
            units[-1] = (*units[-1], step)
        else:
            units.append((step,))
    return units


def _role(step):
    if step.groups > 1 and step.groups == step.channels[0]:
        return "depthwise"
    return "pointwise" if (step.kernel, step.stride, step.groups) == (1, 1, 1) else "standard"


def check_rules(model, transform=None):
    """Measure the assignment's rules on any network from (N, 3, 32, 32) to (N, 10), by running it, and on its training
    transform, if there is one.

    Returns rows of (rule, what was measured, whether the rule holds: True, False, or None where the layout of the
    network does not let it be decided).

    Raises:
        ValueError: the network does not run on such an image, or returns something else.
    """
    steps = _trace(model)
    pooling = [step for step in steps if "pooling" in step.kind]
    last, early = (pooling[-1], pooling[:-1]) if pooling else (None, [])
    is_global = last is not None and last.kind == "global average pooling"
    body = steps[:steps.index(last)] if is_global else steps
    head = [step.kind for step in steps[steps.index(last) + 1:]] if last else []
    early = early if is_global or last is None else pooling
    units = convolution_units(body)
    pairs = sum(len(unit) == 2 for unit in units)
    dilations = [step for unit in units for step in unit if step.dilation > 1 and step.kernel > 1]
    field, whole = measure_receptive_field(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        *_check_blocks(body, units),
        ("no pooling but the final one", ", ".join(step.operation for step in early) or "none", not early),
        (f"receptive field above {RECEPTIVE_FIELD_LIMIT}",
         f"{field}" if whole else f"{field} or more" if field else "can't tell: no map before the end",
         field > RECEPTIVE_FIELD_LIMIT if whole or field > RECEPTIVE_FIELD_LIMIT else None),
        ("a depthwise-separable convolution", f"{pairs}", pairs > 0),
        ("a dilated convolution", f"{len(dilations)}", bool(dilations)),
        ("global average pooling at the end", f"{last.kind} of {last.size[0]}x{last.size[0]}" if last else "none",
         is_global),
        ("then at most one fully connected layer", ", ".join(head) or "nothing", head in ([], ["fully connected"])),
        (f"fewer than {PARAMETER_LIMIT:,} parameters", f"{parameters:,}", parameters < PARAMETER_LIMIT),
        *(_check_transform(transform) if transform else []),
    ]


def _trace(model):
    """Return the steps of a network that anybody wrote, or say in one line that it is none for this task."""
    try:
        with torch.no_grad():
            shape = tuple(copy.deepcopy(model).eval()(torch.zeros(2, 3, 32, 32)).shape)
        steps = trace(model)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{type(model).__name__} does not run on (2, 3, 32, 32) images ({reason}): it has to take "
                         "(N, 3, 32, 32) and return (N, 10)") from error
    if shape != (2, 10):
        raise ValueError(f"{type(model).__name__} turns (2, 3, 32, 32) images into {shape}: it has to return (N, 10)")
    return steps


def _check_blocks(body, units):
    """Return the rows about blocks: the convolutions that begin at the same resolution. Of a network that changes it
    by other means than strides and pooling, or mixes channels otherwise than by convolutions, they can't be told, but
    it may begin with enlarging the image."""
    enlarged = body and "upsample" in body[0].operation and body[0].size[0] < body[0].size[1]
    note = " on images enlarged to {0}x{0}".format(body[0].size[1]) if enlarged else ""
    strange = [step.operation for step in body[bool(enlarged):]
               if step.kind == "resize" or (step.kind == "fully connected" and step.size[0] > 1)]
    rules = "four blocks", "three convolutions in each", "stride 2 in the last of each, only there"
    if strange:
        return [(rule, f"can't tell: {strange[0]} before the end", None) for rule in rules]
    jumps = sorted({unit[0].jump for unit in units})
    blocks = [[max(step.stride for step in unit) for unit in units if unit[0].jump == jump] for jump in jumps]
    measured = [f"{len(blocks)}{note}", " ".join(str(len(block)) for block in blocks),
                " | ".join(" ".join(map(str, block)) for block in blocks)]
    holds = [len(blocks) == 4, all(len(block) == 3 for block in blocks),
             all(block[-1] == 2 and set(block[:-1]) <= {1} for block in blocks)]
    return list(zip(rules, measured, holds))


def _check_transform(transform):
    """Return the rows of the rules about augmentation, from what the transforms do to plain images."""
    steps = {type(step).__name__: step for step in transform.transforms}
    rows = []
    for name in ("HorizontalFlip", "ShiftScaleRotate"):
        share = _measure_share(steps[name]) if name in steps else 0
        rows.append((name, f"changes {share:.0%} of the images" if name in steps else "missing", share > 0))
    hole, colour = _measure_hole(steps["CoarseDropout"]) if "CoarseDropout" in steps else ("missing", None)
    rows.append(("CoarseDropout: one 16x16 hole", hole, hole == "16x16"))
    text = "missing" if colour is None else " ".join(f"{channel:.0f}" for channel in colour)
    rows.append(("... filled with the mean colour", text, colour is not None and np.allclose(colour, FILL, atol=1)))
    side = "x".join(map(str, transform(image=np.zeros((40, 40, 3), np.uint8))["image"].shape[:2]))
    return [*rows, ("Resize", f"40x40 becomes {side}", "Resize" in steps and side == "32x32")]


def _measure_share(step, draws=1000):
    """Return the share of images that the transform changes, from draws that are the same every time."""
    step = copy.deepcopy(step)
    step.set_random_state(np.random.default_rng(0), random.Random(0))
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return np.mean([(step(image=image)["image"] != image).any() for _ in range(draws)])


def _measure_hole(coarse_dropout, draws=50):
    """Return the size of the largest hole, as "16x16", and its colour; "... of another shape" if not one rectangle."""
    coarse_dropout = copy.deepcopy(coarse_dropout)
    coarse_dropout.p = 1
    heights, widths, colours = [], [], []
    for base in np.resize((0, 255), draws):
        image = coarse_dropout(image=np.full((32, 32, 3), base, np.uint8))["image"]
        hole = (image != base).any(2)
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        if hole.sum() != rows * columns or not hole.any():
            return "none or of another shape", None
        heights, widths, colours = [*heights, rows], [*widths, columns], [*colours, image[hole]]
    return f"{max(heights)}x{max(widths)}", np.concatenate(colours).mean(0)


def format_rules(rows):
    """Return the rows of `check_rules` as a text table."""
    words = {True: "holds", False: "BROKEN", None: "undecided"}
    lines = [f"{rule:42} {measured:38} {words[holds]}" for rule, measured, holds in rows]
    return "\n".join([f"{'rule':42} {'measured':38}", *lines])


# ---------------------------------------------------------------- the comparison

PUBLISHED = {  # epochs and test accuracy, as the published answers state them
    "PublishedDilated": ("fewer than 175", "more than 85"),
    "PublishedDepthwise": ("120", "85.24"),
}


def comparison_table(all_facts):
    """Return the facts of several networks as a Markdown table, the published figures beside ours. "With flips" is the
    test accuracy with test-time augmentation, see `predict`; "distilled" networks had a teacher, see `train`."""
    head = ("network", "parameters", "multiply-accumulates", "receptive field", "epochs", "train accuracy %",
            "test accuracy %", "with flips %", "time", "published: epochs", "published: test accuracy %")
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for facts in all_facts:
        distilled = ", distilled" if facts["settings"].get("teacher") else ""
        rows.append((facts["network"] + distilled, f"{facts['parameters']:,}", f"{facts['macs'] / 1e6:.1f} M",
                     str(facts["receptive_field"]), str(facts["settings"]["epochs"]),
                     f"{facts['train_accuracy']:.2f}", f"{facts['test_accuracy']:.2f}", f"{facts['flip_accuracy']:.2f}",
                     f"{facts['seconds'] / 60:.0f} min", *PUBLISHED.get(facts["network"], ("-", "-"))))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---------------------------------------------------------------- the figures

def plot_augmentations(dataset, path, rows=5, columns=10):
    """Draw training images as they are (first row) and as the network sees them; save to `path`, return the figure."""
    base = _base(dataset)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 1.05 * rows + 0.6), layout="constrained")
    for line, index in zip(axes.T, np.linspace(0, len(dataset) - 1, columns, dtype=int).tolist()):
        augmented = dataset.__getitems__([index] * (rows - 1))
        label = augmented[0][1]
        for axis, image in zip(line, [base.data[index], *(image for image, _ in augmented)]):
            _show(axis, image)
        line[0].set_title(base.classes[label], fontsize=10)
    figure.suptitle(f"{base.title}: training images, and four augmented versions of each")
    return _finish(figure, path)


def plot_loss(history, path, data="CIFAR-10"):
    """Draw the training and test loss over the epochs; save to `path`, return the figure."""
    return _plot_curves(history, "loss", "cross entropy", path, data)


def plot_accuracy(history, path, data="CIFAR-10"):
    """Draw the training and test accuracy over the epochs; save to `path`, return the figure."""
    return _plot_curves(history, "accuracy", "accuracy, %", path, data)


def _plot_curves(history, name, unit, path, data):
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for split, colour, style in (("train", BLUE, "--"), ("test", ORANGE, "-")):
        values = history[f"{split}_{name}"]
        axis.plot(range(1, len(values) + 1), values, style, color=colour, marker="o", markersize=3,
                  label=f"{split}{' (augmented)' if split == 'train' else ''}: {values[-1]:.4g} in the end")
    axis.set(xlabel="epoch", ylabel=unit, title=f"{name.capitalize()} on {data}")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return _finish(figure, path)


def plot_misclassified(dataset, logits, path, rows=3, columns=8, most_confident=False):
    """Draw the first test images that the (N, classes) logits get wrong, or the most confidently wrong ones, with the
    predicted class, its probability and the true class; save to `path`, return the figure."""
    base = _base(dataset)
    labels = torch.tensor(base.targets)
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != labels).nonzero().flatten()
    if most_confident:
        wrong = wrong[confidence[wrong].argsort(descending=True)]
    wrong = wrong.tolist()
    figure, axes = plt.subplots(rows, columns, figsize=(10, 1.6 * rows + 0.4), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong):
        _show(axis, base.data[index])
        axis.set_title(f"{base.classes[predicted[index]]} {confidence[index]:.0%}", fontsize=9, color=ORANGE, pad=3)
        axis.text(0.5, -0.04, f"is {base.classes[labels[index]]}", fontsize=9, color=BLUE, ha="center", va="top",
                  transform=axis.transAxes)
    figure.suptitle(f"{base.title}: {len(wrong):,} of {len(labels):,} test images are misclassified; the "
                    f"{'most confident' if most_confident else 'first'} of them")
    return _finish(figure, path)


def plot_picture(source, likeliest, path):
    """Draw a picture, what the network sees of it, and the (class, probability) pairs that `classify` returned; save to
    `path`, return the figure."""
    picture = open_picture(source)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained", width_ratios=(1, 1, 1.3))
    for axis, image, title in zip(axes, (picture, test_transform()(image=picture)["image"]),
                                  (f"{len(picture)} x {len(picture)} pixels", "what the network sees: 32 x 32")):
        _show(axis, image)
        axis.set_title(title, fontsize=10)
    names, probabilities = zip(*reversed(likeliest))
    bars = axes[2].barh(names, probabilities, color=BLUE)
    axes[2].bar_label(bars, [f"{probability:.0%}" for probability in probabilities], padding=3)
    axes[2].set(xlim=(0, 1.15), xticks=[])
    axes[2].spines[["top", "right", "bottom"]].set_visible(False)
    return _finish(figure, path)


def plot_confusion(dataset, logits, path):
    """Draw the confusion matrix of (N, classes) logits, a row for each true class; save to `path`, return the figure."""
    base = _base(dataset)
    counts = multiclass_confusion_matrix(logits, torch.tensor(base.targets), len(base.classes)).numpy()
    shares = 100 * counts / counts.sum(1, keepdims=True)
    figure, axis = plt.subplots(figsize=(8, 6.6), layout="constrained")
    axis.imshow(np.where(np.eye(len(counts), dtype=bool), np.nan, shares), cmap="Oranges", vmin=0, vmax=20)
    for row, column in np.ndindex(counts.shape):
        axis.text(column, row, f"{shares[row, column]:.1f}", ha="center", va="center", fontsize=9,
                  fontweight="bold" if row == column else "normal")
    axis.set_xticks(range(len(counts)), base.classes, rotation=45, ha="right")
    axis.set_yticks(range(len(counts)), base.classes)
    axis.set(xlabel="predicted", ylabel="true", title=f"{base.title}: of each true class, % predicted as")
    return _finish(figure, path)


def plot_reliability(dataset, logits, path, temperature=1.0, bins=15):
    """Draw the accuracy over the confidence of (N, classes) logits in bins of equal width, which is the diagonal where
    probabilities are right, with the `calibration_error`: of the logits as they are and, if that is not 1, divided by
    the temperature. Save to `path`, return the figure."""
    check_settings(temperature=temperature)
    base = _base(dataset)
    figure, axis = plt.subplots(figsize=(6, 4.6), layout="constrained")
    axis.plot([0, 100], [0, 100], color="grey", linestyle="--", label="probabilities that are right")
    for divisor, colour, marker in zip(dict.fromkeys((1.0, temperature)), COLOURS, "os"):
        confidence, predicted = (logits / divisor).softmax(1).max(1)
        confidence, right = confidence.double().numpy(), (predicted == torch.tensor(base.targets)).numpy()
        places = np.minimum((confidence * bins).astype(int), bins - 1)
        accuracy, mean = ([100 * values[places == place].mean() for place in np.unique(places)]
                          for values in (right, confidence))
        error = calibration_error(dataset, logits / divisor, bins)
        axis.plot(mean, accuracy, color=colour, marker=marker, linewidth=1,
                  label=f"temperature {divisor:.3g}: calibration error {error:.1f} %")
    axis.set(xlabel="confidence, %", ylabel="accuracy of the images in a bin, %", xlim=(0, 100), ylim=(0, 103),
             title=f"{base.title}: accuracy over confidence")
    axis.legend(loc="upper left")
    return _finish(figure, path)


def plot_corruptions(accuracies, path, data="CIFAR-10"):
    """Draw the lists of accuracies of `accuracy_under_corruptions` over the strength; save to `path`, return the
    figure."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (name, values), colour, marker in zip(accuracies.items(), COLOURS, "osD^v"):
        axis.plot(range(len(values)), values, color=colour, marker=marker, markersize=5, label=name)
    axis.set(xlabel="strength of the corruption", ylabel="accuracy, %", xticks=range(len(values)),
             title=f"Accuracy on corrupted {data}")
    axis.grid(alpha=0.3)
    axis.legend()
    return _finish(figure, path)


def plot_receptive_field(model, dataset, path, mosaics=4):
    """Draw, for each convolution unit, how much the pixels of an image weigh in one position behind it (the mean
    gradient on mosaics of 4x4 images of the data set) and the theoretical receptive field; save to `path`, return the
    figure."""
    base, steps = _base(dataset), trace(model)
    images = normalise(base.data[:16 * mosaics]).reshape(mosaics, 4, 4, 3, 32, 32)
    images = images.permute(0, 3, 1, 4, 2, 5).reshape(mosaics, 3, 128, 128)
    units = convolution_units(steps)
    model = copy.deepcopy(model).cpu()
    figure, axes = plt.subplots(2, -(-len(units) // 2), figsize=(10, 4.4), layout="constrained")
    for number, (axis, unit) in enumerate(zip(axes.flat, units)):
        weight = gradient_of_the_middle(model, images, steps.index(unit[-1]) + 1)
        axis.imshow((weight / weight.max()).sqrt().numpy(), cmap="viridis")
        field = unit[-1].receptive_field
        row, column = ((index.min() + index.max()) / 2 for index in map(torch.flatten, weight.nonzero().T))
        axis.add_patch(plt.Rectangle((column - field / 2, row - field / 2), field, field, fill=False, color=ORANGE))
        axis.set_title(f"C{number // 3 + 1}, {number % 3 + 1}: {field:.3g}", fontsize=10)
        axis.axis("off")
    figure.suptitle("What one position sees behind each convolution: pixels by weight, the theoretical square around")
    return _finish(figure, path)


def plot_kernels(layers, path):
    """Draw which positions of its input one output position of each depthwise layer, a dict by title, works on; save to
    `path`, return the figure."""
    figure, axes = plt.subplots(1, len(layers), figsize=(3 * len(layers), 3.2), layout="constrained")
    for axis, (title, layer) in zip(axes, layers.items()):
        x = torch.zeros(1, layer.in_channels, 9, 9, requires_grad=True)
        with torch.enable_grad():
            copy.deepcopy(layer).cpu()(x)[0, :, 4, 4].sum().backward()
        axis.imshow(x.grad[0].abs().sum(0).ne(0).numpy(), cmap="Blues", vmax=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(np.arange(8) + 0.5, [])
        axis.set_yticks(np.arange(8) + 0.5, [])
        axis.grid(color="lightgrey")
        axis.tick_params(length=0)
    return _finish(figure, path)


def accuracy_by_class(dataset, logits):
    """Return the accuracy in percent of (N, classes) logits on the images of each class, by name."""
    base = _base(dataset)
    labels = torch.tensor(base.targets)
    return {name: 100 * (logits[labels == number].argmax(1) == number).float().mean().item()
            for number, name in enumerate(base.classes)}


def calibration_error(dataset, logits, bins=15):
    """Return the expected calibration error of (N, classes) logits in percent: how far confidence and accuracy are
    apart, the mean over bins of confidence. Guo et al., https://arxiv.org/abs/1706.04599."""
    labels = torch.tensor(_base(dataset).targets)
    return 100 * multiclass_calibration_error(logits.softmax(1), labels, logits.shape[1], bins).item()


def fit_temperature(logits, labels):
    """Return the number that (N, classes) logits have to be divided by for the probabilities that fit the (N,) labels
    best, by cross entropy. They should be of images that the network was neither trained nor is tested on. Guo et al.,
    https://arxiv.org/abs/1706.04599."""
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of a number that is above 0
    optimizer = torch.optim.LBFGS([logarithm], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits / logarithm.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logarithm.exp().item()


def accuracy_under_corruptions(model, dataset, images=2000):
    """Return lists of the accuracy in percent on the first test images, clean and corrupted at five strengths, by the
    name of the corruption. After Hendrycks and Dietterich, https://arxiv.org/abs/1903.12261."""
    images = range(min(images, len(dataset)))
    clean = test(model, make_loader(Subset(dataset, images), min(500, len(images))))[1]
    accuracies = {name: [clean] for name in CORRUPTIONS}
    corrupted = copy.copy(dataset)
    for name, transforms in CORRUPTIONS.items():
        for transform in transforms:
            corrupted.transform = A.Compose([transform])
            accuracies[name].append(test(model, make_loader(Subset(corrupted, images), min(500, len(images))))[1])
    return accuracies


def _base(dataset):
    return getattr(dataset, "dataset", dataset)  # a Subset keeps its data set in `dataset`


def _show(axis, image):
    axis.imshow(image)
    axis.axis("off")


def _finish(figure, path):
    """Save the figure and return it closed, so that a notebook shows it once: as it is in the file, its titles as the
    alternative text."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    png = buffer.getvalue()
    alt = ", ".join(filter(None, [figure.get_suptitle(), *(axis.get_title() for axis in figure.axes[:12])]))
    figure._repr_mimebundle_ = lambda include=None, exclude=None: ({"image/png": png}, {"image/png": {"alt": alt}})
    try:
        _replace(Path(path), png)
    except OSError as error:
        print(f"{path} could not be written ({error.strerror}): the figure is only shown; make room or choose another "
              "folder to keep it")
    plt.close(figure)
    return figure
