"""data.out_of_scope."""

import pytest

from tabletune.data.lookup import OUT_OF_SCOPE, PlainIndex
from tabletune.data.out_of_scope import read_out_of_scope
from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.data.retrieval_folder import named_file_digests
from tabletune.data.safety_rows import emergency_lines
from tabletune.errors import StageError

ROWS = [
    TableRow("What helps against a cough?", "Tea.", "1"),
    TableRow("What helps against puffy eyes?", "Cold spoons.", "2"),
]
BLEACH = "There is drain cleaner in my eyes, what helps?"


def test_no_source_is_no_question():
    assert read_out_of_scope("", "") == []


def test_emergencies_are_there_in_free_words_and_in_those_of_the_template():
    questions = read_out_of_scope("emergencies", "I have {issue}. Help!")
    emergencies = [line for line in emergency_lines() if line[0]]
    assert len(questions) == 2 * len(emergencies)
    assert f"I have {emergencies[0][0]}. Help!" in questions
    assert emergencies[0][1] in questions


@pytest.mark.parametrize("template", ["", "{issue}", "{issue} and {age} years"])
def test_without_words_of_a_template_there_are_free_words_alone(template):
    emergencies = [line for line in emergency_lines() if line[0]]
    assert read_out_of_scope("emergencies", template) == [line[1] for line in emergencies]


def test_everyday_complaints_are_no_emergencies():
    everyday = {line[1] for line in emergency_lines() if not line[0]}
    assert everyday
    assert everyday.isdisjoint(read_out_of_scope("emergencies", ""))


def test_a_text_file_has_a_question_a_line(tmp_path):
    path = tmp_path / "not for us.txt"
    path.write_bytes(
        "\ufeffDo you sell skates?\r\n\r\nDO YOU SELL SKATES?\r\nWho are you?".encode()
    )
    assert len(read_out_of_scope(str(path), "")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "has no question"), (b"caf\xe9?", "no text in UTF-8")],
)
def test_a_file_without_questions_is_refused(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(StageError, match=message):
        read_out_of_scope(str(path), "")


def test_a_misspelt_name_is_refused():
    with pytest.raises(StageError, match="neither 'emergencies' nor a text file"):
        read_out_of_scope("emergency", "")


def test_what_resembles_a_question_out_of_scope_more_than_any_row_scores_low():
    before = RowIndex.build(ROWS).search("bleach in my eyes, what helps?", 2)
    after = RowIndex.build(ROWS, out_of_scope=[BLEACH]).search("bleach in my eyes, what helps?", 2)
    assert before[0].score > 0.3
    assert after[0].score < OUT_OF_SCOPE
    assert after[0].row == before[0].row


def test_a_question_out_of_scope_is_never_found():
    index = RowIndex.build(ROWS, out_of_scope=[BLEACH])
    assert [hit.row for hit in index.search(BLEACH, 9)] == [ROWS[1], ROWS[0]]


def test_a_row_keeps_its_score_where_its_question_is_out_of_scope_too():
    index = RowIndex.build(ROWS, out_of_scope=[ROWS[0].question])
    assert index.search(ROWS[0].question, 1)[0].score == pytest.approx(1)


def test_a_saved_index_keeps_its_questions_out_of_scope(tmp_path):
    RowIndex.build(ROWS, out_of_scope=[BLEACH]).save(tmp_path)
    loaded = RowIndex.load(tmp_path)
    assert loaded.out_of_scope == [BLEACH]
    assert loaded.search(BLEACH, 1)[0].score < OUT_OF_SCOPE


def test_the_plain_index_gives_the_same_scores():
    questions = [line[1] for line in emergency_lines()]
    fast = RowIndex.build(ROWS, out_of_scope=questions[:50])
    rows = [{"question": row.question, "answer": row.answer} for row in ROWS]
    plain = PlainIndex(rows, fast.analyzer, sorted(fast.function_words), questions[:50])
    for question in [*questions, "what helps for coughs", "my eyes are puffy", "quite another"]:
        expected = [(hit.row.question, hit.score) for hit in fast.search(question, 2)]
        scores = [(row["question"], score) for row, score in plain.search(question, 2)]
        assert [text for text, _ in scores] == [text for text, _ in expected]
        assert [score for _, score in scores] == pytest.approx([score for _, score in expected])


def test_the_digests_are_those_of_files_alone(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("Who are you?", encoding="utf-8")
    digests = named_file_digests({"rewordings": "a column", "out_of_scope": str(path)})
    assert list(digests) == ["out_of_scope"]
    path.write_text("Who is there?", encoding="utf-8")
    assert named_file_digests({"rewordings": "", "out_of_scope": str(path)}) != digests
