"""What an export is made from, and what it refuses."""

import json
import shutil

import pytest
from export_runs import cards_of, read, run_dir, with_rows  # noqa: F401

from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.errors import StageError


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"push_to_hub": "me/x"},
            "The base model was the folder .*tiny-llama, which others do not have: set",
        ),
        ({"push_to_hub": "no owner"}, 'push_to_hub="no owner": use owner/name'),
        ({"base_model_on_hub": "a/b/c"}, 'base_model_on_hub="a/b/c": use owner/name'),
    ],
)
def test_a_bad_name(run_dir, parameters, message):
    with pytest.raises(StageError, match=message) as caught:
        read(run_dir, **parameters)
    assert "\n" not in str(caught.value)
    assert not (run_dir / "export").exists()


@pytest.mark.parametrize(
    ("missing", "first"),
    [
        ("dataset", "01_format"),
        ("adapter", "02_fine"),
        ("merged", "03_merge"),
        ("evaluation", "04_eval"),
    ],
)
def test_an_unfinished_run(run_dir, missing, first):
    shutil.rmtree(run_dir / missing)
    with pytest.raises(StageError, match=f"is missing. Run {first}"):
        read(run_dir)


def test_other_rows_are_another_input(run_dir):
    with_rows(run_dir)
    before = read(run_dir).inputs
    rows = [TableRow("Cold?", "Ginger.", "a"), TableRow("Gas?", "Fennel.", "b")]
    RowIndex.build(rows).save(run_dir / "retrieval" / "use")
    assert read(run_dir).inputs != before


def test_what_another_model_left_is_set_aside_and_what_this_one_left_stays(run_dir, capsys):
    cards_of(run_dir)
    kept = run_dir / "export" / "merged" / "README.md"
    before = kept.stat().st_mtime_ns
    cards_of(run_dir)
    assert kept.stat().st_mtime_ns == before
    assert "All is done already" in capsys.readouterr().out
    path = run_dir / "merged" / "merge_report.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_weights": "dequantized"}))
    export_run = read(run_dir)
    assert not kept.exists()
    assert list(run_dir.glob("earlier/*/export/merged/README.md"))
    assert (
        json.loads((export_run.folder / "metrics.json").read_text())["base_weights"]
        == "dequantized"
    )
