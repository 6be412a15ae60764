"""The convolutions of a network, as a person would count them."""

from torch import nn

from .operations import trace, whole_pixels
from .tables import markdown_table
from .tracer import Operation

Unit = tuple[Operation, ...]  # a convolution, or a depthwise one with its pointwise one


def convolution_units(operations: list[Operation], early: bool = False) -> list[Unit]:
    """Return the convolutions, each as a tuple of operations.

    A depthwise convolution and the pointwise one before or after it are one unit, with several
    depthwise ones side by side as with one. Between two pointwise ones it belongs to the later one,
    or to the earlier one if `early`.
    """
    chains = {}  # place of its last operation -> places of depthwise and of pointwise ones, in turn
    for place, operation in enumerate(operations):
        if operation.kind == "convolution":
            partners = _partners(operations, chains, operation)
            links = [chains.pop(partner) for partner in partners]
            before = [step for link in links for step in link[:-1]]
            chains[place] = [*before, *([partners] if partners else []), (place,)]
    units = []
    for chain in chains.values():
        single = len(chain) % 2 and role_of(operations[chain[0][0]]) == "pointwise" and not early
        parts = [chain[:1]] * single + [
            chain[first : first + 2] for first in range(single, len(chain), 2)
        ]
        units += [sum(part, ()) for part in parts if part]
    return [tuple(operations[place] for place in unit) for unit in sorted(units)]


def _partners(operations, chains, operation):
    """Return the places of the depthwise convolutions that a pointwise one works on, or the other
    way round.

    What they work on themselves may be added to their results, as in a shortcut around them.
    """
    sources = operation.sources
    if len(sources) == 1:
        (source,) = sources
        if operations[source].kind == "resize" and operations[source].stride > 1:
            sources = operations[source].sources  # every other position of the one before
    wanted = {"pointwise": "depthwise", "depthwise": "pointwise"}.get(role_of(operation))
    partners = tuple(
        sorted(
            place for place in sources if place in chains and role_of(operations[place]) == wanted
        )
    )
    around = set().union(*(operations[place].sources for place in partners))
    alone = len(partners) == 1 or wanted == "depthwise"
    return partners if alone and sources - set(partners) <= around else ()


def role_of(operation: Operation) -> str:
    """Return whether a convolution is "depthwise", "pointwise" or "standard"."""
    if operation.groups > 1 and operation.groups == operation.channels[0]:
        return "depthwise"
    return "pointwise" if (operation.kernel, operation.groups) == (1, 1) else "standard"


def describe(unit: Unit) -> str:
    """Return what a convolution is, as "pointwise + 3x3 depthwise, stride 2"."""
    kernels = " + ".join(
        "pointwise"
        if role_of(each) == "pointwise"
        else f"{each.kernel}x{each.kernel} {role_of(each)}"
        for each in unit
    )
    return kernels + "".join(
        f", {name} {max(values):g}"
        for name, values in (
            ("dilation", [each.dilation for each in unit if each.kernel > 1]),
            ("stride", [each.stride for each in unit]),
        )
        if max(values, default=1) > 1
    )


def receptive_fields(model: nn.Module) -> list[float]:
    """Return the receptive field after each convolution, in pixels, in order.

    It is the side of a square, and may end in a half where images are upsampled first.
    """
    return [unit[-1].receptive_field for unit in convolution_units(trace(model))]


def layers_table(model: nn.Module) -> str:
    """Return the convolutions of a network as a Markdown table: output shape, receptive field and
    jump, in pixels.
    """
    rows = []
    for number, unit in enumerate(convolution_units(trace(model)), 1):
        last = unit[-1]
        rows.append(
            (
                str(number),
                describe(unit),
                f"{last.channels[1]} x {last.size[1]} x {last.size[1]}",
                f"{whole_pixels(last.receptive_field)}",
                f"{last.jump * last.stride:g}",
            )
        )
    return markdown_table(("", "convolution", "output", "receptive field:", "jump:"), rows)


def stride_of(unit: Unit) -> float:
    """Return the stride of a convolution."""
    return max(operation.stride for operation in unit)


def is_strided(unit: Unit) -> bool:
    """Return whether a convolution has a stride above 1."""
    return stride_of(unit) > 1


def is_dilated(unit: Unit) -> bool:
    """Return whether a convolution has a dilation above 1 that makes a difference."""
    return any(operation.dilation > 1 and operation.kernel > 1 for operation in unit)


def place_of(operation: Operation) -> str:
    """Return where an operation is, in the words of the network's author."""
    return operation.where or "forward"


def name_of(unit: Unit) -> str:
    """Return a convolution as "conv1 3x3 16->32"."""
    kind = describe(unit).replace(" standard", "")
    return f"{unit[0].where} {kind} {unit[0].channels[0]}->{unit[-1].channels[1]}".strip()
