"""What notebook 1 leaves in `retrieval/`: indexes, settings, and prompts that are asked as in
use.
"""

import json
from types import SimpleNamespace

import datasets
import pytest
from conftest import TINY
from table_helpers import formatted, tokenizer_of, write

from tabletune.chat.encoding import encode_all
from tabletune.data.context import index_fingerprints, load_context
from tabletune.data.retrieval import TableRow, table_rows
from tabletune.data.retrieval_folder import (
    PromptWriter,
    named_file_digests,
    read_rewordings,
    renew_from_table,
    renew_index,
    write_retrieval,
)
from tabletune.data.splits import question_id, question_key
from tabletune.data.training_prompts import TrainingPrompt, Turn
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS

NOTHING = "The table has nothing on that."
SUBJECTS = [f"{a} {b}" for a in ("dry", "sore", "tired", "cold") for b in ("eyes", "feet", "skin")]
ROWS = [
    (f"What helps against {subject}?", f"{way} for {subject}.")
    for subject in SUBJECTS
    for way in ("Rest", "Tea")
]
OPTIONS = {"context_rows": 2, "unknown_answer": NOTHING, "practice_prompts": 4, "max_length": 2000}


def settings_of(**changes):
    return PARAMETERS["01_format_dataset"] | OPTIONS | changes


def formatter_of(table=None):
    tokenizer, stop_token_ids = tokenizer_of(TINY)
    return SimpleNamespace(
        shape=SimpleNamespace(question_template=""),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        table=table,
    )


@pytest.fixture
def run(tmp_path):
    """A run folder with the data set of a small table."""
    path = tmp_path / "table.csv"
    write(path, ["question", "answer"], ROWS)
    formatted(tmp_path, path)
    return tmp_path


def test_the_index_for_evaluation_has_the_train_split_alone(run):
    write_retrieval(run, settings_of(), formatter_of())
    splits = datasets.load_from_disk(run / "dataset")
    assert load_context(run, "evaluation").index.rows == table_rows(splits["train"])


def test_the_index_for_use_has_all_rows(run):
    write_retrieval(run, settings_of(), formatter_of())
    questions = {(row.question, row.answer) for row in load_context(run, "use").index.rows}
    assert questions == set(ROWS)


def test_no_prompt_has_a_row_of_a_held_out_question(run):
    write_retrieval(run, settings_of(copies=3), formatter_of())
    splits = datasets.load_from_disk(run / "dataset")
    answers = [
        row["completion"][0]["content"] for name in ("validation", "test") for row in splits[name]
    ]
    prompts = datasets.load_from_disk(run / "retrieval" / "prompts")
    assert len(prompts["train"]) > 10
    for text in prompts["train"]["text"]:
        assert not any(answer in text for answer in answers)


def test_a_validation_prompt_is_the_prompt_of_use(run):
    write_retrieval(run, settings_of(), formatter_of())
    context = load_context(run)
    template = context.settings.context_template
    before = template.partition("{question}")[0].rpartition("{rows}")[2]
    prompts = datasets.load_from_disk(run / "retrieval" / "prompts")
    for row in prompts["validation"]:
        question = row["prompt"][-1]["content"].rpartition(before)[2]
        plain = [*row["prompt"][:-1], {"role": "user", "content": question}]
        assert context.prompt(plain).messages == row["prompt"]


def test_the_loss_is_on_the_answers_and_on_no_row(run):
    write_retrieval(run, settings_of(), formatter_of())
    tokenizer, stop_token_ids = tokenizer_of(TINY)
    prompts = list(datasets.load_from_disk(run / "retrieval" / "prompts")["train"])
    for row, encoded in zip(prompts, encode_all(prompts, tokenizer, stop_token_ids), strict=True):
        pairs = zip(encoded["input_ids"], encoded["completion_mask"], strict=True)
        learned = tokenizer.decode([token for token, in_loss in pairs if in_loss])
        answers = [m["content"] for m in row["prompt"] if m["role"] == "assistant"]
        answers.append(row["completion"][0]["content"])
        assert learned.replace("</s>", "").split() == " ".join(answers).split()


def test_the_report_tells_what_became_of_the_rows(run):
    plain = json.loads((run / "dataset" / "report.json").read_text(encoding="utf-8"))
    report = write_retrieval(run, settings_of(), formatter_of())
    stored = json.loads((run / "dataset" / "report.json").read_text(encoding="utf-8"))
    assert stored == report
    assert report["fingerprint"] != plain["fingerprint"]
    assert report["context"]["questions"]["own row"] > 0
    assert report["context"]["questions"]["missing"] > 0
    assert report["context"]["tokens"]["max"] <= 2000


def test_the_threshold_alone_needs_no_new_training(run):
    first = write_retrieval(run, settings_of(), formatter_of())["fingerprint"]
    formatted(run, run / "table.csv")
    second = write_retrieval(run, settings_of(unknown_threshold=0.2), formatter_of())
    assert second["fingerprint"] == first
    assert load_context(run).settings.unknown_threshold == 0.2


def test_without_context_rows_an_earlier_folder_moves_aside(run):
    write_retrieval(run, settings_of(), formatter_of())
    report = formatted(run, run / "table.csv")[0]
    assert write_retrieval(run, settings_of(context_rows=0), formatter_of()) == report
    assert not (run / "retrieval").exists()
    assert list((run / "earlier").rglob("settings.json"))


def test_a_prompt_that_is_too_long_keeps_the_row_of_an_answer_with_thoughts(run):
    write_retrieval(run, settings_of(), formatter_of())
    formatter = formatter_of()
    rows = [
        TableRow(f"q {i}", " ".join([word] * 30), str(i))
        for i, word in enumerate(("ginger", "tea"))
    ]
    turn = Turn("q 1", f"<think>hm</think>{rows[1].answer}", "own row")
    prompt = TrainingPrompt([], list(rows), [turn], "1")
    prompts = PromptWriter(
        load_context(run),
        settings_of(max_length=150),
        formatter.tokenizer,
        formatter.stop_token_ids,
    )
    example, _, shorter = prompts.fitting(prompt)
    assert shorter
    assert prompt.rows == [rows[1]]
    assert example is not None


def test_prompts_that_never_fit_are_refused(run):
    with pytest.raises(StageError, match="Raise max_length"):
        write_retrieval(run, settings_of(max_length=20), formatter_of())


def test_a_question_of_a_new_row_is_found_after_a_new_index(run):
    write_retrieval(run, settings_of(), formatter_of())
    question = [{"role": "user", "content": "What helps against hiccups?"}]
    assert load_context(run, "use").prompt(question).hits[0].score < 0.9
    rows = [*load_context(run, "use").index.rows, TableRow(question[0]["content"], "Water.", "h")]
    changes = renew_index(run, rows)
    assert changes == {"rows": len(ROWS) + 1, "came": 1, "went": 0}
    assert load_context(run, "use").prompt(question).hits[0].row.answer == "Water."
    assert len(load_context(run, "evaluation").index.rows) < len(ROWS)


def test_make_index_reads_a_table(run, capsys):
    write_retrieval(run, settings_of(), formatter_of())
    write(run / "new.csv", ["question", "answer"], [*ROWS[2:], ("Hiccups?", "Water.")])
    values = {"dataset": str(run / "new.csv"), "base_model": str(TINY), "max_length": 2000}
    renew_from_table(run, values)
    assert "1 questions came, 1 went" in capsys.readouterr().out
    assert TableRow("Hiccups?", "Water.", question_id(question_key(["Hiccups?"]))) in (
        load_context(run, "use").index.rows
    )


def test_make_index_keeps_the_rows_on_emergencies(tmp_path, capsys):
    path = tmp_path / "table.csv"
    write(path, ["question", "answer"], ROWS)
    values = {"safety_rows": True, "max_length": 2000, "base_model": str(TINY)}
    formatted(tmp_path, path, **values)
    write_retrieval(tmp_path, settings_of(**values), formatter_of())
    before = load_context(tmp_path, "use").index.rows
    assert len(before) > len(ROWS) + 50
    renew_from_table(tmp_path, {"dataset": str(path), **values})
    assert "0 questions came, 0 went" in capsys.readouterr().out
    assert set(load_context(tmp_path, "use").index.rows) == set(before)


def test_a_renewed_index_is_another_input_and_no_other_is(run):
    write_retrieval(run, settings_of(), formatter_of())
    before = index_fingerprints(run)
    renew_index(run, [TableRow("Hiccups?", "Water.", "c")])
    after = index_fingerprints(run)
    assert after["retrieval"] == before["retrieval"]
    assert after["retrieval_in_use"] != before["retrieval_in_use"]


def test_a_run_without_index_has_no_such_input(tmp_path):
    assert index_fingerprints(tmp_path) == {}


def test_a_run_without_index_says_how_to_get_one(tmp_path):
    with pytest.raises(StageError, match="context_rows: 3"):
        renew_index(tmp_path, [TableRow("a", "b", "c")])


# --- rewordings of the reader's


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rewordings_come_from_a_file(tmp_path, kind):
    path = tmp_path / f"words.{kind}"
    line = {"question": "What helps?", "rewording": "Any help?"}
    if kind == "csv":
        path.write_text("question,rewording\nWhat helps?,Any help?\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    expected = {question_id(question_key(["what helps"])): ["Any help?"]}
    assert read_rewordings(str(path), formatter_of()) == expected


def test_rewordings_come_from_a_column(tmp_path):
    from table_helpers import opened

    from tabletune.data.pipeline import TableFormatter
    from tabletune.data.shapes import recognize

    path = tmp_path / "table.csv"
    rows = [("What helps?", "Tea.", "Any help?\nHelp!"), ("And what not?", "Ice.", "")]
    write(path, ["question", "answer", "other"], rows)
    settings = settings_of(dataset=str(path))
    table = opened(path)
    formatter = TableFormatter(table, recognize(table, settings), settings, *tokenizer_of(TINY))
    found = read_rewordings("other", formatter)
    assert list(found.values()) == [["Any help?", "Help!"]]


def test_rewordings_that_are_nowhere_are_refused(tmp_path):
    table = SimpleNamespace(columns=["question"])
    with pytest.raises(StageError, match="neither a file nor a column"):
        read_rewordings("nowhere", formatter_of(table))


def test_a_file_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(StageError, match="columns question and rewording"):
        read_rewordings(str(path), formatter_of())


def test_rewordings_that_a_quote_has_swallowed_are_refused(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text('question,rewording\na,"b\nc,d\ne,f"\n', encoding="utf-8")
    with pytest.raises(StageError, match=r"rewordings=.*words\.csv, line 2: a double quote opens"):
        read_rewordings(str(path), formatter_of())


def test_a_file_of_rewordings_is_an_input(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text("question,rewording\na,b\n", encoding="utf-8")
    before = named_file_digests({"rewordings": str(path)})
    path.write_text("question,rewording\na,c\n", encoding="utf-8")
    assert named_file_digests({"rewordings": str(path)}) != before
    assert named_file_digests({"rewordings": ""}) == {}


def test_notebook_2_trains_on_the_prompts(run):
    from accelerate import PartialState

    from tabletune.training.examples import load_examples

    report = write_retrieval(run, settings_of(), formatter_of())
    splits, read = load_examples(run, "", PartialState(cpu=True))
    assert read["fingerprint"] == report["fingerprint"]
    assert len(splits["train"]) == report["context"]["prompts"]["train"]
    assert "Rows of the table" in splits["train"][0]["text"]
    assert "Rows of the table" not in splits["test"][0]["text"]


def test_a_run_without_context_trains_on_its_rows(run):
    from accelerate import PartialState

    from tabletune.training.examples import load_examples

    splits, report = load_examples(run, "", PartialState(cpu=True))
    assert len(splits["train"]) == report["splits"]["train"]
