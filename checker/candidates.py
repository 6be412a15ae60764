"""The networks of a student's file, and how to build them."""

import ast
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

from .execution import is_harmless
from .neutral import inner_network
from .rows import one_line
from .source import called_name, module_calls
from .stand_ins import StandIn


class Way(NamedTuple):
    """A way to build a network."""

    label: str  # "Net(norm='BN')"
    build: Callable[[], nn.Module]
    guessed: bool = False  # whether the arguments are guesses from their names


class Candidate(NamedTuple):
    """Something in a file that may be the network."""

    name: str
    ways: list[Way]  # those to be preferred first
    place: int  # where the file builds it last: the larger the later; -1 if it never does


# what an argument without a default may be, by its name; the first pattern that matches counts
GUESSES = (
    (r"out_?(ch|plane|filter)", (16,)),
    (r"class|output|num_?out|n_?out|out_(dim|features)|labels", (10,)),
    (r"drop|^p$|prob", (0.1,)),
    (r"norm|^bn$", ("BN", "bn", "batch", "BatchNorm", nn.BatchNorm2d)),
    (r"^act|activation|relu", (nn.ReLU,)),
    (r"in_?(put)?_?(ch|plane|dim|feat)|channels?$|^in_?c|input", (3,)),
    (r"base|width|filters|planes|hidden|growth|start|out_?c|ch", (16,)),
    (r"image|img|size", (32,)),
    (r"kernel", (3,)),
    (r"device", ("cpu",)),
    (r"bias|use|is_|with|verbose|debug", (False,)),
    (r"groups|stride|padding|dilation|mult|ratio|scale|expansion|reduction", (1,)),
)


def find_candidates(module: types.ModuleType, statements: list[ast.stmt]) -> list[Candidate]:
    """Return what may be the network of a file that was executed, in the order of definition.

    These are the classes of networks that it defines, or, if there is none, that it imports from
    its neighbours, and instances that it keeps.
    """
    calls = module_calls(statements)
    names = vars(module)
    classes = {name: each for name, each in names.items() if _is_network_class(each)}
    own = {name: each for name, each in classes.items() if each.__module__ == module.__name__}
    if not own:
        folder = str(Path(module.__file__).parent.parent)
        own = {name: each for name, each in classes.items() if _file_of(each).startswith(folder)}
    lines = [each.name for each in statements if isinstance(each, ast.ClassDef)]
    order = {name: place for place, name in enumerate(lines)}  # where each was defined last
    found = [
        Candidate(name, list(_ways(name, own[name], calls, module)), _last_call(name, calls))
        for name in sorted(own, key=lambda name: order.get(name, -1))
    ]
    instances = {
        name: each
        for name, each in names.items()
        if isinstance(each, nn.Module) and not name.startswith("_")
    }
    for name, each in instances.items():
        way = Way(name, lambda each=each: each)
        kind = type(inner_network(each))
        same = [other for other in found if own.get(other.name) is kind]
        if same:  # better than another one of its class, with guessed arguments
            same[0].ways.append(way._replace(label=f"{same[0].name}, as {name}"))
        else:
            found.append(Candidate(name, [way], _last_binding(name, statements)))
    functions = {name: each for name, each in names.items() if _may_build(each, module)}
    known = {each.name for each in found}
    for name, function in functions.items():
        if name not in known and (not found or name == "Net"):
            ways = list(_ways(name, function, calls, module))
            found.append(Candidate(name, ways, _last_call(name, calls)))
    return found


def chosen_candidate(
    module: types.ModuleType, statements: list[ast.stmt], wanted: str
) -> Candidate:
    """Return what `FILE.py:Net` or `FILE.py:Net(norm='BN')` chooses.

    Raises:
        ValueError: the file has nothing of that name.
    """
    name = wanted.partition("(")[0]
    target = vars(module).get(name)
    if target is None:
        raise ValueError(f"there is no {name} in this file")
    if "(" in wanted:
        return Candidate(name, [Way(wanted, lambda: eval(wanted, vars(module)))], 0)
    if isinstance(target, nn.Module):
        return Candidate(name, [Way(name, lambda: target)], 0)
    return Candidate(name, list(_ways(name, target, module_calls(statements), module)), 0)


def _is_network_class(value):
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _file_of(value):
    try:
        return inspect.getfile(value)
    except (TypeError, OSError):
        return ""


def _may_build(value, module):
    """Return whether a function of the file seems to return a network."""
    if not inspect.isfunction(value) or value.__module__ != module.__name__:
        return False
    return bool(
        re.search(r"net|model|build|create|make", value.__name__, re.IGNORECASE)
        and not re.search(r"train|test|load|save|plot|eval|data", value.__name__, re.IGNORECASE)
    )


def _last_call(name, calls):
    places = [place for place, call in enumerate(calls) if called_name(call) == name]
    return max(places, default=-1)


def _last_binding(name, statements):
    """Return where a module binds a name: as many calls as there are before and in it."""
    place = -1
    for number, statement in enumerate(statements, 1):
        targets = [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
        if isinstance(statement, ast.Assign) and name in targets:
            place = len(module_calls(statements[:number])) - 1
    return place


def _ways(name, target, calls, module) -> Iterator[Way]:
    """Return the ways to build a network: as the file does, without arguments, with guesses."""
    for call in reversed(calls):
        if called_name(call) == name and (call.args or call.keywords):
            try:
                arguments = _evaluated(call, module)
            except Exception:  # they are known only within a function
                continue
            label = _label(name, *arguments)
            label = ast.unparse(call) if " at 0x" in label else label
            yield Way(label, _builder(target, *arguments))
    required = _required(target)
    if not required or not all(map(_guesses, required)):  # the error names what can't be guessed
        yield Way(name, _builder(target, [], {}))
    else:
        most = max(len(_guesses(each)) for each in required)
        for place in range(most):
            guess = {each: _guesses(each)[min(place, len(_guesses(each)) - 1)] for each in required}
            yield Way(_label(name, [], guess), _builder(target, [], guess), True)


def _evaluated(call, module):
    """Return the values of the arguments of a call in the file's own names."""

    def value(node):
        inner = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
        if not all(is_harmless(module, each) for each in inner):
            raise ValueError("this calls something")
        result = eval(compile(ast.Expression(node), "<argument>", "eval"), vars(module))
        if isinstance(result, StandIn):
            raise ValueError("this is of a missing package")
        return result

    arguments = []
    for node in call.args:
        if isinstance(node, ast.Starred):
            arguments += value(node.value)
        else:
            arguments.append(value(node))
    keywords = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            keywords.update(value(keyword.value))
        else:
            keywords[keyword.arg] = value(keyword.value)
    return arguments, keywords


def _builder(target, arguments, keywords):
    return lambda: target(*arguments, **keywords)


def _label(name, arguments, keywords):
    shown = [_shown(value) for value in arguments]
    shown += [f"{key}={_shown(value)}" for key, value in keywords.items()]
    return f"{name}({', '.join(shown)})"


def _shown(value):
    return value.__name__ if isinstance(value, type) else " ".join(repr(value).split())


def _required(target):
    """Return the names of the arguments without a default."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = [each for each in parameters if each.default is each.empty]
    return [each.name for each in needed if each.kind not in kinds]


def _guesses(name):
    for pattern, values in GUESSES:
        if re.search(pattern, name, re.IGNORECASE):
            return values
    return ()


def built(way: Way) -> nn.Module:
    """Build a network.

    Raises:
        ValueError: it can't be built; the message names the error.
    """
    try:
        network = way.build()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{way.label}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{way.label} makes no nn.Module")
    return network
