"""report.baselines: the tables of notebook 5."""

import pytest

from tabletune.report.baselines import answers_of_ways, questions_table


def lines_of(question, part="reworded"):
    return [
        {"part": part, "question": question, "way": way, "answer": answer, "references": ["Tea."]}
        for way, answer in (("base", "so it is, " * 50), ("adapter", "Tea <b>."))
    ]


@pytest.fixture
def shown():
    lines = [*lines_of("new?", "new"), *lines_of("one?"), *lines_of("two?"), *lines_of("three?")]
    return answers_of_ways(lines, "Careful.").data


def test_the_questions_are_counted_by_kind_with_an_example_of_each():
    questions = [{"part": part, "asked": f"{part}?"} for part in ("new", "table", "new")]
    table = questions_table(questions)
    assert table["number"].to_dict() == {"the table's own questions": 1, "new questions": 2}
    assert list(table["for example"]) == ["table?", "new?"]


def test_two_reworded_questions_are_shown(shown):
    assert "one?" in shown
    assert "two?" in shown
    assert "three?" not in shown
    assert "new?" not in shown


def test_the_last_line_has_the_answer_of_the_table(shown):
    assert shown.index("the table") > shown.index("adapter")
    assert "Tea.</td></tr></table>" in shown


def test_answers_are_text_and_what_repeats_is_cut(shown):
    assert "Tea &lt;b&gt;." in shown
    assert "not shown: the same" in shown
