"""Tables of answers: what was measured is shown, nothing is empty, and long answers are cut."""

import json

import pytest

from tabletune.report.tables import (
    MOST_CHARACTERS,
    all_differences,
    answered_questions,
    as_shown,
    content_table,
    difference_line,
    own_answers_table,
    reasons_table,
    references_shown,
    samples_table,
)

MODELS = {"base": "base", "adapter": "adapter", "merged": "merged"}


def line_of(part, model, **more):
    """A line of answers.jsonl."""
    return {
        "part": part,
        "group": f"{part} question",
        "asked": f"{part}?",
        "references": ["As the table says."],
        "model": model,
        "answer": f"{model} says so",
        "outcome": "wrong",
        "stopped": True,
        **more,
    }


@pytest.fixture
def lines():
    """The answers of a run in which only the merged model was asked reworded questions."""
    asked = [("new", name) for name in MODELS] + [("reworded", "merged")]
    return [line_of(part, model) for part, model in asked]


def test_a_model_that_was_not_asked_has_no_column(lines):
    reworded, new = answered_questions(lines, MODELS, 3)
    assert list(reworded.columns) == ["question", "in the table", "merged"]
    assert list(new.columns) == ["question", "in the table", *MODELS]


def test_the_title_says_who_was_asked(lines):
    reworded, new = answered_questions(lines, MODELS, 3)
    assert reworded.title == "Reworded questions (answered by the merged model alone)"
    assert new.title == "New questions"


def test_the_samples_have_no_empty_cell(lines, tmp_path):
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = samples_table(tmp_path, "Careful.").data
    assert ">–<" not in shown
    assert "></td>" not in shown
    assert shown.count("<table") == 2
    assert shown.startswith("<p><b>Careful.</b></p>")


def test_samples_of_texts_without_questions_are_called_not_measured(tmp_path):
    (tmp_path / "answers.jsonl").write_text("")
    assert "Not measured" in samples_table(tmp_path, "Careful.").data


def test_the_most_similar_row_stands_under_the_question():
    row = {"question": "Colds?", "answer": "Tea.", "score": 0.654}
    [new] = answered_questions([line_of("new", "merged", rows=[row])], MODELS, 3)
    assert new.columns["question"] == ["new?\n\n[most similar row: “Colds?”, similarity 0.65]"]


def test_a_question_whose_row_is_kept_out_says_that_nothing_is_right():
    [new] = answered_questions([line_of("new", "merged", answerable=False)], MODELS, 3)
    [in_table] = new.columns["in the table"]
    assert in_table.startswith("[its rows are left out here, so “nothing” is right]")


@pytest.mark.parametrize(
    ("part", "times"),
    [("**Item:**\n", 24), ("Drink water. It helps your skin. ", 9), ("very ", 40)],
)
def test_what_repeats_is_shown_twice_and_says_so(part, times):
    shown = as_shown(f"Here it is:\n{part * times}")
    assert shown.count(part) <= 3
    assert "[not shown: the same" in shown


@pytest.mark.parametrize("text", ["a" * 40, "-" * 60, "no, no, no, no", "One. Two. Three."])
def test_a_short_repetition_is_shown_as_it_is(text):
    assert as_shown(text) == text


def test_an_empty_answer_says_so():
    assert as_shown("\n ") == "[no text]"


def test_a_long_answer_is_cut_and_says_how_much_is_missing():
    words = " ".join(str(number) for number in range(1000))
    shown = as_shown(words)
    assert shown.startswith(words[:500])
    assert f"[not shown: {len(words) - MOST_CHARACTERS:,} more characters]" in shown


def test_an_answer_that_did_not_stop_says_so():
    [new] = answered_questions([line_of("new", "merged", stopped=False)], MODELS, 3)
    assert new.columns["merged"] == ["✗ wrong\nmerged says so … [cut after max_new_tokens]"]


@pytest.mark.parametrize(
    ("name", "difference", "result"),
    [
        ("right", 0.2, "better"),
        ("right", -0.2, "worse"),
        ("log_perplexity", -0.2, "better"),
        ("outside_log_perplexity", 0.2, "worse"),
        ("emergency_offers_remedy", 0.2, "worse"),
        ("emergency_seeks_help", 0.2, "better"),
        ("everyday_offers_remedy", 0.2, "more often"),
        ("mean_new_tokens", -9.0, "shorter"),
    ],
)
def test_a_difference_says_which_model_is_better(name, difference, result):
    entry = {"difference": difference, "ci95": None, "significant": True}
    assert difference_line(name, entry)["result"] == result


def test_with_rows_a_rising_perplexity_of_rows_left_out_is_not_called_worse():
    change = {"difference": 0.4, "ci95": [0.3, 0.5], "significant": True}
    metrics = {"differences": {"adapter - base": {"log_perplexity": change}}, "retrieval": True}
    [line] = all_differences(metrics).reset_index().to_dict("records")
    assert line["figure"] == "perplexity ratio, rows left out"
    assert line["result"] == "higher"


def test_answers_that_are_all_to_be_refused_have_no_differences_in_what_they_say():
    same = {"difference": 0.0, "ci95": [0.0, 0.0], "significant": False}
    metrics = {
        "adapter": {"content": {"new": {"questions": 9, "answerable": 0}}},
        "differences": {"adapter - base": {}},
        "content_differences": {"adapter - base": {"new": {"right": same, "chrf": same}}},
    }
    [line] = all_differences(metrics).reset_index().to_dict("records")
    assert line["figure"] == "new questions: right"


@pytest.mark.parametrize(("others", "said"), [(1, "another answer"), (3, "3 other answers")])
def test_other_answers_of_the_table_are_said_to_be_right(others, said):
    assert said in references_shown(["Tea."] * (1 + others))


def test_without_an_own_question_a_sentence_says_so():
    assert "Not asked" in own_answers_table({}, [], "Careful.").data


def test_own_answers_that_repeat_are_cut():
    shown = own_answers_table({"Why?": {"base": ["because " * 50]}}, ["Why?"], "Careful.").data
    assert "not shown: the same" in shown


@pytest.mark.parametrize(("retrieval", "columns"), [(True, 2), (False, 0)])
def test_only_with_rows_the_content_table_has_columns_on_nothing(retrieval, columns):
    content = {"table": {"questions": 3, "right": 1.0, "nothing": 0.0, "false_nothing": 0.0}}
    table = content_table({"merged": {"content": content}, "retrieval": retrieval})
    assert sum("nothing" in column for column in table) == columns


def test_reasons_have_the_names_of_the_columns_of_the_content_table():
    reasons = {"exact_match": "b", "right": "a", "facts": "c"}
    assert list(reasons_table(reasons).items()) == [
        ("right", "a"), ("word for word", "b"), ("numbers and names", "c")
    ]  # fmt: skip
