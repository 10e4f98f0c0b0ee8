"""Lookup with the standard library: the same rows and scores as scikit-learn's, and the words of
a prompt.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tabletune.data.lookup import (
    PlainIndex,
    char_ngrams,
    choose_rows,
    context_message,
    familiarity,
    final_answer,
    is_refused,
    is_unknown,
    known_words,
    lookup_text,
    source_row,
)
from tabletune.data.retrieval import RowIndex, TableRow, new_vectorizer

NOTHING = "The table has nothing on that."
texts = st.text(alphabet="abcdeé äß-?. 你好", min_size=1, max_size=30)


@pytest.mark.parametrize("analyzer", ["char_wb", "char"])
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_ngrams_are_those_of_scikit_learn(analyzer, text):
    theirs = new_vectorizer(analyzer).build_analyzer()(text)
    assert sorted(char_ngrams(lookup_text(text), analyzer)) == sorted(theirs)


@given(questions=st.lists(texts, min_size=1, max_size=30), question=texts)
@settings(max_examples=100, deadline=None)
def test_plain_index_has_the_rows_and_scores_of_the_fast_one(questions, question):
    rows = [{"question": text, "answer": str(i)} for i, text in enumerate(questions)]
    fast = RowIndex.build([TableRow(**row, question_id="") for row in rows], "char_wb")
    plain = PlainIndex(rows)
    expected = fast.scores(question)
    scores = {row["answer"]: score for row, score in plain.search(question, len(rows))}
    assert all(abs(scores[str(i)] - expected[i]) < 1e-6 for i in range(len(rows)))
    found = [row["answer"] for row, _ in plain.search(question, 3)]
    assert found == [hit.row.answer for hit in fast.search(question, 3)]


@pytest.mark.parametrize("question", ["How do I cook rice?", "a b c", "Tell me a story of owls"])
def test_plain_index_knows_the_words_that_the_fast_one_knows(question):
    rows = [{"question": f"How do I cook {name}?", "answer": name} for name in NAMES]
    fast = RowIndex.build([TableRow(**row, question_id="") for row in rows])
    plain = PlainIndex(rows, fast.analyzer, sorted(fast.function_words))
    assert plain.words == fast.words
    hits = [(hit.row.answer, round(hit.score, 6)) for hit in fast.search(question, 3)]
    assert [(row["answer"], round(score, 6)) for row, score in plain.search(question, 3)] == hits


def test_words_that_the_table_does_not_know_lower_the_scores():
    words = known_words(["How long is the guarantee?"], ["my", "is"])
    assert familiarity("guarantee?", words) == 1
    assert familiarity("My unhappy old purple guarantee", words) == 1  # three of them are free
    assert familiarity("My unhappy old purple dog ate the guarantee", words) == 1 / 1.5
    assert familiarity("My unhappy old purple dog ate the guarantee", None) == 1


def test_a_long_story_is_less_similar_than_the_short_question_in_it():
    rows = [TableRow(f"How do I treat a {name}?", name, name) for name in [*NAMES, "headache"]]
    index = RowIndex.build(rows)
    short = index.search("treat a headache", 1)[0]
    story = "Yesterday grandmother collapsed beside our garden fence, vomits, mumbles, headache"
    long = index.search(story, 1)[0]
    assert long.row == short.row
    assert long.score < 0.7 * short.score


def test_questions_in_a_language_whose_words_are_not_known_keep_their_scores():
    rows = [TableRow(f"Wie kocht man {name}?", name, name) for name in NAMES]
    index = RowIndex.build(rows)
    assert index.words is None
    assert index.function_words is None


def test_words_that_most_questions_share_do_not_count():
    rows = [{"question": f"please help with {name}", "answer": name} for name in NAMES]
    best = PlainIndex(rows).search("please help with walnuts", 1)
    assert best[0][1] < 0.3


NAMES = [
    f"{a}{b}" for a in ("ru", "mo", "ti", "ka", "zo") for b in ("pen", "lar", "sim", "dok", "gu")
]


def test_message_keeps_braces_of_the_texts():
    rows = [{"question": "{question}?", "answer": "use {rows}"}]
    message = context_message("R: {rows} Q: {question} end {", rows, "what is {rows}?")
    assert message == "R: {question}?\nuse {rows} Q: what is {rows}? end {"


def test_the_question_may_come_first():
    rows = [{"question": "a", "answer": "b"}]
    assert context_message("{question}\n{rows}", rows, "q") == "q\na\nb"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (NOTHING, True),
        ("the table has nothing on that", True),
        (f"{NOTHING} Ask a doctor.", True),
        (f"Drink ginger tea. {NOTHING}", True),
        ("The table has nothing on thatch.", False),
        ("The table has ginger.", False),
        ("", False),
    ],
)
def test_unknown_answers_are_recognized(answer, expected):
    assert is_unknown(answer, NOTHING) == expected


def test_a_word_that_may_end_any_answer_is_no_refusal_there():
    assert is_unknown("No, sorry.", "No")
    assert not is_unknown("Now you know.", "No")
    assert is_unknown("表格里没有请问医生", "表格里没有")
    assert not is_unknown("The answer to that is no", "No")


def test_without_unknown_answer_nothing_is_unknown():
    assert not is_unknown("", "")
    assert not is_refused([0.0], "", 0.5)


def test_the_lookup_refuses_below_its_threshold():
    assert is_refused([0.2, 0.1], NOTHING, 0.3)
    assert not is_refused([0.3], NOTHING, 0.3)
    assert is_refused([], NOTHING, 0.3)


def test_a_certain_row_answers_where_the_model_refuses():
    rows = [{"question": "q", "answer": "a", "score": 0.9}]
    assert final_answer(NOTHING, rows, NOTHING, 0.3, 0.8) == ("a", False)
    assert final_answer(NOTHING, rows, NOTHING, 0.3, 0.95) == (NOTHING, True)
    assert final_answer("b", rows, NOTHING, 0.3, 0.8) == ("b", False)


ROWS_OF_TWO_SCORES = [
    {"question": "q", "answer": "Eat two fresh figs.", "score": 0.6},
    {"question": "other", "answer": "Drink warm green tea.", "score": 0.2},
]


def test_an_answer_from_a_row_below_the_threshold_is_not_given():
    answer = "Drink warm green tea."
    assert final_answer(answer, ROWS_OF_TWO_SCORES, NOTHING, 0.3, 0.9) == (NOTHING, True)
    assert final_answer(answer, ROWS_OF_TWO_SCORES, NOTHING, 0.2, 0.9) == (answer, False)
    assert final_answer(answer, ROWS_OF_TWO_SCORES, "", 0.3, 0.9) == (answer, False)


def test_the_row_of_an_answer_is_the_one_with_most_of_its_words():
    assert source_row("drink green tea", ROWS_OF_TWO_SCORES) == ROWS_OF_TWO_SCORES[1]
    assert source_row("something else", ROWS_OF_TWO_SCORES) == ROWS_OF_TWO_SCORES[0]


def test_an_answer_is_shown_once_and_short_rows_fill_up():
    rows = [
        {"question": "q", "answer": "same"},
        {"question": "other words", "answer": "Same!"},
        *[{"question": "q", "answer": str(i)} for i in range(10)],
    ]
    assert choose_rows(rows, 3, 0) == [0, 2, 3]
    assert choose_rows(rows, 3, 13) == [0, 2, 3, 4, 5]


SIGNS = [{"question": f"What is 30 {sign} 5?", "answer": sign} for sign in "+-/*"]


@pytest.mark.parametrize("sign", list("+-/*"))
def test_questions_that_differ_in_a_sign_find_their_own_row_first(sign):
    question = f"what is 30 {sign} 5?"
    fast = RowIndex.build([TableRow(**row, question_id=row["answer"]) for row in SIGNS])
    assert fast.search(question, 1)[0].row.answer == sign
    assert PlainIndex(SIGNS).search(question, 1)[0][0]["answer"] == sign


def test_a_row_is_not_copied_if_another_question_is_as_similar():
    rows = [{**row, "score": 0.99} for row in SIGNS]
    assert final_answer(NOTHING, rows, NOTHING, 0.3, 0.9) == (NOTHING, True)
    same = [rows[0], {**rows[0], "question": "WHAT is 30 + 5?", "answer": "35"}]
    assert final_answer(NOTHING, same, NOTHING, 0.3, 0.9) == ("+", False)
