"""What earlier stages left: it is there, and belongs together."""

import json
import shutil

import pytest
from conftest import copy_of

from tabletune.errors import StageError
from tabletune.run.artifacts import adapter_digest, check_run, load_dataset_of_run, same_model


@pytest.fixture
def run_dir(finished_run, tmp_path):
    run_dir = copy_of(finished_run, tmp_path / "run", "dataset", "adapter")
    (run_dir / "merged").mkdir()
    shutil.copy(finished_run / "merged" / "merge_report.json", run_dir / "merged")
    return run_dir


def change(path, **values):
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content), encoding="utf-8")


def checked(run_dir, base_model=".cache/tiny-llama", merged="merged"):
    report = json.loads((run_dir / "dataset" / "report.json").read_text(encoding="utf-8"))
    return check_run(run_dir, run_dir / merged if merged else None, report, base_model)


def test_check_run_returns_the_adapters_digest(run_dir):
    assert checked(run_dir) == adapter_digest(run_dir)


def test_check_run_needs_no_merged_model_that_is_elsewhere(run_dir):
    assert checked(run_dir, merged=None) == adapter_digest(run_dir)


@pytest.mark.parametrize(
    ("missing", "stage"),
    [
        ("adapter", "02_finetune_qlora"),
        ("adapter/adapter_model.safetensors", "02_finetune_qlora"),
        ("adapter/provenance.json", "02_finetune_qlora"),
        ("merged", "03_merge_adapter"),
        ("merged/merge_report.json", "03_merge_adapter"),
    ],
)
def test_check_run_says_what_is_missing_and_who_makes_it(run_dir, missing, stage):
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StageError) as caught:
        checked(run_dir)
    assert str(caught.value).startswith(f"{path} is missing. Run {stage} first")


def test_check_run_refuses_another_base_model(run_dir):
    with pytest.raises(StageError, match=r"trained on .cache/tiny-llama, but base_model is other"):
        checked(run_dir, base_model="other")


def test_check_run_refuses_an_adapter_of_another_data_set(run_dir):
    change(run_dir / "adapter" / "provenance.json", dataset_fingerprint="other")
    with pytest.raises(StageError, match="The adapter was trained on another data set"):
        checked(run_dir)


def test_check_run_refuses_a_merged_model_of_another_adapter(run_dir):
    change(run_dir / "merged" / "merge_report.json", adapter_sha256="other")
    with pytest.raises(StageError, match="The merged model was made from another adapter"):
        checked(run_dir)


def test_load_dataset_of_run_says_that_it_is_damaged(run_dir):
    (run_dir / "dataset" / "dataset_dict.json").write_text("{")
    with pytest.raises(StageError, match=r"dataset is damaged \(.*Run 01_format_dataset again"):
        load_dataset_of_run(run_dir)


def test_same_model_knows_one_folder_by_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert same_model("model", str(tmp_path / "model"))
    assert not same_model("model", "other")
