"""Training prompts: what stands in them, and what never does, whatever the table and split."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabletune.data.calibration import MOST_THRESHOLD, calibrate
from tabletune.data.context import ContextSettings, TableContext
from tabletune.data.english import FUNCTION_WORDS
from tabletune.data.lookup import CONTEXT_TEMPLATE, MOST_CONTEXT_ROWS, lookup_text
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.data.rewording import Rewording
from tabletune.data.splits import SPLITS, assign_splits, question_id, question_key, split_position
from tabletune.data.training_prompts import (
    PromptMaker,
    PromptOptions,
    TrainingRow,
    practice_prompts,
    read_practice,
)
from tabletune.run.parameters import PARAMETERS

NOTHING = "The table has nothing on that."
WORDS = ["red", "green", "cold", "tea", "nose", "dry", "tired", "feet", "hair", "open", "shop"]


def context_of(rows, context_rows=3, characters=0, unknown=NOTHING):
    chosen = ContextSettings(context_rows, characters, CONTEXT_TEMPLATE, unknown)
    return TableContext(RowIndex.build(rows), chosen)


def maker_of(rows, options=None, **context):
    wrapped = [TrainingRow(row, row.answer) for row in rows]
    return PromptMaker(context_of(rows, **context), wrapped, options or PromptOptions())


def numbered(number=20):
    return [
        TableRow(f"What helps against {WORDS[n % 11]} {n}?", f"Answer {n}.", str(n))
        for n in range(number)
    ]


@st.composite
def tables(draw):
    """Rows of a table with questions asked more than once and answers of several questions, and
    a split.
    """
    question = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
    answers = st.sampled_from([f"answer {n}" for n in range(8)])
    pairs = draw(st.lists(st.tuples(question, answers), min_size=6, max_size=40, unique=True))
    keys = [question_key([text]) for text, _ in pairs]
    if len(set(keys)) < 4:
        return draw(tables())
    seed = draw(st.integers(0, 99))
    split = assign_splits([split_position(key, seed) for key in keys], 0.2, 0.2)
    rows = {name: [] for name in SPLITS}
    for (text, answer), key, name in zip(pairs, keys, split, strict=True):
        rows[name].append(TableRow(text, answer, question_id(key)))
    return rows


@given(
    rows=tables(),
    seed=st.integers(0, 99),
    rate=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    copies=st.sampled_from([0.5, 1, 3]),
    characters=st.sampled_from([0, 200]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_row_of_a_test_question_is_in_the_index_or_a_prompt(
    rows, seed, rate, copies, characters
):
    held_out = {row.question_id for name in ("validation", "test") for row in rows[name]}
    maker = maker_of(
        rows["train"], PromptOptions(rate, copies, 0.5, 0, seed), characters=characters
    )
    assert not held_out & {row.question_id for row in maker.context.index.rows}
    texts = {lookup_text(row.question) for name in ("validation", "test") for row in rows[name]}
    for prompt in maker.prompts():
        assert not held_out & {row.question_id for row in prompt.rows}
        plain = {lookup_text(turn.question) for turn in prompt.turns if turn.kind != "practice"}
        asked = {lookup_text(row.question) for row in rows["train"]}
        assert not (plain & texts) - asked - reworded_to(texts)


def reworded_to(texts):
    """Questions of one or two words, which a rewording of another one can happen to be."""
    return {text for text in texts if len(text.split()) <= 3}


@given(rows=tables(), seed=st.integers(0, 99), rate=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_of_a_missing_question_are_never_its_own(rows, seed, rate):
    maker = maker_of(rows["train"], PromptOptions(rate, 2, 0.0, 0, seed))
    by_text = {}
    for row in rows["train"]:
        by_text.setdefault(row.question, set()).add(row.question_id)
    answers = {}
    for row in rows["train"]:
        answers.setdefault(row.question_id, set()).add(lookup_text(row.answer))
    for prompt in maker.prompts():
        for turn in prompt.turns:
            asked = by_text[turn.question]
            if turn.kind == "missing":
                assert turn.answer == NOTHING
                assert not asked & {row.question_id for row in prompt.rows}
            else:
                assert lookup_text(turn.answer) in {lookup_text(row.answer) for row in prompt.rows}
            if turn.kind == "own row":
                assert asked & {row.question_id for row in prompt.rows}


def test_the_own_row_stands_at_every_place():
    places = Counter()
    for prompt in maker_of(numbered(60), PromptOptions(1.0, 3, reworded_share=0)).prompts():
        questions = [row.question for row in prompt.rows]
        places.update(questions.index(turn.question) for turn in prompt.turns[:1])
    assert set(places) == {0, 1, 2}
    assert min(places.values()) > 0.2 * places.total()


def test_wrong_rows_are_the_most_similar_ones():
    rows = [*numbered(), TableRow("dry cough", "a", "x"), TableRow("dry coughs at night", "b", "y")]
    maker = maker_of(rows, context_rows=2)
    shown = maker.context_of(20)
    assert [rows[place].question for place in shown] == ["dry cough", "dry coughs at night"]


def test_the_hit_rate_is_the_share_of_questions_with_their_row():
    maker = maker_of(numbered(200), PromptOptions(0.6, 3))
    kinds = Counter(turn.kind for prompt in maker.prompts() for turn in prompt.turns)
    assert 0.5 < kinds["own row"] / kinds.total() < 0.7


def test_each_row_is_asked_as_often_as_copies_say():
    maker = maker_of(numbered(), PromptOptions(1.0, 2, reworded_share=0))
    asked = Counter(turn.question for prompt in maker.prompts() for turn in prompt.turns)
    assert set(asked.values()) == {2}


def test_most_tokens_is_the_limit(tokenizer):
    from tabletune.data.retrieval_folder import PromptWriter

    maker = maker_of(numbered(), PromptOptions(copies=9))
    writer = PromptWriter(maker.context, {"max_length": 1000}, *tokenizer)
    writer.examples(maker.prompts(), 2000)
    assert sum(writer.lengths) <= 2000 < sum(writer.lengths) + max(writer.lengths)


def test_without_an_unknown_answer_the_own_answer_stays():
    maker = maker_of(numbered(), PromptOptions(0.3), unknown="")
    missing = [t for p in maker.prompts() for t in p.turns if t.kind == "missing"]
    assert missing
    assert all(turn.answer.startswith("Answer") for turn in missing)


def test_other_wordings_of_an_answer_are_asked_about_each_other():
    rows = [*numbered(), TableRow("Where?", "Here.", "a"), TableRow("Which street?", "Here.", "b")]
    maker = maker_of(rows, PromptOptions(0.6, 8))
    others = [
        (turn.question, [row.question for row in prompt.rows])
        for prompt in maker.prompts()
        for turn in prompt.turns
        if turn.kind == "other wording"
    ]
    assert others
    assert all(question not in shown for question, shown in others)


def test_the_readers_rewordings_are_used():
    rows = numbered()
    wrapped = [TrainingRow(row, row.answer) for row in rows]
    own = {row.question_id: ["in my own words"] for row in rows}
    maker = PromptMaker(context_of(rows), wrapped, PromptOptions(1.0, 1, 1.0), own)
    asked = {turn.question for prompt in maker.prompts() for turn in prompt.turns}
    assert asked == {"in my own words"}


def test_a_question_inside_a_conversation_keeps_its_history():
    history = (("user", "Hello"), ("assistant", "Hi."))
    rows = numbered(5)
    wrapped = [TrainingRow(row, row.answer, history) for row in rows]
    prompts = list(PromptMaker(context_of(rows), wrapped, PromptOptions(0.6, 4)).prompts())
    assert all(len(prompt.turns) == 1 for prompt in prompts)
    assert all(prompt.history[0] == {"role": "user", "content": "Hello"} for prompt in prompts)
    assert {turn.kind for prompt in prompts for turn in prompt.turns} == {"own row", "missing"}


def test_prompts_are_the_same_for_the_same_seed():
    def texts(seed):
        maker = maker_of(numbered(), PromptOptions(seed=seed))
        return [prompt.messages(maker.context) for prompt in maker.prompts()]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)


def test_the_first_turn_is_the_prompt_of_use():
    maker = maker_of(numbered())
    prompt = next(maker.prompts())
    rows = [vars(row) for row in prompt.rows]
    template = maker.context.settings.context_template
    assert prompt.messages(maker.context)[0]["content"] == template.replace(
        "{rows}", "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows)
    ).replace("{question}", prompt.turns[0].question)


def test_practice_tables_have_facts_in_several_words_and_questions_to_refuse():
    tables_ = read_practice()
    assert len(tables_) >= 10
    assert all(len(table.unknown) >= 4 and len(table.facts) >= 5 for table in tables_)
    assert all(len(texts) >= 3 for table in tables_ for _, texts in table.facts)


def test_practice_has_no_words_of_the_safety_prompts():
    import json
    from importlib import resources

    texts = resources.files("tabletune") / "resources/texts"
    emergencies = [
        json.loads(line)["prompt"]
        for line in (texts / "safety_prompts.jsonl").read_text("utf-8").splitlines()
        if json.loads(line)["kind"] == "emergency"
    ]
    practice = f" {lookup_text((texts / 'practice.txt').read_text('utf-8'))} "
    for text in emergencies:
        words = lookup_text(text).split()
        for one, two in pairwise(words):
            if not {one, two} & FUNCTION_WORDS:
                assert f" {one} {two} " not in practice


def test_practice_answers_stand_in_the_rows_or_are_refused():
    context = context_of(numbered())
    for prompt in practice_prompts(context, PromptOptions(practice_prompts=30)):
        answers = {row.answer for row in prompt.rows} | {NOTHING}
        assert {turn.answer for turn in prompt.turns} <= answers
        assert len({row.answer for row in prompt.rows}) == 3


def test_thresholds_separate_reworded_questions_from_new_ones():
    calibration = calibrate(RowIndex.build(numbered(60)), 1)
    assert 0 < calibration.unknown_threshold < 1
    assert np.mean(np.array(calibration.answerable_scores) < calibration.unknown_threshold) <= 0.05
    assert calibration == calibrate(RowIndex.build(numbered(60)), 1)


def test_paraphrases_that_share_no_letters_do_not_lower_the_threshold():
    rows = numbered(60)
    texts = ["zyx wvu", "qpo nml", "rst kji", "hgf edc"]
    others = [TableRow(text, row.answer, text) for text, row in zip(texts, rows, strict=False)]
    assert calibrate(RowIndex.build(rows + others), 1).unknown_threshold > 0.1


def test_questions_out_of_scope_do_not_move_the_thresholds(monkeypatch):
    # as if a rule had reworded each question into what resembles an emergency more than any row
    monkeypatch.setattr(Rewording, "__call__", lambda self, text, generator: f"{text} bleach eyes")
    rows = numbered(60)
    out_of_scope = [f"{row.question} bleach eyes" for row in rows] + ["bleach eyes"]
    rows = [*rows, TableRow("Does bleach hurt eyes?", "Yes.", "bleach")]
    calibration = calibrate(RowIndex.build(rows, out_of_scope=out_of_scope), 1)
    without = calibrate(RowIndex.build(rows), 1)
    assert calibration.unknown_threshold == without.unknown_threshold > 0.1
    assert calibration.certain_threshold == without.certain_threshold
    # but the scores are those of the lookup, which refuses these questions
    assert np.median(calibration.answerable_scores) < 0.1


def test_the_threshold_is_not_high_where_rules_change_little():
    rows = [TableRow(f"你好{number}世界问题", str(number), str(number)) for number in range(40)]
    assert calibrate(RowIndex.build(rows), 1).unknown_threshold <= MOST_THRESHOLD


def test_a_table_of_one_question_can_be_calibrated():
    calibration = calibrate(RowIndex.build([TableRow("cough", "tea", "1")]), 1)
    assert calibration.certain_threshold >= 0.7


@pytest.mark.parametrize("field", ["{rows}", "{question}"])
def test_a_template_without_a_field_is_refused(field):
    from tabletune.data.retrieval_folder import check_context_settings
    from tabletune.errors import StageError

    template = CONTEXT_TEMPLATE.replace(field, "")
    chosen = {"context_rows": 3, "context_template": template}
    with pytest.raises(StageError, match=field):
        check_context_settings(chosen, "columns", tools=False)


@pytest.mark.parametrize(("shape", "tools"), [("text", False), ("messages", True)])
def test_texts_and_tools_are_refused(shape, tools):
    from tabletune.data.retrieval_folder import check_context_settings
    from tabletune.errors import StageError

    chosen = {"context_rows": 3, "context_template": CONTEXT_TEMPLATE}
    with pytest.raises(StageError, match="context_rows: 0"):
        check_context_settings(chosen, shape, tools)
    assert check_context_settings(chosen | {"context_rows": 0}, shape, tools) is None


def test_prompts_that_are_too_long_lose_turns_then_rows(tokenizer):
    from tabletune.data.retrieval_folder import PromptWriter

    rows = numbered()
    maker = maker_of(rows, PromptOptions(1.0))
    prompt = next(maker.prompts())
    options = {"max_length": 100}
    writer = PromptWriter(maker.context, options, *tokenizer)
    example, length, shorter = writer.fitting(prompt)
    assert shorter
    assert length <= 100
    assert len(example["prompt"]) == 1
    assert prompt.turns[0].answer in {row.answer for row in prompt.rows}
    assert SimpleNamespace(**example).group == prompt.question_id


def test_a_context_has_no_more_rows_than_one_in_use():
    rows = [TableRow(f"tea {n}", f"a{n}", str(n)) for n in range(3 * MOST_CONTEXT_ROWS)]
    maker = maker_of(rows, characters=10_000)
    assert len(maker.context_of(0)) == MOST_CONTEXT_ROWS
    assert len(maker.context.hits("tea 0")) == MOST_CONTEXT_ROWS


def test_the_defaults_are_those_of_notebook_1():
    options = PromptOptions()
    parameters = PARAMETERS["01_format_dataset"]
    assert vars(options) == {name: parameters[name] for name in vars(options)}


def test_without_rows_of_their_own_all_questions_are_missing():
    prompts = list(maker_of(numbered(), PromptOptions(0.0, 2)).prompts())
    assert len(prompts) == 40
    assert {turn.kind for prompt in prompts for turn in prompt.turns} == {"missing"}
