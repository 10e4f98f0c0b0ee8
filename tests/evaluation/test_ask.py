"""ask: questions of a file, answered with a finished run."""

import json

import pandas as pd
import pytest
from conftest import TINY, copy_of

from tabletune.evaluation.ask import (
    answer_lines,
    answer_questions,
    answers_to_the_same,
    is_expected,
    table_of_answers,
    width_of,
    with_alternatives,
)
from tabletune.evaluation.content import ContentRules
from tabletune.evaluation.question_files import AskedQuestion

FREE_TEXT = ContentRules("same_text", ("right",), {})


class Context:
    """A context whose table says "Nothing." where it has nothing."""

    def is_unknown(self, answer):
        return answer.casefold().strip(".") == "nothing"


@pytest.mark.parametrize(
    ("answer", "unknown", "expected", "right"),
    [
        ("We are closed on Sundays.", False, ["closed"], True),
        ("We are enclosed by hills.", False, ["closed"], False),
        ("It costs 120 euros.", False, ["12"], False),
        ("Nothing.", True, ["nothing"], True),
        ("Nothing.", True, ["closed"], False),
        ("We are closed.", False, ["Nothing"], False),
        ("We are closed on Sundays.", False, ["On Sundays we are closed all of the day."], False),
    ],
)
def test_which_answers_are_expected(answer, unknown, expected, right):
    assert is_expected(answer, unknown, expected, FREE_TEXT, Context()) is right


def test_short_answers_must_be_equal():
    rules = ContentRules("exact_match", ("right",), {})
    assert is_expected("No.", False, ["no"], rules, None)
    assert not is_expected("no idea", False, ["no"], rules, None)


def test_an_expected_item_is_right_alone_and_in_a_whole_answer():
    template = "**Item:** {item}\n**Remedy:** {remedy}"
    rules = ContentRules(
        "right_item", ("right",), {}, (), template, "item", {"gas": {"mint"}, "cold": {"ginger"}}
    )
    answer = "**Item:** Ginger\n**Remedy:** Sip it."
    assert is_expected(answer, False, ["Ginger"], rules, None)
    assert is_expected(
        answer, False, ["**Item:** Ginger\n**Remedy:** Other words of it."], rules, None
    )
    assert not is_expected(answer, False, ["**Item:** Mint\n**Remedy:** Sip it."], rules, None)


def test_an_answer_that_rests_on_nothing_does_not_name_a_row_as_its_reason():
    row = {"question": "Do you have internet?", "score": 0.32}
    line = {"question": "A sauna?", "answer": "Nothing.", "stopped": True}
    known = table_of_answers([{**line, "rows": [row], "unknown": False}], "")
    refused = table_of_answers([{**line, "rows": [row], "unknown": True}], "")
    assert "nearest:" not in known
    assert "nearest:" in refused


@pytest.mark.parametrize("text", ["地址在哪里？" * 20, "दुकान कब खुलती है? " * 9, "plain words " * 9])
def test_columns_stand_below_each_other_in_all_scripts(text):
    line = {"question": text, "answer": "Here.", "stopped": True, "rows": [], "unknown": False}
    shown = table_of_answers([line, line | {"question": "Where?"}], "").split("\n")
    [first, second] = [row for row in shown if row.endswith("Here.")]
    assert width_of(first) == width_of(second)
    assert max(map(width_of, shown)) <= 100


def test_what_rests_on_nothing_says_so_without_a_row():
    line = {"question": "Sauna?", "answer": "", "stopped": True, "rows": [], "unknown": True}
    row = {"question": "Open?", "score": 0.9}
    text = table_of_answers([line, line | {"rows": [row], "unknown": False}], "")
    assert "nothing" in text


def test_the_table_of_answers(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    answers = pd.DataFrame(
        {
            "answer": ["**Item:** Ginger", "Mint"],
            "stopped": [True, False],
            "new_tokens": 3,
            "unknown": [False, False],
            "rows": [[{"question": "Colds?", "answer": "Ginger", "score": 0.834}], []],
        }
    )
    asked = [AskedQuestion("Cold?", ["ginger"]), AskedQuestion("Gas?", ["anise"])]
    lines = answer_lines(asked, answers, "adapter", FREE_TEXT, None)
    assert [line["right"] for line in lines] == [True, False]
    text = table_of_answers(lines, "No advice.")
    assert text.startswith("No advice.")
    assert "Item: Ginger" in text
    assert "Colds? (0.83)" in text
    assert "[cut after max_new_tokens]" in text
    assert "max_new_tokens]" in text
    assert "Right: 1 of 2 (0–2)." in text
    assert "read these" in text


def a_row(question, answer):
    prompt = [{"role": "user", "content": question}]
    return {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}],
        "group": question,
    }


def test_the_tables_other_answers_to_the_question_are_right_too():
    splits = {
        "train": [a_row("Cold?", "Ginger tea."), a_row("Cold?", "Warm soup, twice a day.")],
        "test": [a_row("Gas?", "Mint."), a_row("Cold?", "Some rest.")],
    }
    alternatives = answers_to_the_same(splits)
    expected = ["ginger TEA", "Sleep."]
    assert with_alternatives(expected, alternatives) == [
        *expected,
        "Ginger tea.",
        "Some rest.",
        "Warm soup, twice a day.",
    ]
    assert with_alternatives(["Sleep."], alternatives) == ["Sleep."]
    answers = pd.DataFrame({"answer": ["Some rest.", "Mint."], "stopped": True})
    asked = [AskedQuestion("A cold?", ["Ginger tea."])] * 2
    accepted = [with_alternatives(question.expected, alternatives) for question in asked]
    lines = answer_lines(asked, answers, "merged", FREE_TEXT, None, accepted)
    assert [line["right"] for line in lines] == [True, False]
    assert lines[0]["expected"] == ["Ginger tea."]


@pytest.mark.parametrize("part", ["adapter", "merged", "base"])
def test_a_finished_run_answers_a_file(finished_run, tmp_path, capsys, part):
    run_dir = copy_of(finished_run, tmp_path / "run", "dataset", "adapter", "merged")
    if part == "adapter":
        (run_dir / "merged").rename(tmp_path / "elsewhere")
    (run_dir / "answers.jsonl").write_text("earlier\n")
    questions = tmp_path / "mine.csv"
    questions.write_text("question,answer\nWhat helps against a cold?,Ginger\nGas?,\n")
    values = {"base_model": str(TINY), "max_new_tokens": 4, "precision": "fp32"}
    answer_questions(run_dir, questions, part, values)
    lines = [json.loads(line) for line in (run_dir / "answers.jsonl").read_text().splitlines()]
    assert [line["question"] for line in lines] == ["What helps against a cold?", "Gas?"]
    assert lines[0]["right"] is False
    assert "right" not in lines[1]
    assert lines[0]["rows"] == []
    assert "not medical advice" in capsys.readouterr().out
    [earlier] = (run_dir / "earlier").iterdir()
    assert (earlier / "answers.jsonl").read_text() == "earlier\n"
