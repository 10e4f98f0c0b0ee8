"""Notebook 01 on tables of every kind: it formats them right, or says in one line what is wrong. Never anything else.

Hypothesis makes up the tables, the same ones in every run. Nearly every test runs the whole notebook.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata

import datasets
import hypothesis.configuration
import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TABLE, TINY, run_tiny
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"
COLUMNS = {"q": "question", "a": "answer"}
TEMPLATES = {"columns": COLUMNS, "question_template": "{q}", "answer_template": "**A:** {a}", "answer_column": "a"}
GOOD = [(f"What helps against cold number {i}?", f"Rest for {i} days, and drink tea.") for i in range(4)]


def examples(number):
    """Settings of a test: so many tables, the same in every run, none of them kept on disk.

    A table that fails is shown as it is: to look for a smaller one takes minutes, as each is a run of the notebook.
    """
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=number,
        phases=[Phase.explicit, Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
    )


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_here(tmp_path_factory):
    """Hypothesis keeps tables of Unicode in a folder of its own, which should not lie in the project."""
    hypothesis.configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture(autouse=True)
def no_windows(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    """A base model's folder with a small tokenizer of SmolLM2's kind: bytes, ChatML, BOS in front of every turn."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TABLE.read_text(encoding="utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    folder = tmp_path_factory.mktemp("chatml")
    fast.save_pretrained(folder)
    LlamaConfig(vocab_size=len(fast)).save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "chatml"])
def base_model(request, chatml):
    return {"llama": TINY, "chatml": chatml}[request.param]


# ---------------------------------------------------------------------------------------------------------------------
# What is fed in

MARKERS = ["[INST]", "[/INST]", "</s>", "<s>", "<unk>", "<<SYS>>", "<</SYS>>"]
MARKERS += ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_start|>assistant\n"]
BROKEN_MARKERS = [
    "<",
    "s>",
    "</",
    "<<s>s>",
    "<\u200bs>",
    "<\x00/s>",
    "<|im_",
    "end|>",
    "[",
    "INST]",
    "<|<|im_end|>im_end|>",
]
ODD_TEXT = [
    "שלום עולם", "مرحبا بالعالم", "\u202eright to left\u202c", "می\u200cخواهم", "दिन में दो बार।",
    "👩‍👩‍👧‍👦", "👍🏽", "❤️", "🏴\U000e0067\U000e0062\U000e007f", "e\u0301", "e\u200b\u0301", "ﬁ", "1½", "①",
    "\x00", "\x07", "\x1a", "\x1b[31m", "\x7f", "\x80", "\x9f", "\ufeff", "\u200e", "\ufffd", "\ufffe", "\U0010ffff",
    "\n", "\r\n", "\r", "\t", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\u00a0", "\u3000", "\n\n\n\n",
    '"', '""', "'", ",", ";", "\\", '\\"', "\\n", "`", "*", "**A:**", "=1+1", "#", "|",
    "{q}", "{question}", "{{ }}", "{{ bos_token }}", "{% endfor %}", "{0}", "%s", "$1", r"\g<0>", r"\1",
    "None", "nan", "null", "N/A", "-", "007", "1e5", "tea", "Rest. Drink water!", "www", "http", "Awww...so cute",
]  # fmt: skip
URLS = ["https://example.org/pose.jpg", "http://example.org", "www.example.org/?q=1", "HTTPS://EXAMPLE.ORG"]
parts = st.one_of(
    st.sampled_from(MARKERS + BROKEN_MARKERS),
    st.sampled_from(ODD_TEXT),
    st.sampled_from(ODD_TEXT),
    st.sampled_from([f" {url} " for url in URLS]),
    st.text(max_size=8),
)
cells = st.lists(parts, max_size=7).map("".join)
rows_of_odd_cells = st.lists(st.tuples(cells, cells), min_size=2, max_size=6)


def write_csv(path, header, rows, bom="", line_end="\n", quote_all=False):
    """Write a table as RFC 4180 says. Python's own writer leaves line breaks without quotes that are not `line_end`."""

    def quoted(cell):
        return '"' + cell.replace('"', '""') + '"' if quote_all or re.search('[,"\r\n]', cell) else cell

    text = "".join(",".join(map(quoted, row)) + line_end for row in [header, *rows])
    path.write_bytes((bom + text).encode("utf-8"))


def write_jsonl(path, header, rows, bom="", line_end="\n", ascii_only=True):
    lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=ascii_only) for row in rows]
    path.write_bytes((bom + line_end.join(lines)).encode("utf-8"))


def write_parquet(path, header, rows):
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table({name: list(column) for name, column in zip(header, columns, strict=True)}), path)


line_ends = st.sampled_from(["\n", "\r\n", "\r"])
boms = st.sampled_from(["", "\ufeff"])
WRITERS = {
    "csv": (
        write_csv,
        st.fixed_dictionaries({"bom": boms, "line_end": line_ends, "quote_all": st.booleans()}),
    ),
    "jsonl": (write_jsonl, st.fixed_dictionaries({"bom": boms, "line_end": line_ends, "ascii_only": st.booleans()})),
    "parquet": (write_parquet, st.just({})),
}


# ---------------------------------------------------------------------------------------------------------------------
# What must come out


def run_notebook(tmp_path, table, base_model=TINY, **parameters):
    """Run the whole notebook on a table, silently. Returns its globals, or the StageError that ended it as a string.

    Any other error goes through and fails the test.
    """
    shutil.rmtree(tmp_path / "run", ignore_errors=True)  # that of the table before this one
    settings = {"dataset": str(table), "base_model": str(base_model), "max_length": 2000, **TEMPLATES}
    settings |= {"near_duplicate_threshold": 1.01, **parameters}  # so that only true duplicates are dropped
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return run_tiny("01_format_dataset", tmp_path / "run", **settings)
        except Exception as error:
            if type(error).__name__ != "StageError":
                raise
            message = str(error)
    assert len(message.splitlines()) == 1 and 20 < len(message) < 3000 and message.isprintable(), message
    assert not (tmp_path / "run").exists()
    return message


def visible(text):
    """A text without what cleaning may add or remove: white space, control and zero-width characters, web addresses."""
    text = re.sub(r"(?i)(https?://|www\.)example\.org\S*", "", text)
    text = re.sub("[\u200b\u2060\ufeff\u00ad]", "", text)
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs") and not c.isspace())
    return unicodedata.normalize("NFC", text)


def is_missing(text):
    return visible(text).casefold() in ("", "none", "nan", "null", "n/a", "na", "nil", "-", "--", "<na>")


def formatted(notebook):
    """The conversations that the notebook wrote, all splits together."""
    splits = datasets.load_from_disk(notebook.run / "dataset")
    return [example for split in splits.values() for example in split]


def check_ids(notebook, example):
    """One BOS, one EOS, no other special token than a plain conversation has, a mask on the answer and its EOS."""
    tokenizer = notebook.tokenizer
    question, answer = example["prompt"][0]["content"], example["completion"][0]["content"]
    encoded = notebook.encode(example, tokenizer)
    ids, mask = encoded["input_ids"], encoded["completion_mask"]
    llama = tokenizer.eos_token == "</s>"
    # the ids of a conversation without a single odd character
    plain = notebook.encode(notebook.to_conversation({"q": "x", "a": "x"}, "{q}", "{a}"), tokenizer)["input_ids"]
    special = set(tokenizer.get_added_vocab().values())
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert ids[0] == tokenizer.bos_token_id and (not llama or ids.count(tokenizer.bos_token_id) == 1)
    assert mask == sorted(mask) and len(mask) == len(ids)
    prompt, response = ids[: mask.index(1)], ids[mask.index(1) :]
    assert response.index(tokenizer.eos_token_id) == len(response) - 1
    # the tiny tokenizer, like Llama's, writes a space as ▁ and so cannot tell the two apart
    as_read = (lambda text: text.replace("▁", " ")) if llama else (lambda text: text)
    end_of_prompt = " [/INST]" if llama else "<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt).endswith(as_read(question) + end_of_prompt)
    body = tokenizer.decode(response[:-1])
    assert (body.strip(" ") if llama else body) == as_read(answer).strip(" ")


def check_table(notebook, rows):
    """All that must hold of a well-formed table with these rows of question and answer."""
    report, found = notebook.report, formatted(notebook)
    with_question = [row for row in rows if not is_missing(row[0])]
    complete = [(question, answer) for question, answer in with_question if not is_missing(answer)]
    assert report["rows_in"] == len(rows)
    assert report["dropped"].get("no question", 0) == len(rows) - len(with_question)
    assert report["dropped"].get("no answer", 0) == len(with_question) - len(complete)
    assert report["rows_out"] == len(found) == report["rows_in"] - sum(report["dropped"].values())
    texts = [(e["prompt"][0]["content"], e["completion"][0]["content"].removeprefix("**A:** ")) for e in found]
    assert {tuple(map(visible, row)) for row in texts} == {tuple(map(visible, row)) for row in complete}
    for question, answer in texts:
        for text in (question, answer):
            assert not is_missing(text) and "example.org" not in text.casefold()
            assert unicodedata.is_normalized("NFC", text)
            assert text == "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()
            assert "\n\n\n" not in text and all(c.isprintable() or c == "\n" or ord(c) > 0xA0 for c in text)
    for conversation in found:
        check_ids(notebook, conversation)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_well_formed_table_is_formatted_right(kind, base_model, tmp_path):
    write, options = WRITERS[kind]

    @examples(15)
    @given(rows_of_odd_cells, options)
    @example([("<s>", "</s>"), ("a\x00b", '"'), ("{q}", "{{ bos_token }}")], {})
    def check(rows, options):
        rows = GOOD + rows
        write(tmp_path / f"table.{kind}", COLUMNS.values(), rows, **options)
        notebook = run_notebook(tmp_path, tmp_path / f"table.{kind}", base_model)
        assert not isinstance(notebook, str), notebook
        check_table(notebook, rows)

    check()


def as_cell(value):
    """What a JSON value in a cell must arrive as."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=False) | st.sampled_from(ODD_TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2),
    max_leaves=4,
)


@examples(25)
@given(
    rows=st.lists(st.fixed_dictionaries({}, optional={"question": values, "answer": values, "x": values}), max_size=6)
)
@example(
    rows=[{"question": 1, "answer": 1.50}, {"question": None, "answer": "2020-01-01"}, {}, {"answer": [None, 1.5]}]
)
def test_mixed_types_arrive_as_they_were_written(tmp_path_factory, rows):
    tmp_path = tmp_path_factory.mktemp("mixed")
    rows = [dict(zip(COLUMNS.values(), row, strict=True)) for row in GOOD] + rows
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    notebook = run_notebook(tmp_path, tmp_path / "table.jsonl")
    check_table(notebook, [(as_cell(row.get("question")), as_cell(row.get("answer"))) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# Tables that are broken

HEADER = "question,answer\n"
PLAIN = HEADER + "".join(f"{q},{a!r}\n".replace(", and", " and") for q, a in GOOD)
LINES = [json.dumps(dict(zip(COLUMNS.values(), row, strict=True))) for row in GOOD]


def with_line(line):
    return "\n".join([*LINES, line])


BAD = {
    "empty.csv": ("", "has no rows"),
    "blank lines.csv": ("\n\r\n\n", "has no rows"),
    "byte order mark only.csv": (b"\xef\xbb\xbf", "has no rows"),
    "header only.csv": (HEADER, "has no rows"),
    "no header.csv": (PLAIN.removeprefix(HEADER), "no column 'question'.*It has"),
    "no header, long cells.csv": ("x" * 100_000 + "," + "y\u2028" * 50_000 + "\n1,2\n", "no column 'question'"),
    "header in capitals.csv": (PLAIN.replace("question", "QUESTION"), "Did you mean 'QUESTION'"),
    "header with a space.csv": (PLAIN.replace("question", " question "), "Did you mean ' question '"),
    "header with a hidden character.csv": (PLAIN.replace("que", "que\u200b"), r"Did you mean 'que\\u200bstion'"),
    "header twice.csv": ("question,answer,answer\na,b,c\n", "more than one column 'answer'"),
    "semicolons.csv": (PLAIN.replace(",", ";"), "first line, 'question;answer', is not column names with commas"),
    "semicolons, and commas in answers.csv": ("question;answer\na;b, c\n", "first line, 'question;answer', is not"),
    "tabs.csv": (PLAIN.replace(",", "\t"), r"first line, 'question\\tanswer', is not column names with commas"),
    "Excel's separator.csv": (b"\xef\xbb\xbfsep=,\r\n" + PLAIN.encode(), "first line, 'sep=,', is not.*remove a line"),
    "another separator of Excel's.csv": ("sep=;\nquestion;answer\na;b\n", "first line, 'sep=;', is not"),
    "the end of a file in DOS.csv": (PLAIN + "\x1a", "line 6.*1 cell"),
    "a comment first.csv": ("# made in 2020\n" + PLAIN, "line 2.*2 cells.*header 1"),
    "overlong.csv": (PLAIN.encode() + b"a,\xc0\x80\n", "not UTF-8"),
    "half a character.csv": (PLAIN.encode() + b"a,\xed\xa0\x80\n", "not UTF-8"),
    "a cell too many in the first row.csv": (HEADER + "a,b,c\nd,e\n", "line 2.*3 cells.*header 2"),
    "a cell too many in every row.csv": (HEADER + "a,b,c\nd,e,f\n", "line 2.*3 cells"),
    "a cell too many at the end.csv": (PLAIN + "a,b,c\n", "line 6.*3 cells"),
    "a cell too few.csv": (PLAIN + "a\n", "line 6.*1 cell"),
    "a line break without quotes.csv": (PLAIN + "Why?,first\nsecond\n", "line 7.*1 cell"),
    "a quote never closed.csv": (HEADER + 'a,"b\n' + "c,d\n" * 9, "line 2 has a double quote too many or too few"),
    "a quote closed by the next one.csv": (HEADER + 'a,"b\nc,d\ne,"f"\ng,h\n', "line 2 has a double quote"),
    "backslashes for quotes.csv": (HEADER + 'a,"say \\"b\\" twice, and rest"\n', "line 2 has a double quote"),
    "HTML.csv": ("<!doctype html>\n<html>\n<p>Not found, sorry</p>\n</html>\n", "line 3.*2 cells|no column"),
    "another answer only.csv": (PLAIN.replace("answer", "reply"), "no column 'answer'"),
    "all answers missing.csv": (HEADER + "a,None\nb,nan\nc,-\nd,https://example.org\n", "All 4 rows.*no answer"),
    "all questions missing.csv": (HEADER + ",a\n,b\n \t,c\n", "All 3 rows.*no question"),
    "one question.csv": (HEADER + "a,b\na,c\nA!,d\n", "Only 1 different questions"),
    "two questions.csv": (HEADER + "a,b\nb,c\n", "Only 2 different questions"),
    "UTF-16 with mark.csv": (PLAIN.encode("utf-16"), "not UTF-8"),
    "UTF-16 LE.csv": (PLAIN.encode("utf-16-le"), "not UTF-8.*UTF-16"),
    "UTF-16 BE.csv": (PLAIN.encode("utf-16-be"), "not UTF-8.*UTF-16"),
    "UTF-32.csv": (PLAIN.encode("utf-32"), "not UTF-8"),
    "Latin-1.csv": ((PLAIN + "café,é\n").encode("latin-1"), "not UTF-8.*byte"),
    "Latin-1 far down.csv": ((PLAIN + "a,b\n" * 100_000 + "é,b\n").encode("latin-1"), r"not UTF-8 \(byte 400\d{3}"),
    "Windows-1252.csv": ((PLAIN + "“quoted”,b\n").encode("cp1252"), "not UTF-8"),
    "Shift-JIS.csv": ((PLAIN + "日本語,b\n").encode("shift-jis"), "not UTF-8"),
    "gzip.csv": (b"\x1f\x8b\x08\x00" + bytes(range(256)), "not UTF-8"),
    "Excel.csv": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00" + bytes(range(256)), "not UTF-8"),
    "empty.jsonl": ("", "has no rows"),
    "empty objects.jsonl": ("{}\n{}\n", "has no rows"),
    "one array.jsonl": ("[" + ",".join(LINES) + "]", "line 1.*must be an object"),
    "a number.jsonl": (with_line("5"), "line 5.*must be an object"),
    "null.jsonl": (with_line("null"), "line 5.*must be an object"),
    "a list in a line.jsonl": (with_line('["a", "b"]'), "line 5.*must be an object"),
    "cut off.jsonl": (with_line('{"question": "a", "ans'), "line 5 is not JSON"),
    "two in a line.jsonl": (with_line(LINES[0] + LINES[1]), "line 5 is not JSON"),
    "single quotes.jsonl": ("{'question': 'a', 'answer': 'b'}", "line 1 is not JSON"),
    "indented.jsonl": (json.dumps({"question": "a", "answer": "b"}, indent=1), "line 1 is not JSON"),
    "a field twice.jsonl": (with_line('{"question": "a", "answer": "b", "answer": "c"}'), "line 5.*twice"),
    "nested too deep.jsonl": ('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON"),
    "a number too long.jsonl": ('{"question": ' + "9" * 10_000 + "}", "line 1 is not JSON"),
    "other fields.jsonl": ('{"Question": "a", "Answer": "b"}', "Did you mean 'Question'"),
    "CSV.jsonl": (PLAIN, "line 1 is not JSON"),
    "Latin-1.jsonl": ('{"question": "é"}'.encode("latin-1"), "not UTF-8"),
    "UTF-16.jsonl": (LINES[0].encode("utf-16"), "not UTF-8"),
    "empty.parquet": ("", "could not be read.*damaged"),
    "CSV.parquet": (PLAIN, "could not be read.*damaged"),
    "magic only.parquet": (b"PAR1" + b"\0" * 20 + b"PAR1", "could not be read.*damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_explained_in_one_line(name, tmp_path):
    content, explanation = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = run_notebook(tmp_path, tmp_path / name)
    assert isinstance(message, str), message.report
    assert re.search(explanation, message), message


BAD_PARQUET = {
    "no rows": pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}),
    "a column twice": pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["question", "question"]),
    "bytes that are no text": pa.table({"question": ["a"], "answer": [b"\xff\xfe"]}),
    "only nulls": pa.table({"question": ["a", "b"], "answer": pa.nulls(2)}),
}


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_a_bad_parquet_table_is_explained_in_one_line(name, tmp_path):
    pq.write_table(BAD_PARQUET[name], tmp_path / "table.parquet")
    assert isinstance(run_notebook(tmp_path, tmp_path / "table.parquet"), str)


def test_parquet_columns_of_other_types_arrive_whole(tmp_path):
    """Whole numbers beside a null stay whole numbers; a long list is not shortened with dots."""
    questions, answers = [*range(5), None], [list(range(1500)), [1, None], [], [1], None, [2]]
    pq.write_table(pa.table({"question": questions, "answer": answers}), tmp_path / "table.parquet")
    notebook = run_notebook(tmp_path, tmp_path / "table.parquet", max_length=100_000)
    check_table(notebook, [(as_cell(q), as_cell(a)) for q, a in zip(questions, answers, strict=True)])


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_files(kind, tmp_path):
    """Bytes cut off, changed or put in: the table is explained, or read with every row accounted for."""
    write, _ = WRITERS[kind]
    write(tmp_path / f"whole.{kind}", COLUMNS.values(), [*GOOD, ('He said "no", and', "é, 👍🏽\nsecond line")] * 2)
    sound = (tmp_path / f"whole.{kind}").read_bytes()

    @examples(20)
    @given(st.integers(0, len(sound)), st.integers(0, 40), st.one_of(st.just(b""), st.binary(max_size=4)))
    def check(start, length, inserted):
        (tmp_path / f"table.{kind}").write_bytes(sound[:start] + inserted + sound[start + length :])
        notebook = run_notebook(tmp_path, tmp_path / f"table.{kind}")
        if not isinstance(notebook, str):
            report = notebook.report
            assert report["rows_in"] - sum(report["dropped"].values()) == report["rows_out"] == len(formatted(notebook))
            for conversation in formatted(notebook):
                check_ids(notebook, conversation)

    check()


@examples(40)
@given(row=st.integers(0, 5), column=st.integers(0, 1), position=st.integers(0, 12))
def test_a_stray_quote_does_not_swallow_rows(tmp_path_factory, row, column, position):
    tmp_path = tmp_path_factory.mktemp("quote")
    rows = [*GOOD, ("\nWhy?", ",because"), ("Where?", "\nthere")]
    lines = [[cell if set(cell).isdisjoint(',"\n') else f'"{cell}"' for cell in cells] for cells in rows]
    lines[row][column] = lines[row][column][:position] + '"' + lines[row][column][position:]
    (tmp_path / "table.csv").write_text(HEADER + "".join(",".join(cells) + "\n" for cells in lines))
    notebook = run_notebook(tmp_path, tmp_path / "table.csv")
    if isinstance(notebook, str):
        assert "double quote" in notebook or "cells" in notebook
    else:
        assert notebook.report["rows_in"] == len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Cells of extraordinary length, and answers that are split

LONG = {
    "words": "tea " * 25_000,
    "no spaces": "x" * 100_000,
    "emoji": "👩‍👩‍👧‍👦" * 9_000,
    "markers": "</s>" * 25_000,
    "sentences": "Drink a cup of tea with honey and lemon before bed.\n\n" * 2_000,
    "sentence ends": "? " * 5_000,
    "invisible": "\u200b" * 100_000 + "tea",
    "right to left": ("שלום עולם " * 8 + ". ") * 1_200,
}


@pytest.mark.parametrize("name", LONG)
def test_a_cell_of_100_000_characters(name, base_model, tmp_path):
    rows = [*GOOD, ("Long?", LONG[name])]
    write_csv(tmp_path / "table.csv", COLUMNS.values(), rows)
    notebook = run_notebook(tmp_path, tmp_path / "table.csv", base_model, max_length=256)
    report, found = notebook.report, formatted(notebook)
    made = report["split_long_answers"]
    assert report["rows_in"] == len(rows)
    assert report["rows_out"] == len(found) == len(rows) - sum(report["dropped"].values()) - made["rows"] + made["into"]
    for conversation in found:
        check_ids(notebook, conversation)
        assert len(notebook.encode(conversation, notebook.tokenizer)["input_ids"]) <= 256
        if not made["sentences_left_out"]:
            answer = conversation["completion"][0]["content"].removeprefix("**A:** ")
            assert any(answer in row["a"] for row in notebook.clean), "a part is not a piece of the answer, as it stood"


def test_a_long_cell_is_not_shown_in_full(tmp_path, capsys):
    """It would make the notebook so long that nobody scrolls past it."""
    write_csv(tmp_path / "table.csv", COLUMNS.values(), [("Long?", LONG["words"]), *GOOD])
    run_tiny("01_format_dataset", tmp_path / "run", dataset=str(tmp_path / "table.csv"), **TEMPLATES)
    assert len(capsys.readouterr().out) < 15_000


@examples(100)
@given(
    st.lists(st.sampled_from(["One.", "Two words!", "Is it?", "a longer one.", " ", "\n", "\n\n", "  "]), min_size=1)
)
def test_the_parts_of_an_answer_make_up_the_answer(format_dataset, pieces):
    answer = format_dataset.clean_cell("".join(pieces))
    parts, left_out = format_dataset.split_answer({"a": answer}, "a", 8, lambda row: len(row["a"].split()))
    parts, place = [part["a"] for part in parts], 0
    for part in parts:
        place = answer.index(part, place) + len(part)
    kept = "".join("".join(part.split()) for part in parts)
    assert left_out or kept == "".join(answer.split())


# ---------------------------------------------------------------------------------------------------------------------
# Single functions, on more text than a notebook can be run for


@examples(300)
@given(cells | st.text(st.characters()))
@example("e\u200b\u0301")
@example("no\x00ne")
@example("\ud800 tea")
def test_cleaning(format_dataset, text):
    cleaned = format_dataset.clean_cell(text)
    assert format_dataset.clean_cell(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not [c for c in cleaned if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]
    if not re.search(r"(?i)https?:|www\.", text):
        assert visible(cleaned) == ("" if is_missing(text) else visible(text))


@pytest.fixture(scope="session")
def tokenizers(format_dataset, chatml):
    """The tiny tokenizer, the ChatML one, and SmolLM2's own where it has been made."""
    folders = [TINY, chatml, *([SMOLLM2] if SMOLLM2.exists() else [])]
    return [format_dataset.load_tokenizer(str(folder), None) for folder in folders]


@examples(200)
@given(st.lists(st.sampled_from(MARKERS + BROKEN_MARKERS + ["", " ", "\n", "tea", "👍🏽"]), max_size=8).map("".join))
def test_no_text_becomes_a_special_token(format_dataset, tokenizers, text):
    for tokenizer in tokenizers:
        vocabulary = tokenizer.get_added_vocab()
        markers = sorted({*vocabulary, "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}, key=len, reverse=True)
        broken = format_dataset.break_markers(format_dataset.clean_cell(text), markers)
        assert not [marker for marker in markers if marker in broken]
        ids = tokenizer(broken, add_special_tokens=False)["input_ids"]
        assert not set(ids) & set(vocabulary.values())


def test_a_marker_that_two_cells_make_together_is_found(base_model, tmp_path):
    """The template joins "<" and "/s>": an EOS in the middle of the answer, which would have ended it there."""
    end = {TINY: "</s>"}.get(base_model, "<|im_end|>")
    rows = [(question, end[0], end[1:] + " more") for question, _ in GOOD]
    write_csv(tmp_path / "table.csv", ["question", "left", "right"], rows)
    columns = {"q": "question", "left": "left", "right": "right"}
    settings = {"columns": columns, "answer_template": "{left}{right}", "answer_column": "right"}
    message = run_notebook(tmp_path, tmp_path / "table.csv", base_model, **settings)
    assert isinstance(message, str) and "no other special token" in message


def test_an_answer_may_say_that_there_is_none(tmp_path):
    """Only a value that says nothing is a missing one; an answer with "Side effects: none" is an answer."""
    rows = [(question, f"{answer}\nSide effects: None\nNone\nwww") for question, answer in GOOD]
    write_csv(tmp_path / "table.csv", COLUMNS.values(), rows)
    check_table(run_notebook(tmp_path, tmp_path / "table.csv"), rows)
    notebook = run_notebook(tmp_path, tmp_path / "table.csv", answer_template="{a}")
    assert all("Side effects: None\nNone\nwww" in row["completion"][0]["content"] for row in formatted(notebook))


LONG_QUESTION = "May I take ginger tea in the morning if I am also on blood thinners?"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("How often?", "दिन में दो बार"), ("How often?", "दान मूं दा बूर")),  # other vowels, the same consonants
        (("Is it good?", "👍"), ("Is it good?", "👎")),
        (("😀", "Smile."), ("🎉", "Smile.")),
        (("?", "Ask a doctor."), ("!", "Ask a doctor.")),
        ((LONG_QUESTION, "Yes."), (LONG_QUESTION, "No.")),
        (("What is 6 * 1?", "Six."), ("What is 6 / 1?", "Six.")),  # only their marks differ, but these mean something
        (("How much?", "Take 50% of it."), ("How much?", "Take 50 of it.")),
        (("How cold?", "It is -5."), ("How cold?", "It is 5.")),
        (("Which?", "C# is fine."), ("Which?", "C is fine.")),
        (("How?", "می‌خواهم"), ("How?", "می_خواهم")),
    ],
)
def test_what_differs_is_no_near_duplicate(one, other, tmp_path):
    write_csv(tmp_path / "table.csv", COLUMNS.values(), [*GOOD, one, other])
    report = run_notebook(tmp_path, tmp_path / "table.csv", near_duplicate_threshold=0.9).report
    assert report["rows_out"] == len(GOOD) + 2


def reasons_by_comparing_all(format_dataset, rows, threshold):
    """`reason_to_drop` as it is defined: each row is compared with every one before it that was kept."""
    kept, reasons = [], []
    for row in rows:
        question, bag = format_dataset.words(row["q"]), set(format_dataset.words(row["a"]))
        twins = [(other, words) for other, asked, words in kept if asked == question]
        if row in [other for other, _ in twins]:
            reasons.append("duplicate")
        elif any(len(bag & words) >= threshold * len(bag | words) for _, words in twins):
            reasons.append("near duplicate")
        else:
            reasons.append("")
            kept.append((row, question, bag))
    return reasons


few_words = st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=12).map(" ".join)


@examples(300)
@given(
    st.lists(st.tuples(st.sampled_from(["one", "two"]), few_words), max_size=30),
    st.sampled_from([0.3, 0.5, 0.6, 0.75, 0.8, 0.9, 1, 1.01]),
)
def test_near_duplicates_are_all_found(format_dataset, rows, threshold):
    """Though only rows with a rare word in common are compared."""
    rows = [{"q": question, "a": answer} for question, answer in rows]
    reasons = format_dataset.reason_to_drop(rows, ["q"], "a", threshold)
    assert list(reasons) == reasons_by_comparing_all(format_dataset, rows, threshold)


@pytest.mark.parametrize("name", ["table.CSV", "table.JsonL", "table.Parquet"])
def test_the_case_of_a_files_ending_does_not_matter(name, tmp_path):
    WRITERS[name.split(".")[1].lower()][0](tmp_path / name, COLUMNS.values(), GOOD)
    check_table(run_notebook(tmp_path, tmp_path / name), GOOD)


def test_an_answer_that_is_only_a_link_is_no_answer(tmp_path):
    links = [
        "(https://example.org)",
        "<www.example.org>",
        '["https://example.org/a.jpg"]',
        "![](https://example.org/a)",
    ]
    write_csv(
        tmp_path / "table.csv", COLUMNS.values(), [*GOOD, *((f"Link {i}?", link) for i, link in enumerate(links))]
    )
    report = run_notebook(tmp_path, tmp_path / "table.csv").report
    assert report["dropped"] == {"no answer": len(links)}


def test_a_column_that_is_not_used_may_hold_anything(tmp_path):
    questions, answers = zip(*GOOD, strict=True)
    columns = {"question": questions, "answer": answers, "image": [b"\xff\xfe"] * len(GOOD)}
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    check_table(run_notebook(tmp_path, tmp_path / "table.parquet"), GOOD)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("请看https://example.org/a?b=1。多喝水", "请看。多喝水"),
        ("看www.example.org，休息", "看，休息"),
        ("お茶（https://example.org/お茶）", "お茶（お茶）"),
        ("Siehe https://example.org/käse für mehr", "Siehe für mehr"),
        ("Awww.so cute", "Awww.so cute"),
        ("See [the picture](https://example.org/a_(b).jpg) and <www.example.org> too", "See the picture and too"),
        ("Rest (see https://example.org/a).", "Rest (see )."),
        ('f() [x](y) <> [] ""', 'f() [x](y) <> [] ""'),
    ],
)
def test_a_web_address_ends_where_the_text_goes_on(format_dataset, raw, cleaned):
    assert format_dataset.clean_cell(raw) == cleaned


@pytest.mark.parametrize("piece", ["(", "[a](", "(https:", "[x](https:a", "www.", '["(', "(a)", "<http:(("])
def test_many_brackets_are_cleaned_quickly(format_dataset, piece):
    begun = time.process_time()
    format_dataset.clean_cell("https:" + piece * (100_000 // len(piece)))
    assert time.process_time() - begun < 1


def test_many_small_sentences_are_split_quickly(format_dataset):
    asked = []

    def length(row):
        asked.append(len(row["a"]))
        return len(row["a"].split())

    parts, too_long = format_dataset.split_answer({"a": "Is it? " * 9000}, "a", 200, length)
    assert [len(part["a"].split()) for part in parts] == [200] * 90 and not too_long
    assert len(asked) < 20 * len(parts) and max(asked) < 200 * 8


def write_many(path, number):
    """A table of so many rows, in the columns of the bundled one: a third as many questions, 30 of 2,000 words each."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abdegiklmnoprstu", k=draw.randint(2, 8))) for _ in range(2000)]
    with path.open("w") as file:
        for _ in range(number):
            row = {
                "Health Issue": f"{draw.choice(words)} {draw.randrange(number // 3)}",
                "Name of Item": draw.choice(words),
            }
            row |= {"Home Remedy": " ".join(draw.choices(words, k=30)), "Yogasan": draw.choice(words)}
            file.write(json.dumps(row) + "\n")


def test_ten_times_the_rows_take_ten_times_as_long_and_no_more_memory(tmp_path):
    """In a process of its own, as memory once taken stays with a process."""
    for number in (500, 2_000, 20_000):
        write_many(tmp_path / f"{number}.jsonl", number)
    program = f"""if True:
        import resource, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from conftest import run_tiny
        folder = Path({str(tmp_path)!r})
        for number in (500, 2_000, 20_000):
            begun = time.process_time()
            run_tiny("01_format_dataset", folder / "run", dataset=str(folder / f"{{number}}.jsonl"))
            print("measured", time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured")]
    _, (seconds, mib), (seconds_of_more, mib_of_more) = [map(float, line) for line in lines]
    print(seconds, seconds_of_more, mib, mib_of_more)
    assert seconds_of_more < 14 * seconds
    assert mib_of_more - mib < 60
