"""The networks: their sizes, their shapes, what their positions can see, and the fast depthwise convolution."""
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checker.layout import convolution_units
from checker.operations import count_macs, count_parameters, receptive_field, trace
from model import NETWORKS, Depthwise, build_network, conv


@pytest.mark.parametrize("name, parameters, macs", [
    ("PublishedDilated", 195_508, 93.3), ("PublishedDepthwise", 198_776, 48.4)])
def test_published_networks_have_the_published_parameters_and_multiply_accumulates(name, parameters, macs):
    network = build_network(name)
    assert count_parameters(network) == parameters
    assert count_macs(network) / 1e6 == pytest.approx(macs, abs=0.06)


def test_ours_has_no_more_parameters_than_the_published_one_of_that_name():
    assert count_parameters(build_network("NetDilated")) <= 195_508


@pytest.mark.parametrize("name", NETWORKS)
def test_each_image_gets_one_logit_for_each_class(name):
    assert build_network(name, 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_ours_is_four_blocks_of_three_convolutions_each_of_which_halves_the_map_at_any_image_size():
    network = build_network("NetDilated")
    for size in (32, 48):
        x = network.upsample(torch.randn(1, 3, size, size))
        assert x.shape[-1] == 2 * size
        for block in (network.C1, network.C2, network.C3, network.C4):
            side = x.shape[-1]
            x = block(x)
            assert type(block) is nn.Sequential and len(block) == 3 and x.shape[-1] == side // 2


@pytest.mark.parametrize("arguments, side", [({}, 12), ({"dilation": 2}, 12), ({"stride": 2}, 6), ({"padding": 2}, 14)])
def test_a_standard_convolution_keeps_the_size_of_the_map_unless_it_has_a_stride_or_its_own_padding(arguments, side):
    assert conv(3, 4, **arguments)(torch.zeros(1, 3, 12, 12)).shape == (1, 4, side, side)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_receptive_field_is_what_the_gradients_reach(name):
    torch.manual_seed(0)
    network = build_network(name).double().eval()
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
    comments = re.findall(r"# (\d+) x (\d+) x (\d+), +(\d+)$", inspect.getsource(NETWORKS[name]), re.MULTILINE)
    units = convolution_units(trace(build_network(name)))
    measured = [(unit[-1].channels[1], unit[-1].size[1], unit[-1].size[1], unit[-1].receptive_field) for unit in units]
    assert [tuple(map(int, comment)) for comment in comments] == measured


@pytest.mark.parametrize("arguments, size", [
    ({}, (7, 10)), ({"stride": 2}, (16, 16)), ({"stride": 2}, (7, 10)),
    ({"dilation": 2}, (16, 16)), ({"dilation": 2}, (18, 9)), ({"dilation": 2}, (9, 18))])
def test_depthwise_is_the_same_convolution_in_fp32_and_under_bf16_autocast(arguments, size):
    torch.manual_seed(0)
    layer, x = Depthwise(8, **arguments), torch.randn(2, 8, *size)
    dilation = arguments.get("dilation", 1)
    exact = F.conv2d(x, layer.weight, None, arguments.get("stride", 1), dilation, dilation, groups=8)
    assert torch.equal(layer(x), exact)
    exact.square().sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)
    rounded.float().square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradient, rtol=0.02, atol=0.02 * gradient.abs().max().item())


def test_an_unknown_network_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'ResNet' is unknown: choose one of NetDilated, PublishedDilated"):
        build_network("ResNet")
