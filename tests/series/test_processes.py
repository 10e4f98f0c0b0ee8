"""Notebooks in two processes, as on two GPUs; here they compute on the CPU and talk through
gloo.
"""

import json
import shutil
import subprocess
import time

import psutil
import pytest
import torch
from conftest import copy_of, make, run_of_make
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# Accelerate shards only what runs on GPUs, so the kernels take themselves for such, with little
# memory.
AS_ON_SMALL_GPUS = """
import psutil
from accelerate.state import DistributedType, PartialState

set_up = PartialState.__init__


def set_up_as_gpu(self, *arguments, **options):
    set_up(self, *arguments, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = set_up_as_gpu
little = psutil.virtual_memory()._replace(available=2**28)
psutil.virtual_memory = lambda: little
"""


FORMATTED = ["dataset", "01_format_dataset.ipynb", "manifest.json"]


def training(run_dir, processes, rows):
    """The arguments of make for the training with so many processes and rows of each a step."""
    arguments = ["02_finetune_qlora", "PROFILE=tiny", f"RUN_DIR={run_dir}", f"GPUS={processes}"]
    return [*arguments, f"ARGS=-p batch_size {rows} -p min_steps 1"]


def history(run_dir):
    """Step, loss and gradient norm of each logged training step, but for the last, whose batch
    is not full.
    """
    log = json.loads((run_dir / "training" / "log_history.json").read_text())
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry][
        :-1
    ]


def kernel_of(make_process, rank):
    """The kernel of one of the processes that make has started; None if it is not there yet."""
    for child in make_process.children(recursive=True):
        if "ipykernel_launcher" in " ".join(child.cmdline()) and child.environ().get("RANK") == str(
            rank
        ):
            return child
    return None


@pytest.fixture(scope="module")
def trained_by_one(finished_run, tmp_path_factory):
    """A run folder in which one process has trained, with as many rows a step as two have below."""
    run_dir = copy_of(finished_run, tmp_path_factory.mktemp("one") / "run", *FORMATTED)
    done = make(*training(run_dir, 1, 4))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP"])
def test_two_processes_train_as_one_also_after_one_was_killed(
    trained_by_one, finished_run, tmp_path, monkeypatch, sharded
):
    run_dir = copy_of(finished_run, tmp_path / "two", *FORMATTED)
    if sharded:
        startup = tmp_path / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "gpus.py").write_text(AS_ON_SMALL_GPUS)
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    command = run_of_make(*training(run_dir, 2, 2))
    two = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while two.poll() is None and not list(
        run_dir.glob("checkpoints/checkpoint-*/trainer_state.json")
    ):
        time.sleep(0.1)
    second = kernel_of(psutil.Process(two.pid), 1)
    assert second.environ()["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    second.kill()
    _, said = two.communicate(timeout=120)  # not a hang
    assert two.returncode != 0
    assert "02_finetune_qlora.process1: " in said
    assert "Process 1 failed first" in said
    assert not (run_dir / "02_finetune_qlora.ipynb").exists()

    done = make(*training(run_dir, 2, 2))
    assert done.returncode == 0, done.stderr
    notebook = (run_dir / "02_finetune_qlora.ipynb").read_text()
    assert "going on from checkpoint-" in notebook
    assert ("sharded over 2 GPUs (FSDP)" in notebook) == sharded
    assert ("each of 2 processes has the whole model" in notebook) == (not sharded)
    assert bool(list(run_dir.glob("checkpoints/*/pytorch_model_fsdp_0"))) == sharded
    states = [
        json.loads(file.read_text())
        for file in run_dir.glob("checkpoints/checkpoint-*/trainer_state.json")
    ]
    last = max(states, key=lambda state: state["global_step"])
    assert last["best_model_checkpoint"].endswith(f"checkpoint-{last['best_global_step']}")
    expected, found = history(trained_by_one), history(run_dir)
    resumed = [
        entry for entry in zip(expected, found, strict=True) if entry[0][0] > 10
    ]  # its first log is of less
    assert len(resumed) > 5
    for one, other in resumed:
        assert other == pytest.approx(one, rel=5e-3)
    adapters = [
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (trained_by_one, run_dir)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    one, other = (
        torch.cat([adapter[name].flatten() for name in sorted(adapter)]) for adapter in adapters
    )
    assert (one - other).norm() < 0.1 * one.norm()
    assert not list(run_dir.glob("*process1*")), "what is left looks as on one GPU"
    assert {path.name for path in run_dir.iterdir()} == {
        path.name for path in trained_by_one.iterdir()
    }


def evaluated(run_dir, stage, processes):
    """The figures and the answers after evaluating with so many processes."""
    done = make(stage, "PROFILE=tiny", f"RUN_DIR={run_dir}", f"GPUS={processes}")
    assert done.returncode == 0, done.stderr
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in run_dir.glob(f"{FOLDER[stage]}/*.json*")
    }


FOLDER = {"04_evaluate": "evaluation", "trust": "trust"}


@pytest.mark.parametrize("stage", FOLDER)
def test_two_processes_evaluate_as_one(finished_run, tmp_path, stage):
    """The same answers, and the same figures but for rounding."""
    one, two = (copy_of(finished_run, tmp_path / name) for name in ("one", "two"))
    if stage == "04_evaluate":
        shutil.rmtree(two / "evaluation")
        (two / "04_evaluate.ipynb").unlink()
    expected, found = evaluated(one, stage, 1), evaluated(two, stage, 2)
    assert expected.keys() == found.keys()
    assert "metrics.json" in found
    for name in expected:
        if name != "metrics.json":
            assert found[name] == expected[name]
    assert figures(found["metrics.json"]) == pytest.approx(
        figures(expected["metrics.json"]), rel=1e-3, abs=1e-6
    )
    left = [{path.name for path in run_dir.iterdir()} for run_dir in (one, two)]
    assert left[0] == left[1], "what is left looks as on one GPU"


def figures(text):
    """All numbers of a file of metrics by where they stand, but for times."""
    found, todo = {}, [("", json.loads(text))]
    while todo:
        place, value = todo.pop()
        if isinstance(value, (dict, list)):
            todo += [
                (f"{place}/{key}", entry)
                for key, entry in (value.items() if isinstance(value, dict) else enumerate(value))
            ]
        elif isinstance(value, (int, float)) and "second" not in place:
            found[place] = value
    return found
