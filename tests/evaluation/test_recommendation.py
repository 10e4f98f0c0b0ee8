"""Which way to ship: tables whose verdict is known, and the sentences."""

import numpy as np
import pandas as pd
import pytest

from tabletune.evaluation.baselines import (
    ADAPTER,
    ADAPTER_CONTEXT,
    BASE,
    BASE_FIXED,
    BASE_NEAREST,
    CONSTANT,
    COPY,
    WAYS,
)
from tabletune.evaluation.recommendation import (
    ADVICE,
    COMMANDS,
    MAY_HELP_LABELS,
    NOTHING,
    ONLY_OF_THE_TABLE,
    TOO_FEW,
    recommend,
)
from tabletune.report.text import RUN_HERE


def answers(right, questions=20):
    """Whether each of so many answers is right: the first `right` of them."""
    return np.arange(questions) < right


def checked(shares, questions=20):
    """What `baselines.check_results` returns, of {way: {part: right answers}}."""
    tables = {}
    for way, parts in shares.items():
        lines = [
            pd.DataFrame({"part": part, "right": answers(right, questions)})
            for part, right in parts.items()
        ]
        tables[way.name] = pd.concat(lines, ignore_index=True)
    return tables


def verdict(shares, questions=20, least_right=0.5):
    """The verdict on such answers; the ways come in the order of their costs."""
    ways = {way.name: {"tokens_a_question": 10, "seconds_a_question": 0.1} for way in shares}
    return recommend(checked(shares, questions), ways, least_right)


def all_ways(reworded, new, table=None):
    """{way: {part: right answers}} of lists in the order of WAYS without labels and without rows in
    training."""
    ways = [COPY, BASE, BASE_FIXED, BASE_NEAREST, ADAPTER]
    table = table or reworded
    return {
        way: {"new": n, "table": t, "reworded": r}
        for way, n, t, r in zip(ways, new, table, reworded, strict=True)
    }


def test_the_ways_are_ordered_by_what_they_cost():
    names = [way.name for way in WAYS]
    assert names == [
        "always the same answer",
        "nearest row, copied",
        "base",
        "base, fixed rows",
        "base, nearest rows",
        "adapter",
        "adapter, nearest rows",
    ]


def test_copying_wins_on_a_table_to_look_things_up_in():
    """As measured on the bundled table: its answers cannot be known for new questions."""
    result = verdict(all_ways(reworded=[20, 0, 0, 6, 0], new=[0, 0, 0, 0, 1]))
    assert result["choice"] == COPY.name
    assert result["parts"] == ["reworded"]
    assert result["sentences"][0].startswith("Do not fine-tune for this table: copy")
    assert result["sentences"][0].endswith(ONLY_OF_THE_TABLE)


@pytest.mark.parametrize(
    ("rights", "command"),
    [
        ([20, 0, 0, 6, 0], "QUESTIONS=my_questions.txt MODEL_PART=copy`"),
        ([0, 20, 0, 6, 0], "QUESTIONS=my_questions.txt MODEL_PART=base`"),
        ([0, 0, 20, 6, 0], "as notebook 5 shows"),
        ([0, 0, 0, 20, 0], "as notebook 5 shows"),
        ([0, 0, 0, 0, 20], "`make export RUN_DIR=…`"),
    ],
)
def test_the_second_sentence_names_the_command(rights, command):
    assert command in verdict(all_ways(reworded=rights, new=[0] * 5))["sentences"][1]


def test_every_way_that_can_be_chosen_has_a_command():
    assert set(COMMANDS) == set(ADVICE)
    for command in COMMANDS.values():
        assert command.count("RUN_DIR") == command.count(RUN_HERE)


def test_what_answers_new_questions_too_is_not_limited_to_those_of_the_table():
    result = verdict(all_ways(reworded=[20, 0, 0, 6, 0], new=[16, 0, 0, 0, 1]))
    assert result["choice"] == COPY.name
    assert ONLY_OF_THE_TABLE not in result["sentences"][0]


def test_rows_in_the_prompt_win_where_the_base_model_reads_them():
    result = verdict(all_ways(reworded=[12, 2, 5, 19, 14], new=[4, 1, 3, 16, 9]))
    assert result["choice"] == BASE_NEAREST.name
    assert result["sentences"][0].startswith("Do not fine-tune")


def test_training_wins_where_it_generalizes():
    """Labels: the same answer for questions that no row has."""
    shares = all_ways(reworded=[18, 3, 9, 12, 20], new=[11, 2, 8, 11, 19])
    result = verdict({CONSTANT: {"new": 7, "table": 7, "reworded": 7}, **shares})
    assert result["choice"] == ADAPTER.name
    assert result["parts"] == ["new"]
    assert result["sentences"][0].startswith("Training was worth it")


def test_training_wins_where_it_learns_a_form_that_no_row_has():
    """Order lines into records: each new answer is another one."""
    result = verdict(all_ways(reworded=[20, 0, 6, 9, 16], new=[0, 0, 7, 9, 19]))
    assert result["choice"] == ADAPTER.name
    assert result["parts"] == ["reworded", "new"]
    assert result["sentences"][0].startswith("Training was worth it: ship")


def test_training_that_may_have_won_by_chance_was_probably_worth_it():
    shares = all_ways(reworded=[0, 0, 0, 15, 17], new=[0, 0, 0, 15, 17])
    sentences = verdict(shares)["sentences"]
    assert sentences[0].startswith("Training was probably worth it: ship")
    assert any("may be chance" in line for line in sentences)


def test_copying_does_not_win_by_the_table_alone_where_training_generalizes():
    """Labels again: copying is always right for questions of the table, and half of the time
    else.
    """
    shares = all_ways(reworded=[20, 3, 9, 12, 17], new=[10, 2, 8, 11, 17])
    result = verdict({CONSTANT: {"new": 7, "table": 7, "reworded": 7}, **shares})
    assert result["choice"] == ADAPTER.name


def test_training_with_rows_wins_where_copying_cannot_refuse():
    shares = all_ways(reworded=[19, 0, 0, 7, 0], new=[2, 0, 0, 0, 0])
    shares[ADAPTER_CONTEXT] = {"new": 19, "table": 20, "reworded": 19}
    assert verdict(shares)["choice"] == ADAPTER_CONTEXT.name


def test_nothing_works_where_all_are_wrong():
    result = verdict(all_ways(reworded=[3, 0, 1, 2, 4], new=[1, 0, 0, 2, 3]))
    assert result["choice"] is None
    assert result["sentences"][0] == NOTHING
    assert "context_rows" in result["sentences"][-1]


def test_nothing_works_where_one_answer_for_all_is_as_good():
    """Labels that were dealt out by chance, most of them the same."""
    shares = all_ways(reworded=[14, 3, 12, 13, 15], new=[13, 2, 12, 13, 15])
    result = verdict({CONSTANT: {"new": 15, "table": 15, "reworded": 15}, **shares})
    assert result["choice"] is None


def labels_by_chance():
    """Labels that were dealt out by chance: copying is right for texts of the table, and for these
    only.
    """
    shares = all_ways(reworded=[20, 3, 8, 13, 9], new=[10, 2, 9, 8, 7])
    return verdict({CONSTANT: {"new": 9, "table": 9, "reworded": 9}, **shares})


def test_copying_labels_of_the_table_is_no_way_to_label_new_texts():
    result = labels_by_chance()
    assert result["choice"] is None
    assert result["sentences"][0] == NOTHING


def test_sentences_say_that_one_label_for_all_is_as_good():
    (line,) = [line for line in labels_by_chance()["sentences"] if "20 new questions" in line]
    assert line.endswith("Always the same answer gets 9, and no way is clearly better than that.")


def test_labels_are_decided_by_new_texts_alone():
    shares = all_ways(reworded=[20, 3, 9, 12, 6], new=[10, 2, 8, 11, 18])
    result = verdict({CONSTANT: {"new": 7, "table": 7, "reworded": 7}, **shares})
    assert result["parts"] == ["new"]
    assert result["choice"] == ADAPTER.name


def test_labels_without_enough_new_texts_are_not_decided():
    tables = checked({CONSTANT: {"reworded": 7}, COPY: {"reworded": 20}, ADAPTER: {"reworded": 9}})
    assert recommend(tables, {}, 0.5)["sentences"] == [TOO_FEW]


def test_one_way_for_old_and_another_for_new_questions_is_said_to_be_so():
    result = verdict(all_ways(reworded=[20, 0, 0, 6, 1], new=[0, 0, 0, 2, 12]))
    assert result["choice"] is None
    assert result["sentences"][0] == (
        "No way answers both kinds of questions well enough. The best ones are, for reworded "
        "questions, copying the most similar row; for new questions, the fine-tuned model."
    )


def test_a_cheaper_way_just_below_the_limit_does_not_make_the_best_one_fail():
    shares = all_ways(reworded=[9, 0, 0, 0, 10], new=[0] * 5)
    assert verdict(shares)["choice"] == ADAPTER.name


def test_what_is_enough_is_a_parameter():
    shares = all_ways(reworded=[0, 0, 0, 0, 12], new=[0, 0, 0, 0, 12])
    assert verdict(shares, least_right=0.5)["choice"] == ADAPTER.name
    assert verdict(shares, least_right=0.8)["choice"] is None


def test_five_questions_decide_nothing():
    result = verdict(all_ways(reworded=[2, 0, 0, 0, 0], new=[0] * 5), questions=2)
    assert result["choice"] is None
    assert result["sentences"][0] == TOO_FEW


def test_a_part_of_few_questions_decides_nothing():
    shares = all_ways(reworded=[20, 0, 0, 6, 0], new=[0] * 5)
    tables = checked(shares)
    for lines in tables.values():
        lines.drop(lines.index[(lines["part"] == "new")][3:], inplace=True)
    ways = {name: {"tokens_a_question": 1, "seconds_a_question": 1} for name in tables}
    result = recommend(tables, ways, 0.5)
    assert result["parts"] == ["reworded"]
    (line,) = [line for line in result["sentences"] if "3 new questions" in line]
    assert line.endswith("Too few to decide anything.")


def test_the_table_as_it_stands_decides_nothing():
    """A model that knows the table by heart, and nothing in other words."""
    shares = all_ways(reworded=[0] * 5, new=[0] * 5, table=[20, 0, 0, 20, 20])
    assert verdict(shares)["choice"] is None


def test_sentences_say_how_many_are_right_with_the_interval():
    sentences = verdict(all_ways(reworded=[20, 0, 0, 6, 0], new=[0, 0, 0, 0, 1]))["sentences"]
    assert (
        "Of 20 reworded questions, copying the most similar row gets 20 right: 100% (84% – 100%)."
        in sentences
    )


def test_sentences_say_that_new_questions_have_no_answer_in_the_table():
    sentences = verdict(all_ways(reworded=[20, 0, 0, 6, 0], new=[0, 0, 0, 0, 1]))["sentences"]
    (line,) = [line for line in sentences if "20 new questions" in line]
    assert "the fine-tuned model gets 1 right" in line
    assert "No way gets more" in line


def test_sentences_say_where_nothing_is_the_right_answer():
    tables = checked(all_ways(reworded=[20, 0, 0, 6, 0], new=[18, 0, 0, 0, 0]))
    for lines in tables.values():
        lines["answerable"] = lines["part"] != "new"
    ways = {name: {"tokens_a_question": 1, "seconds_a_question": 1} for name in tables}
    sentences = recommend(tables, ways, 0.5)["sentences"]
    about = [line for line in sentences if "The table cannot answer most of these" in line]
    assert len(about) == 1
    assert "20 new questions" in about[0]


def test_sentences_say_what_a_question_costs():
    sentences = verdict(all_ways(reworded=[20, 0, 0, 6, 0], new=[0] * 5))["sentences"]
    assert sentences[-1] == (
        "What a question costs on this machine: copying the most similar row, 10 tokens and 0.1 seconds; "
        "the fine-tuned model, 10 tokens and 0.1 seconds."
    )


def test_a_difference_that_may_be_chance_is_called_so():
    close = verdict(all_ways(reworded=[0, 0, 0, 15, 17], new=[0] * 5))["sentences"]
    clear = verdict(all_ways(reworded=[0, 0, 0, 2, 17], new=[0] * 5))["sentences"]
    assert any("may be chance" in line for line in close)
    assert not any("may be chance" in line for line in clear)


def test_each_kind_of_questions_is_compared_with_its_own_rival():
    """As measured on data/terminal.jsonl: copying knows the table, and training the rule."""
    sentences = verdict(all_ways(reworded=[20, 0, 0, 4, 11], new=[1, 0, 0, 0, 13]))["sentences"]
    assert sentences[0] == "Training was worth it: ship the fine-tuned model."
    (reworded,) = [line for line in sentences if line.startswith("For reworded questions")]
    (new,) = [line for line in sentences if line.startswith("For new questions")]
    assert "copying the most similar row, 20 of 20: the fine-tuned model is 45" in reworded
    assert "percentage points behind (" in reworded
    assert "copying the most similar row, 1 of 20: the fine-tuned model is 60" in new
    assert "percentage points ahead (" in new


def test_what_is_recommended_without_training_is_compared_with_training():
    sentences = verdict(all_ways(reworded=[20, 0, 0, 6, 2], new=[0] * 5))["sentences"]
    assert any(
        line.startswith(
            "For reworded questions, the fine-tuned model gets 2 of 20 right: copying the most "
            "similar row is 90 percentage points ahead ("
        )
        for line in sentences
    )


def test_as_many_right_answers_are_called_so():
    sentences = verdict(all_ways(reworded=[12, 0, 0, 0, 12], new=[0] * 5))["sentences"]
    assert any(line.endswith("12 of 20 right: that is as many.") for line in sentences)


def test_where_labels_cannot_be_learned_the_labels_may_be_to_blame():
    assert labels_by_chance()["sentences"][-1] == MAY_HELP_LABELS
