"""One student's file: find the network, measure the rules. It runs in a process of its own."""

import contextlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .candidates import Candidate, Way, built, chosen_candidate, find_candidates
from .execution import execute_definitions, execute_whole, new_module
from .operations import Run, fingerprint
from .rows import CLAIMED, NONE_FOUND, Row, listed, one_line
from .rules import Limits, check_run, run_any
from .source import Source, claims, part_names, read_source
from .stand_ins import Finder, OnCpu, StandIn
from .transforms import check_transform, record_arguments


def examine(file: Path, wanted: str, limits: Limits, whole: bool) -> dict:
    """Execute a file and return its network's name, rows, notes and fingerprint, or an error.

    Args:
        file: a copy of the student's file among copies of its neighbours.
        wanted: the network in the student's words, as "Net" or "Net(norm='BN')"; "" if any.
        whole: execute all of the file, and not only its imports, classes and constants.
    """
    executed = False
    try:
        source = read_source(file)
        for name, text in source.written.items():
            (file.parent / name).write_text(text, encoding="utf-8")
        finder = _open_to_neighbours(file)
        module = new_module(file)
        if "albumentations" in source.text():
            with contextlib.suppress(ValueError):  # it isn't installed: a stand-in will do
                record_arguments()
        errors = []
        if whole:
            execute_whole(module, source)
        else:
            errors = execute_definitions(module, source)
        executed = StandIn.needed = True
        torch.set_default_device("cpu")
        with OnCpu():
            return _judge(module, source, wanted, limits, errors, finder.missing)
    except BaseException as error:  # a file that exits is an error, too
        return {"error": _described(error), "executed": executed}


def _described(error):
    text, kind = one_line(error), type(error).__name__
    return text if type(error) is ValueError or text.startswith(kind) else f"{kind}: {text}"


def _open_to_neighbours(file):
    """Let the file import its neighbours and those in the folder above, before anything of ours."""
    for name in [name for name in sys.modules if name.split(".")[0] == "checker"]:
        del sys.modules[name]  # the student may have a module of that name
    sys.path[:0] = [str(file.parent), str(file.parent.parent)]
    os.chdir(file.parent)
    sys.argv = [str(file)]
    finder = Finder(file.parent.parent)
    sys.meta_path.append(finder)
    warnings.simplefilter("ignore")
    return finder


def _judge(module, source, wanted, limits, errors, missing):
    """Find the network among all candidates, and return its rows."""
    statements = source.statements()
    if wanted:
        candidates = [chosen_candidate(module, statements, wanted)]
    else:
        candidates = find_candidates(module, statements)
    running, failures = _run_all(candidates)
    parts = part_names(statements)
    wholes = [(each, text) for each, text in failures if each.name not in parts]
    if not running:
        raise ValueError(_why_none(wholes or failures, errors, missing))
    # built in the file, and last; or else the last defined
    chosen = max(running, key=lambda each: (each.candidate.place, candidates.index(each.candidate)))
    others = [each.way.label for each in running if each is not chosen]
    notes = _notes(chosen.way.guessed, others, [text for _, text in wholes], missing)
    transform_rows, transform_notes = _check_transforms(vars(module))
    rows = [*check_run(chosen.run, chosen.model, limits), _claim(source), *transform_rows]
    parameters = sum(each.numel() for each in chosen.model.parameters())
    return {
        "network": chosen.way.label,
        "rows": [list(row) for row in rows],
        "notes": notes + transform_notes,
        "mark": fingerprint(chosen.run, parameters),
    }


class _Running(NamedTuple):
    """A candidate that runs on images of this task, and the first way to build it."""

    candidate: Candidate
    way: Way
    model: torch.nn.Module
    run: Run


def _run_all(candidates):
    """Return the candidates that run, and (candidate, why it does not) of the others."""
    running, failures = [], []
    for candidate in candidates:
        errors = []
        for way in candidate.ways:
            try:
                model = built(way)
                running.append(_Running(candidate, way, model, run_any(model)))
                break
            except ValueError as error:
                errors.append((candidate, one_line(error)))
        else:
            failures += errors
    return running, failures


def _why_none(failures, errors, missing):
    """Return why no network was found, beginning with what the file builds itself."""
    failures = sorted(failures, key=lambda each: each[0].place, reverse=True)
    texts = list(dict.fromkeys(text for _, text in failures))
    if not texts:
        texts = ["there is no class of a network", *dict.fromkeys(errors)]
        if missing:
            texts.append(f"these packages are missing: {listed(missing)}")
    return "; ".join(texts[:3])


def _notes(guessed, others, failures, missing):
    notes = ["the arguments are guesses by their names"] if guessed else []
    if others:
        notes.append(f"also in this file: {listed(others)}")
    for text in list(dict.fromkeys(failures))[:2]:
        notes.append(f"also in this file, but not for this task: {text}")
    if missing:
        notes.append(f"missing packages, stood in for: {listed(missing)}")
    return notes


# ---------------------------------------------------------------- augmentation and training


def _check_transforms(names) -> tuple[list[Row], list[str]]:
    """Return the rows of the training transform at module level, and notes."""
    library = sys.modules.get("albumentations")
    homes = [str(getattr(value, "__module__", "")) for value in names.values()]
    used = library in names.values() or any(map(_is_of_albumentations, homes))
    if not used or not isinstance(getattr(library, "BaseCompose", None), type):
        return [], []  # another file may have been the one to import it
    found = [(name, each) for name, value in names.items() for each in _transforms_in(value)]
    if not found:
        return [], ["albumentations is imported, but no transform of it is at module level"]
    name, transform = max(enumerate(found), key=lambda item: (_rank(*item[1]), item[0]))[1]
    notes = [f"augmentation: of {len(found)} transforms, {name}"] if len(found) > 1 else []
    try:
        return check_transform(transform), notes
    except ValueError as error:
        return [], [*notes, f"augmentation: {one_line(error)}"]


def _is_of_albumentations(module_name):
    return module_name.split(".")[0] == "albumentations"


def _transforms_in(value, depth=2) -> Iterator[object]:
    """Return the transforms of albumentations that an object is or holds."""
    library = sys.modules["albumentations"]
    inner = []
    if isinstance(value, library.BaseCompose | library.BasicTransform):
        yield value
    elif isinstance(value, dict):
        inner = value.values()
    elif not isinstance(value, type | types.ModuleType | types.FunctionType | torch.nn.Module):
        inner = getattr(value, "__dict__", {}).values()
    for each in list(inner) if depth else []:
        yield from _transforms_in(each, depth - 1)


def _rank(name, transform):
    """Return how much a transform looks like that of the training."""
    steps = str(transform)
    named = sum(step in steps for step in ("HorizontalFlip", "ShiftScaleRotate", "CoarseDropout"))
    return "train" in name.lower(), "test" not in name.lower(), named


def _claim(source: Source) -> Row:
    """Return the row of the test accuracy, which only the outputs of a notebook can tell."""
    found = claims(source)
    if not found:
        return Row("test accuracy", "none found", NONE_FOUND)

    def told(claim):
        epoch = f"epoch {claim.epoch}, " if claim.epoch else ""
        return f"{claim.accuracy:g} % ({epoch}cell {claim.cell})"

    best = max(found, key=lambda claim: claim.accuracy)
    return Row("test accuracy", f"best {told(best)}, last {told(found[-1])}", CLAIMED)
