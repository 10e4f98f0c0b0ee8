"""Running one notebook: its parameters, what is left of one that stops, and who is at work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from tabletune.cli.notebooks import NotebookError, error_in, notebook_values, run_notebook, stopped
from tabletune.cli.options import RunChoice, write_settings
from tabletune.errors import StageError
from tabletune.run.lock import run_lock
from tabletune.run.parameters import DEFAULTS, PARAMETERS, read_profile

STAGE = "02_finetune_qlora"


def tabletune(*arguments, **options):
    """Run the command line in a process of its own.

    Returns the finished process, its output as text.
    """
    environment = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    command = [sys.executable, "-m", "tabletune", *map(str, arguments)]
    options = {"cwd": ROOT, "env": environment, **options}
    return subprocess.run(command, capture_output=True, text=True, **options)


def write_notebook(path, source):
    """A notebook with all parameters of its name, and one more cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {default!r}" for name, default in PARAMETERS[path.stem].items()]
    parameters = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [parameters, nbformat.v4.new_code_cell(source)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


STAGE_ERROR = "class StageError(Exception): pass\nraise StageError('the table is empty')"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (STAGE_ERROR, f"{STAGE}: the table is empty"),
        ("1 / 0", f"{STAGE}: ZeroDivisionError: division by zero\nSee the end of {{partial}}."),
    ],
)
def test_a_notebook_that_stops_says_why_and_leaves_what_it_wrote(tmp_path, source, message):
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", source)
    target = tmp_path / "run" / notebook.name
    partial = tmp_path / "run" / f"{STAGE}.partial.ipynb"
    done = tabletune("run", notebook, target)
    assert done.returncode == 1
    assert done.stderr.strip() == message.format(partial=partial)
    assert partial.exists()
    assert not target.exists()
    write_notebook(notebook, "print('mended')")
    assert tabletune("run", notebook, target).returncode == 0
    assert [path.name for path in (tmp_path / "run").glob("*.ipynb")] == [notebook.name]


def test_a_notebook_gets_its_own_parameters_as_values(tmp_path):
    """From the settings of its run folder, and the folder itself as run_dir, whatever it is
    named.
    """
    target = tmp_path / "2026" / f"{STAGE}.ipynb"
    values = read_profile(ROOT / "profiles" / "tiny.yaml")
    write_settings(RunChoice(target.parent, values | {"seed": 7}, 2, "tiny"))
    run_notebook(
        ROOT / "notebooks" / f"{STAGE}.ipynb", target, {"learning_rate": 0.01}, prepare_only=True
    )
    injected = next(
        cell
        for cell in nbformat.read(target, 4).cells
        if "injected-parameters" in cell.metadata.tags
    )
    found = {}
    exec(injected.source, found)
    found = {name: value for name, value in found.items() if name in DEFAULTS}
    assert found["learning_rate"] == 0.01
    assert found["seed"] == 7
    assert found["run_dir"] == str(target.parent)
    assert found["gradient_checkpointing"] is False
    assert set(found) <= set(PARAMETERS[STAGE])


def test_papermill_does_not_call_a_rarely_changed_parameter_unknown(tmp_path):
    """It says so of a parameter that stands in another cell than the tagged one."""
    words = ["--prepare-only", "-p", "report_to", "none"]
    done = tabletune("run", f"notebooks/{STAGE}.ipynb", tmp_path / f"{STAGE}.ipynb", *words)
    assert done.returncode == 0
    assert "report_to = " in (tmp_path / f"{STAGE}.ipynb").read_text()
    assert "unknown" not in done.stderr


def test_of_a_progress_bar_the_last_state_stays_in_the_executed_notebook(tmp_path):
    source = (
        "import sys\nimport time\nfor k in range(4):\n    sys.stdout.write(f'\\rwork: {k}/3')\n"
        "    sys.stdout.flush()\n    time.sleep(0.3)\nprint()\nprint('done')"
    )
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", source)
    target = tmp_path / "run" / notebook.name
    run_notebook(notebook, target, {})
    [output] = nbformat.read(target, 4).cells[-1].outputs
    assert output.text == "work: 3/3\ndone\n"


def test_settings_of_a_run_stand_behind_all_cells_of_parameters(tmp_path):
    """A cell of defaults behind them would undo them."""
    for name in ("01_format_dataset", "02_finetune_qlora"):
        target = tmp_path / f"{name}.ipynb"
        run_notebook(ROOT / "notebooks" / f"{name}.ipynb", target, {"seed": 7}, prepare_only=True)
        codes = [cell for cell in nbformat.read(target, 4).cells if cell.cell_type == "code"]
        injected = next(
            i for i, cell in enumerate(codes) if "injected-parameters" in cell.metadata.tags
        )
        namespace = {}
        exec("\n".join(cell.source for cell in codes[1 : injected + 1]), namespace)
        assert namespace["seed"] == 7
        assert set(PARAMETERS[name]) <= set(namespace)


def test_a_port_that_two_kernels_picked_is_tried_again(tmp_path, monkeypatch):
    attempts = []

    def execute(source, target, values, **options):
        attempts.append(values)
        if len(attempts) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        shutil.copy(source, target)

    monkeypatch.setattr("papermill.execute_notebook", execute)
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", "")
    run_notebook(notebook, tmp_path / "run" / notebook.name, {})
    assert len(attempts) == 2
    assert (tmp_path / "run" / notebook.name).exists()


def test_a_kernel_that_dies_is_said(tmp_path, monkeypatch):
    def execute(source, target, values, **options):
        raise RuntimeError("Kernel died")

    monkeypatch.setattr("papermill.execute_notebook", execute)
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", "")
    with pytest.raises(NotebookError, match=f"{STAGE}: RuntimeError: Kernel died"):
        run_notebook(notebook, tmp_path / "run" / notebook.name, {})


@pytest.mark.parametrize(
    "name", [name for name in PARAMETERS if name > "05" and name != "compare_runs"]
)
def test_a_notebook_that_needs_a_run_says_so(tmp_path, name):
    target = tmp_path / "none" / f"{name}.ipynb"
    with pytest.raises(StageError) as caught:
        notebook_values(Path(f"{name}.ipynb"), target, {})
    line = f"{target.parent} is no run folder. Make one with: make run-all RUN_DIR={target.parent}"
    assert str(caught.value) == line
    assert not target.parent.exists()


def test_what_is_no_notebook_is_refused(tmp_path):
    with pytest.raises(
        StageError,
        match=r"There is no notebook .*mine\.ipynb\. The notebooks are: 01_format_dataset",
    ):
        notebook_values(Path("mine.ipynb"), tmp_path / "mine.ipynb", {})


def test_a_misspelt_parameter_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"'max_lenght'. Did you mean 'max_length'"):
        notebook_values(Path(f"{STAGE}.ipynb"), tmp_path / "a.ipynb", {"max_lenght": 3})


def test_a_second_program_in_one_folder_is_told_that_the_first_is_at_work(tmp_path):
    notebook = write_notebook(tmp_path / "source" / f"{STAGE}.ipynb", "")
    with run_lock(tmp_path, "04_evaluate"):
        environment = {**os.environ, "TABLETUNE_LOCKED_FOLDER": ""}
        done = tabletune("run", notebook, tmp_path / notebook.name, env=environment)
    assert done.returncode == 1
    assert f"{tmp_path}: 04_evaluate (process {os.getpid()}) is at work here already" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / notebook.name).exists()


def test_a_bug_of_ours_shows_its_traceback(tmp_path):
    """A ValueError is no mistake of the reader's."""
    program = (
        "import sys\nfrom tabletune.cli import main, summary\n"
        "def broken(options): raise ValueError('a bug')\n"
        "summary.print_summary = broken\nsys.argv[0:1] = ['tabletune', 'summary']\nmain.main()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


# --- the error of a notebook that stopped


@pytest.mark.parametrize(
    ("label", "advice"),
    [
        (STAGE, "lower batch_size and raise gradient_accumulation_steps"),
        (f"{STAGE}.process1", "lower batch_size and raise gradient_accumulation_steps"),
        ("04_evaluate", "end other programs that use this GPU"),
    ],
)
def test_a_notebook_that_ran_out_of_memory_says_what_to_lower(tmp_path, label, advice):
    error = stopped(label, tmp_path, "OutOfMemoryError", "CUDA out of memory.")
    first, second, last = str(error).splitlines()
    assert first == f"{label}: OutOfMemoryError: CUDA out of memory."
    assert advice in second
    assert last == f"See the end of {tmp_path}."


def test_other_errors_get_no_advice_on_memory(tmp_path):
    assert "memory" not in str(stopped(STAGE, tmp_path / "a", "ValueError", "no"))


def notebook_with_error(path, name, text, **options):
    output = nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[])
    cell = nbformat.v4.new_code_cell("raise", outputs=[output])
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    path.write_text(nbformat.writes(notebook, **options), encoding="utf-8")


def target_in(folder):
    return folder / "02_finetune_qlora.ipynb"


@pytest.mark.parametrize("indent", [None, 1], ids=["on one line", "on many lines"])
def test_error_in_reads_it_however_the_file_is_written(tmp_path, indent):
    path = tmp_path / "02_finetune_qlora.partial.ipynb"
    notebook_with_error(path, "StageError", 'no "room", {}', indent=indent)
    assert error_in(target_in(tmp_path), 0) == 'no "room", {}'


def test_error_in_is_that_of_the_process_that_stopped_last(tmp_path):
    names = ("02_finetune_qlora.process1", "02_finetune_qlora")
    old, new = (tmp_path / f"{name}.partial.ipynb" for name in names)
    notebook_with_error(new, "ValueError", "new")
    notebook_with_error(old, "StageError", "old")
    os.utime(old, (1, 1))
    assert error_in(target_in(tmp_path), 0) == "ValueError: new"


def test_error_in_is_none_of_another_notebook_or_of_an_earlier_start(tmp_path):
    """A process that was killed leaves no error, and then nothing is known."""
    notebook_with_error(tmp_path / "04_evaluate.partial.ipynb", "ValueError", "another")
    earlier = tmp_path / "02_finetune_qlora.partial.ipynb"
    notebook_with_error(earlier, "ValueError", "last week")
    os.utime(earlier, (1000, 1000))
    assert error_in(target_in(tmp_path), 2000) is None


def test_error_in_skips_a_file_that_was_killed_while_it_was_written(tmp_path):
    (tmp_path / "02_finetune_qlora.partial.ipynb").write_text('{"cells": [')
    assert error_in(target_in(tmp_path), 0) is None
