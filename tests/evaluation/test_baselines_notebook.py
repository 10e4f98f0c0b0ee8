"""Notebook 5 on a finished run: what it leaves, what it shows, and that it does nothing twice."""

import json

import pytest
from conftest import copy_of, run_tiny

from tabletune.report.baselines import baselines_table, recommendation, training_table
from tabletune.report.reading import read_lines

FEW = {"baseline_samples": 6, "max_new_tokens": 8, "bootstrap_samples": 50}
WAYS = ["nearest row, copied", "base", "base, fixed rows", "base, nearest rows", "adapter"]


@pytest.fixture(scope="module")
def compared(finished_run, tmp_path_factory):
    """A copy of the finished run in which notebook 5 has run, too, on few questions."""
    run_dir = copy_of(finished_run, tmp_path_factory.mktemp("baselines") / "run")
    run_tiny("05_baselines", run_dir, **FEW)
    return run_dir


@pytest.fixture(scope="module")
def metrics(compared):
    """What notebook 5 measured."""
    return json.loads((compared / "baselines" / "metrics.json").read_text(encoding="utf-8"))


def all_files(run_dir):
    """The content of every file of a run."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_every_way_is_measured(metrics):
    assert list(metrics["ways"]) == WAYS


def test_every_part_has_right_answers_with_an_interval(metrics):
    for entry in metrics["ways"].values():
        assert set(entry["content"]) == {"new", "table", "reworded"}
        for content in entry["content"].values():
            assert content["questions"] == 6
            assert content["right_ci95"][0] <= content["right"] <= content["right_ci95"][1]


def test_copying_is_right_for_the_questions_of_the_table(metrics):
    assert metrics["ways"]["nearest row, copied"]["content"]["table"]["right"] == 1


def test_a_perplexity_stands_where_there_is_a_prompt(metrics):
    assert metrics["ways"]["nearest row, copied"]["perplexity"] == {}
    for name in WAYS[1:]:
        assert metrics["ways"][name]["perplexity"]["new"]["response"] > 1


def test_rows_in_the_prompt_cost_tokens(metrics):
    tokens = [metrics["ways"][name]["tokens_a_question"] for name in WAYS]
    copied, base, fixed, nearest, _ = tokens
    assert copied == 0 < base < min(fixed, nearest)


def test_the_adapter_is_compared_with_each_other_way(metrics):
    assert list(metrics["differences"]) == [f"adapter - {name}" for name in WAYS[:-1]]
    for name, parts in metrics["differences"].items():
        has_perplexity = "copied" not in name
        assert all(("log_perplexity" in part) == has_perplexity for part in parts.values())


def test_the_verdict_is_to_copy(metrics):
    """A random model of a million parameters is right about nothing."""
    assert metrics["verdict"]["choice"] == "nearest row, copied"
    assert "Do not fine-tune" in metrics["verdict"]["sentences"][0]


def test_every_answer_is_kept(compared):
    lines = read_lines(compared / "baselines" / "answers.jsonl")
    assert len(lines) == 3 * 6 * len(WAYS)
    assert {line["way"] for line in lines} == set(WAYS)


def test_the_manifest_has_the_stage(compared):
    manifest = json.loads((compared / "manifest.json").read_text())
    assert manifest["05_baselines"]["parameters"]["baseline_samples"] == 6


def test_the_table_has_a_line_for_each_part_and_way(metrics):
    table = baselines_table(metrics)
    assert len(table) == 3 * len(WAYS)
    assert list(table.index.get_level_values("way")[: len(WAYS)]) == WAYS


def test_the_recommendation_is_a_heading(metrics):
    lines = recommendation(metrics).data.splitlines()
    assert lines[0].startswith("### Do not fine-tune for this table: copy")
    assert all(line.startswith("- ") for line in lines[2:])


def test_the_table_of_training_has_a_line_for_each_other_way(metrics):
    table = training_table(metrics)
    assert list(table.index) == [f"adapter against {name}" for name in WAYS[:-1]]
    assert list(table.columns) == [
        "reworded questions",
        "the table's own questions",
        "new questions",
    ]
    assert table.loc["adapter against base", "new questions"].endswith(", may be chance")


def test_a_second_pass_changes_no_file(compared, capsys):
    before = all_files(compared)
    run_tiny("05_baselines", compared, **FEW)
    said = capsys.readouterr().out
    assert "All is done already: baselines/metrics.json" in said
    assert all_files(compared) == before


def test_other_settings_move_the_earlier_result_away(compared, tmp_path):
    run_dir = copy_of(compared, tmp_path / "run")
    run_tiny("05_baselines", run_dir, **{**FEW, "least_right": 0.9})
    (earlier,) = (run_dir / "earlier").glob("*/baselines")
    assert (earlier / "metrics.json").exists()
