"""Notebook 1 as a whole."""

import json

import pytest
import yaml
from conftest import ROOT, make, run_tiny
from table_helpers import GOOD, NAMES, jsonl, write

from tabletune.errors import StageError


@pytest.fixture
def no_windows(monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)


def snapshot(folder):
    """When each file was written, and its size; the lock of the run is no result."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_second_pass_is_done_already(tmp_path, capsys, no_windows):
    first = run_tiny("01_format_dataset", tmp_path / "run")
    before = snapshot(tmp_path / "run")
    capsys.readouterr()
    second = run_tiny("01_format_dataset", tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    assert second.report == first.report
    assert "All is done already: dataset" in capsys.readouterr().out
    assert set(first.report) >= {
        "dataset_commit", "rows_in", "rows_out", "dropped", "safety_rows", "splits", "tokens", "fingerprint",
        "base_model", "max_length", "templates", "shape", "example", "system_prompt", "thinking", "template_date",
        "changed", "leaks", "source",
    }  # fmt: skip
    assert first.report["fingerprint"] == "a04d3f9094097544"


def test_other_settings_archive_the_finished_data_set(tmp_path, no_windows):
    table = write(tmp_path / "t.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(9)])
    run_tiny("01_format_dataset", tmp_path / "run", dataset=str(table))
    for changed in ({"test_fraction": 0.3}, {}):
        write(tmp_path / "t.csv", NAMES, [(f"Question {i}?", f"Answer {i}!") for i in range(9)])
        run_tiny("01_format_dataset", tmp_path / "run", dataset=str(table), **changed)
    earlier = sorted((tmp_path / "run" / "earlier").glob("*/dataset/report.json"))
    assert len(earlier) == 2
    assert (tmp_path / "run" / "dataset" / "report.json").exists()
    with pytest.raises(StageError, match="would be lost"):
        run_tiny("01_format_dataset", tmp_path / "run", dataset=str(table), max_length=3)
    assert (tmp_path / "run" / "dataset" / "report.json").exists(), (
        "what cannot be made makes no room for itself"
    )


def test_long_cell_is_not_shown_in_full(tmp_path, capsys, no_windows):
    """It would make the notebook so long that nobody scrolls past it."""
    rows = [("Long?", "tea " * 25_000), *GOOD, *((f"Q{i}", "a") for i in range(9))]
    run_tiny(
        "01_format_dataset", tmp_path / "run", dataset=str(write(tmp_path / "t.csv", NAMES, rows))
    )
    assert len(capsys.readouterr().out) < 15_000


@pytest.mark.slow
def test_table_of_another_shape_through_make(tmp_path):
    """By parameters alone, through make; the answers may have several paragraphs."""
    rows = [
        {"q": f"What is {i} plus {i}?", "a": f"It is {2 * i}.\n\nCount on your fingers."}
        for i in range(40)
    ]
    own = yaml.safe_load((ROOT / "profiles" / "tiny.yaml").read_text())
    own |= {"dataset": str(jsonl(tmp_path, *rows)), "columns": {"question": "q", "answer": "a"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    done = make(
        "01_format_dataset",
        "PROFILE=tiny",
        f"ARGS=-f {tmp_path / 'own.yaml'}",
        f"RUN_DIR={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "dataset" / "report.json").read_text())
    assert report["rows_out"] == 40
    assert not report["dropped"]
    assert report["example"] is None
