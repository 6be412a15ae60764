"""The tracer: follows what PyTorch executes on an image, and which pixels each element of a tensor
can see.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary


class Operation(NamedTuple):
    """One operation of a network that looks around, mixes channels or changes the size of the
    map.
    """

    kind: str  # convolution, pooling, global average pooling, global pooling, fully connected, resize, attention,
    #            squeeze-excite (whatever weighs a map by what was pooled from it), other
    name: str  # PyTorch's own name of it
    where: str  # the name of the module that does it; "" if it is the network's own forward
    channels: tuple  # in, out
    size: tuple  # side of the input, of the output, in positions
    kernel: int
    stride: float
    dilation: int
    groups: int
    jump: float  # image pixels between neighbouring positions of its input
    receptive_field: float  # side of the square of image pixels that one position can see: of its output, or of its
    #                         input if it leaves no positions; infinite after attention
    sources: frozenset  # the places in the list of the operations whose results it works on; empty for the image


@dataclass
class _Path:
    """How a tensor came from the image.

    `reach` has four tensors of its shape: the top, minus the bottom, the left and minus the right
    of the square of pixels that each element can see. The square around two squares is the minimum
    of these. Infinity is no pixel.
    """

    reach: list
    jump: float
    sources: set  # of the places of the operations it comes from
    pooled: bool = False  # it has no positions any more
    whole: bool = False  # every position sees all others
    map: "_Path | None" = (
        None  # before the mean over rows or columns, the first half of a global pooling
    )
    unpadded: int = 0  # the width of the map before it was padded, if it was

    def field(self, pick=min):
        """Return the side of the largest square, in pixels; of a rectangle, the shorter one."""
        seen = [-(low + high) + 1 for low, high in (self.reach[:2], self.reach[2:])]
        sides = [side[side.isfinite()] for side in seen]
        return (
            math.inf
            if self.whole
            else pick(float(side.max()) if side.numel() else 1.0 for side in sides)
        )

    def sides(self):
        """Return how many positions the tensor has along the height and the width of the image."""
        centres = [(low - high) / 2 for low, high in (self.reach[:2], self.reach[2:])]
        centres = [centre[centre.isfinite()] for centre in centres]
        return [
            round(float(each.max() - each.min()) / self.jump) + 1 if each.numel() else 1
            for each in centres
        ]


class End(Exception):
    """The tracer has come to the operation at which it was to stop."""


LAYOUT = {
    "view",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "permute",
    "transpose",
    "t",
    "slice",
    "select",
    "index",
    "index_select",
    "gather",
    "expand",
    "unsqueeze",
    "squeeze",
    "cat",
    "stack",
    "split",
    "split_with_sizes",
    "unbind",
    "roll",
    "flip",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "alias",
    "detach",
    "as_strided",
    "repeat",
    "unfold",
    "squeeze_",
    "unsqueeze_",
    "transpose_",
    "t_",
    "chunk",
    "diagonal",
    "narrow",
    "unsafe_split",
    "unsafe_chunk",
    "lift_fresh",
    "rot90",
}
MATRIX = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}
REDUCTION = {
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "var",
    "std",
    "logsumexp",
    "linalg_vector_norm",
    "norm",
    "var_mean",
}
FRESH = {
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_empty_strided",
    "bernoulli",
}


class Tracer(TorchDispatchMode):
    """Writes down the operations that PyTorch executes on the image and on what comes of it, up to
    operation `end`.
    """

    def __init__(self, model, end=None):
        super().__init__()
        self.operations, self.end = [], end
        self.last, self.maps = None, []  # the last (N, C, H, W) map, and that before each operation
        self.memory = set()  # where the tensors lie that were used
        self.paths = WeakTensorKeyDictionary()  # tensor -> _Path
        self.names, self.stack = {module: name for name, module in model.named_modules()}, [""]

    def __enter__(self):
        self.hooks = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module),
        ]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def _enter_module(self, module, _):
        self.stack.append(self.names.get(module, self.stack[-1]))

    def _leave_module(self, module, inputs, output):
        self.stack.pop()

    def follow(self, images):
        """Begin with these (N, C, H, W) images."""
        rows, columns = (torch.arange(float(side)) for side in images.shape[2:])
        reach = [
            each.expand(images.shape).clone()
            for each in (rows[:, None], -rows[:, None], columns, -columns)
        ]
        self.paths[images] = _Path(reach, 1, set())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.memory.update(
            tensor.untyped_storage().data_ptr()
            for tensor in inputs
            if tensor.layout == torch.strided
        )
        tracked = [tensor for tensor in inputs if tensor in self.paths]
        if not tracked:  # it works on weights only
            return func(*args, **kwargs)
        if tracked[0].ndim == 4:
            self.last = tracked[
                0
            ]  # and what is flattened of it is still the same map, until an operation mixes it
        paths, shape = [self.paths[tensor] for tensor in tracked], tracked[0].shape
        known = {id(tensor): path for tensor, path in zip(tracked, paths, strict=True)}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if outputs:
            call = _Call(
                func, func.overloadpacket.__name__, args, kwargs, known, paths, shape, outputs
            )
            for tensor, path in zip(outputs, self._follow(call), strict=False):
                self._set(tensor, path)
        return result

    def _set(self, tensor, path):
        """Keep the path of a tensor, its squares laid out in memory like it.

        What was written in place keeps the memory that its views share.
        """
        old = self.paths.get(tensor)
        if any(
            part.shape == tensor.shape and part.stride() != tensor.stride() for part in path.reach
        ):
            path = replace(
                path,
                reach=[
                    torch.empty_like(tensor, dtype=torch.float32, device="cpu").copy_(part)
                    for part in path.reach
                ],
            )
        if old and old is not path and old.reach[0].shape == tensor.shape == path.reach[0].shape:
            for here, new in zip(old.reach, path.reach, strict=True):
                here.copy_(new)
            old.sources.update(path.sources)
            path = replace(path, reach=old.reach, sources=old.sources)
        self.paths[tensor] = path

    def _follow(self, call):
        """Return the paths of the results of a call."""
        name = call.name
        if name in FRESH:
            return [_Path(_nothing(call.outputs[0].shape), call.paths[0].jump, set())]
        if name == "copy_":
            return self._copy(call)
        if (
            name in MATRIX
            or name in ("convolution", "_convolution")
            or "scaled_dot_product" in name
        ):
            if "conv" in name and call.args[1].ndim == 4 and max(call.args[1].shape[2:]) > 1:
                self._unpool(call)
            if all(path.pooled for path in call.paths):
                return [self._fully_connected(call)]
            if "conv" in name:
                return [self._convolution(call)]
            return [self._matrix(call) if name in MATRIX else self._attention(call, call.paths[0])]
        if all(path.pooled for path in call.paths):
            return [self._pooled(call, output.shape) for output in call.outputs]
        if name in LAYOUT or (
            name == "constant_pad_nd" and not (any(call.args[1][:4]) and _is_map(call.paths[0]))
        ):
            return self._layout(call)
        if "pool" in name:
            return [self._pooling(call)]
        if name in REDUCTION and (call.outputs[0].shape != call.shape or 1 in call.shape):
            return [self._reduction(call)]
        if "upsample" in name:
            return [self._resize(call)]
        if name == "constant_pad_nd" or "_pad2d" in name:
            return [self._padding(call)]
        return [self._elementwise(call)]

    def _record(
        self,
        call,
        kind,
        path,
        before,
        size,
        kernel=1,
        stride=1,
        dilation=1,
        groups=1,
        channels=None,
    ):
        """Write down an operation that turns the path `before` into `path`; return that path."""
        self.maps.append(self.last)
        if len(self.operations) == self.end:
            raise End
        field = (before if path.pooled else path).field()
        channels = channels or tuple(
            [1, *each[:2]][-1] for each in (call.shape, call.outputs[0].shape)
        )
        self.operations.append(
            Operation(
                kind,
                call.name,
                self.stack[-1],
                channels,
                tuple(size),
                kernel,
                stride,
                dilation,
                groups,
                before.jump,
                field,
                frozenset(before.sources),
            )
        )
        return replace(path, sources={len(self.operations) - 1})

    # ------------------------------------------------------------ what an operation does to the squares

    def _merged(self, call, shape, uniform=False):
        """Return the path of what depends on all inputs: element by element, or, if uniform, as a
        whole.
        """
        paths = [path for path in call.paths if not path.pooled] or call.paths
        paths = [
            path for path in paths if path.map is None
        ] or paths  # means of rows or columns weigh a map, too
        reach = []
        for parts in zip(*(path.reach for path in paths), strict=True):
            parts = [part.amin() if uniform else part for part in parts]
            total = parts[0]
            for part in parts[1:]:
                total = torch.minimum(total, part)
            reach.append(total.expand(shape).clone())
        whole = any(path.whole for path in paths)
        if (
            len({path.pooled for path in call.paths}) == 2
        ):  # what has no positions any more weighs a map that has
            pools = [self._weigh(path.sources) for path in call.paths if path.pooled]
            whole = whole or not all(pools)
        return _Path(
            reach,
            max(path.jump for path in paths),
            set().union(*(path.sources for path in paths)),
            all(path.pooled for path in paths),
            whole,
            paths[0].map,
        )

    def _weigh(self, sources):
        """Turn the operations between a global pooling and a map it weighs into squeeze-excite; say
        if there are any.

        There are none if the map was mixed by a matrix.
        """
        pools = True
        for place in sources:
            operation = self.operations[place]
            if operation.kind == "fully connected" and operation.size[0] > 1:
                self.operations[place] = operation._replace(kind="attention")
                pools = False
            elif operation.kind in (
                "fully connected",
                "pooling",
                "global pooling",
                "global average pooling",
            ):
                self.operations[place] = operation._replace(kind="squeeze-excite")
                pools = (
                    operation.kind != "fully connected" or self._weigh(operation.sources)
                ) and pools
        return pools

    def _unpool(self, call):
        """A window moves over what had seemed to be pooled at the end: make it a map again, and
        what led to it.
        """
        places = [place for path in call.paths if path.pooled for place in path.sources]
        while places:
            place = places.pop()
            operation = self.operations[place]
            if operation.kind == "fully connected":
                places += operation.sources
            kind = "convolution" if operation.kind == "fully connected" else "pooling"
            self.operations[place] = operation._replace(kind=kind)
        for path in call.paths:
            path.pooled = False

    def _pooled(self, call, shape):
        """Return the path of what has no positions. If its last map had only one, it may be pooled
        yet.
        """
        path = self._merged(call, shape, uniform=True)
        connected = any(self.operations[place].kind == "fully connected" for place in path.sources)
        if (
            connected
            and len(call.shape) == 4
            and ("pool" in call.name or call.name in ("mean", "amax"))
        ):
            return self._record(call, _global_kind(call.name), path, path, (1, 1))
        return path

    def _elementwise(self, call):
        shape = call.outputs[0].shape
        try:
            if torch.broadcast_shapes(*(path.reach[0].shape for path in call.paths)) in (
                shape,
                call.shape,
            ):
                return self._merged(call, shape)
        except RuntimeError:
            pass  # it is something else
        path = self._merged(call, shape, uniform=True)
        return self._record(call, "other", path, path, (call.side(), call.side()))

    def _layout(self, call):
        """Move the squares as the elements are moved."""
        path = self._merged(call, (), uniform=True)
        results = []
        for part in range(4):

            def reach(leaf, part=part):
                if not isinstance(leaf, torch.Tensor):
                    return leaf
                if id(leaf) in call.known:
                    return call.known[id(leaf)].reach[part]
                return torch.full(leaf.shape, torch.inf) if leaf.is_floating_point() else leaf

            function = (
                call.func
                if not call.name.endswith("_")
                else getattr(torch.ops.aten, call.name[:-1])
            )
            arguments = (*call.args[:2], torch.inf) if call.name == "constant_pad_nd" else call.args
            results.append(tree_leaves(function(*tree_map(reach, arguments), **call.kwargs)))
        sources = (
            call.paths[0].sources if len(call.paths) == 1 else path.sources
        )  # views share their sources
        paths = [
            replace(path, reach=list(reach), sources=sources)
            for reach in zip(*results, strict=True)
        ]
        for number, (each, output) in enumerate(zip(paths, call.outputs, strict=False)):
            jump = _jump(each)
            if jump != each.jump and output.ndim == len(call.shape) == 4:
                each.jump = jump
                paths[number] = self._record(
                    call,
                    "resize",
                    each,
                    path,
                    (call.side(), output.shape[-1]),
                    stride=jump / path.jump,
                    channels=(call.shape[1], output.shape[1]),
                )
        return paths

    def _copy(self, call):
        """Write into a part of a tensor, perhaps a new one."""
        target, path = call.args[0], call.known.get(id(call.args[1]))
        if path is None:
            return [self.paths[target]]
        if target not in self.paths:
            base = target if target._base is None else target._base
            whole = _Path(_nothing(base.shape), path.jump, set())
            view = [
                each.as_strided(target.shape, target.stride(), target.storage_offset())
                for each in whole.reach
            ]
            self.paths[base], self.paths[target] = whole, replace(whole, reach=view)
        return [
            replace(
                path,
                reach=[each.expand(target.shape) for each in path.reach],
                sources=set(path.sources),
            )
        ]

    def _convolution(self, call):
        data, weight, _, stride, padding, dilation, transposed, _, groups = call.args[:9]
        before, output = call.known.get(id(data), call.paths[0]), call.outputs[0]
        channels, sizes = (
            (data.shape[1], output.shape[1]),
            (before.unpadded or data.shape[-1], output.shape[-1]),
        )
        kernel, steps, gaps = weight.shape[2:], stride, dilation
        if data.ndim != 4:
            path = self._merged(call, output.shape, uniform=True)
            return self._record(call, "other", path, before, (before.sides()[1], 1))
        if transposed:
            steps = [1 / step for step in steps]
            padding = [
                ((side - 1) * gap - pad) * step
                for side, gap, pad, step in zip(kernel, gaps, padding, steps, strict=True)
            ]
            gaps = [gap * step for gap, step in zip(gaps, steps, strict=True)]
        path = _window(before, output.shape, kernel, steps, padding, gaps)
        kind = "resize" if transposed else "squeeze-excite" if before.map else "convolution"
        return self._record(
            call,
            kind,
            path,
            before,
            sizes,
            max(kernel),
            max(steps),
            max(dilation),
            groups,
            channels,
        )

    def _pooling(self, call):
        data, output, before = call.args[0], call.outputs[0], call.paths[0]
        if "3d" in call.name and _pair(call.args[1])[-2:] == [
            1,
            1,
        ]:  # of channels, as local response norm does
            reach = [
                each.amin(2, keepdim=True).expand(output.shape).clone() for each in before.reach
            ]
            return replace(before, reach=reach, sources=set(before.sources))
        if "adaptive" in call.name:
            steps = [
                side / out for side, out in zip(data.shape[-2:], output.shape[-2:], strict=False)
            ]
            kernel, padding = [math.ceil(step) for step in steps], [0, 0]
        else:
            kernel = _pair(call.args[1])
            steps, padding = (
                _pair(call.args[place]) if len(call.args) > place and call.args[place] else default
                for place, default in ((2, kernel), (3, [0, 0]))
            )
        path, sides = _window(before, output.shape, kernel, steps, padding, [1, 1]), data.shape[-2:]
        path.pooled = output.shape[-2:] == (1, 1)
        covers = all(
            pad < length and side - pad >= length
            for side, pad, length in zip(kernel, padding, sides, strict=True)
        )
        kind = _global_kind(call.name) if path.pooled and covers else "pooling"
        return self._record(
            call,
            kind,
            path,
            before,
            (sides[1], output.shape[-1]),
            max(kernel),
            max(steps),
            channels=(data.shape[1], output.shape[1]),
        )

    def _reduction(self, call):
        """Reduce over channels, or over positions: that is pooling if it leaves none of them."""
        before, output = call.paths[0], call.outputs[0]
        dims = (
            call.args[1]
            if len(call.args) > 1 and call.name not in ("linalg_vector_norm", "norm")
            else None
        )
        dims = call.args[2] if dims is None and len(call.args) > 2 else dims
        dims = [dims] if isinstance(dims, int) else list(dims or range(len(call.shape)))
        dims = sorted({dim % len(call.shape) for dim in dims})
        reach = [
            each.amin(dims, keepdim=len(output.shape) == len(call.shape)) for each in before.reach
        ]
        path, sides = replace(before, reach=reach, sources=set(before.sources)), before.sides()
        if max(path.sides()) > 1:
            return (
                replace(path, map=before.map or before)
                if 1 in path.sides() and path.sides() != sides
                else path
            )
        if max(sides) == 1 and not {2, 3} <= set(dims):
            return path
        before = before.map or before
        side = call.shape[-1] if {2, 3} <= set(dims) else max(before.sides())
        return self._record(
            call,
            _global_kind(call.name),
            replace(path, pooled=True, map=None),
            before,
            (side, 1),
            side,
        )

    def _resize(self, call):
        """Interpolate, which is PyTorch's "upsample" in both directions."""
        before, output = call.paths[0], call.outputs[0]
        steps = [side / out for side, out in zip(call.shape[2:], output.shape[2:], strict=True)]
        if steps == [1, 1]:
            return self._merged(call, output.shape)
        taps = 2 if "linear" in call.name else 4 if "cubic" in call.name else 1
        taps = [taps * max(1, step) if "aa" in call.name else taps for step in steps]
        padding = [(tap - step) / 2 for tap, step in zip(taps, steps, strict=True)]
        path = _window(before, output.shape, taps, steps, padding, [1, 1])
        return self._record(
            call,
            "resize",
            path,
            before,
            (call.side(), output.shape[-1]),
            max(taps),
            max(steps),
            channels=(call.shape[1], output.shape[1]),
        )

    def _padding(self, call):
        """Go on beyond the border as within."""
        padding = list(call.args[1])
        path = _window(
            call.paths[0],
            call.outputs[0].shape,
            [1, 1],
            [1, 1],
            [padding[2] if len(padding) > 2 else 0, padding[0]],
            [1, 1],
        )
        return replace(path, unpadded=call.side())

    def _matrix(self, call):
        """Multiply by a matrix, which mixes what lies along its side: channels, a patch, or all
        positions.
        """
        left, right = [leaf for leaf in tree_leaves(call.args) if isinstance(leaf, torch.Tensor)][
            -2:
        ]
        if id(left) in call.known and id(right) in call.known:
            return self._attention(call, call.known[id(left)])
        data, axis = (left, -1) if id(left) in call.known else (right, -2 if right.ndim > 1 else -1)
        before, shape = call.known[id(data)], call.outputs[0].shape
        reach = [
            each.amin(axis, keepdim=data.ndim == len(shape)).expand(shape).clone()
            for each in before.reach
        ]
        path, side = replace(before, reach=reach), max(before.sides())
        kernel = (
            1 + round((path.field(max) - before.field(max)) / before.jump)
            if not before.whole
            else 1
        )
        if max(path.sides()) == 1:
            path.pooled = True
            return self._record(call, "fully connected", path, before, (side, 1))
        if kernel > 1:
            path.jump = before.jump * kernel
        return self._record(
            call,
            "convolution",
            path,
            before,
            (side, max(path.sides())),
            kernel,
            kernel,
            channels=(data.shape[axis], shape[-1] if axis == -1 else shape[-2]),
        )

    def _attention(self, call, queries):
        reach = [
            each.amin(-1, keepdim=True).expand(call.outputs[0].shape).clone()
            for each in queries.reach
        ]
        path = replace(self._merged(call, (), uniform=True), reach=reach, whole=True)
        return self._record(call, "attention", path, path, [max(path.sides())] * 2)

    def _fully_connected(self, call):
        path = self._merged(call, call.outputs[0].shape, uniform=True)
        return self._record(call, "fully connected", path, path, (1, 1))


class _Call(NamedTuple):
    """A call of an ATen function on tensors that come from the image."""

    func: object
    name: str
    args: tuple
    kwargs: dict
    known: dict  # id of a tensor -> its path before the call
    paths: list  # of the inputs that come from the image
    shape: tuple  # of the first of them before the call
    outputs: list

    def side(self):
        """Return the width of the first input."""
        return self.shape[-1]


def _pair(value):
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _nothing(shape):
    """Return the squares of what comes from no pixel."""
    return [torch.full(shape, torch.inf) for _ in range(4)]


def _global_kind(name):
    average = "avg" in name or name in ("mean", "sum")
    return "global average pooling" if average else "global pooling"


def _is_map(path):
    """Return whether a tensor is (N, C, H, W), and not (N, H, W, C) or tokens."""
    left = path.reach[2]
    return left.ndim == 4 and bool((left == left[:, :, :1]).all())


def _jump(path):
    """Return the smaller jump of a map's two axes, measured at its middle; that of its past if it
    is no map.
    """
    if path.reach[0].ndim != 4:
        return path.jump
    return min(
        _step(path.reach[place].amin(dims), path.jump)
        for place, dims in ((0, (0, 1, 3)), (2, (0, 1, 2)))
    )


def _step(line, otherwise):
    """Return the distance of neighbouring positions in a line, if there are any and it is the same
    for all.
    """
    steps = line.diff()
    even = len(steps) and bool((steps == steps[0]).all()) and 0 < steps[0] < math.inf
    return float(steps[0]) if even else otherwise


def _window(before, shape, kernel, steps, padding, gaps):
    """Return the path of a (N, C, H, W) map of that shape, made by a window that moves over the map
    before.

    The squares go on beyond the border of a map as in its middle.
    """
    jumps, reach = [], []
    for axis, (low, high) in ((-2, before.reach[:2]), (-1, before.reach[2:])):
        length, step, pad, gap = (each[axis] for each in (kernel, steps, padding, gaps))
        dims = [dim for dim in range(low.ndim) if dim != low.ndim + axis]
        first, last = low.amin(dims), high.amin(dims)
        jump, middle = _step(first, before.jump), (len(first) - 1) // 2
        places = jump * (step * torch.arange(float(shape[axis])) - pad - middle)
        places = places[:, None] if axis == -2 else places
        reach += [
            (first[middle] + places).expand(shape).clone(),
            (last[middle] - places - jump * (length - 1) * gap).expand(shape).clone(),
        ]
        jumps.append(jump * step)
    jump = max(min(jumps), before.jump * min(steps))  # of paths that met, the larger one counts
    return replace(before, reach=reach, jump=jump, sources=set(before.sources), unpadded=0)
