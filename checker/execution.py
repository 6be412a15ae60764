"""Executing a student's file: the whole of it, or only its imports, classes and constants."""

import ast
import importlib.util
import sys
import types
from dataclasses import is_dataclass
from pathlib import Path

from torch import nn

from .rows import one_line
from .source import Source
from .stand_ins import StandIn

DEFINITIONS = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# what a constant may be made with
BUILTINS = set(
    "dict list tuple set frozenset int float str bool range len min max sum abs round zip "
    "enumerate sorted map filter getattr hasattr isinstance type super object property".split()
)
MAKERS = {"device", "tensor", "partial", "namedtuple", "OrderedDict", "defaultdict", "array"}
MAKERS |= {"Path", "SimpleNamespace", "is_available"}
PACKAGES = ("torch.nn", "albumentations", "torchvision.transforms")


def new_module(path: Path) -> types.ModuleType:
    """Return an empty module for a file, which may import its neighbours, also as of a package."""
    package = path.parent.name
    if package in sys.modules or (path.parent / f"{package}.py").exists():
        package = f"folder_{package}"  # it must not hide another module
    home = sys.modules[package] = types.ModuleType(package)
    home.__path__ = [str(path.parent)]
    name = f"{package}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.with_suffix(".py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    return module


def execute_whole(module: types.ModuleType, source: Source) -> None:
    """Execute all of a Python file. Its own errors pass through, SystemExit among them."""
    exec(compile(source.text(), module.__file__, "exec"), vars(module))


def execute_definitions(module: types.ModuleType, source: Source) -> list[str]:
    """Execute only imports, classes, functions and constants; return the errors on the way.

    A name whose import fails becomes a stand-in, so that a class that doesn't need it is defined.
    """
    errors = []
    for statement in source.statements():
        _execute(module, statement, errors)
    return errors


def _execute(module, statement, errors):
    if isinstance(statement, ast.If | ast.Try):
        _execute_parts(module, statement, errors)
    elif isinstance(statement, DEFINITIONS) or _is_constant(module, statement):
        try:
            _run(module, _without_device(statement))
        except (Exception, SystemExit) as error:
            errors.append(f"{type(error).__name__}: {one_line(error)}")
            _stand_in(module, statement, error)


def _execute_parts(module, statement, errors):
    """Execute the definitions within `if` (of the branch that is taken) and `try`."""
    parts = [*statement.body, *getattr(statement, "finalbody", [])]
    if isinstance(statement, ast.If):
        test = statement.test
        if "__name__" in ast.unparse(test) or not _is_harmless_value(module, test):
            return
        try:
            taken = eval(compile(ast.Expression(test), module.__file__, "eval"), vars(module))
        except Exception:
            return
        parts = statement.body if taken else statement.orelse
    for part in parts:
        _execute(module, part, errors)


def _run(module, statement):
    tree = ast.fix_missing_locations(ast.Module([statement], []))
    exec(compile(tree, module.__file__, "exec"), vars(module))


def _stand_in(module, statement, error):
    """Bind the names of a failed import to stand-ins."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        package = getattr(error, "name", None) or getattr(statement, "module", None) or "import"
        for alias in statement.names:
            name = (alias.asname or alias.name).split(".")[0]
            if name != "*":
                vars(module).setdefault(name, StandIn(package, name))


def _without_device(statement):
    """Return `model = Net().to("cuda")` as `model = Net()`."""
    value = getattr(statement, "value", None)
    while (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr in ("to", "cuda")
        and isinstance(value.func.value, ast.Call)
    ):
        value = statement.value = value.func.value
    return statement


def _is_constant(module, statement):
    """Return whether a statement binds a name to something that is harmless to make."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return False
    value = _without_device(statement).value
    return value is not None and _is_harmless_value(module, value)


def _is_harmless_value(module, expression):
    nodes = list(ast.walk(expression))
    if any(isinstance(node, ast.Await | ast.Yield | ast.YieldFrom) for node in nodes):
        return False
    return all(is_harmless(module, node) for node in nodes if isinstance(node, ast.Call))


def is_harmless(module: types.ModuleType, call: ast.Call) -> bool:
    """Return whether a call only makes an object: a layer, a transform, a list."""
    function = call.func
    if isinstance(function, ast.Name) and function.id in BUILTINS - set(vars(module)):
        return True
    try:
        target = eval(ast.unparse(function), vars(module)) if _is_path(function) else None
    except Exception:
        return False
    if isinstance(target, StandIn):
        return True
    if isinstance(getattr(target, "__self__", None), dict | str | list | tuple):
        return True  # a method of a constant
    if isinstance(target, type) and issubclass(target, nn.Module):
        return True
    home = getattr(target, "__module__", None) or ""
    if isinstance(target, type) and (home.startswith(PACKAGES) or is_dataclass(target)):
        return True
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in MAKERS and home != module.__name__


def _is_path(node):
    """Return whether a node is a name, or attributes of a name, as `nn.Conv2d`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name | ast.Constant)
