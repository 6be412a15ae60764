"""The tracer: follows what PyTorch executes on an image, and what each result of it can see."""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .squares import Call, Path, around, image_path, is_map, measured_jump, nothing, window


class Operation(NamedTuple):
    """What looks around, mixes channels or changes the size of the map."""

    # convolution, pooling, global average pooling, global pooling, fully connected, resize,
    # attention, squeeze-excite (what weighs a map by what was pooled from it), other
    kind: str
    name: str  # PyTorch's own name of it
    where: str  # the name of the module that does it; "" if it is the network's own forward
    channels: tuple  # in, out
    size: tuple  # side of the input, of the output, in positions
    kernel: int
    stride: float  # below 1 if the map grows
    dilation: int
    groups: int
    jump: float  # image pixels between neighbouring positions of its input
    # side of the square of image pixels that a position of its output can see, or of its input if
    # it leaves no positions; infinite after attention
    receptive_field: float
    sources: frozenset  # places in the list of operations whose results it works on


# names of ATen functions by what they do to the squares
LAYOUT = set(
    "view _unsafe_view reshape _reshape_alias permute transpose transpose_ t t_ slice select index "
    "index_select gather expand unsqueeze unsqueeze_ squeeze squeeze_ cat stack split chunk unbind "
    "split_with_sizes unsafe_split unsafe_chunk roll flip rot90 pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle alias detach lift_fresh as_strided repeat unfold "
    "diagonal narrow".split()
)
MATRIX = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv"}
NORMS = {"linalg_vector_norm", "norm"}  # whose second argument is no axis
REDUCTION = NORMS | set("mean sum amax amin max var std var_mean logsumexp".split())
FRESH = set(
    "new_empty new_zeros new_ones new_full new_empty_strided empty_like zeros_like ones_like "
    "full_like rand_like randn_like bernoulli".split()
)


class Tracer(TorchDispatchMode):
    """Writes down the operations that PyTorch executes on the image and on what comes of it."""

    def __init__(self, model):
        super().__init__()
        self.operations = []
        self.memory = set()  # where the tensors lie that were used
        self.paths = WeakTensorKeyDictionary()  # tensor -> Path
        # what torch.compile wraps keeps its name
        modules = [(name.replace("_orig_mod.", ""), each) for name, each in model.named_modules()]
        self.names, self.stack = {module: name for name, module in modules}, [""]

    @classmethod
    def _should_skip_dynamo(cls):
        """Keep PyTorch from importing its compiler, which takes longer than all of a check."""
        return False

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
        self.paths[images] = image_path(images.shape)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:
            if tensor.layout == torch.strided:
                self.memory.add(tensor.untyped_storage().data_ptr())
        tracked = [tensor for tensor in inputs if tensor in self.paths]
        if not tracked:  # it works on weights only
            return func(*args, **kwargs)
        # the paths and the shape from before the call, which may write in place
        paths, shape = [self.paths[tensor] for tensor in tracked], tracked[0].shape
        known = {id(tensor): path for tensor, path in zip(tracked, paths, strict=True)}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if outputs:
            name = func.overloadpacket.__name__
            call = Call(func, name, args, kwargs, known, paths, shape, outputs)
            for tensor, path in zip(outputs, self._follow(call), strict=False):
                self._set(tensor, path)
        return result

    def _set(self, tensor, path):
        """Keep the path of a tensor, its squares laid out in memory like it.

        What was written in place keeps the memory that its views share.
        """
        old, shape, stride = self.paths.get(tensor), tensor.shape, tensor.stride()
        if any(part.shape == shape and part.stride() != stride for part in path.reach):
            like = torch.empty_like(tensor, dtype=torch.float32, device="cpu")
            path = replace(path, reach=[like.clone().copy_(part) for part in path.reach])
        if old and old is not path and old.reach[0].shape == shape == path.reach[0].shape:
            for here, new in zip(old.reach, path.reach, strict=True):
                here.copy_(new)
            old.sources.update(path.sources)
            path = replace(path, reach=old.reach, sources=old.sources)
        self.paths[tensor] = path

    def _follow(self, call):
        """Return the paths of the results of a call."""
        name, convolves = call.name, call.name in ("convolution", "_convolution")
        if name in FRESH:
            return [Path(nothing(call.outputs[0].shape), call.paths[0].jump, set())]
        if name == "copy_":
            return self._copy(call)
        if convolves and call.args[1].ndim == 4 and max(call.args[1].shape[2:]) > 1:
            self._unpool(call)
        if convolves or name in MATRIX or "scaled_dot_product" in name:
            if all(path.pooled for path in call.paths):
                return [self._fully_connected(call)]
            if convolves:
                return [self._convolution(call)]
            return [self._matrix(call) if name in MATRIX else self._attention(call, call.paths[0])]
        if all(path.pooled for path in call.paths):
            return [self._pooled(call, output.shape) for output in call.outputs]
        if name == "constant_pad_nd" and not (any(call.args[1][:4]) and is_map(call.paths[0])):
            return self._layout(call)  # it pads channels, or tokens
        if name in LAYOUT:
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

    def _record(self, call, kind, path, before, size, window=(1, 1, 1, 1), channels=None):
        """Write down an operation that turns the path `before` into `path`; return that path.

        `window` is its kernel, stride, dilation and groups.
        """
        channels = channels or tuple(
            shape[1] if len(shape) > 1 else 1 for shape in (call.shape, call.outputs[0].shape)
        )
        field = (before if path.pooled else path).field()
        place = (call.name, self.stack[-1], channels, tuple(size))
        operation = Operation(kind, *place, *window, before.jump, field, frozenset(before.sources))
        self.operations.append(operation)
        return replace(path, sources={len(self.operations) - 1})

    # ------------------------------------------------------------ what is pooled and what it weighs

    def _merged(self, call, shape, uniform=False):
        """Return the path of what depends on all inputs, by elements or, if uniform, as a whole."""
        paths = [path for path in call.paths if not path.pooled] or call.paths
        # means of rows or columns weigh a map, too
        paths = [path for path in paths if path.map is None] or paths
        whole = any(path.whole for path in paths)
        if len({path.pooled for path in call.paths}) == 2:
            # what has no positions any more weighs a map that has
            pools = [self._weigh(path.sources) for path in call.paths if path.pooled]
            whole = whole or not all(pools)
        return Path(
            around(paths, shape, uniform),
            max(path.jump for path in paths),
            set().union(*(path.sources for path in paths)),
            all(path.pooled for path in paths),
            whole,
            paths[0].map,
        )

    def _weigh(self, sources):
        """Turn what leads from a global pooling to a map that it weighs into squeeze-excite.

        Return whether there is such a pooling. There is none if the map was mixed by a matrix.
        """
        pools = True
        for place in sources:
            operation = self.operations[place]
            if operation.kind == "fully connected" and operation.size[0] > 1:
                self.operations[place] = operation._replace(kind="attention")
                pools = False
            elif operation.kind == "fully connected" or "pooling" in operation.kind:
                self.operations[place] = operation._replace(kind="squeeze-excite")
                if operation.kind == "fully connected":
                    pools = self._weigh(operation.sources) and pools
        return pools

    def _unpool(self, call):
        """Make what had seemed to be pooled at the end a map again: a window moves over it."""
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
        """Return the path of what has no positions. A map of one position may be pooled yet."""
        path = self._merged(call, shape, uniform=True)
        connected = any(self.operations[place].kind == "fully connected" for place in path.sources)
        pools = "pool" in call.name or call.name in ("mean", "amax")
        if connected and pools and len(call.shape) == 4:
            return self._record(call, _global_kind(call.name), path, path, (1, 1))
        return path

    # ------------------------------------------------------------ what each operation does

    def _elementwise(self, call):
        shape = call.outputs[0].shape
        try:
            # torch.broadcast_shapes would import much that nothing else here needs
            broadcast = np.broadcast_shapes(*(path.reach[0].shape for path in call.paths))
        except ValueError:
            broadcast = None
        if broadcast in (shape, call.shape):
            return self._merged(call, shape)
        path = self._merged(call, shape, uniform=True)
        return self._record(call, "other", path, path, (call.side(), call.side()))

    def _layout(self, call):
        """Move the squares as the elements are moved."""
        path = self._merged(call, (), uniform=True)
        name, func, args = call.name, call.func, call.args
        if name.endswith("_"):
            func = getattr(torch.ops.aten, name[:-1])
        if name == "constant_pad_nd":
            args = (*args[:2], torch.inf)
        results = []
        for part in range(4):

            def reach(leaf, part=part):
                if not isinstance(leaf, torch.Tensor):
                    return leaf
                if id(leaf) in call.known:
                    return call.known[id(leaf)].reach[part]
                return nothing(leaf.shape)[0] if leaf.is_floating_point() else leaf

            results.append(tree_leaves(func(*tree_map(reach, args), **call.kwargs)))
        # views share their sources
        sources = call.paths[0].sources if len(call.paths) == 1 else path.sources
        reaches = zip(*results, strict=True)
        paths = [replace(path, reach=list(reach), sources=sources) for reach in reaches]
        for number, (each, output) in enumerate(zip(paths, call.outputs, strict=False)):
            jump = measured_jump(each)
            if jump != each.jump and output.ndim == len(call.shape) == 4:
                each.jump = jump
                shape = (1, jump / path.jump, 1, 1), (call.shape[1], output.shape[1])
                sides = call.side(), output.shape[-1]
                paths[number] = self._record(call, "resize", each, path, sides, *shape)
        return paths

    def _copy(self, call):
        """Write into a part of a tensor, perhaps a new one."""
        target, path = call.args[0], call.known.get(id(call.args[1]))
        if path is None:
            return [self.paths[target]]
        if target not in self.paths:
            base = target if target._base is None else target._base
            whole = Path(nothing(base.shape), path.jump, set())
            place = target.shape, target.stride(), target.storage_offset()
            view = [each.as_strided(*place) for each in whole.reach]
            self.paths[base], self.paths[target] = whole, replace(whole, reach=view)
        reach = [each.expand(target.shape) for each in path.reach]
        return [replace(path, reach=reach, sources=set(path.sources))]

    def _convolution(self, call):
        data, weight, _, steps, padding, gaps, transposed, _, groups = call.args[:9]
        before, output = call.known.get(id(data), call.paths[0]), call.outputs[0]
        if data.ndim != 4:
            path = self._merged(call, output.shape, uniform=True)
            return self._record(call, "other", path, before, (before.sides()[1], 1))
        kernel, dilation = weight.shape[2:], max(gaps)
        if transposed:
            steps = [1 / step for step in steps]
            axes = zip(kernel, gaps, padding, steps, strict=True)
            padding = [((side - 1) * gap - pad) * step for side, gap, pad, step in axes]
            gaps = [gap * step for gap, step in zip(gaps, steps, strict=True)]
        path = window(before, output.shape, kernel, steps, padding, gaps)
        kind = "resize" if transposed else "squeeze-excite" if before.map else "convolution"
        sides = before.unpadded or data.shape[-1], output.shape[-1]
        shape = (max(kernel), max(steps), dilation, groups), (data.shape[1], output.shape[1])
        return self._record(call, kind, path, before, sides, *shape)

    def _pooling(self, call):
        data, output, before = call.args[0], call.outputs[0], call.paths[0]
        sides = data.shape[-2:]
        if "3d" in call.name and _pair(call.args[1])[-2:] == [1, 1]:
            # of neighbouring channels, as local response norm does
            reach = [each.amin(2, keepdim=True).expand(output.shape) for each in before.reach]
            reach = [each.clone() for each in reach]
            return replace(before, reach=reach, sources=set(before.sources))
        if "adaptive" in call.name:
            steps = [side / out for side, out in zip(sides, output.shape[-2:], strict=False)]
            kernel, padding = [math.ceil(step) for step in steps], [0, 0]
        else:
            kernel, given = _pair(call.args[1]), len(call.args)
            steps = _pair(call.args[2]) if given > 2 and call.args[2] else kernel
            padding = _pair(call.args[3]) if given > 3 and call.args[3] else [0, 0]
        path = window(before, output.shape, kernel, steps, padding, [1, 1])
        path.pooled = output.shape[-2:] == (1, 1)
        covers = all(
            pad < length and side - pad >= length
            for side, pad, length in zip(kernel, padding, sides, strict=True)
        )
        kind = _global_kind(call.name) if path.pooled and covers else "pooling"
        shape = (max(kernel), max(steps), 1, 1), (data.shape[1], output.shape[1])
        return self._record(call, kind, path, before, (sides[1], output.shape[-1]), *shape)

    def _reduction(self, call):
        """Reduce over channels, or over positions: that is pooling if it leaves none of them."""
        before, rank = call.paths[0], len(call.shape)
        dims = _reduced_axes(call)
        keep = call.outputs[0].ndim == rank
        reach = [each.amin(dims, keepdim=keep) for each in before.reach]
        path, sides = replace(before, reach=reach, sources=set(before.sources)), before.sides()
        if max(path.sides()) > 1:
            along_one_axis = 1 in path.sides() and path.sides() != sides
            return replace(path, map=before.map or before) if along_one_axis else path
        if max(sides) == 1 and not {2, 3} <= set(dims):
            return path
        before = before.map or before
        side = call.side() if {2, 3} <= set(dims) else max(before.sides())
        path = replace(path, pooled=True, map=None)
        return self._record(call, _global_kind(call.name), path, before, (side, 1), (side, 1, 1, 1))

    def _resize(self, call):
        """Interpolate, which is PyTorch's "upsample" in both directions."""
        before, output = call.paths[0], call.outputs[0]
        steps = [side / out for side, out in zip(call.shape[2:], output.shape[2:], strict=True)]
        if steps == [1, 1]:
            return self._merged(call, output.shape)
        taps = 2 if "linear" in call.name else 4 if "cubic" in call.name else 1
        taps = [taps * max(1, step) if "aa" in call.name else taps for step in steps]
        padding = [(tap - step) / 2 for tap, step in zip(taps, steps, strict=True)]
        path = window(before, output.shape, taps, steps, padding, [1, 1])
        shape = (max(taps), max(steps), 1, 1), (call.shape[1], output.shape[1])
        return self._record(call, "resize", path, before, (call.side(), output.shape[-1]), *shape)

    def _padding(self, call):
        """Go on beyond the border as within."""
        padding = list(call.args[1])
        low = [padding[2] if len(padding) > 2 else 0, padding[0]]
        path = window(call.paths[0], call.outputs[0].shape, [1, 1], [1, 1], low, [1, 1])
        return replace(path, unpadded=call.side())

    def _matrix(self, call):
        """Multiply by a matrix, which mixes along an axis: channels, a patch, or all positions."""
        tensors = [leaf for leaf in tree_leaves(call.args) if isinstance(leaf, torch.Tensor)]
        left, right = tensors[-2:]
        if id(left) in call.known and id(right) in call.known:
            return self._attention(call, call.known[id(left)])
        data, axis = (left, -1) if id(left) in call.known else (right, -2 if right.ndim > 1 else -1)
        before, shape = call.known[id(data)], call.outputs[0].shape
        keep = data.ndim == len(shape)
        reach = [each.amin(axis, keepdim=keep).expand(shape).clone() for each in before.reach]
        path, side = replace(before, reach=reach), max(before.sides())
        if max(path.sides()) == 1:
            path.pooled = True
            return self._record(call, "fully connected", path, before, (side, 1))
        more = 0 if before.whole else path.field(max) - before.field(max)
        kernel = 1 + round(more / before.jump)
        if kernel > 1:
            path.jump = before.jump * kernel
        channels = data.shape[axis], shape[-1] if axis == -1 else shape[-2]
        sides, shape = (side, max(path.sides())), ((kernel, kernel, 1, 1), channels)
        return self._record(call, "convolution", path, before, sides, *shape)

    def _attention(self, call, queries):
        shape = call.outputs[0].shape
        reach = [each.amin(-1, keepdim=True).expand(shape).clone() for each in queries.reach]
        path = replace(self._merged(call, (), uniform=True), reach=reach, whole=True)
        return self._record(call, "attention", path, path, [max(path.sides())] * 2)

    def _fully_connected(self, call):
        path = self._merged(call, call.outputs[0].shape, uniform=True)
        return self._record(call, "fully connected", path, path, (1, 1))


def _pair(value):
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _reduced_axes(call):
    """Return the axes that a reduction removes, counted from 0; all of them if it names none."""
    rank, args = len(call.shape), call.args
    dims = args[1] if len(args) > 1 and call.name not in NORMS else None
    if dims is None and len(args) > 2:
        dims = args[2]
    dims = [dims] if isinstance(dims, int) else list(dims or range(rank))
    return sorted({dim % rank for dim in dims})


def _global_kind(name):
    average = "avg" in name or name in ("mean", "sum")
    return "global average pooling" if average else "global pooling"
