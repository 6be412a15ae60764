"""The networks: their sizes and shapes, their symmetry, and the fast depthwise convolution."""

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checker.layout import convolution_units, receptive_fields
from checker.operations import receptive_field, trace
from model import (
    MirrorBatchNorm2d,
    MirrorConv2d,
    MirrorDepthwiseConv2d,
    MirrorMean,
    NetDilated,
    Network,
    depthwise_conv2d,
    separable,
    standard,
)
from published import NETWORKS, conv, find_network
from utils import count_macs, count_parameters

HERE = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "name, parameters, macs",
    [("PublishedDilated", 195_508, 93.3), ("PublishedDepthwise", 198_776, 48.4)],
)
def test_published_networks_have_the_published_parameters_and_multiply_accumulates(
    name, parameters, macs
):
    network = NETWORKS[name]()
    assert count_parameters(network) == parameters
    assert count_macs(network) / 1e6 == pytest.approx(macs, abs=0.06)


def test_ours_has_no_more_parameters_than_the_published_one_of_that_name():
    assert count_parameters(NetDilated()) <= 195_508


@pytest.mark.parametrize("name", NETWORKS)
def test_each_image_gets_one_logit_for_each_class(name):
    assert NETWORKS[name](7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_ours_is_four_blocks_of_three_convolutions_each_of_which_halves_the_map_at_any_image_size():
    network = NetDilated()
    for size in (32, 48):
        x = network.upsample(torch.randn(1, 3, size, size))
        assert x.shape[-1] == 2 * size
        for block in (network.C1, network.C2, network.C3, network.C4):
            side = x.shape[-1]
            x = block(x)
            assert type(block) is nn.Sequential and len(block) == 3 and x.shape[-1] == side // 2


@pytest.mark.parametrize(
    "arguments, side", [({}, 12), ({"dilation": 2}, 12), ({"stride": 2}, 6), ({"padding": 2}, 14)]
)
def test_a_standard_convolution_keeps_the_size_of_the_map_unless_it_has_a_stride_or_its_own_padding(
    arguments, side
):
    assert conv(3, 4, **arguments)(torch.zeros(1, 3, 12, 12)).shape == (1, 4, side, side)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_receptive_field_is_what_the_gradients_reach(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().double().eval()
    rows, columns = torch.zeros(128, dtype=bool), torch.zeros(128, dtype=bool)
    for _ in range(3):  # a ReLU hides a path in one image, hardly in three
        image = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
        features = network.C4(network.C3(network.C2(network.C1(network.upsample(image)))))
        middle = features.shape[-1] // 2
        features[..., middle, middle].sum().backward()
        reached = image.grad[0].ne(0).any(0)
        rows, columns = rows | reached.any(1), columns | reached.any(0)
    assert not rows[[0, -1]].any()  # it lies within the image
    assert rows.sum() == columns.sum() == receptive_field(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_comment_beside_each_layer_tells_its_shape_and_receptive_field(name):
    comments = re.findall(
        r"# (\d+) x (\d+) x (\d+), +([\d.]+)$", inspect.getsource(NETWORKS[name]), re.MULTILINE
    )
    network = NETWORKS[name]()
    last = [unit[-1] for unit in convolution_units(trace(network))]
    measured = [
        (each.channels[1], each.size[1], each.size[1], int(side))
        for each, side in zip(last, receptive_fields(network), strict=True)
    ]
    assert [tuple(map(float, comment)) for comment in comments] == measured


@pytest.mark.parametrize(
    "side, settings, size",
    [
        (3, {}, (7, 10)),
        (4, {"stride": 2}, (16, 16)),
        (3, {"stride": 2}, (7, 10)),
        (5, {}, (8, 8)),
        (5, {"dilation": 2}, (16, 16)),
        (3, {"dilation": 2}, (16, 16)),
        (3, {"dilation": 2}, (18, 9)),
        (3, {"dilation": 2}, (9, 18)),
    ],
)
def test_a_depthwise_convolution_is_the_same_in_fp32_and_under_bf16_autocast(side, settings, size):
    torch.manual_seed(0)
    weight, x = torch.randn(8, 1, side, side, requires_grad=True), torch.randn(2, 8, *size)
    dilation = settings.get("dilation", 1)
    exact = F.conv2d(
        x, weight, None, settings.get("stride", 1), (side - 1) // 2 * dilation, dilation, groups=8
    )
    (gradient,) = torch.autograd.grad(exact.square().sum(), weight)
    ours = depthwise_conv2d(x, weight, **settings)
    torch.testing.assert_close(ours, exact)
    (ours,) = torch.autograd.grad(ours.square().sum(), weight)
    torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = depthwise_conv2d(x.bfloat16(), weight, **settings)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(
        rounded.float(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item()
    )
    with torch.no_grad():  # where there is no backward pass to care for
        native = depthwise_conv2d(x.bfloat16(), weight.bfloat16(), **settings)
    torch.testing.assert_close(native, rounded, rtol=0.01, atol=0.05)
    rounded.float().square().sum().backward()
    torch.testing.assert_close(
        weight.grad, gradient, rtol=0.02, atol=0.02 * gradient.abs().max().item()
    )


# ---------------------------------------------------------------- mirrored pairs


def swap(x):
    """The halves of the channels, exchanged."""
    return torch.cat(x.chunk(2, 1)[::-1], 1)


def randomise(module):
    """Give batch norms other statistics and weights than those they begin with, as training
    does.
    """
    for value in module.state_dict().values():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    return module.eval()


@pytest.mark.parametrize(
    "layer",
    [
        MirrorConv2d(6, 8),
        MirrorConv2d(6, 8, 1),
        MirrorConv2d(6, 8, 4, stride=2),
        MirrorDepthwiseConv2d(6),
        MirrorDepthwiseConv2d(6, 4, stride=2),
        MirrorDepthwiseConv2d(6, dilation=2),
        MirrorBatchNorm2d(6),
        standard(6, 6),
        separable(6, 8, 4, stride=2),
    ],
)
def test_each_layer_is_flip_equivariant(layer):
    """A flipped input with its halves swapped gives the flipped output with its halves swapped."""
    x = torch.randn(2, 6, 8, 12)
    torch.testing.assert_close(
        randomise(layer)(swap(x).flip(3)), swap(layer(x)).flip(3), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("make", [MirrorConv2d, MirrorDepthwiseConv2d])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 6])
def test_a_layer_is_equivariant_where_its_kernel_ends_at_both_borders_alike(
    kernel_size, stride, make
):
    """Where (W + 2 padding - k) is divisible by the stride, and nowhere else."""
    settings = {"kernel_size": kernel_size, "stride": stride}
    layer = make(6, **settings) if make is MirrorDepthwiseConv2d else make(6, 6, **settings)
    padding = (kernel_size - 1) // 2
    for width in range(8, 12):
        x = torch.randn(2, 6, 8, width)
        mirrored, expected = layer(swap(x).flip(3)), swap(layer(x)).flip(3)
        equivariant = torch.allclose(mirrored, expected, rtol=1e-4, atol=1e-5)
        assert equivariant is ((width + 2 * padding - kernel_size) % stride == 0)


@pytest.mark.parametrize("kernel_size, stride", [(3, 1), (4, 2)])
def test_a_lifting_convolution_makes_pairs_of_an_image(kernel_size, stride):
    layer, image = MirrorConv2d(3, 8, kernel_size, stride, lifting=True), torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(
        layer(image.flip(3)), swap(layer(image)).flip(3), rtol=1e-4, atol=1e-5
    )


def test_the_mean_of_the_pairs_is_the_same_for_exchanged_halves():
    x = torch.randn(2, 6)
    assert MirrorMean()(x).equal((x[:, :3] + x[:, 3:]) / 2) and MirrorMean()(swap(x)).equal(
        MirrorMean()(x)
    )


@pytest.mark.parametrize(
    "layer, plain",
    [
        (MirrorConv2d(6, 8), nn.Conv2d(6, 8, 3, bias=False)),
        (MirrorDepthwiseConv2d(6), nn.Conv2d(6, 6, 3, groups=6, bias=False)),
        (MirrorConv2d(6, 8, 4, stride=2), nn.Conv2d(6, 8, 4, bias=False)),
        (MirrorBatchNorm2d(6), nn.BatchNorm2d(6)),
    ],
)
def test_a_mirrored_layer_has_half_the_parameters_of_a_plain_one(layer, plain):
    assert 2 * count_parameters(layer) == count_parameters(plain)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: MirrorConv2d(5, 8),
        lambda: MirrorConv2d(6, 7),
        lambda: MirrorDepthwiseConv2d(5),
        lambda: MirrorBatchNorm2d(7),
    ],
)
def test_mirrored_pairs_need_an_even_number_of_channels(layer):
    with pytest.raises(
        ValueError, match="^[57] channels can't be mirrored pairs: choose an even number$"
    ):
        layer()


def test_in_training_batch_norm_is_that_of_pytorch_with_shared_scale_and_shift():
    ours, plain, x = MirrorBatchNorm2d(6), nn.BatchNorm2d(6), torch.randn(4, 6, 5, 5)
    nn.init.uniform_(ours.weight)
    nn.init.uniform_(ours.bias)
    plain.weight.data, plain.bias.data = ours.weight.repeat(2), ours.bias.repeat(2)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)


@pytest.mark.parametrize("size", [32, 24, 16])
def test_logits_of_an_image_and_of_its_mirror_image_agree_to_rounding(size):
    """In fp64, where rounding is small, and at sizes that stay even through all blocks."""
    torch.manual_seed(0)
    network, images = (
        NetDilated().double(),
        torch.randn(8, 3, size, size, dtype=torch.float64),
    )
    for module in network.modules():
        if isinstance(module, MirrorBatchNorm2d):
            module.momentum = 1  # the statistics of this batch, which differ within a pair
    network(images)
    logits = network.eval()(images)
    assert logits.std(0).min() > 0.01
    torch.testing.assert_close(network(images.flip(3)), logits, rtol=1e-9, atol=1e-9)


def test_upsampling_by_less_than_one_is_refused():
    with pytest.raises(ValueError, match="^upsample is 0.5: choose a factor of 1 or more$"):
        Network([], [], [], [], [], upsample=0.5)


def test_the_network_is_one_file_that_needs_torch_alone(tmp_path):
    """A copy of model.py and one file of weights, in an empty folder."""
    for name in ("model.py", "weights/NetDilated.pt"):
        shutil.copy(HERE / name, tmp_path)
    code = """
import sys
import torch
before = set(sys.modules)
from model import NetDilated
network = NetDilated()
network.load_state_dict(torch.load("NetDilated.pt", weights_only=True))
print(tuple(network.eval()(torch.zeros(1, 3, 32, 32)).shape))
others = {name.split(".")[0] for name in set(sys.modules) - before}
print(others & {"torchvision", "albumentations", "cv2", "matplotlib", "PIL", "dataset", "checks"})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("(1, 10)\nset()\n", 0), run.stderr


# ---------------------------------------------------------------- networks by name


def test_a_network_is_found_by_its_name_or_in_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from layers import Mine\n")
    (tmp_path / "layers.py").write_text("from torch import nn\nclass Mine(nn.Identity): pass\n")
    assert find_network("NetDilated") is NetDilated
    assert find_network(f"{file}:Mine").__name__ == "Mine"


@pytest.mark.parametrize(
    "name, message",
    [
        ("ResNet", "^network is 'ResNet': choose one of NetDilated, .*, or FILE.py:CLASS$"),
        ("nowhere.py:Net", "^network is 'nowhere.py:Net': choose one of NetDilated"),
        (f"{__file__}:Nothing", "has no Nothing; choose one of NetDilated"),
    ],
)
def test_an_unknown_network_is_named_with_the_known_ones(name, message):
    with pytest.raises(ValueError, match=message):
        find_network(name)
