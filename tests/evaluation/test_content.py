"""content: which answers are right, by the rules for labels, items and free text."""

import math

import pandas as pd
import pytest

from tabletune.evaluation.content import (
    ContentRules,
    check_content,
    class_figures,
    classification_labels,
    compare_answer,
    content_differences,
    content_rules,
    majority_baseline,
    numbers_and_names,
    summarize_content,
)

REMEDY = "Here is a suggested remedy:\n\n**Item:** {item}\n**Remedy:** {remedy}"
FREE_TEXT = ContentRules("same_text", ("right", "facts", "chrf"), {})


def row_of(question, answer, group=None):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "group": group or question,
    }


def question_of(*references, group="q"):
    return {"references": list(references), "group": group}


# --- which rules apply


def test_short_answers_are_compared_word_for_word():
    splits = {"train": [row_of(str(i), "yes" if i % 2 else "no") for i in range(12)]}
    rules = content_rules(splits, {})
    assert rules.right == "exact_match"
    assert rules.metrics == ("right", "exact_match", "chrf")
    assert "word for word" in rules.reasons["exact_match"]


def test_labels_are_ordered_by_how_common_they_are_in_training():
    splits = {
        "train": [row_of(str(i), "no" if i < 3 else "yes") for i in range(9)],
        "test": [row_of(f"t{i}", "no") for i in range(20)],
    }
    assert content_rules(splits, {}).labels == ("yes", "no")


def test_short_answers_that_seldom_repeat_are_no_labels():
    assert classification_labels([f"{i} euros" for i in range(20)]) == ()
    assert classification_labels(["yes"] * 9) == ()


def test_items_decide_where_the_answer_template_names_one():
    answer = REMEDY.format(item="Ginger", remedy="Sip a cup of warm tea with it twice a day.")
    rules = content_rules(
        {"train": [row_of("Cold?", answer)]}, {"templates": {"answer": REMEDY}}, "item"
    )
    assert rules.right == "right_item"
    assert rules.items == {"Cold?": {"ginger"}}
    assert "{item}" in rules.reasons["right_item"]


@pytest.mark.parametrize("item_field", ["none", "other", ""])
def test_without_an_item_field_the_text_decides(item_field):
    answer = REMEDY.format(item="Ginger", remedy="Sip a cup of warm tea with it twice a day.")
    rules = content_rules(
        {"train": [row_of("Cold?", answer)]}, {"templates": {"answer": REMEDY}}, item_field
    )
    assert rules.right == "same_text"
    assert "right_item" not in rules.metrics
    assert rules.reasons["right_item"].startswith("Not used")


def test_the_worked_example_brings_its_item_field():
    answer = REMEDY.format(item="Ginger", remedy="Sip a cup of warm tea with it twice a day.")
    report = {"templates": {"answer": REMEDY}, "example": "home_remedies"}
    assert content_rules({"train": [row_of("Cold?", answer)]}, report).right == "right_item"


def test_rows_without_a_question_are_left_out():
    text = {**row_of("", "A text."), "prompt": []}
    assert content_rules({"train": [text]}, {}).labels == ()


# --- free text


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("We are closed on Sundays.", "We are closed on Sundays.", True),
        ("we are closed on sundays", "We are closed on Sundays.", True),
        ("We are open on Sundays.", "We are closed on Sundays.", False),
        (
            "On Sundays and public holidays we are open.",
            "On Sundays and public holidays we are closed.",
            False,
        ),
        ("Our address is 41 Mill Lane.", "Our address is 14 Mill Lane.", False),
        ("Our address is 14 Hill Lane.", "Our address is 14 Mill Lane.", False),
        ("A service costs 45 euros, with tyres 60.", "A service costs 45 euros.", False),
        ("A small service costs 12.50 euros.", "A small service costs 12,50 euros.", True),
        ("Sure! Our address is 14 Mill Lane.", "Our address is 14 Mill Lane.", True),
        (
            "We do not deliver within the city for 20 euros.",
            "We deliver within the city for 20 euros.",
            False,
        ),
        ("", "Our address is 14 Mill Lane.", False),
        ("हम रविवार को बंद रहते हैं।", "हम रविवार को बंद रहते हैं।", True),
        ("हम रविवार को खुले रहते हैं।", "हम रविवार को बंद रहते हैं।", False),
        ("我们星期天不营业。", "我们星期天不营业。", True),
    ],
)
def test_free_text_is_right_with_the_same_words_numbers_and_names(answer, reference, right):
    assert compare_answer(answer, [reference], FREE_TEXT, "q")["right"] is right


def test_the_best_of_several_references_counts():
    line = compare_answer(
        "Call 555 0134.", ["Write to us by letter.", "Call 555 0134."], FREE_TEXT, "q"
    )
    assert line["right"]
    assert line["chrf"] == pytest.approx(100)
    assert line["facts"] == 1


def test_chrf_is_its_definition():
    """The F-score with recall counted twice, of the runs of 1 to 6 letters (Popović, 2015), by
    hand.
    """
    answer, reference = "ginger tea", "ginger soup"

    def runs(text, n):
        text = text.replace(" ", "")
        return [text[i : i + n] for i in range(len(text) - n + 1)]

    precision, recall = [], []
    for n in range(1, 7):
        left = runs(reference, n)
        shared = 0
        for run in runs(answer, n):
            if run in left:
                left.remove(run)
                shared += 1
        precision.append(shared / len(runs(answer, n)))
        recall.append(shared / len(runs(reference, n)))
    p, r = sum(precision) / 6, sum(recall) / 6
    expected = 100 * 5 * p * r / (4 * p + r)
    assert compare_answer(answer, [reference], FREE_TEXT, "q")["chrf"] == pytest.approx(expected)


def test_numbers_and_names():
    text = "Call Anna Meyer at 555-0134. It costs 1,000 euros, or 12,50 in Zürich: The NHS pays."
    assert numbers_and_names(text) == {
        "anna",
        "meyer",
        "555",
        "0134",
        "1000",
        "12.50",
        "zürich",
        "nhs",
    }
    assert numbers_and_names("**Item:** Honey\n**Remedy:** Take it.") == set()


def test_the_share_of_facts():
    line = compare_answer("It is in Mill Lane.", ["Our shop is at 14 Mill Lane."], FREE_TEXT, "q")
    assert line["facts"] == pytest.approx(2 / 3)
    assert math.isnan(compare_answer("A text.", ["Mix well and rest."], FREE_TEXT, "q")["facts"])


# --- items


ITEM_RULES = ContentRules(
    "right_item",
    ("right", "right_item", "chrf"),
    {},
    answer_template=REMEDY,
    item_field="item",
    items={"cold": {"ginger", "honey"}, "gas": {"mint"}},
)
COLD = [REMEDY.format(item=item, remedy="Sip it.") for item in ("Ginger", "Honey")]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (REMEDY.format(item="Honey", remedy="In quite other words."), True),
        (REMEDY.format(item="Mint", remedy="Sip it."), False),
        (REMEDY.format(item="Moonstone", remedy="Sip it."), False),
        ("Take some ginger.", True),
        ("Take ginger and mint.", False),
        ("Rest well.", False),
    ],
)
def test_an_answer_is_right_with_an_item_of_the_question_and_no_other(answer, right):
    line = compare_answer(answer, COLD, ITEM_RULES, "cold")
    assert line["right"] is right
    assert line["right_item"] is right


def test_a_question_without_an_item_is_judged_by_its_text():
    reference = "Here is a suggested remedy:\n\n**Remedy:** Rest in a dark room for an hour."
    line = compare_answer(reference, [reference], ITEM_RULES, "headache")
    assert line["right_item"] is None
    assert line["right"] is True
    other = compare_answer(COLD[0], [reference], ITEM_RULES, "headache")
    assert other["right"] is False


# --- saying "nothing"


def test_outcomes_with_and_without_an_answer_in_the_table():
    answers = ["Nothing on that.", "Nothing on that.", "We are closed.", "Whatever."]
    questions = [question_of("We are closed.")] * 4
    table = check_content(
        answers, questions, FREE_TEXT, [True, True, False, False], [True, False, True, False]
    )
    assert table["outcome"].tolist() == ["nothing", "right", "right", "wrong"]
    assert table["right"].tolist() == [False, True, True, False]


def test_summary_of_refusals():
    answers = ["no"] * 10
    questions = [question_of("We are closed.")] * 10
    unknown = [True] * 2 + [False] * 6 + [True] * 2
    answerable = [True] * 8 + [False] * 2
    table = check_content(answers, questions, FREE_TEXT, unknown, answerable)
    entry = summarize_content(table, FREE_TEXT)
    assert entry["false_nothing"] == pytest.approx(2 / 8)
    assert entry["nothing"] == pytest.approx(4 / 10)
    assert entry["unanswerable"]["questions"] == 2
    assert entry["unanswerable"]["nothing"] == 1
    assert entry["paraphrased"]["questions"] == 8


# --- figures


def test_every_figure_has_an_interval():
    questions = [question_of("We have 4 bikes.", group=str(i)) for i in range(10)]
    answers = ["We have 4 bikes."] * 6 + ["We have 5 bikes."] * 4
    entry = summarize_content(check_content(answers, questions, FREE_TEXT), FREE_TEXT)
    assert entry["right"] == pytest.approx(0.6)
    for figure in ("right", "wrong", "facts", "chrf"):
        low, high = entry[f"{figure}_ci95"]
        assert low < entry[figure] < high
    assert entry["exact_match"] is None, "answers of this table are too long for it"


def test_facts_that_are_all_there_leave_some_doubt():
    questions = [question_of("We have 4 bikes.", group=str(i)) for i in range(10)]
    entry = summarize_content(
        check_content(["We have 4 bikes."] * 10, questions, FREE_TEXT), FREE_TEXT
    )
    assert entry["facts"] == 1
    assert entry["facts_ci95"] == pytest.approx([0.722, 1.0], abs=1e-3)


def test_no_questions_have_no_figures():
    entry = summarize_content(check_content([], [], FREE_TEXT), FREE_TEXT)
    assert entry["questions"] == 0
    assert entry["right"] is None
    assert entry["chrf_ci95"] is None


def test_differences_are_in_pairs_and_significant_only_beyond_chance():
    questions = [question_of("We are closed.", group=str(i)) for i in range(20)]
    good = check_content(["We are closed."] * 20, questions, FREE_TEXT)
    bad = check_content(["Ask the owner of the shop."] * 20, questions, FREE_TEXT)
    entries = content_differences(good, bad, FREE_TEXT)
    assert entries["right"]["difference"] == 1
    assert entries["right"]["significant"]
    assert entries["chrf"]["difference"] > 50
    same = content_differences(good, good, FREE_TEXT)
    assert not same["right"]["significant"]
    assert "facts" not in entries, "the references have none"


# --- labels


LABELS = ContentRules("exact_match", ("right", "exact_match"), {}, labels=("yes", "no"))


def test_the_commonest_label_is_the_baseline():
    questions = [question_of("yes")] * 19 + [question_of("no")]
    baseline = majority_baseline(questions, LABELS)
    assert baseline["label"] == "yes"
    assert baseline["rate"] == 0.95
    assert baseline["rate_ci95"][0] < 0.95
    assert majority_baseline(questions, FREE_TEXT) is None


def test_figures_by_class():
    questions = [question_of("yes")] * 19 + [question_of("no")]
    table = class_figures(["yes"] * 20, questions, LABELS)
    assert table.loc["yes", "recall"] == 1
    assert table.loc["no", "recall"] == 0
    assert table.loc["yes", "precision"] == 0.95
    assert pd.isna(table.loc["no", "precision"])
    assert table.loc["no", "rows"] == 1
    assert table.loc["no", "recall_ci95"][1] > 0.5
