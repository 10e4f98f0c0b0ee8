"""Running one notebook with papermill, in one process or in several."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tabletune.cli.options import read_settings
from tabletune.cli.paths import repository
from tabletune.cli.progress import register_engine
from tabletune.cli.warm_kernel import QUIET_KERNEL
from tabletune.errors import StageError
from tabletune.run.lock import run_lock
from tabletune.run.parameters import NUMBERED, PARAMETERS, RUN_STAGES, check_names


class NotebookError(StageError):
    """A notebook has stopped; `reason` is its own error, in one line."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def notebook_values(source: Path, target: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook that is to run as `target`.

    The settings of the run folder, and `overrides` on top.

    Raises StageError if `source` is none of the notebooks, or if there is no run in the folder and
    it needs one.
    """
    name = source.stem
    folder = target.parent
    if name not in PARAMETERS:
        raise StageError(
            f"There is no notebook {source}. The notebooks are: {', '.join(PARAMETERS)}."
        )
    needs_run = "run_dir" in PARAMETERS[name] and name not in RUN_STAGES
    if needs_run and not folder.is_dir():
        raise StageError(f"{folder} is no run folder. Make one with: make run-all RUN_DIR={folder}")
    values = {**read_settings(folder), "run_dir": str(folder), **overrides}
    # how many processes is the command line's business, and no notebook's parameter
    values.pop("gpus", None)
    check_names(values, {*NUMBERED, name})
    return {key: value for key, value in values.items() if key in PARAMETERS[name]}


def run_notebook(
    source: Path,
    target: Path,
    overrides: dict[str, Any],
    processes: int = 1,
    prepare_only: bool = False,
    kernel: Any = None,
) -> None:
    """Execute a notebook with the settings of the run folder that `target` is in.

    `overrides` are parameters on top of these settings.

    Until it has ended without an error, what it wrote has the name NAME.partial.ipynb. With several
    `processes`, each has a GPU. `kernel` is a kernel that has started already (`WarmKernel.take`).
    Raises NotebookError if the notebook stops, other StageErrors if it cannot begin.
    """
    name = source.stem
    values = notebook_values(source, target, overrides)
    is_page = name not in NUMBERED  # a page only reads the run
    is_one_of_several = "RANK" in os.environ  # the process that started them holds the lock
    if prepare_only or is_page or is_one_of_several:
        execute(source, target, values, prepare_only)
        return
    with run_lock(Path(values["run_dir"]), name):
        if processes > 1:
            launch(source, target, overrides, processes)
        else:
            execute(source, target, values, prepare_only, kernel)


# For glibc's malloc, see mallopt(3). By default it gets the memory of each large tensor from the
# system and gives it back at once, and the system fills it with zeros again for the next tensor:
# a tenth of the CPU time of a training on a CPU.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def set_kernel_environment() -> None:
    """Set the environment variables that a notebook's kernel starts with."""
    os.environ.update(
        PYTHONWARNINGS="ignore",
        PYDEVD_DISABLE_FILE_VALIDATION="1",
        PYTHONUTF8="1",
        JUPYTER_PREFER_ENV_PATH="1",
    )
    for name, value in KEEP_FREED_MEMORY.items():
        os.environ.setdefault(name, value)


def execute(
    source: Path,
    target: Path,
    values: dict[str, Any],
    prepare_only: bool = False,
    kernel: Any = None,
) -> None:
    """Execute a notebook in `kernel`, or in a kernel that this process starts.

    Of several processes the first one's notebook is kept.

    Raises NotebookError if it stops.
    """
    check_environment()
    set_kernel_environment()
    # slow to import, so only here
    from papermill import PapermillExecutionError, execute_notebook

    # papermill warns of parameters that stand in another cell than the tagged one
    logging.getLogger("papermill").setLevel(logging.ERROR)
    rank = int(os.environ.get("RANK", 0))
    # each process executes the whole notebook, and writes a file of its own while it does
    label = f"{source.stem}.process{rank}" if rank else source.stem
    partial = target.with_name(f"{label}.partial.ipynb")
    options: dict[str, Any] = {"prepare_only": prepare_only, "progress_bar": False}
    options["extra_arguments"] = [QUIET_KERNEL]
    if source.stem in NUMBERED and not rank and not prepare_only:
        options["engine_name"] = register_engine()
        options |= {"stage_name": source.stem, "kernel": kernel}
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            execute_notebook(source, partial, values, **options)
        except RuntimeError as error:
            # Two kernels that start at the same moment can pick the same port.
            if "died before replying" not in str(error):
                raise
            if "kernel" in options:
                options["kernel"] = None
            execute_notebook(source, partial, values, **options)
    except PapermillExecutionError as error:
        raise stopped(label, partial, error.ename, error.evalue.strip()) from None
    except RuntimeError as error:  # the kernel died
        raise stopped(label, partial, type(error).__name__, str(error).strip()) from None
    if rank:
        partial.unlink()
    else:
        partial.replace(target)


LESS_MEMORY_IN_TRAINING = (
    "The GPU's memory does not suffice: lower batch_size and raise gradient_accumulation_steps by "
    "as much, set gradient_checkpointing, or lower max_length."
)
LESS_MEMORY = (
    "The GPU's memory does not suffice: end other programs that use this GPU, or take a smaller "
    "base_model."
)


def stopped(label: str, partial: Path, kind: str, text: str) -> NotebookError:
    """The error of a notebook that has stopped.

    One line for a StageError, else also where to look. What to lower where memory ran out.
    """
    if kind == "StageError":
        return NotebookError(f"{label}: {text}", text)
    reason = f"{kind}: {text}"
    lines = [f"{label}: {reason}"]
    if kind == "OutOfMemoryError":
        is_training = label.startswith("02_")
        lines.append(LESS_MEMORY_IN_TRAINING if is_training else LESS_MEMORY)
    lines.append(f"See the end of {partial}.")
    return NotebookError("\n".join(lines), reason)


def check_environment() -> None:
    """Raise StageError if a package that the notebooks need is not installed."""
    from importlib.util import find_spec

    # one package of each kind; find_spec looks them up without importing them
    needed = ["torch", "trl", "bitsandbytes", "papermill"]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise StageError(
            f"This environment lacks a package ({', '.join(missing)}): "
            f"{sys.executable} -m pip install -r requirements.txt"
        )


def launch(source: Path, target: Path, overrides: dict[str, Any], processes: int) -> None:
    """Run a notebook in several processes, each with a GPU if there are any.

    One that fails stops all.

    Raises NotebookError, or StageError if there are too few GPUs.
    """
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # what shards leave free is used again
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # a checkpoint cannot be on cpu:0
    elif torch.cuda.device_count() < processes:
        raise StageError(
            f"GPUS={processes}, but this machine has {torch.cuda.device_count()}. Lower GPUS."
        )
    config = repository() / "profiles" / "accelerate" / "gpus.yaml"
    command = ["--config_file", str(config), "--num_processes", str(processes)]
    command += ["--module", "tabletune", "run", str(source), str(target)]
    if overrides:
        command += ["-y", json.dumps(overrides)]
    started_at = time.time()
    try:
        launch_command(launch_command_parser().parse_args(command))
    except ChildFailedError as error:
        # the others fail after it, because they wait for one that is gone
        process, failure = error.get_first_failure()
        reason = error_in(target, started_at) or f"exit code {failure.exitcode}"
        raise NotebookError(
            f"Process {process} failed first (exit code {failure.exitcode}); the others were "
            "stopped.",
            reason,
        ) from None


def error_in(target: Path, started_at: float) -> str | None:
    """The error of the process of a notebook that stopped last, in one line; None without one.

    Only what was written since `started_at`, in seconds since 1970, is looked at: a process that
    was killed leaves no error, and an older file has that of another time.
    """
    import nbformat

    partials = []
    for path in target.parent.glob(f"{target.stem}*.partial.ipynb"):
        modified_at = path.stat().st_mtime
        if modified_at >= started_at - 1:  # the clock of a file system is not quite ours
            partials.append((modified_at, path))
    for _, path in sorted(partials, reverse=True):
        try:
            cells = nbformat.read(path, as_version=4).cells
        except (OSError, ValueError):  # killed while it was written
            continue
        errors = []
        for cell in cells:
            errors += [out for out in cell.get("outputs", []) if out.output_type == "error"]
        if errors:
            last = errors[-1]
            return last.evalue if last.ename == "StageError" else f"{last.ename}: {last.evalue}"
    return None
