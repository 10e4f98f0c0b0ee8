"""The series as a whole: pairs, references, commands, and what people get wrong."""

import ast
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

import datasets
import jupytext
import nbformat
import psutil
import pytest
import yaml
from conftest import ROOT, STAGES, TABLE, TINY, but_for_rounding, make, metrics_without_times, run_of_make, run_tiny

NOTEBOOKS = [*STAGES, "05_export", "chat", "report", "compare_runs"]


def cells(notebook):
    return [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells]


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_pairs_are_in_sync(stage):
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4)
    paired = jupytext.read(ROOT / "notebooks_py" / f"{stage}.py")
    assert cells(notebook) == cells(paired), "run `make sync`"
    for key in ("accelerator", "colab", "kernelspec"):
        assert notebook.metadata.get(key) == paired.metadata.get(key)


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(stage):
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("stage", STAGES)
def test_references_have_the_code_of_the_notebooks(stage):
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4)
    reference = nbformat.read(ROOT / "tests" / "reference" / f"{stage}.ipynb", 4)
    executed = [cell for cell in cells(reference) if "injected-parameters" not in cell[2]]
    assert executed == cells(notebook), "run `make reference` and review what changed"


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_only_times_and_pictures_are_ignored(stage):
    """A cell that nbval does not compare loads, trains, evaluates or plots: it prints a time or a picture."""
    for cell in nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4).cells:
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            timed = (
                "plt.show()",
                "load_base(",
                "load_model(",
                "trainer.train(",
                "tqdm(",
                "from_pretrained(",
                "memory",
                "trainer.evaluate(",
                "disk_usage(",
                "report",
            )
            assert any(word in cell.source for word in timed), cell.source
        assert "NBVAL_" not in cell.source


def test_what_two_notebooks_share_is_word_for_word_the_same():
    seen, shared = {}, 0
    for stage in NOTEBOOKS:
        for node in ast.parse((ROOT / "notebooks_py" / f"{stage}.py").read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                other, code = seen.setdefault(node.name, (stage, ast.unparse(node)))
                assert code == ast.unparse(node), f"{node.name} differs between {other} and {stage}"
                shared += other != stage
    assert shared > 15


def test_parameters_that_stages_share_have_one_default():
    seen = {}
    for stage in NOTEBOOKS:
        for cell in nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                values = {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in ast.parse(cell.source).body}
                assert all(seen.setdefault(name, value) == value for name, value in values.items())
    assert {"run_dir", "base_model", "seed"} <= set(seen)


@pytest.mark.parametrize("profile", ["t4", "a100", "cpu", "tiny"])
def test_profiles_are_flat_and_say_what_they_are_for(profile):
    text = (ROOT / "profiles" / f"{profile}.yaml").read_text()
    assert text.startswith(f"# {profile}: ")
    assert not any(isinstance(value, (dict, list)) for value in yaml.safe_load(text).values())


def test_the_manifest_says_what_ran(finished_run):
    manifest = json.loads((finished_run / "manifest.json").read_text())
    assert list(manifest) == STAGES
    for entry in manifest.values():
        assert entry["parameters"]["base_model"] == ".cache/tiny-llama"
        assert entry["packages"]["transformers"] and entry["seconds"] > 0
    assert len({entry["dataset_fingerprint"] for entry in manifest.values()}) == 1


def stamps(folder):
    """When each file was written, of those that are whole."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path.relative_to(folder))]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def kill_once(stage, run_dir, moment):
    """Run a stage and kill all of its processes after so many seconds."""
    command = run_of_make(stage, "PROFILE=tiny", f"RUN_DIR={run_dir}")
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    with suppress(psutil.NoSuchProcess):
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


def test_a_series_that_is_killed_ends_with_the_same_metrics_and_a_second_run_does_nothing(finished_run, tmp_path):
    """SIGKILL at random moments of each stage, which pytest shows if this fails; KILLS and KILL_SEED set them."""
    again, random_seed = tmp_path / "again", os.environ.get("KILL_SEED", str(time.time_ns()))
    print(f"KILL_SEED={random_seed}")
    draw, times = random.Random(random_seed), json.loads((finished_run / "manifest.json").read_text())
    for stage in STAGES:
        for _ in range(int(os.environ.get("KILLS", 1))):
            moment = draw.uniform(0, times[stage]["seconds"] + 3)  # and what it takes to start
            kill_once(stage, again, moment)
            found = sorted(path.name for path in again.glob("*"))
            print(f"{stage} killed after {moment:.1f} s: {found}")
        recorded = json.loads((again / "manifest.json").read_text()) if (again / "manifest.json").exists() else {}
        before = {} if stage in recorded else stamps(again)  # what had ended but for its notebook is made anew
        assert make(stage, "PROFILE=tiny", f"RUN_DIR={again}").returncode == 0
        after = stamps(again)
        done_twice = {name for name, stamp in before.items() if name in after and after[name] != stamp}
        costly = {name for name in done_twice if name.endswith((".safetensors", "optimizer.pt")) or "so_far/" in name}
        assert costly <= {"adapter/adapter_model.safetensors"}  # the end of a training: loaded, and saved again
    assert not list(again.rglob("*.partial*"))
    assert metrics_without_times(again) == but_for_rounding(metrics_without_times(finished_run))
    finished = stamps(again)
    assert make("run-all", "PROFILE=tiny", f"RUN_DIR={again}").returncode == 0
    assert stamps(again) == finished


def expect_make_error(run_dir, *words, profile="tiny", args=""):
    """`make run-all` must fail with one clear line with `words` in it, and leave nothing that looks complete."""
    done = make("run-all", f"PROFILE={profile}", f"RUN_DIR={run_dir}", f"ARGS={args}")
    lines = [line for line in done.stderr.splitlines() if words[0] in line]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines
    assert "Traceback" not in done.stdout + done.stderr
    assert not (run_dir / "dataset").exists() and not (run_dir / "01_format_dataset.ipynb").exists()


def test_unknown_profile(tmp_path):
    expect_make_error(tmp_path / "run", 'no profile "t5"', "a100", "cpu", "t4", "tiny", profile="t5")


def test_unknown_parameter(tmp_path):
    expect_make_error(tmp_path / "run", "'learning_rte'", "Did you mean 'learning_rate'", args="-p learning_rte 1")


def test_missing_file(tmp_path):
    expect_make_error(tmp_path / "run", "no such file", "nowhere.csv", args="-p dataset nowhere.csv")


def expect_error(stage, run_dir, message, **parameters):
    """A stage must stop with a StageError that matches `message`, and leave nothing under its own name."""
    with pytest.raises(Exception, match=message) as caught:
        run_tiny(stage, run_dir, **parameters)
    assert type(caught.value).__name__ == "StageError"
    assert "\n" not in str(caught.value) and caught.value._render_traceback_() == [f"StageError: {caught.value}"]
    output = ["dataset", "adapter", "merged", "evaluation"][STAGES.index(stage)]
    assert not (run_dir / output).exists()


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


HEADER = "Name of Item,Health Issue,Home Remedy,Yogasan\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no rows"),
        (HEADER, r"has no rows"),
        (HEADER + "a,b,c,d\na,b,c,d,e,f\n", r"line 3: this row has 6 cells, the header 4"),
        (
            "Name of Item,Health Isue,Home Remedy,Yogasan\na,b,c,d\n",
            r"no column 'Health Issue'.*Did you mean 'Health Isue'",
        ),
        (HEADER + "a,Cold,None,d\na,,Rest.,d\n", r"All 2 rows .*'no answer': 1, 'no question': 1"),
        (HEADER + "a,Cold,Rest.,d\na,Cough,Drink tea.,d\n", r"Only 2 different questions"),
    ],
    ids=["nothing", "no rows", "ragged", "misspelt column", "all dropped", "too few"],
)
def test_a_bad_table(tmp_path, text, message):
    expect_error("01_format_dataset", tmp_path / "run", message, dataset=str(write(tmp_path / "t.csv", text)))


def test_a_table_in_another_encoding(tmp_path):
    table = write(tmp_path / "t.csv", HEADER + "Café,Cold,Rest.,\n", "latin-1")
    expect_error("01_format_dataset", tmp_path / "run", "not UTF-8", dataset=str(table))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dataset": "Makefile"}, r"Makefile: this kind of file is not read.*\.parquet"),
        ({"dataset": "someone/no-such-table"}, r"dataset=someone/no-such-table"),
        ({"dataset": "nowhere.jsonl"}, r"nowhere.jsonl: there is no such file"),
        ({"base_model": "no/such-model"}, r"base_model=no/such-model: not a model folder here"),
        ({"base_model": "data"}, r"base_model=data: not a model folder here"),
        ({"max_length": 10}, r"max_length=10 leaves no room.*the shortest prompt has \d+ tokens"),
        ({"answer_column": "remedies"}, r"answer_column='remedies' is not in answer_template"),
        ({"question_template": "{ailment}?"}, r"\{ailment\}, which `columns` does not name"),
        ({"long_answers": "cut"}, r"long_answers='cut'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_parameter(tmp_path, monkeypatch, parameters, message):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    expect_error("01_format_dataset", tmp_path / "run", message, **parameters)


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
    run_dir = tmp_path / "run"
    for folder in {"dataset", "adapter", "merged"} - {missing, "merged" if stage[1] == "3" else ""}:
        if not (stage[1] == "2" and folder == "adapter"):
            shutil.copytree(finished_run / folder, run_dir / folder)
    expect_error(stage, run_dir, f"{run_dir / missing} is missing. {first}")


def test_training_refuses_rows_that_it_would_cut(finished_run, tmp_path):
    shutil.copytree(finished_run / "dataset", tmp_path / "run" / "dataset")
    expect_error("02_finetune_qlora", tmp_path / "run", "max_length=64, but the longest example has", max_length=64)


@pytest.mark.parametrize("stale", ["dataset", "adapter"])
def test_evaluation_refuses_what_does_not_belong_together(finished_run, tmp_path, stale):
    run_dir = tmp_path / "run"
    for folder in ("dataset", "adapter", "merged"):
        shutil.copytree(finished_run / folder, run_dir / folder)
    if stale == "dataset":
        report = run_dir / "dataset" / "report.json"
        report.write_text(report.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
        expect_error("04_evaluate", run_dir, "trained on another data set. Run 02_finetune_qlora again")
    else:
        with (run_dir / "adapter" / "adapter_model.safetensors").open("ab") as file:
            file.write(b" ")
        expect_error("04_evaluate", run_dir, "made from another adapter. Run 03_merge_adapter again")


def test_a_full_disk(format_dataset, tmp_path):
    """Nothing half-written stays, and the message says what to do."""
    with (
        pytest.raises(format_dataset.StageError, match="The disk is full"),
        format_dataset.whole(tmp_path / "new") as partial,
    ):
        partial.mkdir()
        (partial / "file").write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_was_whole_stays_until_its_successor_is(format_dataset, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), format_dataset.whole(tmp_path / "file") as partial:
        partial.write_text("new")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_text() == "old"
    with format_dataset.whole(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_environment_is_checked():
    done = make("01_format_dataset", "PROFILE=tiny", "PYTHON=/usr/bin/env -i /usr/bin/python3 -I -S")
    assert done.returncode != 0 and "lacks a package" in done.stderr


def test_a_folder_with_spaces_in_its_name(tmp_path):
    """The whole repository, copied into such a folder."""
    copy = tmp_path / "my notebooks"
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", ".cache")
    shutil.copytree(ROOT, copy, ignore=ignore)
    shutil.copytree(TINY, copy / ".cache" / "tiny-llama")
    done = make("01_format_dataset", "PROFILE=tiny", "-C", copy)
    assert done.returncode == 0, done.stderr
    assert (copy / "runs" / "tiny" / "dataset" / "report.json").exists()


def test_the_benchmark_says_that_it_needs_a_gpu():
    """With all of its rows, and with one whose name has a comma in it."""
    for arguments in ([], ["--only", "a100 profile, 39 GiB"]):
        command = [sys.executable, ROOT / "benchmarks" / "run.py", *arguments]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == "The benchmark needs an NVIDIA GPU; there is none here.\n"


def test_the_examples_of_the_benchmark_fit_into_a_row(tmp_path, finetune, tokenizer):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    benchmark["make_dataset"](tmp_path, TINY, steps=2)
    train = datasets.load_from_disk(tmp_path / "dataset")["train"]
    lengths = [len(finetune.encode(row, tokenizer)["input_ids"]) for row in train]
    assert max(lengths) <= 512
    assert statistics.mean(lengths) == pytest.approx(statistics.mean(benchmark["LENGTHS"]), rel=0.15)


@pytest.mark.parametrize(("word", "rows"), [("true", 186), ("false", 0), ("True", 186)])
def test_truth_values_as_people_write_them(word, rows, tmp_path):
    """Papermill takes a small "false" for a text, and a text is true."""
    done = make("01_format_dataset", "PROFILE=tiny", f"RUN_DIR={tmp_path}", f"ARGS=-p safety_rows {word}")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "dataset" / "report.json").read_text())["safety_rows"] == rows


def test_a_changed_table_is_noticed(tmp_path):
    table = tmp_path / "t.csv"
    shutil.copy(TABLE, table)
    run_dir = tmp_path / "run"
    arguments = ("01_format_dataset", "PROFILE=tiny", f"RUN_DIR={run_dir}", f"ARGS=-p dataset {table}")
    assert make(*arguments).returncode == 0
    before = json.loads((run_dir / "dataset" / "report.json").read_text())
    with table.open("a", encoding="utf-8") as file:
        file.write("Lemon,A New Issue,Squeeze half a lemon into a glass of water.,Tadasana\n")
    assert make(*arguments).returncode == 0
    after = json.loads((run_dir / "dataset" / "report.json").read_text())
    assert after["rows_in"] == before["rows_in"] + 1 and after["fingerprint"] != before["fingerprint"]
