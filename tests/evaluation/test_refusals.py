"""Both errors of saying "nothing", by the threshold of the lookup."""

import json
from types import SimpleNamespace

import pytest

from tabletune.evaluation import refusals
from tabletune.evaluation.refusals import HAS, LACKS, refusals_table, show_refusals

CALIBRATION = {"answerable": [0.25, 0.65, 0.85, 0.95], "others": [0.05, 0.15, 0.35, 0.75]}


def line_of(score, unknown, answerable, model="merged"):
    """A line of answers.jsonl on a question that was looked up."""
    rows = [] if score is None else [{"question": "q", "answer": "a", "score": score}]
    return {
        "model": model,
        "rows": rows,
        "answer": "a",
        "unknown": unknown,
        "answerable": answerable,
    }


LINES = [
    line_of(0.9, False, True),
    line_of(0.6, False, True),
    line_of(0.45, True, False),
    line_of(0.55, False, False),
    line_of(None, True, False),
]


@pytest.fixture
def said(monkeypatch):
    """What is said and shown."""
    texts = []
    monkeypatch.setattr(refusals, "say", lambda *sentences: texts.extend(sentences))
    monkeypatch.setattr(refusals, "show_table", texts.append)
    return texts


def context_of(unknown_answer, threshold=0.4):
    """Rows in the prompt, as far as the threshold is concerned."""
    settings = SimpleNamespace(unknown_answer=unknown_answer, unknown_threshold=threshold)
    return SimpleNamespace(settings=settings)


def test_the_lookup_alone_refuses_what_scores_below_the_threshold():
    table = refusals_table(LINES, CALIBRATION, 0.4)
    at = table.loc["0.7"]
    assert at[f"lookup alone: {HAS}"] == "50%"
    assert at[f"lookup alone: {LACKS}"] == "25%"


def test_the_threshold_in_use_is_marked():
    assert "0.4 (in use)" in refusals_table(LINES, CALIBRATION, 0.4).index


def test_a_threshold_between_the_steps_has_a_line_of_its_own():
    assert list(refusals_table(LINES, CALIBRATION, 0.337).index)[3:5] == ["0.3", "0.337 (in use)"]


def test_the_model_refuses_some_of_what_the_lookup_lets_through():
    at = refusals_table(LINES, CALIBRATION, 0.4).loc["0.4 (in use)"]
    assert at[f"with the model: {HAS}"] == "0%"
    assert at[f"with the model: {LACKS}"] == "33%"


def test_an_answer_counts_with_the_row_that_it_was_taken_from():
    line = line_of(0.9, False, False)
    line["rows"].append({"question": "q", "answer": "green tea", "score": 0.45})
    line["answer"] = "Green tea."
    table = refusals_table([line], CALIBRATION, 0.4)
    assert table.loc["0.4 (in use)", f"with the model: {LACKS}"] == "100%"
    assert table.loc["0.5", f"with the model: {LACKS}"] == "0%"


def test_below_the_threshold_in_use_nothing_is_known_of_the_model():
    table = refusals_table(LINES, CALIBRATION, 0.4)
    assert set(table.loc[["0", "0.1", "0.3"], f"with the model: {HAS}"]) == {"–"}
    assert table.loc["0.7", f"with the model: {HAS}"] == "50%"


def test_errors_that_no_question_measures_are_unknown():
    table = refusals_table(LINES[:2], CALIBRATION, 0.0)
    assert set(table[f"with the model: {LACKS}"]) == {"–"}


def test_without_rows_in_the_prompt_it_is_called_not_measured(said, tmp_path):
    show_refusals(tmp_path, None)
    assert said == [refusals.NO_ROWS]


def test_without_an_answer_for_unknown_questions_it_is_called_not_measured(said, tmp_path):
    show_refusals(tmp_path, context_of(""))
    assert said == [refusals.NO_ANSWER]


def test_the_reader_sees_both_errors_and_how_to_move_the_threshold(said, tmp_path):
    for folder in ("evaluation", "retrieval"):
        (tmp_path / folder).mkdir()
    lines = [*LINES, line_of(0.9, True, True, model="base")]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "evaluation" / "answers.jsonl").write_text(text)
    settings = json.dumps({"calibration": CALIBRATION})
    (tmp_path / "retrieval" / "settings.json").write_text(settings)
    show_refusals(tmp_path, context_of("My table has nothing on that."))
    table, counts, advice = said
    expected = refusals_table(LINES, CALIBRATION, 0.4)
    assert list(table["unknown_threshold"]) == list(expected.index)
    assert (
        table[f"with the model: {LACKS}"].tolist() == expected[f"with the model: {LACKS}"].tolist()
    )
    assert "the questions above: 2 whose answer is in the index, and 3 whose" in counts
    assert "set `unknown_threshold` above" in advice
