"""What notebook 1 shows of the rows in prompts."""

from types import SimpleNamespace

import pytest
from conftest import TINY
from table_helpers import formatted, tokenizer_of, write

from tabletune.data.context import load_context
from tabletune.data.retrieval_folder import write_retrieval
from tabletune.data.retrieval_report import HEADINGS, RIGHT, example_prompt, prompts_table
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.files import read_json
from tabletune.run.parameters import PARAMETERS

NOTHING = "The table has nothing on that."
SUBJECTS = [f"{a} {b}" for a in ("dry", "sore", "tired", "cold") for b in ("eyes", "feet", "skin")]
ROWS = [(f"What helps against {subject}?", f"Rest for {subject}.") for subject in SUBJECTS]
OPTIONS = {"context_rows": 2, "unknown_answer": NOTHING, "practice_prompts": 4, "max_length": 2000}


@pytest.fixture
def run(tmp_path):
    """A run folder with the data set of a small table, and rows in its prompts."""
    path = tmp_path / "table.csv"
    write(path, ["question", "answer"], ROWS)
    formatted(tmp_path, path)
    tokenizer, stop_token_ids = tokenizer_of(TINY)
    formatter = SimpleNamespace(
        shape=SimpleNamespace(question_template=""),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        table=None,
    )
    write_retrieval(tmp_path, PARAMETERS["01_format_dataset"] | OPTIONS, formatter)
    return tmp_path


def test_a_question_of_the_training_split_is_shown_with_its_own_row_and_its_answer(run):
    splits, _ = load_dataset_of_run(run)
    first = splits["train"][0]
    question, answer = first["prompt"][-1]["content"], first["completion"][0]["content"]
    shown = example_prompt(run, load_context(run)).partition(HEADINGS["validation"])[0]
    assert f"{question}\n{answer}" in shown
    assert shown.rstrip().endswith(f"{RIGHT}\n\n{answer}")


def test_a_new_question_is_shown_with_what_is_to_be_said_without_a_row(run):
    shown = example_prompt(run, load_context(run)).partition(HEADINGS["validation"])[2]
    assert shown.endswith(f"{RIGHT}\n\n{NOTHING}")


def test_the_questions_of_the_training_prompts_add_up(run):
    report = read_json(run / "dataset" / "report.json", "01_format_dataset")
    [column] = prompts_table(report).T.to_dict("records")
    kinds = [count for name, count in column.items() if name.startswith("–")]
    assert column["questions that they ask"] == sum(kinds)


def test_without_context_rows_each_question_is_shown_with_its_own_answer(run):
    splits, _ = load_dataset_of_run(run)
    shown = example_prompt(run, None)
    for name, heading in HEADINGS.items():
        row = splits[name][0]
        question, answer = row["prompt"][-1]["content"], row["completion"][0]["content"]
        assert f"{heading}\n\n{question}\n\n{RIGHT}\n\n{answer}" in shown
