"""The square of image pixels that each element of a tensor can see, and how it grows."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


@dataclass
class Path:
    """How a tensor came from the image.

    `reach` has four tensors of its shape: the top, minus the bottom, the left and minus the right
    of the square of pixels that each element can see. The square around two squares is the minimum
    of these. Infinity is no pixel.
    """

    reach: list
    jump: float  # pixels between neighbouring positions
    sources: set  # of the places of the operations it comes from
    pooled: bool = False  # it has no positions any more
    whole: bool = False  # every position sees all others
    map: "Path | None" = None  # before the mean over rows or columns, half of a global pooling
    unpadded: int = 0  # the width of the map before it was padded, if it was

    def field(self, pick=min) -> float:
        """Return the side of the largest square, in pixels; of a rectangle, the shorter one."""
        if self.whole:
            return math.inf
        sides = []
        for low, high in (self.reach[:2], self.reach[2:]):
            side = 1 - (low + high)
            side = side[side.isfinite()]
            sides.append(float(side.max()) if side.numel() else 1.0)
        return pick(sides)

    def sides(self) -> list[int]:
        """Return how many positions the tensor has along the height and the width of the image."""
        counts = []
        for low, high in (self.reach[:2], self.reach[2:]):
            centre = (low - high) / 2
            centre = centre[centre.isfinite()]
            extent = float(centre.max() - centre.min()) if centre.numel() else 0
            counts.append(round(extent / self.jump) + 1)
        return counts


class Call(NamedTuple):
    """A call of an ATen function on tensors that come from the image."""

    func: object
    name: str
    args: tuple
    kwargs: dict
    known: dict  # id of a tensor -> its path before the call
    paths: list  # of the inputs that come from the image
    shape: tuple  # of the first of them before the call
    outputs: list

    def side(self) -> int:
        """Return the width of the first input."""
        return self.shape[-1]


def image_path(shape: tuple[int, ...]) -> Path:
    """Return the path of (N, C, H, W) images: each element sees its own pixel."""
    rows, columns = (_count(side) for side in shape[2:])
    reach = rows[:, None], -rows[:, None], columns, -columns
    return Path([part.expand(shape).clone() for part in reach], 1, set())


def nothing(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Return the squares of what comes from no pixel."""
    return [torch.full(shape, torch.inf, dtype=torch.float32, device="cpu") for _ in range(4)]


def _count(number):
    return torch.arange(number, dtype=torch.float32, device="cpu")


def around(paths: list[Path], shape: tuple[int, ...], uniform: bool) -> list[torch.Tensor]:
    """Return the squares around those of all paths: element by element, or one around them all."""
    reach = []
    for parts in zip(*(path.reach for path in paths), strict=True):
        parts = [part.amin() if uniform else part for part in parts]
        total = parts[0]
        for part in parts[1:]:
            total = torch.minimum(total, part)
        reach.append(total.expand(shape).clone())
    return reach


def is_map(path: Path) -> bool:
    """Return whether a tensor is (N, C, H, W), and not (N, H, W, C) or tokens."""
    left = path.reach[2]
    return left.ndim == 4 and bool((left == left[:, :, :1]).all())


def measured_jump(path: Path) -> float:
    """Return the smaller jump of a map's two axes; that of its past if it is no map."""
    if path.reach[0].ndim != 4:
        return path.jump
    top, left = path.reach[0].amin((0, 1, 3)), path.reach[2].amin((0, 1, 2))
    return min(_step(top, path.jump), _step(left, path.jump))


def _step(line, otherwise):
    """Return the distance of neighbours in a line, if it has some and all are as far apart."""
    steps = line.diff()
    even = len(steps) and bool((steps == steps[0]).all()) and 0 < steps[0] < math.inf
    return float(steps[0]) if even else otherwise


def window(before: Path, shape, kernel, steps, padding, gaps) -> Path:
    """Return the path of a map that a moving window makes of the map before.

    `shape` is that of the new map, (N, C, H, W); the others have a value for each of the two axes.
    The squares go on beyond the border of a map as in its middle.
    """
    jumps, reach = [], []
    for axis, (low, high) in ((-2, before.reach[:2]), (-1, before.reach[2:])):
        length, step, pad, gap = (each[axis] for each in (kernel, steps, padding, gaps))
        dims = [dim for dim in range(low.ndim) if dim != low.ndim + axis]
        first, last = low.amin(dims), high.amin(dims)
        jump, middle = _step(first, before.jump), (len(first) - 1) // 2
        places = jump * (step * _count(shape[axis]) - pad - middle)
        places = places[:, None] if axis == -2 else places
        end = jump * (length - 1) * gap
        reach.append((first[middle] + places).expand(shape).clone())
        reach.append((last[middle] - places - end).expand(shape).clone())
        jumps.append(jump * step)
    jump = max(min(jumps), before.jump * min(steps))  # of paths that met, the larger one counts
    return replace(before, reach=reach, jump=jump, sources=set(before.sources), unpadded=0)
