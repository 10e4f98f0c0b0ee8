"""A run folder in Google Drive or on the Hub: one-line errors."""

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from tabletune.errors import StageError
from tabletune.run.hub import open_run, upload_result


class Response:
    headers, request, status_code = {}, None, 404


def refuse(*_, **__):
    raise RepositoryNotFoundError("401", response=Response())


def test_open_run_mounts_drive_in_colab_only():
    with pytest.raises(StageError, match="only Colab can mount Google Drive"):
        open_run("drive:remedies")


def test_open_run_expands_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_run("~/run") == tmp_path / "run"


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_open_run_says_that_a_repository_may_be_private(tmp_path, monkeypatch, token):
    """Instead of "run notebook 1 first": without a token, and with one that the Hub refuses."""

    def no_token(*_):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", refuse if token else no_token)
    with pytest.raises(StageError, match="private one"):
        open_run("hub:someone/private")
    assert not list(tmp_path.rglob("*.partial"))


def test_upload_result_says_why_in_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("")

    monkeypatch.setattr("huggingface_hub.create_repo", fail)
    with pytest.raises(StageError, match=r"could not go to the Hub as me/mine: OSError$"):
        upload_result("hub:me/mine", tmp_path / "adapter")


def test_upload_result_does_nothing_for_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.create_repo", refuse)
    upload_result(tmp_path, tmp_path / "adapter")
