"""Run all, pressed again; a cell run twice; a training interrupted in the middle: each notebook
in a real kernel.
"""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager

import nbformat
import pytest
from conftest import ROOT, STAGES, copy_of, profile_parameters
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tabletune.run.parameters import PARAMETERS

NEEDS = {  # what is there of a finished run when a notebook begins
    "01_format_dataset": ["settings"],
    "02_finetune_qlora": ["dataset"],
    "03_merge_adapter": ["dataset", "adapter", "training"],
    "04_evaluate": ["dataset", "adapter", "training", "merged"],
}

# Run in a kernel: 0.3 s later its work is interrupted, as by Jupyter's stop button, but never
# within an import: a library that is half imported stays so in its process, which is no fault of
# the notebook's.
INTERRUPT_SOON = """
import signal
def _interrupt(number, frame):
    importing = False
    while frame is not None:
        importing = importing or "importlib" in frame.f_code.co_filename
        frame = frame.f_back
    # ipykernel has this handler while a cell runs, and another one between cells
    works = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if works and not importing:
        signal.raise_signal(signal.SIGINT)
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
signal.signal(signal.SIGALRM, _interrupt)
signal.setitimer(signal.ITIMER_REAL, 0.3)
"""


class Kernel:
    """A notebook open in a kernel, with the tiny profile's parameters set in a cell of their
    own.
    """

    def __init__(self, name, run_dir, **parameters):
        self.notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        values = profile_parameters("tiny", run_dir, **parameters)
        lines = [f"{key} = {value!r}" for key, value in values.items() if key in PARAMETERS[name]]
        place = next(
            i for i, cell in enumerate(self.cells) if "parameters" in cell.metadata.get("tags", [])
        )
        self.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        where = {"metadata": {"path": str(ROOT)}}
        self.client = NotebookClient(
            self.notebook, kernel_name="python3", resources=where, timeout=900
        )

    @property
    def cells(self):
        return self.notebook.cells

    def run_all(self, interrupt_in=None):
        """All cells in order, once. Returns what they show.

        With `interrupt_in`, they are interrupted soon after a cell of that text has begun, or in
        one of the next if it is done by then.
        """
        for number, cell in enumerate(self.cells):
            if interrupt_in and interrupt_in in cell.source and cell.cell_type == "code":
                soon = nbformat.v4.new_code_cell(INTERRUPT_SOON)
                self.client.execute_cell(soon, number)  # which puts it in the place of the cell
                self.cells[number] = cell
            self.client.execute_cell(cell, number)
        return self.shown()

    def run_cell(self, text):
        """The code cell with this text in it."""
        number = next(
            i
            for i, cell in enumerate(self.cells)
            if cell.cell_type == "code" and text in cell.source
        )
        self.client.execute_cell(self.cells[number], number)

    def shown(self):
        """The kinds of what each code cell shows besides what it prints, but for those that work
        only once.
        """
        code = [
            c
            for c in self.cells
            if c.cell_type == "code" and not c.source.startswith("if not done")
        ]
        return [
            [sorted(output.data) for output in cell.outputs if "data" in output] for cell in code
        ]

    def said(self):
        """All that the cells print."""
        outputs = [
            output for cell in self.cells if cell.cell_type == "code" for output in cell.outputs
        ]
        return "".join(output.text for output in outputs if output.get("name") == "stdout")


@contextmanager
def opened(name, run_dir, **parameters):
    kernel = Kernel(name, run_dir, **parameters)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    with kernel.client.setup_kernel(env=environment):
        yield kernel


def files_of(run_dir):
    """When each file was written, and how large it is; but for those of TensorBoard, which
    flushes when it wants to.
    """
    files = [
        path for path in run_dir.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    ]
    stats = {str(path.relative_to(run_dir)): path.stat() for path in files}
    return {
        name: "tensorboard" in name or (stat.st_mtime_ns, stat.st_size)
        for name, stat in stats.items()
    }


def read(run_dir, name):
    return json.loads((run_dir / name).read_text(encoding="utf-8"))


def steps_of(run_dir):
    """How many steps of how many epochs the training's metrics and its newest checkpoint tell
    of.
    """
    states = [
        json.loads(path.read_text())
        for path in run_dir.glob("checkpoints/checkpoint-*/trainer_state.json")
    ]
    newest = max(states, key=lambda state: state["global_step"])
    return newest["global_step"], newest["epoch"], read(run_dir, "training/metrics.json")


def test_the_training_cell_twice_in_a_row_and_then_run_all(finished_run, tmp_path):
    """Is one training: the cell finds that all is done, and so does a second pass."""
    run_dir = copy_of(finished_run, tmp_path / "run", "dataset")
    with opened("02_finetune_qlora", run_dir) as kernel:
        kernel.run_all()
        before, (step, epoch, metrics) = files_of(run_dir), steps_of(run_dir)
        assert epoch == 1
        assert metrics == but_for_times(read(finished_run, "training/metrics.json"), metrics)
        kernel.run_cell("trainer.train(")
        # a second call opens another file of TensorBoard, and logs nothing into it
        events = {name for name in files_of(run_dir) if "tensorboard" in name}
        before |= dict.fromkeys(events, True)
        assert files_of(run_dir) == before
        assert steps_of(run_dir)[:2] == (step, 1)
        first = kernel.shown()
        assert kernel.run_all() == first
        assert files_of(run_dir) == before
        assert "All is done already" in kernel.said()


def but_for_times(expected, found):
    """`expected`, with the times and the memory of `found`."""
    measured = ("second", "memory", "time", "runtime")
    return {
        name: found.get(name) if any(word in name for word in measured) else expected[name]
        for name in expected
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PARAMETERS if name != "02_finetune_qlora"])
def test_run_all_twice_in_one_kernel(finished_run, tmp_path, name):
    """The second pass shows the same, says that all is done where something was made, and
    changes no file.
    """
    if name == "chat":
        pytest.importorskip("gradio", reason="`make test-export` has it")
    copied = NEEDS.get(name, ["."])
    run_dir = copy_of(finished_run, tmp_path / "run", *copied)
    more = {"compare_runs": {"runs": [str(run_dir)]}, "07_export": {"gguf_types": []}}.get(name, {})
    with opened(name, run_dir, **more) as kernel:
        first = kernel.run_all()
        before = files_of(run_dir)
        assert kernel.run_all() == first
        assert files_of(run_dir) == before
        if name in STAGES or name in ("05_baselines", "06_trust"):
            assert "All is done already" in kernel.said()


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_cells_out_of_order_after_a_run(finished_run, tmp_path, name):
    """After a second pass has found that all is done, each cell once more, the last one first:
    nothing is made anew.
    """
    run_dir = copy_of(finished_run, tmp_path / "run", *NEEDS[name])
    with opened(name, run_dir) as kernel:
        kernel.run_all()
        kernel.run_all()
        before = files_of(run_dir)
        for number, cell in reversed(list(enumerate(kernel.cells))):
            kernel.client.execute_cell(cell, number)
        assert files_of(run_dir) == before


def interrupt_when(condition, pid):
    """Send SIGINT, as Jupyter's stop button does, once the condition holds.

    Returns the thread that waits for it.
    """

    def wait():
        while not condition():
            time.sleep(0.02)
        os.kill(pid, signal.SIGINT)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_training_interrupted_in_the_middle_and_run_all_again(finished_run, tmp_path):
    """It goes on from the newest checkpoint, and ends as one that nothing disturbed."""
    run_dir = copy_of(finished_run, tmp_path / "run", "dataset")
    with opened("02_finetune_qlora", run_dir) as kernel:
        pid = kernel.client.km.provisioner.pid
        waiting = interrupt_when(
            lambda: list(run_dir.glob("checkpoints/*/trainer_state.json")), pid
        )
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            kernel.run_all()
        waiting.join()
        assert not (run_dir / "adapter").exists()
        kernel.run_all()
        assert "going on from checkpoint" in kernel.said()
        metrics = read(run_dir, "training/metrics.json")
        assert metrics == pytest.approx(
            but_for_times(read(finished_run, "training/metrics.json"), metrics), rel=1e-4
        )
        before = files_of(run_dir)
        kernel.run_all()
        assert files_of(run_dir) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("01_format_dataset", "format_table("),
        ("03_merge_adapter", "merge_adapter("),
        ("04_evaluate", 'examine("base"'),
    ],
)
def test_a_stage_interrupted_in_its_work_and_run_all_again(finished_run, tmp_path, name, work):
    """Half-written outputs are not taken for whole ones, and nothing of an interrupted cell is
    in the way.
    """
    run_dir = copy_of(finished_run, tmp_path / "run", *NEEDS[name])
    with opened(name, run_dir) as kernel:
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            kernel.run_all(interrupt_in=work)
        kernel.run_all()
        before = files_of(run_dir)
        kernel.run_all()
        assert files_of(run_dir) == before
        assert not list(run_dir.rglob("*.partial*"))
