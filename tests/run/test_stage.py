"""Stages: their parameters, what is done already, and the entries of the manifest."""

import json

import pytest

from tabletune.errors import StageError
from tabletune.run import stage as stage_module
from tabletune.run.files import write_json
from tabletune.run.parameters import DEFAULTS, PARAMETERS
from tabletune.run.stage import start_stage

STAGE = "03_merge_adapter"


def started(folder, name=STAGE, injected="", **values):
    """A stage, and what its kernel holds, after papermill has set the `injected` parameters."""
    cells = ["", f"# Parameters\n{injected}", "start_stage()"]
    variables = {**PARAMETERS[name], "run_dir": str(folder), "In": cells, **values}
    stage = start_stage(name, variables)
    stage.close()
    return stage, variables


# --- parameters


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-2", 0.01),
        ("max_length", "30", 30),
        ("gradient_checkpointing", "false", False),
        ("published_dataset", 2026, "2026"),
    ],
)
def test_start_stage_gives_values_the_types_of_the_defaults(tmp_path, name, value, expected):
    """papermill's own -p knows numbers and True, its -r and -y only texts."""
    stage, variables = started(tmp_path, "02_finetune_qlora", **{name: value})
    assert stage.parameters[name] == variables[name] == expected
    assert type(variables[name]) is type(expected)


def test_start_stage_knows_the_parameters_of_other_numbered_notebooks(tmp_path):
    """A profile names those of all notebooks."""
    started(tmp_path, injected="safety_prompts = 'bundled'\nmax_length = 30")


def test_start_stage_refuses_a_misspelt_name(tmp_path):
    with pytest.raises(StageError, match=r"'max_lenght'\. Did you mean 'max_length'\?"):
        started(tmp_path, injected="max_lenght = 30")


@pytest.mark.parametrize("source", ["a, b = 1, 2", "%pip install x", "print('mine')\nmine = 3"])
def test_start_stage_leaves_a_cell_of_the_readers_own_alone(tmp_path, source):
    started(tmp_path, injected=source)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packing": "yes"}, "packing='yes': use true or false."),
        ({"lora_r": True}, "lora_r=True: use a whole number from 1 to 100000."),
        ({"learning_rate": float("inf")}, "learning_rate=inf: use a number above 0, up to 1."),
        ({"lora_options": {"a": {1}}}, "use a text, a number, a truth value, a list or a"),
    ],
)
def test_start_stage_refuses_values_that_make_no_sense(tmp_path, values, message):
    with pytest.raises(StageError) as caught:
        started(tmp_path, "02_finetune_qlora", **values)
    assert message in str(caught.value)


def test_another_base_model_has_another_revision(tmp_path, capsys):
    """The default commit is one of the default base model; a commit that was set stays."""
    commit = PARAMETERS[STAGE]["base_model_revision"]

    def revision(**values):
        stage, variables = started(tmp_path, **values)
        assert variables["base_model_revision"] == stage.parameters["base_model_revision"]
        return variables["base_model_revision"]

    assert revision() == commit
    assert revision(base_model=str(tmp_path)) == commit
    assert not capsys.readouterr().out
    assert revision(base_model="Qwen/Qwen3-4B") == "main"
    assert "main of Qwen/Qwen3-4B" in capsys.readouterr().out
    assert revision(base_model="Qwen/Qwen3-4B", base_model_revision="abc") == "abc"


# --- what is done already


@pytest.fixture
def recorded(tmp_path):
    """A run folder in which the stage has made `merged` of the adapter "a"."""
    stage, _ = started(tmp_path / "run")
    (stage.folder / "merged").mkdir(parents=True)
    stage.is_done({"adapter": "a"}, ["merged"])
    stage.record("fingerprint", {"adapter": "a"})
    return stage.folder


def test_is_done_with_the_same_inputs_and_settings(recorded, capsys):
    stage, _ = started(recorded, adapter={"a set that is no parameter"})
    assert stage.is_done({"adapter": "a"}, ["merged"])
    assert "All is done already: merged, made on 20" in capsys.readouterr().out


def test_is_done_wherever_the_run_folder_is(recorded, tmp_path):
    recorded.rename(tmp_path / "moved")
    stage, _ = started(tmp_path / "moved")
    assert stage.is_done({"adapter": "a"}, ["merged"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "float16"), ("device", "cuda"), ("processes", 2), ("sharded", True)],
)
def test_is_done_on_whatever_it_was_computed(recorded, name, value):
    stage, _ = started(recorded)
    assert stage.is_done({"adapter": "a", name: value}, ["merged"])


def test_is_not_done_without_an_entry(tmp_path):
    stage, _ = started(tmp_path / "run")
    assert not stage.is_done({}, [])


def test_is_not_done_with_another_input(recorded):
    stage, _ = started(recorded)
    assert not stage.is_done({"adapter": "b"}, ["merged"])


def test_is_not_done_where_an_output_is_missing(recorded):
    stage, _ = started(recorded)
    assert not stage.is_done({"adapter": "a"}, ["merged", "more"])


def test_is_not_done_with_another_setting(recorded):
    stage, _ = started(recorded, base_model="another")
    assert not stage.is_done({"adapter": "a"}, ["merged"])


def test_is_not_done_before_it_was_recorded(tmp_path):
    stage, _ = started(tmp_path)
    assert not stage.is_done({"adapter": "a"}, ["merged"])


# --- the manifest


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_record_keeps_the_entries_of_other_stages(tmp_path):
    write_json(tmp_path / "manifest.json", {"01_format_dataset": {"seconds": 1}})
    started(tmp_path)[0].record("fingerprint")
    assert list(manifest(tmp_path)) == ["01_format_dataset", STAGE]
    assert manifest(tmp_path)["01_format_dataset"] == {"seconds": 1}


def test_record_says_what_ran(recorded):
    entry = manifest(recorded)[STAGE]
    assert entry["parameters"] == {**PARAMETERS[STAGE], "run_dir": str(recorded)}
    assert entry["packages"]["tabletune"]
    assert entry["dataset_fingerprint"] == "fingerprint"
    assert entry["inputs"] == {"adapter": "a"}
    assert entry["outputs"] == ["merged"]


def test_record_has_the_seconds_of_the_stopwatch(tmp_path, monkeypatch):
    """And not those in which the notebook was open."""
    stage, _ = started(tmp_path)
    stage.stopwatch._finished_seconds, stage.stopwatch._cell_started = 12.34, None
    stage.record("fingerprint")
    assert manifest(tmp_path)[STAGE]["seconds"] == 12.3


def test_record_has_no_commit_where_none_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_module, "git_commit", lambda: None)
    started(tmp_path)[0].record("fingerprint")
    assert manifest(tmp_path)[STAGE]["git_commit"] is None


def test_defaults_have_the_parameters_of_every_notebook():
    assert {"run_dir", "base_model", "seed"} <= set(DEFAULTS)
