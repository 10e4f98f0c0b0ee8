"""The notebooks in their order: each runs only if something that it depends on has changed."""

import argparse
import ast
import json
from pathlib import Path
from typing import Any

from tabletune.cli.base_models import make_base_model
from tabletune.cli.notebooks import (
    check_environment,
    notebook_values,
    run_notebook,
    set_kernel_environment,
)
from tabletune.cli.options import USES_GPUS, RunChoice, read_run_choice, write_settings
from tabletune.cli.paths import notebook
from tabletune.cli.summary import print_summary
from tabletune.cli.warm_kernel import WarmKernel
from tabletune.errors import StageError
from tabletune.run.artifacts import adapter_digest
from tabletune.run.files import read_json
from tabletune.run.lock import run_lock
from tabletune.run.parameters import PARAMETERS, RUN_STAGES
from tabletune.run.stage import is_made_from, stage_parameters, with_absolute_paths


def run_series(options: argparse.Namespace) -> None:
    """Run notebooks 1 to 4, as far as they are not done: from a table to an evaluated model.

    A stage is done if its notebook, its parameters and what it was made from are as they were.
    Raises StageError.
    """
    choice = read_run_choice(options)
    until = options.until or RUN_STAGES[-1]
    make_series(choice, until)
    if options.until is None:
        print_summary(choice.run_dir)


def make_series(choice: RunChoice, until: str = RUN_STAGES[-1]) -> None:
    """Run the notebooks of a run up to `until`, as far as they are not done. Raises StageError.

    While one runs, the kernel of the next one imports its libraries.
    """
    check_environment()
    make_base_model(choice.values.get("base_model"))
    stages = RUN_STAGES[: RUN_STAGES.index(until) + 1]
    set_kernel_environment()
    with run_lock(choice.run_dir, "run-all"), WarmKernel() as warm_kernel:
        write_settings(choice)
        for number, stage in enumerate(stages):
            target = choice.run_dir / f"{stage}.ipynb"
            if is_up_to_date(stage, target):
                continue
            print(f"{stage}  ({choice.profile} profile, in {choice.run_dir})", flush=True)
            kernel = take_kernel(warm_kernel, stage, choice)
            following = stages[number + 1 : number + 2]
            if following and processes_of(following[0], choice) == 1:
                warm_kernel.start(notebook(following[0]))
            # {}: the settings were written above, and run_notebook reads them from the run folder
            run_notebook(notebook(stage), target, {}, processes_of(stage, choice), kernel=kernel)


def take_kernel(warm_kernel: WarmKernel, stage: str, choice: RunChoice) -> Any:
    """The kernel that waits for a notebook; the first one gets one that begins to import now.

    None where the notebook needs several processes, or there is no room for a kernel beside this
    process: then papermill starts one.
    """
    kernel = warm_kernel.take(notebook(stage))
    if kernel is None and processes_of(stage, choice) == 1:
        warm_kernel.start(notebook(stage))
        kernel = warm_kernel.take(notebook(stage))
    return kernel


def processes_of(stage: str, choice: RunChoice) -> int:
    """How many processes a notebook runs in, each with a GPU."""
    return choice.gpus if stage in USES_GPUS else 1


# --- is a stage done?


def is_up_to_date(stage: str, target: Path) -> bool:
    """Whether an executed notebook, and what it made, are what running it now would give.

    Three things decide: the text of the notebook, its parameters, and its inputs as they are now.
    The result itself is judged by the same rule as in the notebook (`Stage.is_done`).
    """
    source = notebook(stage)
    # the cheap question first: has the notebook's own text or a parameter changed?
    values = notebook_values(source, target, {})
    if not target.exists() or not shows(target, source, values):
        return False
    entry = manifest_entry(target.parent, stage)
    outputs = entry.get("outputs")
    if not outputs or not all((target.parent / name).exists() for name in outputs):
        return False
    # with the defaults: a default that has changed since changes the result, too
    parameters = stage_parameters(stage, PARAMETERS[stage] | values)
    try:
        inputs = current_inputs(target.parent, parameters, entry.get("inputs") or {})
    except StageError:  # the notebook says what is wrong
        return False
    return is_made_from(entry, inputs, parameters)


def manifest_entry(run_dir: Path, stage: str) -> dict[str, Any]:
    """What the manifest of a run says of a stage; {} if it says nothing."""
    path = run_dir / "manifest.json"
    return read_json(path, stage).get(stage, {}) if path.exists() else {}


def shows(executed: Path, source: Path, values: dict[str, Any]) -> bool:
    """Whether an executed notebook has the text of `source` and was given these parameters."""
    before = read_cells(executed)
    now = read_cells(source)
    injected: dict[str, Any] = {}
    cells = []
    for kind, text, tags in before:
        # papermill adds a cell of its own, which the source does not have
        if "injected-parameters" in tags:
            injected = assigned_values(text)
        else:
            cells.append((kind, text, tags))
    if cells != now:
        return False
    moved = {"run_dir": ""}  # a run folder may be moved
    return with_absolute_paths(injected | moved) == with_absolute_paths(values | moved)


def read_cells(path: Path) -> list[tuple[str, str, list[str]]]:
    """The cells of a notebook: [(kind, text, tags), ...]; [] if the file is damaged."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return []
    return [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in cells
    ]


def assigned_values(source: str) -> dict[str, Any]:
    """The values that papermill's cell of parameters assigns."""
    values = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            values[statement.targets[0].id] = ast.literal_eval(statement.value)
    return values


def current_inputs(
    run_dir: Path, parameters: dict[str, Any], recorded: dict[str, Any]
) -> dict[str, Any]:
    """The inputs of a stage as they are now, for those that can be looked at in moments.

    The others as recorded.

    A data set of the Hub counts as unchanged: the run keeps the commit that it was made from.
    """
    # only what was recorded is compared, so an entry of an earlier version stays comparable
    current = dict(recorded)
    if "table" in recorded and not recorded.get("commit"):
        current["table"] = digest_of_table(parameters)
    if "rewordings" in recorded or "out_of_scope" in recorded:
        from tabletune.data.retrieval_folder import named_file_digests

        current |= named_file_digests(parameters)
    if "retrieval" in recorded:
        from tabletune.data.context import INPUT_NAMES, index_fingerprints

        needed = [which for which, name in INPUT_NAMES.items() if name in recorded]
        fingerprints = index_fingerprints(run_dir, needed)
        for which in needed:
            current[INPUT_NAMES[which]] = fingerprints.get(INPUT_NAMES[which])
    if "dataset" in recorded:
        report = read_json(run_dir / "dataset" / "report.json", "01_format_dataset")
        current["dataset"] = report["fingerprint"]
    if "adapter" in recorded:
        current["adapter"] = adapter_digest(run_dir)
    return current


def digest_of_table(parameters: dict[str, Any]) -> str:
    """The digest of the table's files as they are now. Raises StageError if they cannot be read."""
    from tabletune.data.tables import table_digest

    return table_digest(
        parameters["dataset"],
        config=parameters["dataset_config"],
        splits=parameters["splits"],
    )
