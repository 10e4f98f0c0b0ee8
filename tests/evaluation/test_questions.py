"""questions: which ones are asked, and in which words."""

import random

from tabletune.evaluation.questions import own_question, question_sets, questions_of


def row_of(question, answer):
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
        "group": question.casefold(),
    }


TRAIN = [row_of(f"I am suffering from ailment {i}. Please help.", f"Remedy {i}") for i in range(30)]
SPLITS = {"train": TRAIN, "test": [row_of("What about snoring?", "Rest")]}


def test_the_sets_have_as_many_questions_as_asked_for():
    sets = question_sets(SPLITS, 5)
    assert {part: len(questions) for part, questions in sets.items()} == {
        "new": 1,
        "table": 5,
        "reworded": 5,
    }


def test_the_tables_own_questions_do_not_depend_on_the_order_of_rows():
    shuffled = random.Random(0).sample(TRAIN, len(TRAIN))
    again = question_sets({**SPLITS, "train": shuffled}, 5)
    for part in ("table", "reworded"):
        expected = [question["asked"] for question in question_sets(SPLITS, 5)[part]]
        assert [question["asked"] for question in again[part]] == expected


def test_reworded_questions_are_the_same_ones_in_other_words():
    sets = question_sets(SPLITS, 10)
    for own, other in zip(sets["table"], sets["reworded"], strict=True):
        assert own["group"] == other["group"]
        assert own["references"] == other["references"]
        assert own["asked"] != other["asked"]
        assert other["prompt"][-1]["content"] == other["asked"]


def test_earlier_turns_stay_and_the_last_one_is_reworded():
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    rows = [{**row, "prompt": before + row["prompt"]} for row in TRAIN]
    [question] = question_sets({"train": rows, "test": []}, 1)["reworded"]
    assert question["prompt"][:-1] == before


def test_texts_without_a_question_give_no_questions():
    text = {**row_of("", "A text."), "prompt": []}
    assert question_sets({"train": [text], "test": [text]}, 5) == {
        "new": [],
        "table": [],
        "reworded": [],
    }


def test_without_an_own_question_the_first_is_asked_with_its_earlier_turns_and_tools():
    before = [{"role": "user", "content": "Cold?"}, {"role": "assistant", "content": "Ginger"}]
    row = row_of("And for children?", "Honey")
    row = {**row, "prompt": before + row["prompt"], "tools": "[]"}
    prompts, texts = own_question("", questions_of([row]))
    assert prompts == [{"prompt": row["prompt"], "tools": "[]"}]
    assert texts == ["And for children?"]
