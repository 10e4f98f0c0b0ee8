"""Loading tokenizers: what is said where one is missing."""

import pytest
from conftest import TINY

from tabletune.chat.tokenizer import load_tokenizer, load_tokenizer_of_run
from tabletune.errors import StageError


@pytest.mark.parametrize(
    ("folder", "stage"), [("adapter", "02_finetune_qlora"), ("merged", "03_merge_adapter")]
)
def test_a_missing_folder_names_the_notebook_that_makes_it(tmp_path, folder, stage):
    with pytest.raises(StageError, match=rf"{folder} is missing\. Run {stage} first"):
        load_tokenizer_of_run(tmp_path / folder)


def test_an_unreadable_tokenizer_of_a_run_is_said(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(StageError, match=r"cannot be read \(.+\)\. Run 02_finetune_qlora again"):
        load_tokenizer_of_run(tmp_path / "adapter")


def test_a_model_that_the_hub_does_not_have(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError
    from transformers import AutoConfig

    class Response:
        headers, request, status_code = {}, None, 404

    def refuse(*_, **__):
        raise OSError("not a valid model") from RepositoryNotFoundError("no", response=Response())

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(StageError, match="the Hub has no such repository"):
        load_tokenizer("someone/gone")


def test_a_model_that_cannot_be_asked_for_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StageError, match="the Hub cannot be reached"):
        load_tokenizer("someone/anything")


def test_a_folder_whose_tokenizer_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    with pytest.raises(StageError, match="its tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))
