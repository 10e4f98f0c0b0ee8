"""Answers that are copied from the most similar row: `make ask MODEL_PART=copy`."""

import json
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

from tabletune.data.context import ContextSettings, TableContext
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.data.retrieval_folder import renew_index
from tabletune.errors import StageError
from tabletune.evaluation.ask import answer_questions
from tabletune.evaluation.copying import copied_answers, copying_context

NOTHING = "The table has nothing on that."
SETTINGS = {"unknown_threshold": "auto", "seed": 42}
SHOP = [
    ("What is your address?", "14 Harbour Road."),
    ("How can I pay?", "Cash or card."),
    ("When are you open?", "From 9 to 18.\n\nNot on Sundays."),
    ("Do you sell helmets?", "Yes, from 35 euros."),
]


def write_dataset(run, pairs):
    """What notebook 1 leaves in `dataset/`; the last pair is the only row of the test split."""
    rows = []
    for number, (question, answer) in enumerate(pairs):
        prompt = [{"role": "user", "content": question}]
        completion = [{"role": "assistant", "content": answer}]
        rows.append({"prompt": prompt, "completion": completion, "text": "", "group": str(number)})
    splits = {"train": Dataset.from_list(rows[:-1]), "test": Dataset.from_list(rows[-1:])}
    DatasetDict(splits).save_to_disk(run / "dataset")
    (run / "dataset" / "report.json").write_text("{}")


def write_retrieval(run, pairs, **settings):
    """What notebook 1 leaves in `retrieval/` with `context_rows`."""
    rows = [TableRow(question, answer, question) for question, answer in pairs]
    for which in ("evaluation", "use"):
        RowIndex.build(rows).save(run / "retrieval" / which)
    stored = {
        "context_rows": 3,
        "context_characters": 0,
        "context_template": "{rows}{question}",
        "unknown_answer": NOTHING,
        "unknown_threshold": 0.4,
        "certain_threshold": 0.9,
    }
    (run / "retrieval" / "settings.json").write_text(json.dumps(stored | settings))


def ask(run, *questions, values=SETTINGS, name="q.txt"):
    """The lines of answers.jsonl after `make ask MODEL_PART=copy`."""
    (run / name).write_text("\n".join(questions), encoding="utf-8")
    answer_questions(run, run / name, "copy", values)
    text = (run / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_a_run_with_rows_needs_only_its_index(tmp_path):
    write_retrieval(tmp_path, SHOP)
    [known, strange] = ask(tmp_path, "how can i pay", "Why is the sky blue?")
    assert known == {
        "question": "how can i pay",
        "answer": "Cash or card.",
        "unknown": False,
        "rows": [{"question": "How can I pay?", "answer": "Cash or card.", "score": 1.0}],
        "model": "copy",
        "stopped": True,
    }
    assert (strange["answer"], strange["unknown"]) == (NOTHING, True)


def test_expected_answers_are_judged(tmp_path):
    write_retrieval(tmp_path, SHOP)
    write_dataset(tmp_path, SHOP)
    lines = ask(
        tmp_path,
        "question,expected",
        "How can I pay?,Cash or card.",
        "What is your address?,By bus.",
        "Why is the sky blue?,The table has nothing on that.",
        name="q.csv",
    )
    assert [line["right"] for line in lines] == [True, False, True]


def test_several_lines_are_copied_as_they_are(tmp_path, capsys):
    write_retrieval(tmp_path, SHOP)
    [line] = ask(tmp_path, "When are you open?")
    assert line["answer"] == "From 9 to 18.\n\nNot on Sundays."
    assert line["rows"][0]["score"] == 1
    shown = capsys.readouterr().out
    assert "From 9 to 18." in shown
    assert "Not on Sundays." in shown


def test_rows_that_were_added_later_are_copied(tmp_path):
    write_retrieval(tmp_path, SHOP)
    renew_index(tmp_path, [TableRow("Is there a sauna?", "Upstairs.", "s")])
    assert ask(tmp_path, "a sauna?")[0]["answer"] == "Upstairs."


def test_without_an_index_the_rows_of_all_splits_are_copied(tmp_path, capsys):
    write_dataset(tmp_path, SHOP)
    [trained, of_the_test] = ask(tmp_path, "your address", "helmets?")
    assert trained["answer"] == "14 Harbour Road."
    assert of_the_test["answer"] == "Yes, from 35 euros."
    assert "Every question gets the answer of a row" in capsys.readouterr().out


def test_without_an_index_nothing_is_refused_unless_there_is_an_unknown_answer(tmp_path):
    write_dataset(tmp_path, SHOP)
    strange = "Who sells skateboards?"
    assert ask(tmp_path, strange)[0]["answer"] == "Yes, from 35 euros."
    values = SETTINGS | {"unknown_answer": NOTHING, "unknown_threshold": 0.6}
    assert ask(tmp_path, strange, values=values)[0]["answer"] == NOTHING


def test_without_an_index_the_threshold_is_calibrated(tmp_path):
    write_dataset(tmp_path, SHOP)
    context = copying_context(tmp_path, SETTINGS | {"unknown_answer": NOTHING})
    assert 0 < context.settings.unknown_threshold < 1


def test_the_threshold_and_its_answer_can_be_set(tmp_path):
    write_retrieval(tmp_path, SHOP)
    values = {"unknown_threshold": 0.99, "unknown_answer": "Ask us."}
    assert ask(tmp_path, "how do you pay", values=values)[0]["answer"] == "Ask us."


@pytest.mark.parametrize("with_index", [True, False])
def test_a_threshold_without_anything_to_say_is_an_error(with_index, tmp_path):
    write_dataset(tmp_path, SHOP)
    if with_index:
        write_retrieval(tmp_path, SHOP, unknown_answer="")
    with pytest.raises(StageError, match="needs a text to answer below it"):
        copying_context(tmp_path, {"unknown_threshold": 0.3, "seed": 42})


@pytest.mark.parametrize("threshold", [0, 0.0])
def test_a_threshold_of_0_copies_whatever_shares_anything(threshold, tmp_path):
    write_retrieval(tmp_path, SHOP)
    values = {"unknown_threshold": threshold}
    [similar, nothing_shared] = ask(tmp_path, "skateboards?", "東京", values=values)
    assert not similar["unknown"]
    assert nothing_shared["unknown"]
    assert nothing_shared["answer"] == NOTHING
    assert nothing_shared["rows"] == []


def test_a_run_without_a_table_is_one_line(tmp_path):
    with pytest.raises(StageError, match=r"report\.json is missing\. Run 01_format_dataset first"):
        copying_context(tmp_path, SETTINGS)


def test_a_table_of_texts_has_nothing_to_look_up(tmp_path):
    write_dataset(tmp_path, SHOP)
    row = {"prompt": [], "completion": [{"role": "assistant", "content": "x"}]}
    DatasetDict({"train": Dataset.from_list([row])}).save_to_disk(tmp_path / "texts")
    (tmp_path / "dataset").rename(tmp_path / "earlier")
    (tmp_path / "texts").rename(tmp_path / "dataset")
    (tmp_path / "dataset" / "report.json").write_text("{}")
    with pytest.raises(StageError, match="texts without questions"):
        copying_context(tmp_path, SETTINGS)


def context_of(pairs, threshold=0.3):
    """A context of these rows."""
    rows = [TableRow(question, answer, question) for question, answer in pairs]
    settings = ContextSettings(3, 0, "{rows}{question}", NOTHING, threshold)
    return TableContext(RowIndex.build(rows), settings)


@pytest.mark.parametrize(
    ("pairs", "question", "answer"),
    [
        ([("दुकान कब खुलती है?", "नौ बजे।"), ("पता क्या है?", "हार्बर रोड।")], "दुकान कब खुलती", "नौ बजे।"),
        (
            [("你们几点开门？", "九点。"), ("你们的地址在哪里？", "海港路。")],
            "地址在哪",
            "海港路。",
        ),
        ([("Open?", "Yes."), ("Open?", "No.")], "open", "Yes."),
        ([("30 / 5", "6"), ("30 - 5", "25")], "30 - 5", "25"),
        ([("I love it", "praise"), ("I hate it", "complaint")], "hate it so much", "complaint"),
        (SHOP, "how can I pay " * 500, "Cash or card."),
        ([("Only row?", "One.")], "only row", "One."),
    ],
    ids=["Hindi", "Chinese", "two answers", "a tie", "labels", "a long question", "one row"],
)
def test_tables_of_all_kinds_are_copied(pairs, question, answer):
    [line] = copied_answers(context_of(pairs), [question]).to_dict("records")
    assert (line["answer"], line["unknown"]) == (answer, False)


def test_a_row_that_says_nothing_counts_as_nothing():
    answers = copied_answers(context_of([("The sauna?", NOTHING)]), ["the sauna"])
    assert answers["unknown"].tolist() == [True]


def test_no_torch_is_imported(tmp_path):
    write_retrieval(tmp_path, SHOP)
    (tmp_path / "q.txt").write_text("How can I pay?")
    program = (
        "import sys; from pathlib import Path; from tabletune.cli.main import main; "
        f"sys.argv[1:] = ['ask', {str(tmp_path)!r}, '--questions', {str(tmp_path / 'q.txt')!r}, "
        "'--part', 'Copy']; main(); "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Cash or card." in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
