"""Is a stage done? Its notebook's text, its parameters and its inputs decide, and never a file's
time.
"""

import json
import shutil
from dataclasses import asdict

import pytest
from conftest import ROOT, STAGES, TABLE, copy_of

from tabletune.cli import series
from tabletune.cli.options import RunChoice, read_settings, write_settings
from tabletune.cli.series import current_inputs, is_up_to_date
from tabletune.data.context import ContextSettings
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS


@pytest.fixture
def run_dir(finished_run, tmp_path, monkeypatch):
    """A copy of a finished run, seen from the repository's root, in which it was made."""
    monkeypatch.chdir(ROOT)
    return copy_of(finished_run, tmp_path / "run")


def fresh(run_dir):
    """The stages that need not run."""
    return [stage for stage in STAGES if is_up_to_date(stage, run_dir / f"{stage}.ipynb")]


def change_settings(run_dir, **values):
    write_settings(RunChoice(run_dir, read_settings(run_dir) | values, 1, "tiny"))


def change_manifest(run_dir, stage, **values):
    path = run_dir / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest[stage].update(values)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_all_stages_of_a_finished_run_are(run_dir):
    assert fresh(run_dir) == STAGES


def test_times_of_files_do_not_matter(run_dir):
    for path in run_dir.rglob("*"):
        path.touch()
    assert fresh(run_dir) == STAGES


def test_a_run_folder_may_be_moved(run_dir):
    moved = run_dir.rename(run_dir.with_name("moved"))
    assert fresh(moved) == STAGES


def test_a_changed_parameter_is_noticed_by_the_stages_that_have_it(run_dir):
    change_settings(run_dir, lora_r=4)
    assert fresh(run_dir) == ["01_format_dataset", "03_merge_adapter", "04_evaluate"]


def test_a_changed_question_is_noticed_although_no_result_depends_on_it(run_dir):
    change_settings(run_dir, your_question="What helps against hiccups?")
    assert fresh(run_dir) == STAGES[:3]


def test_a_parameter_that_is_set_to_its_default_is_noticed_only_by_its_text(run_dir):
    change_settings(run_dir, window=PARAMETERS["04_evaluate"]["window"])
    assert fresh(run_dir) == STAGES[:3]


def test_a_changed_notebook_is_noticed(run_dir, monkeypatch, tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    changed = tmp_path / "notebooks" / "02_finetune_qlora.ipynb"
    text = changed.read_text(encoding="utf-8")
    changed.write_text(text.replace("## Train", "## The training"), encoding="utf-8")
    monkeypatch.setattr(series, "notebook", lambda name: tmp_path / "notebooks" / f"{name}.ipynb")
    assert fresh(run_dir) == ["01_format_dataset", "03_merge_adapter", "04_evaluate"]


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("dataset", "01_format_dataset"),
        ("adapter", "02_finetune_qlora"),
        ("merged", "03_merge_adapter"),
        ("evaluation/metrics.json", "04_evaluate"),
        ("04_evaluate.ipynb", "04_evaluate"),
        ("manifest.json", "01_format_dataset"),
    ],
)
def test_a_missing_output_is_noticed(run_dir, missing, stage):
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not is_up_to_date(stage, run_dir / f"{stage}.ipynb")


def test_another_adapter_is_noticed_by_what_was_made_of_it(run_dir):
    with (run_dir / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert fresh(run_dir) == ["01_format_dataset", "02_finetune_qlora"]


def test_another_data_set_is_noticed_by_what_was_made_of_it(run_dir):
    path = run_dir / "dataset" / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(report | {"fingerprint": "another"}), encoding="utf-8")
    assert fresh(run_dir) == ["01_format_dataset", "03_merge_adapter"]


def test_a_result_that_was_made_in_jupyter_with_other_parameters_is_noticed(run_dir):
    parameters = json.loads((run_dir / "manifest.json").read_text())["02_finetune_qlora"]
    change_manifest(
        run_dir, "02_finetune_qlora", parameters=parameters["parameters"] | {"epochs": 2}
    )
    assert fresh(run_dir) == ["01_format_dataset", "03_merge_adapter", "04_evaluate"]


def test_a_training_on_other_hardware_counts(run_dir):
    """As in the notebook: whoever trained on a GPU keeps the adapter on a laptop."""
    entry = json.loads((run_dir / "manifest.json").read_text())["02_finetune_qlora"]
    gpus = {"dtype": "float16", "device": "cuda", "processes": 2, "sharded": True}
    change_manifest(run_dir, "02_finetune_qlora", inputs=entry["inputs"] | gpus)
    assert fresh(run_dir) == STAGES


def test_a_damaged_notebook_is_noticed(run_dir):
    (run_dir / "03_merge_adapter.ipynb").write_text('{"cells": [')
    assert fresh(run_dir) == ["01_format_dataset", "02_finetune_qlora", "04_evaluate"]


# --- the table

HEADER, ROW = "question,answer\n", "a question,an answer\n"


def write_table(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(HEADER + ROW, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "dataset", "splits", "changed"),
    [
        (["t.csv"], "t.csv", {}, "t.csv"),
        (["a/t.csv", "a/u.csv"], "a", {}, "a/u.csv"),
        (["a/t.csv", "a/u.csv"], "a/*.csv", {}, "a/u.csv"),
        (["my table.csv"], "my table.csv", {}, "my table.csv"),
        (["t.jsonl"], "t.jsonl", {}, "t.jsonl"),
        (["t.arrow"], "t.arrow", {}, "t.arrow"),
        (["a/x.csv", "a/y.csv"], "a", {"train": "x.csv", "test": "y.csv"}, "a/y.csv"),
    ],
)
def test_a_changed_table_is_noticed_whatever_names_it(
    tmp_path, monkeypatch, files, dataset, splits, changed
):
    """The notebook's own digest decides, and not words that end in .csv."""
    monkeypatch.chdir(tmp_path)
    for name in files:
        path = tmp_path / name
        write_table(path.parent, path.name)
    parameters = {"dataset": dataset, "dataset_config": "", "splits": splits}
    before = current_inputs(tmp_path, parameters, {"table": "", "commit": None})
    assert current_inputs(tmp_path, parameters, before) == before
    with (tmp_path / changed).open("a") as file:
        file.write(ROW)
    assert current_inputs(tmp_path, parameters, before) != before


def test_a_new_file_in_a_folder_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "a", "t.csv")
    parameters = {"dataset": "a", "dataset_config": "", "splits": {}}
    before = current_inputs(tmp_path, parameters, {"table": ""})
    write_table(tmp_path / "a", "u.csv")
    assert current_inputs(tmp_path, parameters, before) != before


def test_a_changed_file_of_rewordings_is_noticed(tmp_path):
    rewordings = tmp_path / "rewordings.csv"
    rewordings.write_text("question,rewording\n", encoding="utf-8")
    parameters = {"rewordings": str(rewordings)}
    before = current_inputs(tmp_path, parameters, {"rewordings": ""})
    assert current_inputs(tmp_path, parameters, before) == before
    rewordings.write_text("question,rewording\na,b\n", encoding="utf-8")
    assert current_inputs(tmp_path, parameters, before) != before


@pytest.mark.parametrize("which", ["evaluation", "use"])
def test_a_renewed_index_is_noticed(tmp_path, which):
    rows = [TableRow("Cold?", "Ginger.", "a"), TableRow("Gas?", "Fennel.", "b")]
    for name in ("evaluation", "use"):
        RowIndex.build(rows).save(tmp_path / "retrieval" / name)
    settings = ContextSettings(3, 0, "{rows}{question}", "Nothing.")
    (tmp_path / "retrieval" / "settings.json").write_text(json.dumps(asdict(settings)))
    before = current_inputs(tmp_path, {}, {"retrieval": "", "retrieval_in_use": ""})
    assert current_inputs(tmp_path, {}, before) == before
    new_rows = [*rows, TableRow("Flu?", "Rest.", "c")]
    RowIndex.build(new_rows).save(tmp_path / "retrieval" / which)
    assert current_inputs(tmp_path, {}, before) != before


def test_an_index_that_is_gone_is_noticed(tmp_path):
    assert current_inputs(tmp_path, {}, {"retrieval": "abc"}) != {"retrieval": "abc"}


def test_a_table_of_the_hub_is_not_asked_for_again(tmp_path):
    recorded = {"table": "abc", "commit": "def"}
    parameters = {"dataset": "owner/name", "dataset_config": "", "splits": {}}
    assert current_inputs(tmp_path, parameters, recorded) == recorded


def test_a_table_that_is_gone_is_left_to_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = {"dataset": "t.csv", "dataset_config": "", "splits": {}}
    with pytest.raises(StageError, match="there is no such file"):
        current_inputs(tmp_path, parameters, {"table": "abc"})


def test_the_digest_is_the_notebooks_own(finished_run, monkeypatch):
    monkeypatch.chdir(ROOT)
    manifest = json.loads((finished_run / "manifest.json").read_text(encoding="utf-8"))
    recorded = manifest["01_format_dataset"]["inputs"]
    parameters = {"dataset": str(TABLE), "dataset_config": "", "splits": {}}
    assert current_inputs(finished_run, parameters, recorded) == recorded
