"""The run folder: files that are whole or absent, nothing finished deleted, what is done already, one-line errors."""

import json

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from tabletune.errors import StageError, hub_error
from tabletune.run.files import read_json, set_aside, whole, write_json
from tabletune.run.hub import open_run
from tabletune.run.parameters import PARAMETERS
from tabletune.run.stage import begin

STAGE = "03_merge_adapter"


def test_a_full_disk(tmp_path):
    """Nothing half-written stays, and the message says what to do."""
    with pytest.raises(StageError, match="The disk is full"), whole(tmp_path / "new") as partial:
        partial.mkdir()
        (partial / "file").write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_was_whole_stays_until_its_successor_is(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "file") as partial:
        partial.write_text("new")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_text() == "old"
    with whole(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_parameter_takes_another_base_model(tmp_path, capsys):
    """The default commit is one of the default base model, so it goes with it; a commit that was given stays."""
    commit = PARAMETERS[STAGE]["base_model_revision"]

    def revision(**chosen):
        variables = {**PARAMETERS[STAGE], "run_dir": str(tmp_path), **chosen}
        stage = begin(STAGE, variables)
        assert variables["base_model_revision"] == stage.parameters["base_model_revision"]
        return variables["base_model_revision"]

    assert (
        revision() == revision(base_model=str(tmp_path)) == commit and not capsys.readouterr().out
    )
    assert (
        revision(base_model="Qwen/Qwen3-4B") == "main"
        and "main of Qwen/Qwen3-4B" in capsys.readouterr().out
    )
    assert revision(base_model="Qwen/Qwen3-4B", base_model_revision="abc") == "abc"


def test_a_finished_folder_is_never_written_over(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("a night of training")
    with (
        pytest.raises(StageError, match="nothing finished is deleted"),
        whole(tmp_path / "adapter") as partial,
    ):
        partial.mkdir()
    assert (tmp_path / "adapter" / "weights").read_text() == "a night of training"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_makes_room_moves_aside_and_says_where(tmp_path, capsys):
    for name in ("adapter", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    aside = [
        set_aside(tmp_path, "adapter", "training", "not there"),
        set_aside(tmp_path, "adapter"),
    ]
    assert aside[1] is None and aside[0].parent == tmp_path / "earlier"
    assert [(aside[0] / name / "file").read_text() for name in ("adapter", "training")] == [
        "adapter",
        "training",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    said = capsys.readouterr().out
    assert "adapter, training" in said and str(aside[0]) in said and said.count("\n") == 1


def stage_of(run_dir, **parameters):
    return begin(STAGE, {**PARAMETERS[STAGE], "run_dir": str(run_dir), **parameters})


def test_what_was_made_from_the_same_with_the_same_settings_is_done(tmp_path, capsys):
    """Other settings, inputs or a missing output make it anew; where it lies and what else the kernel holds do not."""
    (tmp_path / "run").mkdir()
    stage = stage_of(tmp_path / "run")
    assert not stage.is_done({"adapter": "a"}, ["merged"])
    (stage.folder / "merged").mkdir()
    stage.record("fingerprint", {"adapter": "a"})
    assert (
        stage.is_done({"adapter": "a"}, ["merged"])
        and "All is done already: merged" in capsys.readouterr().out
    )
    (tmp_path / "run").rename(tmp_path / "moved")
    again = stage_of(tmp_path / "moved", adapter={"a set that is no parameter"})
    assert again.is_done({"adapter": "a"}, ["merged"])
    assert not again.is_done({"adapter": "b"}, ["merged"])
    assert not again.is_done({"adapter": "a"}, ["merged", "more"])
    assert not stage_of(tmp_path / "moved", base_model="another").is_done(
        {"adapter": "a"}, ["merged"]
    )


def test_the_manifest_keeps_the_entries_of_other_stages(tmp_path):
    write_json(tmp_path / "manifest.json", {"01_format_dataset": {"seconds": 1}})
    stage_of(tmp_path).record("fingerprint")
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert list(manifest) == ["01_format_dataset", STAGE] and manifest["01_format_dataset"] == {
        "seconds": 1
    }
    assert manifest[STAGE]["parameters"] == {**PARAMETERS[STAGE], "run_dir": str(tmp_path)}
    assert (
        manifest[STAGE]["packages"]["tabletune"]
        and manifest[STAGE]["dataset_fingerprint"] == "fingerprint"
    )


def test_a_machine_without_git_records_a_run_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    stage_of(tmp_path).record("fingerprint")
    assert (
        json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))[STAGE]["git_commit"]
        is None
    )


@pytest.mark.parametrize(("text", "reason"), [(None, "is missing"), ('{"half', "is damaged")])
def test_a_file_that_is_not_there_or_not_whole_says_who_makes_it(tmp_path, text, reason):
    path = tmp_path / "report.json"
    if text:
        path.write_text(text)
    with pytest.raises(StageError) as caught:
        read_json(path, "01_format_dataset")
    assert f"{path} {reason}" in str(caught.value) and "Run 01_format_dataset first" in str(
        caught.value
    )
    assert caught.value._render_traceback_() == [f"StageError: {caught.value}"] and "\n" not in str(
        caught.value
    )


class Response:
    headers, request, status_code = {}, None, 404


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (GatedRepoError("a", response=Response()), "is gated: accept its terms"),
        (
            RepositoryNotFoundError("a", response=Response()),
            "or a private one that this token may not read",
        ),
        (LocalEntryNotFoundError("a"), "the Hub cannot be reached"),
        (OSError("first line\nsecond line"), "not to be had from the Hub: first line"),
        (ValueError(""), "not to be had from the Hub: ValueError"),
        (
            ValueError("Repo id must be in the form"),
            "there is no such folder here, and on the Hub names are OWNER/NAME",
        ),
        (
            OSError("a/b does not appear to have a file named config.json."),
            "Perhaps it is an adapter, or GGUF files.",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, said):
    found = hub_error("base_model=a/b", error)
    assert (
        isinstance(found, StageError)
        and str(found).startswith("base_model=a/b")
        and said in str(found)
    )
    assert "\n" not in str(found)


def test_drive_is_in_colab_only():
    with pytest.raises(StageError, match="only Colab can mount Google Drive"):
        open_run("drive:remedies")


@pytest.mark.parametrize(("token", "said"), [(None, "private one"), ("hf_wrong", "private one")])
def test_a_private_repository_says_so(tmp_path, monkeypatch, token, said):
    """Instead of "run notebook 1 first": without a token, and with one that the Hub refuses."""

    def refuse(*_, **__):
        raise RepositoryNotFoundError("401", response=Response())

    def unknown(*_):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse if token else unknown)
    with pytest.raises(StageError, match=said):
        open_run("hub:someone/private")
    assert not list(tmp_path.rglob("*.partial"))
