"""Every combination of a grid of parameters, each as a run of its own."""

import argparse
import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

from tabletune.cli.notebooks import NotebookError
from tabletune.cli.options import RunChoice, read_run_choice
from tabletune.cli.pages import compare_runs
from tabletune.cli.paths import folder_title
from tabletune.cli.series import make_series
from tabletune.errors import StageError
from tabletune.run.parameters import DEFAULTS, NUMBERED, check_names, read_parameters, read_text

EQUAL_STEPS = "equal_steps"  # stands in a grid, and is a parameter of no notebook

MOST_NAME_CHARACTERS = 200  # of a folder; file systems take names of up to 255 bytes


def run_sweep(options: argparse.Namespace) -> None:
    """Run every combination of the values that stand in lists in a grid, and compare the runs.

    Each is a run like any other, so what is done is not done again. One that fails does not stop
    the rest.
    """
    grid = read_grid(options)
    equal_steps = grid.pop(EQUAL_STEPS, False)
    lists = {name: values for name, values in grid.items() if isinstance(values, list)}
    options.run_dir = None  # each point has its own
    base = read_run_choice(options)
    folder = sweep_folder(options)
    # the point's order is the grid's: the last list varies fastest
    points = list(itertools.product(*lists.values()))
    finished: list[Path] = []
    failed: dict[Path, str] = {}
    for number, values in enumerate(points, 1):
        point = dict(zip(lists, values, strict=True))
        run_dir = folder / point_name(point)
        print(f"{number} of {len(points)}: {run_dir}", flush=True)
        values_of_run = base.values | grid | point
        if equal_steps:
            values_of_run["epochs"] = more_epochs(values_of_run, lists["train_rows"])
        choice = RunChoice(run_dir, values_of_run, base.gpus, base.profile)
        try:
            make_series(choice)
            finished.append(run_dir)
        except StageError as error:
            print(error, flush=True)
            # repeated at the end, since hours of output may lie between
            failed[run_dir] = error.reason if isinstance(error, NotebookError) else str(error)
    if finished:
        compare_runs(finished, folder / "compare.html")
    if failed:
        lines = [f"{len(failed)} of {len(points)} points failed:"]
        lines += [f"{run_dir}: {reason}" for run_dir, reason in failed.items()]
        raise StageError("\n".join(lines))


def more_epochs(values: dict[str, Any], sizes: list[float]) -> float:
    """The epochs of a run with fewer rows that make about as many steps as the largest size has.

    `sizes` are all values of `train_rows`: shares, or numbers of questions.
    """
    epochs = values.get("epochs", DEFAULTS["epochs"]) * max(sizes) / values["train_rows"]
    return int(epochs) if float(epochs).is_integer() else epochs


def sweep_folder(options: argparse.Namespace) -> Path:
    """The folder for the runs of a sweep: the one that was asked for, or runs/GRID_PROFILE."""
    if options.folder:
        return Path(options.folder)
    names = [options.grid, options.profile]
    if options.model:
        names.append(options.model)
    return Path("runs") / "_".join(folder_title(name) for name in names)


def read_grid(options: argparse.Namespace) -> dict[str, Any]:
    """The grid, {name: value or list of values}. Raises StageError if it cannot be run."""
    grid = read_parameters(read_text(options.grid), options.grid, grid=True)
    check_names(set(grid) - {EQUAL_STEPS}, NUMBERED)
    lists = {name: values for name, values in grid.items() if isinstance(values, list)}
    for name, values in lists.items():
        if not values:
            raise StageError(f"{options.grid}: {name} is an empty list. Give it values.")
    for name in grid:
        if name in options.overrides:
            raise StageError(
                f"{options.grid}: {name} is set in the grid and in ARGS. Remove one of them."
            )
    if not lists:
        raise StageError(
            f"{options.grid}: no parameter has a list of values, so there is nothing to vary. "
            "Write one as name: [value, value]."
        )
    if "run_dir" in grid:
        raise StageError(f"{options.grid}: a sweep sets run_dir itself. Remove it from the grid.")
    check_equal_steps(grid, options.grid)
    return grid


def check_equal_steps(grid: dict[str, Any], path: str) -> None:
    """Raise StageError if a grid has `equal_steps` and nothing that it could make equal."""
    equal_steps = grid.get(EQUAL_STEPS, False)
    if not isinstance(equal_steps, bool):
        raise StageError(f"{path}: {EQUAL_STEPS}={equal_steps!r}: use true or false.")
    if not equal_steps:
        return
    sizes = grid.get("train_rows")
    if not isinstance(sizes, list):
        raise StageError(f"{path}: {EQUAL_STEPS} needs a list of values of train_rows.")
    if min(sizes) <= 1 < max(sizes):
        raise StageError(
            f"{path}: with {EQUAL_STEPS}, train_rows has only shares up to 1, or only numbers "
            "above 1."
        )


def point_name(point: dict[str, Any]) -> str:
    """The folder's name of one combination of values."""
    name = "_".join(short_name(name, value) for name, value in point.items())
    if len(name) <= MOST_NAME_CHARACTERS:
        return name
    # what is cut may be all that two points differ in; the digest keeps their folders apart
    return f"{name[: MOST_NAME_CHARACTERS - 7]}-{short_digest(name)}"


def short_digest(text: str) -> str:
    """Six characters that differ where texts do."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def short_name(name: str, value: Any) -> str:
    """A parameter and its value as a part of a folder's name.

    With a piece of its hash if it had to be changed.
    """
    written = value if isinstance(value, str) else json.dumps(value)
    text = f"{name}-{written}"
    short = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:50]
    if short == text:
        return short
    # two values may shorten to the same text; the digest keeps their folders apart
    return f"{short}-{short_digest(text)}"
