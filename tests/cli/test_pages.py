"""Pages: a comparison as README has it, a report, and a sweep that ends with one."""

import re

import pytest
from conftest import copy_of, make

from tabletune.cli.pages import write_page


def test_make_compare_takes_several_folders(finished_run, tmp_path):
    """README's own line: RUNS="folder folder"."""
    runs = [copy_of(finished_run, tmp_path / name) for name in ("one", "other")]
    page = tmp_path / "pages" / "compare.html"
    done = make("compare", f"RUNS={' '.join(map(str, runs))}", f"OUT={page}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(page)
    text = page.read_text(encoding="utf-8")
    assert "one" in text
    assert "other" in text
    assert "import matplotlib" not in text  # the code is hidden


def test_make_compare_without_runs_says_how():
    done = make("compare")
    assert done.returncode != 0
    assert 'Which runs? make compare RUNS="runs/a runs/b"' in done.stderr


def test_make_report_writes_a_page_into_the_run_folder(finished_run, tmp_path):
    run_dir = copy_of(finished_run, tmp_path / "my run")
    done = make("report", f"RUN_DIR={run_dir}")
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").exists()


@pytest.mark.slow
def test_make_sweep_ends_with_a_comparison_and_says_which_point_failed(tmp_path):
    """One point cannot be made: r 8 of no layer."""
    (tmp_path / "grid.yaml").write_text("lora_target_modules: [[q_proj], [no_such_layer]]")
    folder = tmp_path / "sweep"
    words = ["PROFILE=tiny", f"GRID={tmp_path / 'grid.yaml'}", f"SWEEP_DIR={folder}"]
    done = make("sweep", *words)
    assert done.returncode != 0
    assert (folder / "compare.html").exists()
    assert "1 of 2 points failed:" in done.stderr
    assert re.search(r"no_such_layer.*: .*no_such_layer", done.stderr.splitlines()[-2])
    again = make("sweep", *words)
    assert "01_format_dataset  (" not in again.stdout, "what is done is not done again"


@pytest.mark.slow
def test_make_sweep_over_rows_ends_with_the_learning_curve(tmp_path):
    """Two seeds of a tenth of the rows and of all, in a folder with spaces; the seeds are one."""
    folder = tmp_path / "my sweep"
    folder.mkdir()
    grid = folder / "my grid.yaml"
    grid.write_text("train_rows: [0.1, 1.0]\nseed: [1, 2]\nsamples: 8\nmax_new_tokens: 8")
    done = make("sweep", "PROFILE=tiny", f"GRID={grid}", f"SWEEP_DIR={folder / 'all runs'}")
    assert done.returncode == 0, done.stderr
    page = (folder / "all runs" / "compare.html").read_text(encoding="utf-8")
    assert re.search(r"From \d+ to \d+ questions in training, the perplexity of new", page)
    assert "Whether the last doubling gained is not measured" in page
    assert page.count("(2 seeds)</th>") >= 2


def test_write_page_escapes_what_a_notebook_printed(tmp_path):
    import nbformat

    output = nbformat.v4.new_output("stream", name="stdout", text="<script>")
    cell = nbformat.v4.new_code_cell("print()", outputs=[output])
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    assert "&lt;script&gt;" in write_page(path).read_text(encoding="utf-8")
