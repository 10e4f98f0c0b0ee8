"""What the tests share: the functions of a notebook, taken out of its paired .py, and ways to run one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TINY = ROOT / ".cache" / "tiny-llama"
TABLE = ROOT / "data" / "home_remedies.csv"
STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"]


def definitions(name):
    """The imports, functions, classes, constants and parameters of a notebook, without running its other cells."""
    source = (ROOT / "notebooks_py" / f"{name}.py").read_text(encoding="utf-8")
    parameters = source.partition('# %% tags=["parameters"]\n')[2].partition("\n# %%")[0]
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    kept = [
        node
        for node in ast.parse(source).body
        if isinstance(node, kinds) or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper())
    ]
    kept = [*ast.parse(parameters).body, *kept]
    namespace = {}
    exec(compile(ast.Module(kept, []), name, "exec"), namespace)
    return SimpleNamespace(**namespace)


@pytest.fixture(scope="session")
def format_dataset():
    return definitions("01_format_dataset")


@pytest.fixture(scope="session")
def finetune():
    return definitions("02_finetune_qlora")


@pytest.fixture(scope="session")
def merge_adapter():
    return definitions("03_merge_adapter")


@pytest.fixture(scope="session")
def evaluation():
    return definitions("04_evaluate")


@pytest.fixture(scope="session")
def tokenizer(format_dataset):
    return format_dataset.load_tokenizer(str(TINY), None)


def run_of_make(*arguments):
    """What subprocess is to be told to run make in this environment, its output as text."""
    command = ["make", "--no-print-directory", "VENV=", f"PYTHON={sys.executable}", *map(str, arguments)]
    # not as a part of the make that may run these tests: its level and its arguments are not ours
    env = {name: value for name, value in os.environ.items() if name not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")}
    return {"args": command, "cwd": ROOT, "env": env, "text": True}


def make(*arguments, cwd=ROOT):
    """Run make in this environment. Returns the finished process, its output as text."""
    return subprocess.run(**{**run_of_make(*arguments), "cwd": cwd}, capture_output=True)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder in which all four stages of the tiny profile have run, undisturbed. Copy it before changing it."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = make("run-all", "PROFILE=tiny", f"RUN_DIR={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


def run_script(name, before=None, **parameters):
    """Run a notebook's paired .py in this process with other parameters, as Papermill would. Returns its globals.

    With `before`, a heading, it stops in front of the part that the heading opens.
    """
    source = (ROOT / "notebooks_py" / f"{name}.py").read_text(encoding="utf-8")
    if before:
        source = source[: source.rindex("\n# %%", 0, source.index(f"\n# {before}\n"))]
    cells = source.split("\n# %%")
    after = next(i for i, cell in enumerate(cells) if cell.startswith(' tags=["parameters"]')) + 1
    cells.insert(after, "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items()))
    namespace = {"__name__": name}
    exec(compile("\n# %%".join(cells), name, "exec"), namespace)
    return SimpleNamespace(**namespace)


def profile_parameters(profile, run_dir, **parameters):
    """The parameters of a profile of ours that needs no Hub, its paths made absolute, and `parameters` on top."""
    values = yaml.safe_load((ROOT / "profiles" / f"{profile}.yaml").read_text())
    paths = {name: str(ROOT / values[name]) for name in ("base_model", "dataset")}
    return {**values, **paths, "run_dir": str(run_dir), **parameters}


def run_tiny(name, run_dir, before=None, **parameters):
    """`run_script` with the tiny profile and `parameters` on top."""
    return run_script(name, before, **profile_parameters("tiny", run_dir, **parameters))


def metrics_without_times(run_dir):
    """The metrics that notebook 4 left in a run folder, without those that differ from run to run."""
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    for figures in metrics.values():
        figures.get("generation", {}).pop("tokens_per_second", None)
    return metrics


def but_for_rounding(value):
    """What equals `value`, nested or not, where numbers may differ by 1e-5 of their size.

    Of some hundred runs of one seed on one machine two ended with a last bit that differed, and it was not found why. A
    training with other kernels (MKL_CBWR=AVX2) differs by 1e-7, one without its optimizer state by 1e-2.
    """
    if isinstance(value, dict):
        return {name: but_for_rounding(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [but_for_rounding(entry) for entry in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
