"""The networks, and the instruments that measure them, against the assignment and against gradients."""
import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from model import NETWORKS, Depthwise, Dropout, build_network, count_macs, count_parameters, receptive_field, trace
from utils import convolution_units


@pytest.mark.parametrize("name, parameters", [("PublishedDilated", 195_508), ("PublishedDepthwise", 198_776)])
def test_published_networks_have_the_published_parameters(name, parameters):
    assert count_parameters(build_network(name)) == parameters


@pytest.mark.parametrize("name, macs", [("PublishedDilated", 93.3), ("PublishedDepthwise", 48.4)])
def test_published_networks_have_the_published_multiply_accumulates(name, macs):
    assert count_macs(build_network(name)) / 1e6 == pytest.approx(macs, abs=0.06)


def test_ours_has_no_more_parameters_than_the_published_one_of_that_name():
    assert count_parameters(build_network("NetDilated")) <= 195_508


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("classes", [10, 7])
def test_logits(name, classes):
    assert build_network(name, classes)(torch.randn(2, 3, 32, 32)).shape == (2, classes)


def test_ours_is_four_blocks_of_three_units_at_any_input_size():
    network = build_network("NetDilated")
    blocks = (network.C1, network.C2, network.C3, network.C4)
    assert all(type(block) is nn.Sequential and len(block) == 3 for block in blocks)
    for size in (32, 48, 96):
        x = torch.randn(1, 3, size, size)
        for block in blocks:
            side = x.shape[-1]
            x = block(x)
            assert x.shape[-1] == side // 2


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_field_is_what_the_gradients_reach(name):
    torch.manual_seed(0)
    network = build_network(name).double().eval()
    rows, columns = torch.zeros(280, dtype=bool), torch.zeros(280, dtype=bool)
    for _ in range(3):  # a ReLU hides a path in one image, hardly in three
        image = torch.randn(1, 3, 280, 280, dtype=torch.float64, requires_grad=True)
        features = network.C4(network.C3(network.C2(network.C1(network.enlarge(image)))))
        middle = features.shape[-1] // 2
        features[..., middle, middle].sum().backward()
        reached = image.grad[0].ne(0).any(0)
        rows, columns = rows | reached.any(1), columns | reached.any(0)
    assert rows.sum() == columns.sum() == receptive_field(network)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_comment_beside_each_layer_tells_its_shape_and_receptive_field(name):
    comments = re.findall(r"# (\d+) x (\d+) x \d+, +(\d+)$", inspect.getsource(NETWORKS[name]), re.MULTILINE)
    units = convolution_units(trace(build_network(name)))
    measured = [(unit[-1].channels[1], unit[-1].size[1], unit[-1].receptive_field) for unit in units]
    assert [tuple(map(int, comment)) for comment in comments] == measured


@pytest.mark.parametrize("name", NETWORKS)
def test_trace_sees_what_the_modules_say(name):
    network = build_network(name)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    steps = [step for step in trace(network) if step.operation == "convolution"]
    assert [(step.kernel, step.stride, step.dilation, step.groups) for step in steps] == [
        (layer.kernel_size[0], layer.stride[0], layer.dilation[0], layer.groups) for layer in convolutions]
    macs = sum(layer.weight.numel() * step.size[1] ** 2 for layer, step in zip(convolutions, steps))
    macs += sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear))
    assert macs == count_macs(network)


def test_trace_sees_functional_calls_and_takes_the_longest_path():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.long, self.short = nn.Conv2d(3, 8, 7, padding=3), nn.Conv2d(3, 8, 1)

        def forward(self, x):
            x = F.max_pool2d(self.long(x) + self.short(x), 2)
            return F.avg_pool2d(x, x.shape[-1]).flatten(1)

    steps = trace(Branches())
    assert [step.kind for step in steps] == ["convolution", "convolution", "pooling", "global average pooling"]
    assert receptive_field(Branches()) == 8  # 7, and 1 more through the pooling window of 2


def test_measuring_leaves_the_network_as_it_was():
    network = build_network("NetDilated").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trace(network), count_macs(network), receptive_field(network)
    assert network.training
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("size", [(16, 16), (7, 10), (18, 9)])
@pytest.mark.parametrize("arguments", [dict(), dict(stride=2), dict(dilation=2), dict(dilation=3), dict(kernel_size=5),
                                       dict(padding=2), dict(dilation=2, padding=1)])
def test_depthwise_is_the_same_convolution_in_fp32_and_under_bf16_autocast(arguments, size):
    torch.manual_seed(0)
    layer, x = Depthwise(8, **arguments), torch.randn(2, 8, *size)
    exact = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert torch.equal(layer(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_a_share_p_and_scales_the_rest(memory_format):
    torch.manual_seed(0)
    layer, x = Dropout(0.1), torch.ones(7, 16, 31, 33).contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    dropped = y.eq(0)
    assert y.stride() == x.stride() and y[~dropped].allclose(torch.tensor(1 / 0.9))
    deviation = (0.1 * 0.9 / x.numel()) ** 0.5
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=4 * deviation)
    for axis in range(4):  # neighbours share their random bits no more than others
        pairs = dropped & dropped.roll(1, axis)
        assert pairs.double().mean().item() == pytest.approx(0.01, abs=8 * deviation)
    y.sum().backward()
    assert torch.equal(x.grad, y) and not torch.equal(layer(x).eq(0), dropped)
    assert layer.eval()(x) is x or torch.equal(layer(x), x)


def test_unknown_network_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="'ResNet' is unknown: choose one of NetDilated, PublishedDilated"):
        model.build_network("ResNet")
