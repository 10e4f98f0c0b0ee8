"""Kernels that import a notebook's libraries before the notebook begins."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import nbformat
import pytest
from papermill import execute_notebook

from tabletune.cli import series, warm_kernel
from tabletune.cli.notebooks import set_kernel_environment
from tabletune.cli.progress import register_engine
from tabletune.cli.warm_kernel import WarmKernel, warm_up

RARE = "tabnanny"  # a module of Python that nothing else here imports


@pytest.fixture
def write_notebook(tmp_path):
    """A function that writes a notebook with these code cells, and returns its path."""

    def write(*cells):
        code = [nbformat.v4.new_code_cell(cell) for cell in cells]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = nbformat.v4.new_notebook(cells=code, metadata={"kernelspec": kernel})
        path = tmp_path / "a notebook.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


def run_in(manager, source, target):
    """The outputs of the cells of a notebook, executed in a kernel that has started, or in none."""
    options = {"engine_name": register_engine(), "stage_name": "test", "kernel": manager}
    executed = execute_notebook(source, target, {}, progress_bar=False, **options)
    return [cell.outputs for cell in executed.cells]


@pytest.mark.parametrize("statement", [f"import {RARE}", f"from {RARE} import check"])
def test_what_a_cell_imports_is_imported(write_notebook, monkeypatch, statement):
    monkeypatch.delitem(sys.modules, RARE, raising=False)
    warm_up(write_notebook("x = 1", statement))
    assert RARE in sys.modules


def test_names_that_a_library_imports_late_are_asked_for(write_notebook, monkeypatch, tmp_path):
    late = "def __getattr__(name):\n    asked.append(name)\n    return 1\nasked = []\n"
    (tmp_path / "a_late_library.py").write_text(late)
    monkeypatch.syspath_prepend(str(tmp_path))
    warm_up(write_notebook("from a_late_library import first, second"))
    assert sys.modules["a_late_library"].asked == ["first", "second"]


def test_pandas_shows_tables_as_in_any_notebook(write_notebook, tmp_path):
    source = write_notebook("import pandas as pd", "print(pd.get_option('display.max_columns'))")
    with WarmKernel() as warm:
        warm.start(source)
        manager = warm.take(source)
        assert manager is not None
        early = run_in(manager, source, tmp_path / "early.ipynb")
    assert early[1] == run_in(None, source, tmp_path / "usual.ipynb")[1]


def test_no_other_statement_runs(write_notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    warm_up(write_notebook("import math\nopen('trace', 'w').close()\nif True:\n    import nothing"))
    assert not Path("trace").exists()


def test_cells_that_fail_stop_nothing(write_notebook, monkeypatch):
    monkeypatch.delitem(sys.modules, RARE, raising=False)
    warm_up(write_notebook("%matplotlib inline", "import no_such_module", f"import {RARE}"))
    assert RARE in sys.modules


def test_defaults_of_environment_variables_are_set(write_notebook, monkeypatch):
    monkeypatch.setenv("OF_A_TEST", "before")
    monkeypatch.delenv("OF_A_TEST")
    warm_up(write_notebook('import os\nos.environ.setdefault("OF_A_TEST", "1")'))
    assert os.environ["OF_A_TEST"] == "1"


def test_a_notebook_runs_in_a_kernel_that_has_imported(write_notebook, tmp_path, monkeypatch):
    """Its plots are shown as in any other kernel, libraries see that they are in a notebook, and
    the kernel ends with it.
    """
    library = "from IPython import get_ipython\nin_notebook = get_ipython() is not None\n"
    (tmp_path / "a_library.py").write_text(library)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    seen = f"import sys\nprint({RARE!r} in sys.modules)"
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2])"
    where = "from a_library import in_notebook\nprint(in_notebook)"
    notebook = write_notebook(seen, f"import {RARE}", plot, where)
    set_kernel_environment()
    with WarmKernel() as kernel:
        kernel.start(notebook)
        manager = kernel.take(notebook)
        outputs = run_in(manager, notebook, tmp_path / "executed.ipynb")
    assert outputs[0][0].text == "True\n"
    assert any("image/png" in output.get("data", {}) for output in outputs[2])
    assert outputs[3][0].text == "True\n"
    assert not manager.has_kernel


def test_without_one_a_notebook_gets_a_kernel_of_its_own(write_notebook, tmp_path):
    notebook = write_notebook(f"import sys\nprint({RARE!r} in sys.modules)", f"import {RARE}")
    assert run_in(None, notebook, tmp_path / "executed.ipynb")[0][0].text == "False\n"


def test_at_the_end_libraries_may_clean_up_and_then_the_kernel_is_gone(write_notebook, tmp_path):
    """Of what is to be done at exit, only what takes Python apart is left out."""
    clean_up = f"import atexit\natexit.register(open({str(tmp_path / 'cleaned')!r}, 'w').close)"
    # Python would wait for it when it takes its modules apart, and could import nothing any more
    slow = "import time\nclass Slow:\n    def __del__(self, sleep=time.sleep):\n        sleep(600)"
    notebook = write_notebook(clean_up, f"{slow}\nimport math\nmath.slow = Slow()")
    with WarmKernel() as kernel:
        kernel.start(notebook)
        manager = kernel.take(notebook)
        process = manager.provisioner.process
        manager.shutdown_wait_time = 60  # seconds; a busy machine may take longer than the usual 5
        run_in(manager, notebook, tmp_path / "executed.ipynb")
    assert (tmp_path / "cleaned").exists()
    assert process.returncode == 0  # ended by itself, not by a signal


def test_a_kernel_keeps_the_memory_of_tensors_for_the_next_ones(write_notebook, tmp_path):
    """The second large array is not filled with zeros by the system again."""
    count = "import resource\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    faults = "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    make = "array = bytearray(200 * 2**20)\ndel array"
    notebook = write_notebook(make, f"{count}\n{make}\n{faults}")
    set_kernel_environment()
    with WarmKernel() as kernel:
        kernel.start(notebook)
        manager = kernel.take(notebook)
        outputs = run_in(manager, notebook, tmp_path / "executed.ipynb")
    # 51,200 pages of 4 KiB
    assert int(outputs[1][0].text) < 5000


def test_a_kernel_that_has_died_is_not_taken(write_notebook):
    notebook = write_notebook("import math")
    with WarmKernel() as kernel:
        kernel.start(notebook)
        kernel.manager.shutdown_kernel(now=True)
        assert kernel.take(notebook) is None


def test_a_kernel_of_another_notebook_is_not_taken(write_notebook, tmp_path):
    with WarmKernel() as kernel:
        kernel.start(write_notebook("import math"))
        manager = kernel.manager
        assert kernel.take(tmp_path / "another.ipynb") is None
        assert not manager.is_alive()


def test_a_kernel_that_nobody_took_ends(write_notebook):
    with WarmKernel() as kernel:
        kernel.start(write_notebook("import math"))
        manager = kernel.manager
        assert manager.is_alive()
    assert not manager.is_alive()


@pytest.mark.parametrize("reason", ["one core", "little memory"])
def test_none_is_started_where_it_would_be_in_the_way(write_notebook, monkeypatch, reason):
    if reason == "one core":
        monkeypatch.setattr(os, "cpu_count", lambda: 1)
    else:
        monkeypatch.setattr(warm_kernel, "FREE_GIB", 1e6)
    with WarmKernel() as kernel:
        kernel.start(write_notebook("import math"))
        assert kernel.manager is None


class Recorder(WarmKernel):
    """Starts nothing; notes for which notebooks it should."""

    started: ClassVar[list] = []

    def start(self, notebook):
        self.started.append(notebook.stem)
        self.manager = SimpleNamespace(is_alive=lambda: True, shutdown_kernel=lambda now: None)
        self.notebook = notebook


@pytest.mark.parametrize(
    ("gpus", "started"),
    [
        (
            1,
            ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"],
        ),
        (2, ["01_format_dataset", "03_merge_adapter"]),
    ],
)
def test_the_kernel_of_the_next_notebook_is_started(monkeypatch, tmp_path, gpus, started):
    """The first one's, too, but not of those that run in several processes: they start theirs."""
    warm = []
    monkeypatch.setattr(series, "WarmKernel", Recorder)
    monkeypatch.setattr(Recorder, "started", [])
    for name in ("make_base_model", "write_settings"):
        monkeypatch.setattr(series, name, lambda choice: None)
    monkeypatch.setattr(series, "run_lock", lambda *_: nullcontext())
    monkeypatch.setattr(series, "is_up_to_date", lambda *_: False)

    def run_notebook(source, target, overrides, processes, kernel):
        if kernel is not None:
            warm.append(source.stem)

    monkeypatch.setattr(series, "run_notebook", run_notebook)
    choice = SimpleNamespace(values={}, run_dir=tmp_path, profile="tiny", gpus=gpus)
    series.make_series(choice)
    assert Recorder.started == started
    assert warm == started
