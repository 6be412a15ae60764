"""Networks in other people's styles, written without our building blocks."""
import torch
import torch.nn.functional as F
from torch import nn


class PlainSequential(nn.Module):
    """Everything in one list, average pooling of a fixed size, `view` before the linear layer. Keeps all rules."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (16, 24, 32, 48):
            for stride, dilation in ((1, 1), (1, 2), (2, 1)):
                layers += [nn.Conv2d(channels, channels, 3, stride, dilation, dilation, groups=channels, bias=False),
                           nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                           nn.Dropout(0.05)]
                channels = width
        self.features, self.gap, self.fc = nn.Sequential(*layers), nn.AvgPool2d(2), nn.Linear(48, 10)

    def forward(self, x):
        x = self.gap(self.features(x))
        return F.log_softmax(self.fc(x.view(x.size(0), -1)), dim=-1)


class Functional(nn.Module):
    """No layer objects: parameters, `F.conv2d`, padding and pooling by hand, in two steps. Keeps all rules."""

    def __init__(self):
        super().__init__()
        widths = [3, 8, 8, 8, 16, 16, 16, 24, 24, 24, 32, 32, 10]
        self.full = nn.ParameterList(nn.Parameter(torch.randn(b, a, 3, 3) / (3 * a**0.5))
                                     for a, b in zip(widths, widths[1:], strict=False))
        self.depth, self.point = nn.Parameter(torch.randn(8, 1, 3, 3) / 3), nn.Parameter(torch.randn(8, 8, 1, 1) / 3)

    def forward(self, x):
        for number, weight in enumerate(self.full, 1):
            x = F.pad(x, [2 if number == 4 else 1] * 4)
            if number == 2:
                x = F.conv2d(F.conv2d(x, self.depth, groups=8), self.point)
            else:
                x = F.conv2d(x, weight, stride=2 if number % 3 == 0 else 1, dilation=2 if number == 4 else 1)
            x = F.relu_(x)
        return x.mean(-1).mean(-1)


class PooledBlocks(nn.Module):
    """Max pooling between the blocks, the global one as a mean over two axes."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 16, 16, 24, 24, 24, 32, 32, 32, 40, 40, 10)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])

    def forward(self, x):
        for number, (convolution, norm) in enumerate(zip(self.convs, self.norms, strict=True), 1):
            x = norm(torch.relu(convolution(x)))
            x = F.max_pool2d(x, 2) if number % 3 == 0 else x
        return x.mean(dim=[2, 3])


class BasicBlock(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(a, b, 3, stride, 1), nn.Conv2d(b, b, 3, 1, 1)
        self.shortcut = nn.Conv2d(a, b, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def resnet():
    """Blocks that begin with the stride, and have a third convolution in the shortcut."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), BasicBlock(16, 16, 1), BasicBlock(16, 24, 2), BasicBlock(24, 32, 2),
                         nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(32, 10))


class SqueezeExcite(nn.Module):
    """An inverted residual block in the style of MobileNetV3: a global pooling inside."""

    def __init__(self, width, stride):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width),
                                    nn.Hardswish())
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 5, stride, 2, groups=2 * width)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2 * width, 8, 1), nn.ReLU(),
                                     nn.Conv2d(8, 2 * width, 1), nn.Hardsigmoid())
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if x.shape == y.shape else y


def mobilenet():
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), SqueezeExcite(16, 1), SqueezeExcite(16, 2), SqueezeExcite(16, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 10))


class Mixer(nn.Module):
    """Patches as tokens, mixed by matrix products: no convolution anywhere."""

    def __init__(self):
        super().__init__()
        self.embed, self.tokens, self.channels = nn.Linear(48, 32), nn.Linear(64, 64), nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = x.view(-1, 3, 8, 4, 8, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 64, 48)
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head(F.gelu(self.channels(x)).mean(1))


class Sliced(PlainSequential):
    """Halves the resolution by leaving out every other pixel, and the last time by a pixel shuffle, not by strides."""

    def forward(self, x):
        for layer in self.features:
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2):
                x = F.conv2d(x, layer.weight, None, 1, 1, 1, layer.groups)[:, :, ::2, ::2]
            else:
                x = layer(x)
        x = F.pixel_unshuffle(x, 2)[:, :48]
        return self.fc(x.mean((2, 3)))


class FixedSize(nn.Module):
    """A learned offset for each pixel, so that no other image size will do; too narrow a view; dense head."""

    def __init__(self, dilation=1):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, 3, 32, 32))
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, dilation, dilation), nn.Conv2d(8, 8, 3, 1, dilation, dilation)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8192, 10))

    def forward(self, x):
        return self.head(self.b(F.relu(self.a(x + self.offset))))


class Resized(PlainSequential):
    """Works on images of another size, and may change it once more between two blocks."""

    def __init__(self, scale, between=1, antialias=False):
        super().__init__()
        self.scale, self.between, self.antialias, self.gap = scale, between, antialias, nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = F.interpolate(x, scale_factor=self.scale, mode="bilinear", antialias=self.antialias)
        x = self.features[:30](x)
        x = F.interpolate(x, scale_factor=self.between) if self.between > 1 else x
        return self.fc(self.gap(self.features[30:](x)).flatten(1))


class SideBySide(nn.Module):
    """A depthwise and a pointwise convolution one after the other, but neither works on the other's result."""

    def __init__(self):
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        return self.head(torch.cat([self.depthwise(x), self.pointwise(x)], 1).mean((2, 3)))
