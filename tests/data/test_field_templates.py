"""data.field_templates."""

import pytest
from table_helpers import ANSWER, formatted, jsonl, pairs, row

from tabletune.data.field_templates import fill


def test_placeholders_may_have_spaces_and_braces_are_written_twice(tmp_path):
    rows = [
        {"Age Group": group, "issue": f"Issue {i}", "a": f"{{x}} {i}"}
        for i, group in enumerate(["adult", "child"] * 3)
    ]
    _, splits = formatted(
        tmp_path,
        jsonl(tmp_path, *rows),
        columns={"Age Group": "Age Group", "problem": "issue"},
        question_template="I am a {Age Group} with {problem}.",
        answer_template='{{"says": "{a}"}}',
    )
    assert pairs(splits)[1] == ("I am a adult with Issue 2.", '{"says": "{x} 2"}')


def test_lines_without_a_value_are_skipped():
    filled = fill(ANSWER, row(item="", yoga=""))
    assert filled == "Here is a suggested remedy:\n\n**Remedy:** Sip ginger tea twice a day."
    assert (
        fill("{remedy}\n\n{item}\n\n{yoga}", row(item="", remedy="a\n\n\n\nb"))
        == "a\n\n\n\nb\n\nBalasana"
    )
    assert fill("{remedy}", row(remedy="use {yoga} {0}")) == "use {yoga} {0}"


@pytest.mark.parametrize(
    "template", ["{q}\n{c}", "{c}\n\n{q}", "{q} {c}", "Context: {c}\nQuestion: {q}"]
)
def test_optional_fields_may_be_empty(tmp_path, template):
    rows = [
        {"q": f"Question {i}?", "c": "" if i % 2 else f"Context {i}.", "a": f"Answer {i}."}
        for i in range(10)
    ]
    report, splits = formatted(
        tmp_path,
        jsonl(tmp_path, *rows),
        question_template=template,
        answer_template="{a}",
        answer_column="a",
    )
    assert not report["dropped"]
    assert len(pairs(splits)) == 10
    assert any(question.replace("Question: ", "") == "Question 1?" for question, _ in pairs(splits))


def test_sentence_needs_all_of_its_fields(tmp_path):
    rows = [{"q": f"thing {i}", "c": "home", "a": "x"} for i in range(9)] + [
        {"q": "thing 9", "c": "", "a": "x"}
    ]
    templates = {"question_template": "What is {q} at {c}?", "answer_template": "{a}"}
    report, _ = formatted(tmp_path, jsonl(tmp_path, *rows), **templates)
    assert report["dropped"] == {"no question": 1}
