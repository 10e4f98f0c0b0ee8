"""The ways to answer: which rows stand in which prompt, what is scored, and what a question
costs.
"""

import pandas as pd
import pytest

from tabletune.chat.encoding import encode_prompt
from tabletune.data.context import ContextSettings, TableContext
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.errors import StageError
from tabletune.evaluation import baselines
from tabletune.evaluation.baselines import (
    ADAPTER,
    ADAPTER_CONTEXT,
    BASE,
    BASE_FIXED,
    BASE_NEAREST,
    CONSTANT,
    COPY,
    Prompts,
    Result,
    all_questions,
    fixed_rows,
    last_part,
    ways_for,
    with_rows,
    without_model,
)

SUBJECTS = ["cold", "fever", "headache", "sunburn", "insomnia", "hiccups", "sore throat", "cough"]
ROWS = [
    TableRow(f"What helps against {subject}?", f"Take number {n}.", f"id{n}")
    for n, subject in enumerate(SUBJECTS)
]


def user(text):
    """A prompt of one question."""
    return [{"role": "user", "content": text}]


def question(text, *references, part="new"):
    """A question as notebook 4 asks it."""
    return {"prompt": user(text), "references": list(references), "part": part, "group": text}


@pytest.fixture
def prompts(tokenizer):
    """The prompts of a table of eight rows, three of them in a prompt."""
    return Prompts(tokenizer[0], RowIndex.build(ROWS), ROWS[:3], 3, 1000)


class FakeContext:
    """A run that was trained with rows."""

    def prompt(self, messages):
        messages = [{"role": "user", "content": f"rows and {messages[-1]['content']}"}]
        return type("Prompt", (), {"messages": messages})()

    def is_unknown(self, answer):
        return answer == "Nothing."

    def has_answer(self, references):
        return "absent" not in references


class FakeRules:
    """Rules for right answers, of a table with labels or without."""

    def __init__(self, *labels):
        self.labels = labels


# --- which ways


def test_the_table_of_ways_says_where_answers_come_from():
    table = baselines.ways_table(baselines.WAYS)
    assert list(table.index) == [way.name for way in baselines.WAYS]
    assert table.loc["nearest row, copied", "rows in its prompt"] == "no prompt"
    assert table.loc["base, fixed rows", "the answer comes from"] == "the base model"
    assert table.loc["adapter", "rows in its prompt"] == "none"


def test_one_answer_for_all_is_a_way_for_labels_only():
    assert CONSTANT not in ways_for(FakeRules(), None)
    assert ways_for(FakeRules("yes", "no"), None)[0] == CONSTANT


def test_the_adapter_gets_rows_only_where_it_was_trained_with_them():
    assert ADAPTER_CONTEXT not in ways_for(FakeRules(), None)
    assert ways_for(FakeRules(), FakeContext())[-1] == ADAPTER_CONTEXT


def test_a_table_without_questions_is_refused_in_one_line():
    with pytest.raises(StageError, match="nothing to compare") as error:
        all_questions({"new": [], "reworded": []})
    assert "\n" not in str(error.value)


# --- how long an answer may be


def splits_of(*answers):
    """The splits of a table with these answers."""
    return {"train": [{"completion": [{"content": answer}]} for answer in answers], "test": []}


def test_an_answer_may_be_twice_as_long_as_the_longest(tokenizer):
    answer = "Rest, and drink tea. " * 20
    tokens = len(tokenizer[0](answer, add_special_tokens=False).input_ids)
    assert baselines.answer_limit(splits_of("Rest.", answer), tokenizer[0], 1000) == 2 * tokens


def test_an_answer_is_never_longer_than_asked_for(tokenizer):
    assert baselines.answer_limit(splits_of("Rest, and drink tea. " * 20), tokenizer[0], 40) == 40


def test_a_label_leaves_room_for_a_sentence(tokenizer):
    assert baselines.answer_limit(splits_of("yes", "no"), tokenizer[0], 1000) == 32


def test_answers_that_begin_with_thinking_have_no_usual_length(tokenizer):
    splits = splits_of("<think>Hm.</think>Yes.", "No.")
    assert baselines.answer_limit(splits, tokenizer[0], 1000) == 1000


# --- which rows


def test_fixed_rows_are_not_those_that_are_asked():
    chosen = fixed_rows(ROWS, 4, ["id0", "id1"], 42)
    assert len(chosen) == 4
    assert not {"id0", "id1"} & {row.question_id for row in chosen}


def test_where_all_rows_are_asked_there_are_fixed_rows_all_the_same():
    assert len(fixed_rows(ROWS, 4, [row.question_id for row in ROWS], 42)) == 4


def test_fixed_rows_show_every_label():
    rows = [TableRow(f"message {n}", "rare" if n == 17 else "common", f"id{n}") for n in range(30)]
    assert {row.answer for row in fixed_rows(rows, 2, [], 42)} == {"rare", "common"}


def test_fixed_rows_have_one_row_of_a_question():
    rows = [TableRow("same", f"answer {n}", "id") for n in range(5)] + ROWS[:1]
    assert len(fixed_rows(rows, 4, [], 42)) == 2


def test_fixed_rows_are_the_same_for_one_seed():
    assert fixed_rows(ROWS, 3, [], 7) == fixed_rows(ROWS, 3, [], 7)
    assert any(fixed_rows(ROWS, 3, [], seed) != fixed_rows(ROWS, 3, [], 7) for seed in range(5))


def test_rows_stand_as_earlier_turns_before_the_question():
    messages = [{"role": "system", "content": "Be kind."}, *user("And now?")]
    turns = with_rows(messages, ROWS[:1])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[1]["content"] == ROWS[0].question
    assert turns[-1] == messages[-1]


# --- prompts


def test_base_and_adapter_alone_get_the_question_as_it_is(prompts):
    for way in (BASE, ADAPTER):
        assert prompts.messages(way, user("hm?")) == user("hm?")


def test_fixed_rows_are_the_same_for_every_question(prompts):
    one, other = (prompts.messages(BASE_FIXED, user(text)) for text in ("cough", "fever"))
    assert one[:-1] == other[:-1]


def test_the_nearest_row_stands_next_to_the_question(prompts):
    messages = prompts.messages(BASE_NEAREST, user("Anything against a sore throat, please"))
    assert len(messages) == 7
    assert messages[-3]["content"] == "What helps against sore throat?"


def test_what_does_not_fit_is_left_out_the_farthest_first(prompts):
    asked = user("Anything against a sore throat, please")
    complete = prompts.messages(BASE_NEAREST, asked)
    prompts.longest = prompts.length(complete) - 1
    assert prompts.messages(BASE_NEAREST, asked) == complete[2:]


def test_where_no_row_fits_the_question_is_asked_alone(prompts):
    prompts.longest = 1
    assert prompts.messages(BASE_NEAREST, user("sore throat")) == user("sore throat")


def test_the_adapter_with_rows_is_asked_as_it_was_trained(prompts):
    prompts.context = FakeContext()
    assert prompts.messages(ADAPTER_CONTEXT, user("hm?")) == user("rows and hm?")


# --- without a model


def test_copying_takes_the_answer_of_the_nearest_row(prompts):
    result = without_model(COPY, prompts, [question("sunburn, any idea?", "x")])
    assert list(result.answers["answer"]) == ["Take number 3."]


def test_copying_costs_no_tokens(prompts):
    result = without_model(COPY, prompts, [question("sunburn", "x")])
    assert result.prompt_tokens == [0]
    assert list(result.answers["new_tokens"]) == [0]


def test_copying_refuses_what_the_look_up_refuses(prompts):
    settings = ContextSettings(3, 0, "{rows}{question}", "Nothing.", unknown_threshold=0.5)
    prompts.context = TableContext(prompts.index, settings)
    asked = [question("sunburn", "x"), question("sun and sand in Spain", "x")]
    result = without_model(COPY, prompts, asked)
    assert list(result.answers["answer"]) == ["Take number 3.", "Nothing."]


def test_a_row_that_shares_nothing_with_the_question_is_not_copied(prompts):
    result = without_model(COPY, prompts, [question("東京", "x")])
    assert list(result.answers["answer"]) == [""]


def test_one_answer_for_all_is_the_commonest(tokenizer):
    rows = [TableRow(f"message {n}", "no" if n % 3 else "yes", f"id{n}") for n in range(9)]
    prompts = Prompts(tokenizer[0], RowIndex.build(rows), [], 3, 1000)
    result = without_model(CONSTANT, prompts, [question("message 3", "yes"), question("hm", "no")])
    assert list(result.answers["answer"]) == ["no", "no"]


# --- what is scored


def test_only_the_last_answer_of_a_mask_is_left():
    assert last_part([0, 1, 1, 0, 0, 1, 1]) == [0, 0, 0, 0, 0, 1, 1]
    assert last_part([0, 0, 1]) == [0, 0, 1]


@pytest.mark.parametrize("way", [BASE, BASE_FIXED, BASE_NEAREST], ids=lambda way: way.name)
def test_the_references_are_scored_after_the_prompt_of_the_way(prompts, tokenizer, way):
    asked = question("sore throat", "Gargle.", "Rest.")
    rows = prompts.references(way, [asked, question("cough", "Honey.")], tokenizer[1])
    prompt = encode_prompt(prompts.messages(way, asked["prompt"]), tokenizer[0])
    assert rows[0]["input_ids"][: len(prompt)] == prompt
    assert rows[0]["completion_mask"][: len(prompt)] == [0] * len(prompt)
    assert all(rows[0]["completion_mask"][len(prompt) :])


def test_one_reference_of_each_question_is_scored(prompts, tokenizer):
    questions = [question("cough", "Honey.", "Tea."), question("cold", "Rest.")]
    assert len(prompts.references(BASE, questions, tokenizer[1])) == 2


# --- figures


def result_of(way, answers, tokens=0, scores=None):
    """A Result of a way with these answers, a tenth of a second for each."""
    table = pd.DataFrame({"answer": answers, "stopped": True, "new_tokens": 5})
    return Result(way, table, 0.1 * len(answers), [tokens] * len(answers), scores)


def test_the_cost_of_a_question_is_prompt_and_answer(monkeypatch):
    monkeypatch.setattr(baselines, "summarize_content", lambda *_: {})
    checked = pd.DataFrame({"right": [True, False], "part": ["new", "new"]})
    entry = baselines.summarize_result(result_of(BASE, ["a", "b"], 20), checked, None, 100, 0)
    assert entry["tokens_a_question"] == 25
    assert entry["seconds_a_question"] == pytest.approx(0.1)


def test_the_perplexity_of_a_part_is_that_of_its_questions(monkeypatch):
    monkeypatch.setattr(baselines, "summarize_content", lambda *_: {})
    scores = pd.DataFrame({"response_nll": [0.0, 10.0], "response_tokens": [5.0, 5.0]})
    checked = pd.DataFrame({"right": [True, False], "part": ["new", "table"]})
    result = result_of(BASE, ["a", "b"], scores=scores)
    entry = baselines.summarize_result(result, checked, None, 100, 0)
    assert entry["perplexity"]["new"]["response"] == pytest.approx(1)
    assert entry["perplexity"]["table"]["response"] == pytest.approx(7.389, abs=1e-3)


def test_what_the_table_does_not_have_is_known_to_the_check(monkeypatch):
    seen = []

    def check(answers, questions, rules, unknown, answerable):
        seen.append((unknown, answerable))
        return pd.DataFrame({"right": [True] * len(answers)})

    monkeypatch.setattr(baselines, "check_content", check)
    questions = [question("a", "absent"), question("b", "present")]
    baselines.check_results([result_of(ADAPTER, ["Nothing.", "x"])], questions, None, FakeContext())
    assert seen == [([True, False], [False, True])]
