"""What is stored of executed notebooks is of the notebooks as they are."""

import nbformat
import pytest
from conftest import ROOT, STAGES

OWN_TABLES = sorted(path.stem for path in (ROOT / "examples" / "own_tables").glob("*.yaml"))


def code_of(path):
    """The texts of a notebook's code cells, but for the one that papermill put in."""
    cells = nbformat.read(path, 4).cells
    return [
        cell.source
        for cell in cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


@pytest.mark.parametrize("folder", ["cpu_run", "knowledge_run"])
@pytest.mark.parametrize("name", STAGES)
def test_the_example_runs_have_the_code_of_the_notebooks(name, folder):
    stored = code_of(ROOT / "examples" / folder / f"{name}.ipynb")
    assert stored == code_of(ROOT / "notebooks" / f"{name}.ipynb"), "run `make examples`"


@pytest.mark.parametrize("name", OWN_TABLES)
def test_the_examples_of_other_tables_have_the_code_of_notebook_1(name):
    stored = code_of(ROOT / "examples" / "own_tables" / f"{name}.ipynb")
    assert stored == code_of(ROOT / "notebooks" / "01_format_dataset.ipynb"), "run `make examples`"


@pytest.mark.parametrize("name", OWN_TABLES)
def test_every_other_table_has_its_notebook(name):
    assert (ROOT / "examples" / "own_tables" / f"{name}.ipynb").exists()
