"""`tabletune sync`: parameters.json, badges and install cells."""

import pytest
from conftest import ROOT

from tabletune.cli.sync import change_repository, parameters_in, with_series
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS

SERIES = {
    "repository": "a/b",
    "ref": "v1",
    "colab_runtime": "2026.07",
    "install_cell": "# @title Install it\nimport sys",
}


def test_parameters_in_takes_all_cells_and_is_not_confused_by_equals_signs():
    source = "# %% [markdown]\n# # Title\n\n# %%\n# @title Rarely changed parameters\nb = 1\n\n"
    source += '# %% tags=["main-parameters"]\nm = 2  # an int\n\n'
    source += '# %% tags=["parameters"]\na = "x = 1"  # f = 2\nc = {"d": [1, 2]}\n\n# %%\ne = 3\n'
    assert parameters_in(source) == {"b": 1, "m": 2, "a": "x = 1", "c": {"d": [1, 2]}}


@pytest.mark.parametrize("notebook", sorted(PARAMETERS))
def test_parameters_json_is_what_the_notebooks_have(notebook):
    source = (ROOT / "notebooks_py" / f"{notebook}.py").read_text(encoding="utf-8")
    assert parameters_in(source) == PARAMETERS[notebook], "make sync renews it"


def test_with_series_writes_repository_and_ref_into_badges():
    badge = "https://colab.research.google.com/github/{}/notebooks/a.ipynb"
    text = badge.format("old/name/blob/main")
    assert with_series(text, SERIES) == badge.format("a/b/blob/v1")


def test_with_series_writes_repository_and_ref_into_links_to_pages_of_docs():
    link = "[glossary](https://github.com/{}/docs/glossary.md)"
    assert with_series(link.format("old/name/blob/main"), SERIES) == link.format("a/b/blob/v1")


def test_with_series_leaves_links_to_other_repositories():
    link = "[LoRA](https://github.com/huggingface/peft/blob/main/docs/source/lora.md)"
    assert with_series(link, SERIES) == link


def test_with_series_writes_the_runtime():
    text = "#     runtime_attributes:\n#       runtime_version: '2025.01'\n"
    assert "runtime_version: '2026.07'\n" in with_series(text, SERIES)


def test_with_series_writes_the_install_cell():
    text = "\n# %%\n# @title Install old\nimport sys\nold()\n\n# %% [markdown]\n"
    new = "\n# %%\n# @title Install it\nimport sys\n\n# %% [markdown]\n"
    assert with_series(text, SERIES) == new


@pytest.mark.parametrize("name", ["a", "a/b/c", "a b/c"])
def test_change_repository_refuses_what_is_no_name(name):
    with pytest.raises(StageError, match="use owner/name, as on GitHub"):
        change_repository(ROOT / "pyproject.toml", name)
