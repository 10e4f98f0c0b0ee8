"""The series as a whole: pairs, references, what make says and redoes, and where it runs."""

import json
import os
import random
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version

import jupytext
import nbformat
import psutil
import pytest
from conftest import (
    ROOT,
    STAGES,
    TABLE,
    TINY,
    but_for_rounding,
    copy_of,
    hostile,
    make,
    metrics_without_times,
    run_of_make,
    run_tiny,
)
from packaging.version import Version

from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS, read_profile

# On some CPUs bitsandbytes says at its import that it lacks an optional kernel. The package imports
# it silently (model/bnb.py), but peft from 0.20 on imports it first.
NO_HINT = """
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
"""
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks_py").glob("*.py"))


def notebook_of(name, folder="notebooks"):
    return nbformat.read(ROOT / folder / f"{name}.ipynb", 4)


def cells(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_pairs_are_in_sync(name):
    notebook, paired = notebook_of(name), jupytext.read(ROOT / "notebooks_py" / f"{name}.py")
    assert cells(notebook) == cells(paired), "run `make sync`"
    for key in ("accelerator", "colab", "kernelspec"):
        assert notebook.metadata.get(key) == paired.metadata.get(key)


def test_each_notebook_has_its_pair():
    assert (
        NOTEBOOKS
        == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
        == sorted(PARAMETERS)
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(name):
    assert not any(
        cell.get("outputs") or cell.get("execution_count") for cell in notebook_of(name).cells
    )


@pytest.mark.parametrize("name", STAGES)
def test_references_have_the_code_of_the_notebooks(name):
    executed = [
        cell
        for cell in cells(notebook_of(name, "tests/reference"))
        if "injected-parameters" not in cell[2]
    ]
    assert executed == cells(notebook_of(name)), "run `make reference` and review what changed"


def test_the_notebooks_print_what_the_references_show(tmp_path):
    """nbval, strict, in a kernel a notebook, without make and without a locale: what each cell
    prints is as stored.
    """
    for name in ("data", ".cache"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    for name in STAGES:
        shutil.copy(ROOT / "tests" / "reference" / f"{name}.ipynb", tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-kernel-name=python3",
        "-p",
        "no:cacheprovider",
        "-q",
    ]
    environment = {
        **os.environ,
        **hostile(tmp_path / "Zoë's home"),
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if Version(version("peft")) >= Version("0.20"):  # it imports bitsandbytes before we do
        (tmp_path / "sitecustomize.py").write_text(NO_HINT, encoding="utf-8")
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
    files = [f"{name}.ipynb" for name in STAGES]
    done = subprocess.run(
        [*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_only_times_and_pictures_are_ignored(name):
    """A cell that nbval does not compare works, and shows a bar, or shows a time, memory or a
    picture.
    """
    words = (
        "plt.",
        "plot_",
        "if not",
        "train(",
        "merge_adapter(",
        "tqdm(",
        "memory",
        "seconds",
        "room",
        "score(",
        "pipeline(",
        "before_and_after(",
        "nf4_round_trip(",  # whose last digits differ between processors
    )
    for cell in notebook_of(name).cells:
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            assert any(word in cell.source for word in words) or "load_" in cell.source, cell.source
        assert "NBVAL_" not in cell.source


@pytest.mark.parametrize(
    "path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem
)
def test_profiles_say_what_they_are_for_and_name_parameters(path):
    assert path.read_text(encoding="utf-8").startswith(f"# {path.stem}: ")
    known = {
        name for notebook, defaults in PARAMETERS.items() if notebook[0] == "0" for name in defaults
    }
    assert set(read_profile(path)) <= known | {"gpus"}


def test_the_manifest_says_what_ran(finished_run):
    manifest = json.loads((finished_run / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest) == STAGES
    for name, entry in manifest.items():
        assert set(entry["parameters"]) == set(PARAMETERS[name])
        assert entry["parameters"]["base_model"] == ".cache/tiny-llama"
        assert entry["packages"]["transformers"]
        assert entry["seconds"] > 0
    assert len({entry["dataset_fingerprint"] for entry in manifest.values()}) == 1


def test_the_series_ran_offline_without_a_locale_a_cache_or_an_ascii_home(finished_run):
    """`finished_run` is made in such a place; each stage's executed notebook is whole and has no
    warning on red.
    """
    assert (finished_run / "where").read_text(
        encoding="utf-8"
    ) == "LC_ALL=C, HF_HOME=/dev/null/cache"
    for name in STAGES:
        for cell in nbformat.read(finished_run / f"{name}.ipynb", 4).cells:
            for output in cell.get("outputs", []):
                lines = output.text.splitlines() if output.get("name") == "stderr" else []
                assert all("%|" in line or not line.strip() for line in lines), output.text
                assert output.output_type != "error"


def stamps(folder):
    """When each file was written, of those that are whole; a lock is not written."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and ".partial" not in str(path.relative_to(folder))
    ]
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in files
        if not path.name.endswith(".lock")
    }


def test_a_finished_run_is_not_made_again(finished_run, tmp_path):
    run_dir = copy_of(finished_run, tmp_path / "run")
    before = stamps(run_dir)
    done = make("run-all", "PROFILE=tiny", f"RUN_DIR={run_dir}")
    assert done.returncode == 0, done.stderr
    assert stamps(run_dir) == before
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert "right" in lines[0]  # whether answers are right comes first
    start = next(k for k, line in enumerate(lines) if "response perplexity" in line)
    models = [line.split()[0] for line in lines[start + 1 : start + 4]]
    assert models == ["base", "adapter", "merged"]


def kill_once(stage, run_dir, moment):
    """Run a stage and kill all of its processes after so many seconds."""
    command = run_of_make(stage, "PROFILE=tiny", f"RUN_DIR={run_dir}")
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    kill_all(process)


def kill_all(process):
    """SIGKILL for a process and all that it started."""
    with suppress(psutil.NoSuchProcess):
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


@pytest.mark.slow
def test_a_series_that_is_killed_ends_with_the_same_metrics_and_a_second_run_does_nothing(
    finished_run, tmp_path
):
    """SIGKILL at random moments of each stage, which pytest shows if this fails; KILLS and
    KILL_SEED set them.
    """
    again, random_seed = tmp_path / "again", os.environ.get("KILL_SEED", str(time.time_ns()))
    print(f"KILL_SEED={random_seed}")
    draw, times = (
        random.Random(random_seed),
        json.loads((finished_run / "manifest.json").read_text(encoding="utf-8")),
    )
    for stage in STAGES:
        for _ in range(int(os.environ.get("KILLS", 1))):
            moment = draw.uniform(0, times[stage]["seconds"] + 3)  # and what it takes to start
            kill_once(stage, again, moment)
            print(
                f"{stage} killed after {moment:.1f} s: {sorted(path.name for path in again.glob('*'))}"
            )
        recorded = (
            json.loads((again / "manifest.json").read_text())
            if (again / "manifest.json").exists()
            else {}
        )
        before = (
            {} if stage in recorded else stamps(again)
        )  # what had ended but for its notebook is made anew
        done = make(stage, "PROFILE=tiny", f"RUN_DIR={again}")
        assert done.returncode == 0, done.stderr
        after = stamps(again)
        done_twice = {
            name for name, stamp in before.items() if name in after and after[name] != stamp
        }
        costly = {name for name in done_twice if name.endswith((".safetensors", "optimizer.pt"))}
        assert costly <= {
            "adapter/adapter_model.safetensors"
        }  # the end of a training: loaded, and saved again
    assert not list(again.rglob("*.partial*"))
    assert metrics_without_times(again) == but_for_rounding(metrics_without_times(finished_run))
    finished = stamps(again)
    assert make("run-all", "PROFILE=tiny", f"RUN_DIR={again}").returncode == 0
    assert stamps(again) == finished


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "-p packing false -p epochs 2",
        "-p evaluations 5 -p learning_rate 0.3 -p early_stopping_patience 1",
    ],
    ids=["packed", "padded", "packed, stopping early"],
)
def test_a_killed_training_ends_with_the_same_metrics(finished_run, tmp_path, arguments):
    """SIGKILL once the first checkpoint is there; the next run goes on from it; one after the
    end changes nothing.
    """
    import torch
    from safetensors.torch import load_file

    done, killed = (
        copy_of(finished_run, tmp_path / name, "dataset") for name in ("done", "killed")
    )
    command = [sys.executable, "-m", "tabletune", "run", "notebooks/02_finetune_qlora.ipynb"]

    def figures(folder):
        metrics = json.loads((folder / "training" / "metrics.json").read_text(encoding="utf-8"))
        return {
            name: value
            for name, value in metrics.items()
            if "second" not in name and "memory" not in name
        }

    def start(folder):
        told = [
            str(folder / "02_finetune_qlora.ipynb"),
            "-f",
            "profiles/tiny.yaml",
            *arguments.split(),
        ]
        return subprocess.Popen([*command, *told], cwd=ROOT, stderr=subprocess.DEVNULL)

    assert start(done).wait() == 0
    process = start(killed)
    while not list(killed.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        time.sleep(0.05)
    kill_all(process)
    assert not (killed / "adapter").exists()
    assert not (killed / "training" / "metrics.json").exists()
    assert start(killed).wait() == 0
    assert "going on from checkpoint" in (killed / "02_finetune_qlora.ipynb").read_text(
        encoding="utf-8"
    )
    assert figures(killed) == but_for_rounding(figures(done))
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (done, killed)
    )
    torch.testing.assert_close(
        other, one, rtol=0, atol=1e-4
    )  # steps of other kernels, AVX2's, add up to 1e-5
    before = stamps(killed)
    assert start(killed).wait() == 0
    changed = {name for name, stamp in stamps(killed).items() if before.get(name) != stamp}
    assert changed == {"02_finetune_qlora.ipynb"}, "the notebook that shows it all again"


@pytest.mark.parametrize(
    ("stage", "missing", "first"),
    [
        ("02_finetune_qlora", "dataset", "Run 01_format_dataset"),
        ("03_merge_adapter", "adapter", "Run 02_finetune_qlora"),
        ("04_evaluate", "dataset", "Run 01_format_dataset"),
        ("04_evaluate", "adapter", "Run 02_finetune_qlora"),
        ("04_evaluate", "merged", "Run 03_merge_adapter"),
    ],
)
def test_out_of_order(finished_run, tmp_path, stage, missing, first):
    """A stage whose input is not there says which notebook makes it, in one line, and leaves
    nothing.
    """
    run_dir = tmp_path / "run"
    there = {"02": [], "03": ["dataset"], "04": ["dataset", "adapter", "merged"]}[stage[:2]]
    copy_of(finished_run, run_dir, "settings", *(name for name in there if name != missing))
    with pytest.raises(StageError, match=f"{run_dir / missing}.* is missing. {first}") as caught:
        run_tiny(stage, run_dir)
    assert "\n" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"StageError: {caught.value}"]
    assert not (run_dir / {"02": "adapter", "03": "merged", "04": "evaluation"}[stage[:2]]).exists()


def test_a_changed_table_is_noticed_also_in_a_folder_with_spaces_in_its_name(tmp_path):
    """The whole repository, copied into such a folder; only the table differs between the two
    runs.
    """
    copy = tmp_path / "my notebooks"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".cache", "examples", "tests"),
    )
    shutil.copytree(TINY, copy / ".cache" / "tiny-llama")
    arguments = ("01_format_dataset", "PROFILE=tiny", "ARGS=-p dataset data/t.csv", "-C", copy)
    shutil.copy(TABLE, copy / "data" / "t.csv")
    reports = []
    for _ in range(2):
        done = make(*arguments)
        assert done.returncode == 0, done.stderr
        reports.append(
            json.loads(
                (copy / "runs" / "tiny" / "dataset" / "report.json").read_text(encoding="utf-8")
            )
        )
        with (copy / "data" / "t.csv").open("a", encoding="utf-8") as file:
            file.write("Lemon,A New Issue,Squeeze half a lemon into a glass of water.,Tadasana\n")
    before, after = reports
    assert after["rows_in"] == before["rows_in"] + 1
    assert after["fingerprint"] != before["fingerprint"]
    assert list((copy / "runs" / "tiny" / "earlier").glob("*/dataset/report.json")), (
        "nothing finished is deleted"
    )


def test_the_benchmark_says_that_it_needs_a_gpu():
    """With all of its rows, and with one whose name has a comma in it."""
    for arguments in ([], ["--only", "a100 profile, 39 GiB"]):
        command = [sys.executable, ROOT / "benchmarks" / "run.py", *arguments]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == "The benchmark needs an NVIDIA GPU; there is none here.\n"


def test_the_examples_of_the_benchmark_fit_into_a_row(tmp_path, tokenizer):
    import datasets

    from tabletune.chat.encoding import encode

    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "common.py"))
    benchmark["make_dataset"](tmp_path, TINY, steps=2)
    train = datasets.load_from_disk(tmp_path / "dataset")["train"]
    lengths = [len(encode(row, *tokenizer)["input_ids"]) for row in train]
    assert max(lengths) <= 512
    assert statistics.mean(lengths) == pytest.approx(
        statistics.mean(benchmark["LENGTHS"]), rel=0.15
    )
