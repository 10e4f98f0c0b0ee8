"""What the tests share: a finished run, ways to run make and notebooks, comparisons that forgive
what may differ.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

# a thread that waits leaves its core to the other worker: before PyTorch is imported, also in what
# tests start
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# what tests start is no part of the make that may run them: its level and its arguments are not
# theirs, nor is ARGS, which is for pytest
for variable in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS", "ARGS"):
    os.environ.pop(variable, None)
ROOT = Path(__file__).parent.parent
TINY = ROOT / ".cache" / "tiny-llama"
TABLE = ROOT / "data" / "home_remedies.csv"
STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"]
pytest_plugins = ["deprecations"]  # a test in which our own code uses what is deprecated fails


def enable_checkpointing(model, **options):
    """Have a model recompute its activations, under the name that this transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):  # newer than 5.15
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def hostile(home):
    """An environment in which people do run this: no locale, no network, no cache to write to, a
    home like Zoë's.
    """
    home.mkdir(parents=True, exist_ok=True)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/dev/null/cache", "HTTPS_PROXY": "http://localhost:9"}
    return {**locale, **hub, "HOME": str(home), "MPLCONFIGDIR": str(home / "matplotlib")}


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny base model's tokenizer and its stop tokens."""
    from tabletune.chat.tokenizer import load_tokenizer

    return load_tokenizer(str(TINY))


def run_of_make(*arguments):
    """What subprocess is to be told to run make in this environment, its output as text."""
    command = [
        "make",
        "--no-print-directory",
        "VENV=",
        f"PYTHON={sys.executable}",
        *map(str, arguments),
    ]
    return {"args": command, "cwd": ROOT, "env": dict(os.environ), "text": True}


def make(*arguments, cwd=ROOT):
    """Run make in this environment. Returns the finished process, its output as text."""
    return subprocess.run(**{**run_of_make(*arguments), "cwd": cwd}, capture_output=True)


@contextmanager
def locked(path):
    """Hold a lock that only one process has at a time: pytest-xdist's workers share what is made
    once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def what_a_run_depends_on():
    """A digest of all that the tiny profile's run is made from, the libraries included."""
    from tabletune.run.machine import installed
    from tabletune.run.stage import PACKAGES

    digest = hashlib.sha256()
    for package in PACKAGES:
        digest.update(f"{package}=={installed(package)}\n".encode())
    files = [ROOT / "requirements.txt"]
    for name in ("src/tabletune", "notebooks", "profiles", "data"):
        files += sorted((ROOT / name).rglob("*"))
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


KEPT_RUNS = 6  # finished runs of other states of the code, which somebody may come back to


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run folder in which notebooks 1 to 4 of the tiny profile have run.

    Copy it before changing it.

    Nothing disturbed the run, but it was made in a place that is `hostile`. One run serves all
    workers, and the next session too, as long as nothing that it is made from has changed.
    """
    cache = ROOT / ".cache" / "finished_runs"
    made = cache / what_a_run_depends_on()
    with locked(cache / ".lock"):
        if not made.exists():
            newest_first = sorted(cache.glob("*"), key=lambda run: -run.stat().st_mtime)
            for other in [cache / "partial", *newest_first[KEPT_RUNS:]]:
                shutil.rmtree(other, ignore_errors=True)
            partial = cache / "partial"
            place = hostile(tmp_path_factory.mktemp("place") / "Zoë's home")
            run_dir = partial.relative_to(ROOT)
            command = run_of_make("run-all", "PROFILE=tiny", f"RUN_DIR={run_dir}")
            environment = {**command["env"], **place}
            done = subprocess.run(**{**command, "env": environment}, capture_output=True)
            assert done.returncode == 0, done.stderr
            (partial / "where").write_text(f"LC_ALL={place['LC_ALL']}, HF_HOME={place['HF_HOME']}")
            partial.rename(made)
        return copy_of(made, tmp_path_factory.mktemp("finished") / "run")


def copy_of(run_dir, target, *names):
    """A copy of a run folder, or of what has these names in it, with the files' times: to make
    it is as finished.
    """
    for name in names or ["."]:
        source = run_dir / name
        if source.is_dir():
            shutil.copytree(source, target / name, copy_function=shutil.copy2, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def run_script(name, before=None, **parameters):
    """Run a notebook's paired .py in this process with other parameters, as Papermill would.

    Returns its globals.

    With `before`, a heading, it stops in front of the part that the heading opens.
    """
    source = (ROOT / "notebooks_py" / f"{name}.py").read_text(encoding="utf-8")
    if before:
        source = source[: source.rindex("\n# %%", 0, source.index(f"\n# {before}\n"))]
    cells = source.split("\n# %%")
    after = (
        next(i for i, cell in enumerate(cells) if '["parameters"]' in cell.partition("\n")[0]) + 1
    )
    cells.insert(after, "\n" + "\n".join(f"{key} = {value!r}" for key, value in parameters.items()))
    namespace = {"__name__": name}
    exec(compile("\n# %%".join(cells), name, "exec"), namespace)
    return SimpleNamespace(**namespace)


def profile_parameters(profile, run_dir, **parameters):
    """The parameters of a profile of ours that needs no Hub, its paths made absolute, and
    `parameters` on top.
    """
    from tabletune.run.parameters import read_profile

    values = read_profile(ROOT / "profiles" / f"{profile}.yaml")
    paths = {name: str(ROOT / values[name]) for name in ("base_model", "dataset")}
    return {**values, **paths, "run_dir": str(run_dir), **parameters}


def run_tiny(name, run_dir, before=None, **parameters):
    """`run_script` with the tiny profile and `parameters` on top."""
    return run_script(name, before, **profile_parameters("tiny", run_dir, **parameters))


def metrics_without_times(run_dir):
    """The metrics that notebook 4 left in a run folder, without those that differ from run to
    run.
    """
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
    for figures in metrics.values():
        if isinstance(figures, dict):
            figures.get("generation", {}).pop("tokens_per_second", None)
    return metrics


def but_for_rounding(value):
    """What equals `value`, nested or not, where numbers may differ by 1e-5 of their size.

    Of some hundred runs of one seed on one machine two ended with a last bit that differed, and it
    was not found why. A training with other kernels (MKL_CBWR=AVX2) differs by 1e-7, one without
    its optimizer state by 1e-2.
    """
    if isinstance(value, dict):
        return {name: but_for_rounding(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [but_for_rounding(entry) for entry in value]
    return pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
