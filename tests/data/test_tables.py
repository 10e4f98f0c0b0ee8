"""Tables of every kind: read as they were written, or explained in one line. Never anything else.

Hypothesis makes up tables, the same ones in every run. Most tests go through all steps but the notebook's prose.
"""

import contextlib
import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import unicodedata
from functools import lru_cache

import datasets
import hypothesis.configuration
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, TINY
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from tabletune.chat.markers import break_markers
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.data.pipeline import format_table
from tabletune.data.shapes import recognize, with_example
from tabletune.data.table_file import ReadOptions
from tabletune.data.tables import open_table
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS

GOOD = [
    (f"What helps against cold number {i}?", f"Rest for {i} days, and drink tea.") for i in range(4)
]
NAMES = ["question", "answer"]


def examples(number):
    """Settings of a test: so many tables, the same in every run, none of them kept on disk."""
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


@lru_cache
def tokenizer_of(base_model):
    return load_tokenizer(str(base_model))


def opened(dataset, **parameters):
    """The table at `dataset`, as notebook 1 opens it with these parameters."""
    known = {**PARAMETERS["01_format_dataset"], **parameters}
    source = [known[name] for name in ("dataset_revision", "dataset_config", "splits")]
    names = ("encoding", "delimiter", "quotes", "header", "header_row")
    options = ReadOptions(*(known[name] for name in names))
    return open_table(str(dataset), *source, options)


def formatted(folder, dataset, base_model=TINY, **parameters):
    """What notebook 1 makes of a table: the report, and the conversations [(prompt, answer), ...] of each split.

    Anything but a StageError of one line fails the test.
    """
    shutil.rmtree(folder / "dataset", ignore_errors=True)
    known = {
        **PARAMETERS["01_format_dataset"],
        "dataset": str(dataset),
        "base_model": str(base_model),
    }
    known |= {"max_length": 2000, **parameters}
    try:
        table = opened(dataset, **parameters)
        chosen, name = with_example(table, known)
        shape = recognize(table, chosen, name)
        with contextlib.redirect_stdout(io.StringIO()):
            report = format_table(
                table, shape, chosen, *tokenizer_of(base_model), folder / "dataset", 512
            )
    except StageError as error:
        message = str(error)
        assert (
            len(message.splitlines()) == 1 and 20 < len(message) < 3000 and message.isprintable()
        ), message
        assert not (folder / "dataset").exists()
        raise
    splits = datasets.load_from_disk(folder / "dataset")
    return report, {
        name: [(row["prompt"], row["completion"][0]["content"]) for row in split]
        for name, split in splits.items()
    }


def pairs(splits):
    """The questions and answers of all splits, sorted."""
    return sorted(
        (prompt[-1]["content"], answer) for split in splits.values() for prompt, answer in split
    )


# ---------------------------------------------------------------------------------------------------------------------
# One table in every container


def as_csv(header, rows, mark=",", line_end="\n"):
    """A table as RFC 4180 says. Python's own writer leaves line breaks without quotes that are not `line_end`."""

    def quoted(cell):
        return (
            '"' + cell.replace('"', '""') + '"'
            if re.search(f'[{mark}"\r\n]|^sep=|^$', cell)
            else cell
        )

    return "".join(mark.join(map(quoted, row)) + line_end for row in [header, *rows])


def write(path, header, rows, encoding="utf-8", **how):
    """Write a table as the file's name says; a name that ends with .gz is compressed."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    records = [dict(zip(header, row, strict=True)) for row in rows]
    if kind == "xlsx":
        book = openpyxl.Workbook()
        for number, row in enumerate([header, *rows], start=1):
            for column, text in enumerate(row, start=1):
                cell = book.active.cell(number, column, "x")
                cell._value = (
                    text  # also where it begins with =, and openpyxl takes it for a formula
                )
        book.save(buffer := io.BytesIO())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), buffer := io.BytesIO())
    else:
        text = {
            "csv": lambda: as_csv(header, rows, **how),
            "tsv": lambda: as_csv(header, rows, "\t", **how),
            "json": lambda: json.dumps(records, indent=1, **how),
            "jsonl": lambda: "\n".join(json.dumps(record, **how) for record in records),
        }[kind]()
        buffer = io.BytesIO(text.encode(encoding))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        gzip.compress(buffer.getvalue()) if path.suffix == ".gz" else buffer.getvalue()
    )
    return path


ODD_TEXT = [
    "שלום עולם", "مرحبا بالعالم", "\u202eright to left\u202c", "می\u200cخواهم", "दिन में दो बार।", "👩‍👩‍👧‍👦", "👍🏽",
    "e\u0301", "ﬁ", "1½", "①", "\ufeff", "\u200b", "\ufffd", "\n", "\r\n", "\t", "\u0085", "\u2028", "\u00a0", "\u3000",
    "\n\n\n\n", "    ", '"', '""', "'", ",", ";", "|", "\\", '\\"', "\\n", "`", "*", "=1+1", "#", "{q}", "{question}",
    "{{ }}", "{{ bos_token }}",
    "{% endfor %}", "{0}", "%s", r"\1", "None", "nan", "NA", "null", "-", "007", "1.50", "1e5", "true", "<p>", "&amp;",
    "https://example.org/a?b=1", "www.example.org", "[INST]", "[/INST]", "</s>", "<s>", "<<SYS>>", "<|im_end|>",
    "<", "s>",
]  # fmt: skip
parts = st.one_of(
    st.sampled_from(ODD_TEXT),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=8),
)
cells = st.lists(parts, max_size=7).map("".join)


def kept(text):
    """What must be left of a text with no rule on but the usual ones, and with its special tokens broken up."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    return break_markers(text, tokenizer_of(TINY)[0])


CONTAINERS = [
    "t.csv",
    "t.tsv",
    "t.json",
    "t.jsonl",
    "t.parquet",
    "t.xlsx",
    "t.csv.gz",
    "t.json.gz",
    "t.parquet.gz",
    "t.xlsx.gz",
]


@examples(6)
@given(st.lists(st.tuples(cells, cells), max_size=5))
@example([("<s>", "</s>"), ("{q}", "{{ bos_token }}"), ("a" * 30_000 + ".", "007")])
def test_a_table_is_the_same_in_every_container(tmp_path_factory, rows):
    """And its answers are those of the table, up to the rules that are always on."""
    tmp_path, rows = tmp_path_factory.mktemp("containers"), GOOD + rows
    usual = {"max_length": 100_000, "max_dropped": 1, "near_duplicate_threshold": 1.01}
    sources = [write(tmp_path / name, NAMES, rows) for name in CONTAINERS]
    for i, row in enumerate(rows):
        write(tmp_path / "folder" / f"{i}.csv", NAMES, [row])
    fingerprints = {}
    for source in [*sources, tmp_path / "folder", tmp_path / "folder" / "*.csv"]:
        report, splits = formatted(tmp_path, source, **usual)
        fingerprints[source.name] = report["fingerprint"]
    assert len(set(fingerprints.values())) == 1, fingerprints
    expected = {(kept(q), kept(a)) for q, a in rows if kept(q) and kept(a)}
    assert pairs(splits) == sorted(expected)
    rows_with_text = sum(any(cell.strip() for cell in row) for row in rows)
    assert report["rows_in"] == rows_with_text
    assert report["rows_out"] + sum(report["dropped"].values()) == rows_with_text


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_encodings_that_prove_themselves(tmp_path, encoding, line_end):
    rows = [("Où est-ce ?", 'Là-bas, "€" 你好\nsecond line'), ("a", "b")]
    write(tmp_path / "t.csv", NAMES, rows, encoding, line_end=line_end)
    table = opened(tmp_path / "t.csv")
    assert [tuple(cells) for _, cells in table.rows(NAMES)] == rows


@pytest.mark.parametrize(
    ("encoding", "said"), [("cp1252", "Windows-1252"), ("latin-1", "Windows-1252")]
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_encodings_that_are_guessed_and_said(tmp_path, encoding, said, kind):
    rows = [("Wie spät öffnet die Bücherei?", "Um neun Uhr, täglich."), ("¿Dónde?", "Allí, señor.")]
    how = {"ensure_ascii": False} if kind.startswith("json") else {}
    table = opened(write(tmp_path / f"t.{kind}", NAMES, rows, encoding, **how))
    assert [tuple(cells) for _, cells in table.rows(NAMES)] == rows
    assert said in table.descriptions[0] and "set `encoding`" in table.descriptions[0]


@pytest.mark.parametrize(
    "rows", [[("plain", "café")], [("ü", "ö")] * 3 + [("Where is the harbour?", "Left of it.")]]
)
def test_few_letters_are_enough_to_guess(tmp_path, rows):
    (tmp_path / "t.csv").write_bytes(as_csv(NAMES, rows).rstrip("\n").encode("cp1252"))
    assert [tuple(cells) for _, cells in opened(tmp_path / "t.csv").rows(NAMES)] == rows


def test_quotes_of_windows_far_down(tmp_path):
    rows = [("a" * 200, "b")] * 10_000 + [("“Café”", "5 €")]
    assert list(opened(write(tmp_path / "t.csv", NAMES, rows, "cp1252")).rows(NAMES))[-1][1] == [
        "“Café”",
        "5 €",
    ]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "Где находится вокзал?"),
        ("shift_jis", "駅はどこですか"),
        ("gb18030", "你叫什么名字？"),
    ],
)
def test_other_encodings_are_refused_until_they_are_set(tmp_path, encoding, text):
    """Read as Windows-1252 they would be a table of nonsense."""
    write(tmp_path / "t.csv", NAMES, [(text, text)] * 3, encoding)
    with pytest.raises(
        StageError, match=r"not UTF-8, and does not look like Windows-1252.*set `encoding`: cp1251"
    ):
        opened(tmp_path / "t.csv")
    assert next(opened(tmp_path / "t.csv", encoding=encoding).rows(NAMES)) == ("", [text, text])


def test_a_setting_of_the_encoding(tmp_path):
    write(tmp_path / "t.csv", NAMES, GOOD, "utf-8-sig")
    assert opened(tmp_path / "t.csv", encoding="utf-8").columns == NAMES
    with pytest.raises(StageError, match=r"unknown encoding: utf-9.*`encoding`"):
        opened(tmp_path / "t.csv", encoding="utf-9")
    write(tmp_path / "t.csv", NAMES, [("ü", "ö")], "cp1252")
    with pytest.raises(StageError, match=r"could not be read.*utf-8.*`encoding`"):
        opened(tmp_path / "t.csv", encoding="utf-8")


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
def test_the_separator_is_found_and_said(tmp_path, mark, suffix):
    rows = [
        ("Is it a; b | c, or d?", "It is, I think; or not."),
        ("One, two", "a\nb"),
        ("x", "1,5"),
    ]
    text = as_csv(NAMES, rows, mark).encode()
    (tmp_path / f"t{suffix}").write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    table = opened(tmp_path / f"t{suffix}")
    assert [tuple(cells) for _, cells in table.rows(NAMES)] == rows
    assert ("tabs" if mark == "\t" else repr(mark)) in table.descriptions[0]


def test_commas_in_prose_are_no_separators(tmp_path):
    (tmp_path / "t.csv").write_text(
        "question, short;answer, long\nWhy, then?;Because, so.\nHow, now?;Thus, hence.\n"
    )
    assert opened(tmp_path / "t.csv").columns == ["question, short", "answer, long"]


def test_a_separator_that_is_set(tmp_path):
    (tmp_path / "t.csv").write_text("a;b,c;d\n1;2,3;4\n")
    assert opened(tmp_path / "t.csv", delimiter=",").columns == ["a;b", "c;d"]
    (tmp_path / "t.csv").write_text("a b~c\n1~2\n")
    assert opened(tmp_path / "t.csv", delimiter="~").columns == ["a b", "c"]
    for tab in ("tab", "\\t", "\t"):
        write(tmp_path / "t.tsv", NAMES, GOOD)
        assert opened(tmp_path / "t.tsv", delimiter=tab).columns == NAMES
    with pytest.raises(StageError, match="delimiter='::'"):
        opened(tmp_path / "t.csv", delimiter="::")


def test_excels_line_about_its_separator(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfsep=;\r\nquestion;answer\r\na;b, c\r\n")
    table = opened(tmp_path / "t.csv")
    assert table.columns == NAMES and list(table.rows(NAMES)) == [("", ["a", "b, c"])]


def test_a_table_without_a_line_of_names(tmp_path):
    (tmp_path / "t.csv").write_text(
        "".join(f"{'pos' if i % 2 else 'neg'},Remark {i} was so.\n" for i in range(12))
    )
    for settings_ in (
        {},
        {"columns": {"t": "text"}, "question_template": "{t}", "answer_template": "{t}"},
    ):
        with pytest.raises(StageError, match="set header: false"):
            formatted(tmp_path, tmp_path / "t.csv", **settings_)
    columns = {"question": 2, "answer": 1}
    report, splits = formatted(tmp_path, tmp_path / "t.csv", header=False, columns=columns)
    assert report["rows_in"] == 12 and ("Remark 0 was so.", "neg") in pairs(splits)
    by_templates = {
        "columns": {"remark": 2},
        "question_template": "Is this good? {remark}",
        "answer_template": "{1}",
    }
    assert ("Is this good? Remark 0 was so.", "neg") in pairs(
        formatted(tmp_path, tmp_path / "t.csv", header=False, **by_templates)[1]
    )


@pytest.mark.parametrize("text", [
    json.dumps([{"q": 1, "a": "x"}, {"q": 2, "a": "y"}]),
    json.dumps([{"q": 1, "a": "x"}, {"q": 2, "a": "y"}], indent=4),
    '{"q": 1, "a": "x"}\n{"q": 2, "a": "y"}\n',
    '\n\n{"q": 1,\n "a": "x"}\r\n\r\n{"q": 2, "a": "y"}',
    '[\n{"q": 1, "a": "x"},\n{"q": 2, "a": "y"}\n]\n',
])  # fmt: skip
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_json_however_it_is_broken_into_lines(tmp_path, text, kind):
    (tmp_path / f"t.{kind}").write_text(text)
    assert list(opened(tmp_path / f"t.{kind}").rows(["q", "a"])) == [
        ("", ["1", "x"]),
        ("", ["2", "y"]),
    ]


def test_json_larger_than_a_block(tmp_path):
    rows = [(f"Question {i}?", "x" * (i * 1000)) for i in range(100)] + [("Long?", "y" * 5_000_000)]
    assert [
        tuple(cells) for _, cells in opened(write(tmp_path / "t.json", NAMES, rows)).rows(NAMES)
    ] == rows


def as_cell(value):
    """What a JSON value in a cell must arrive as."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_infinity=False)
    | st.sampled_from(ODD_TEXT),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2)
    ),
    max_leaves=4,
)


@examples(50)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"q": values, "a": values, "x": values}),
        min_size=1,
        max_size=6,
    )
)
@example([{"q": 1, "a": 1.50}, {"q": None, "a": "2020-01-01"}, {}, {"a": [None, 1.5]}, {"x": True}])
def test_values_of_mixed_types_arrive_as_they_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("mixed") / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"q": "x", "a": "y"}, *rows])))
    expected = [[as_cell(row.get(name)) for name in ("q", "a")] for row in rows]
    assert [cells for _, cells in opened(path).rows(["q", "a"])][1:] == expected


def test_numbers_keep_their_zeros(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"q": 1.50, "a": "007", "n": {"x": 1.50}}\n')
    assert list(opened(tmp_path / "t.jsonl").rows(["q", "a", "n"])) == [
        ("", ["1.50", "007", '{"x": 1.50}'])
    ]
    (tmp_path / "t.csv").write_text("q,a\n1.50,007\nNA,None\n")
    assert [cells for _, cells in opened(tmp_path / "t.csv").rows(["q", "a"])] == [
        ["1.50", "007"],
        ["NA", "None"],
    ]


def test_columns_of_other_types_in_parquet(tmp_path):
    """Whole numbers beside a null stay whole numbers; a column that is not used may hold anything."""
    table = {"q": [1, None, 3], "a": [[1, None], [], None], "image": [b"\xff\xfe"] * 3}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert [cells for _, cells in opened(tmp_path / "t.parquet").rows(["q", "a"])] == [
        ["1", "[1, null]"], ["", "[]"], ["3", ""]
    ]  # fmt: skip
    with pytest.raises(StageError, match="the column 'image' holds bytes that are no text"):
        list(opened(tmp_path / "t.parquet").rows(["image"]))


def test_a_workbook(tmp_path):
    book = openpyxl.Workbook()
    for row in [
        ["question", "answer"],
        ["a", 7],
        ["b", 1.5],
        [None, None],
        ["c", "007"],
        ["NA", None],
    ]:
        book.active.append(row)
    book.create_sheet("Other").append(["q", "a"])
    book["Other"].append(["x", "y"])
    book.save(tmp_path / "t.xlsx")
    table = opened(tmp_path / "t.xlsx")
    assert [cells for _, cells in table.rows(NAMES)] == [
        ["a", "7"],
        ["b", "1.5"],
        ["c", "007"],
        ["NA", ""],
    ]
    assert "'Sheet' of 2" in table.descriptions[0]
    assert list(opened(tmp_path / "t.xlsx", dataset_config="Other").rows(["q", "a"])) == [
        ("", ["x", "y"])
    ]
    with pytest.raises(StageError, match=r"no such sheet. It has: Sheet, Other"):
        opened(tmp_path / "t.xlsx", dataset_config="Othr")
    assert opened(tmp_path / "t.xlsx", header=False).columns == ["1", "2"]


@pytest.mark.parametrize("name", ["t.CSV", "t.JsonL", "t.Parquet", "T.CSV.GZ", "t.ndjson"])
def test_the_case_of_a_files_ending_does_not_matter(tmp_path, name):
    made = write(tmp_path / name.lower().replace("ndjson", "jsonl"), NAMES, GOOD)
    made.rename(tmp_path / name)
    assert len(list(opened(tmp_path / name).rows(NAMES))) == 4


def test_a_file_compressed_twice_in_a_row(tmp_path):
    """Several members in one file, as `cat a.gz b.gz` makes them; and a compressed file that does not say so."""
    lines = [json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in GOOD]
    (tmp_path / "t.jsonl.gz").write_bytes(b"".join(gzip.compress(line.encode()) for line in lines))
    shutil.copy(tmp_path / "t.jsonl.gz", tmp_path / "u.jsonl")
    for name in ("t.jsonl.gz", "u.jsonl"):
        assert [tuple(cells) for _, cells in opened(tmp_path / name).rows(NAMES)] == GOOD


# ---------------------------------------------------------------------------------------------------------------------
# Folders, splits, configurations


def split_rows(table, wanted=NAMES):
    """{official split: first cells} of a table."""
    found = {}
    for split, cells in table.rows(wanted):
        found.setdefault(split, []).append(cells[0])
    return found


def write_each(folder, *names):
    """A file of one row for each name, whose question is the name."""
    for name in names:
        write(folder / name, NAMES, [(name, f"answer in {name}")])


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["b.csv", "a.csv"], {"": ["a.csv", "b.csv"]}),
        (["train.csv", "test.csv"], {"train": ["train.csv"], "test": ["test.csv"]}),
        (["data.csv", "my-test.csv"], {"train": ["data.csv"], "test": ["my-test.csv"]}),
        (
            ["train/1.jsonl", "dev/1.jsonl"],
            {"train": ["train/1.jsonl"], "validation": ["dev/1.jsonl"]},
        ),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/eval-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/eval-00000-of-00001.parquet"],
            },
        ),
        (["test.csv"], {"": ["test.csv"]}),
        (["contest.csv", "latest.csv"], {"": ["contest.csv", "latest.csv"]}),
    ],
)
def test_the_splits_of_a_folder(tmp_path, names, found):
    """Its own, where it has a held-out one besides others; all of it is ours to split where it has not."""
    write_each(tmp_path / "t", *names)
    (tmp_path / "t" / "notes.txt").write_text("no table")
    (tmp_path / "t" / ".hidden").mkdir()
    write_each(tmp_path / "t" / ".hidden", "x.csv")
    assert split_rows(opened(tmp_path / "t")) == found
    kind = "*." + names[0].rpartition(".")[2]
    assert split_rows(opened(tmp_path / "t" / "**" / kind)) == found


def test_splits_that_are_set(tmp_path):
    write_each(tmp_path / "t", "a.csv", "b.csv", "c.csv", "test.csv")
    assert split_rows(opened(tmp_path / "t", splits={"train": "a.csv", "test": "b.csv"})) == {
        "train": ["a.csv"],
        "test": ["b.csv"],
    }
    assert split_rows(opened(tmp_path / "t", splits={"validation": "b"})) == {
        "train": ["a.csv", "c.csv"],
        "validation": ["b.csv"],
    }
    assert split_rows(opened(tmp_path / "t", splits={"train": ["a.csv", "test"]})) == {
        "": ["a.csv", "test.csv"]
    }
    other = {"test": str(tmp_path / "t" / "b.csv")}
    assert split_rows(opened(tmp_path / "t" / "a.csv", splits=other)) == {
        "train": ["a.csv"],
        "test": ["b.csv"],
    }
    with pytest.raises(
        StageError, match=r"splits: 'tets' is none of train, validation, test. Did you mean 'test'"
    ):
        opened(tmp_path / "t", splits={"tets": "a.csv"})
    with pytest.raises(StageError, match=r"has no 'bb.csv'. It has: .*Did you mean 'b.csv'"):
        opened(tmp_path / "t", splits={"test": "bb.csv"})


def test_a_folder_that_datasets_has_saved(tmp_path):
    train = datasets.Dataset.from_list([{"question": f"q{i}", "answer": "a"} for i in range(5)])
    train.save_to_disk(tmp_path / "one")
    assert split_rows(opened(tmp_path / "one")) == {"": [f"q{i}" for i in range(5)]}
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(tmp_path / "two")
    assert split_rows(opened(tmp_path / "two")) == {
        "train": [f"q{i}" for i in range(5)],
        "test": ["q0"],
    }


def configurations(folder, head):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{head}---\n# A table\n")


def test_a_data_set_with_configurations(tmp_path):
    write_each(tmp_path / "t", "a.csv", "b.csv", "c/x.csv", "c/y.csv")
    configurations(
        tmp_path / "t",
        "- config_name: main\n  data_files: a.csv\n"
        "- config_name: extra\n  data_files:\n  - split: train\n    path: [b.csv, 'c/*.csv']\n"
        "  - split: validation\n    path: a.csv\n"
        "- config_name: folder\n  data_dir: c\n",
    )
    with pytest.raises(StageError, match="dataset_config='': use one of main, extra, folder"):
        opened(tmp_path / "t")
    with pytest.raises(StageError, match=r"dataset_config='mian'.*Did you mean 'main'"):
        opened(tmp_path / "t", dataset_config="mian")
    assert split_rows(opened(tmp_path / "t", dataset_config="main")) == {"": ["a.csv"]}
    assert split_rows(opened(tmp_path / "t", dataset_config="folder")) == {
        "": ["c/x.csv", "c/y.csv"]
    }
    extra = {"train": ["b.csv", "c/x.csv", "c/y.csv"], "validation": ["a.csv"]}
    assert split_rows(opened(tmp_path / "t", dataset_config="extra")) == extra
    configurations(
        tmp_path / "t",
        "- config_name: default\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n",
    )
    assert split_rows(opened(tmp_path / "t")) == {"": ["a.csv"]}


def test_a_folder_in_the_place_of_a_configuration(tmp_path):
    write_each(tmp_path / "t", "en/a.csv", "de/b.csv")
    assert split_rows(opened(tmp_path / "t", dataset_config="de")) == {"": ["de/b.csv"]}
    with pytest.raises(
        StageError, match=r"dataset_config='fr'.*has no such configuration or folder"
    ):
        opened(tmp_path / "t", dataset_config="fr")


def test_splits_that_have_other_names_are_not_mixed_into_training(tmp_path):
    write_each(tmp_path / "t", "a.csv", "b.csv", "c.csv")
    files = [("train_sft", "a"), ("unsupervised", "b"), ("test_sft", "c")]
    lines = "".join(f"  - split: {split}\n    path: {name}.csv\n" for split, name in files)
    configurations(tmp_path / "t", f"- config_name: default\n  data_files:\n{lines}")
    assert split_rows(opened(tmp_path / "t")) == {"train": ["a.csv"], "test": ["c.csv"]}
    chosen = {"train": "unsupervised", "test": "test_sft"}
    assert split_rows(opened(tmp_path / "t", splits=chosen)) == {
        "train": ["b.csv"],
        "test": ["c.csv"],
    }


class Hub:
    """A stand-in for the Hub with one data set, whose newest commit is ccc…"""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def snapshot_download(self, name, repo_type, revision, allow_patterns):
        self.asked.append(revision)
        if name != "someone/table":
            from httpx import Request, Response
            from huggingface_hub.errors import RepositoryNotFoundError

            raise RepositoryNotFoundError(
                "404", response=Response(404, request=Request("GET", "https://hub.example"))
            )
        target = self.folder.parent / ("c" * 40 if revision == "main" else revision)
        for path in self.folder.rglob("*"):
            wanted = any(path.relative_to(self.folder).match(pattern) for pattern in allow_patterns)
            if path.is_file() and wanted:
                (target / path.relative_to(self.folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / path.relative_to(self.folder))
        return str(target)


def test_a_hub_data_set_is_read_at_a_commit(tmp_path, monkeypatch):
    """Its CSV as it was written, which `datasets.load_dataset` would not; its validation split stays one."""
    write(tmp_path / "hub" / "train.csv", NAMES, [("a", "007"), ("b", "NA")])
    write(tmp_path / "hub" / "validation.csv", NAMES, [("c", "1.50")])
    (tmp_path / "hub" / "model.bin").write_bytes(b"large")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    table = opened("someone/table")
    assert table.commit == "c" * 40
    assert list(table.rows(NAMES)) == [
        ("train", ["a", "007"]),
        ("train", ["b", "NA"]),
        ("validation", ["c", "1.50"]),
    ]
    assert opened("someone/table", dataset_revision="d" * 40).commit == "d" * 40
    assert not list(tmp_path.glob("c*/model.bin"))
    configurations(
        tmp_path / "hub",
        "- config_name: one\n  data_files: '**/train.csv'\n- config_name: two\n  data_files: v*\n",
    )
    assert split_rows(opened("someone/table", dataset_revision="e" * 40, dataset_config="one")) == {
        "": ["a", "b"]
    }
    with pytest.raises(StageError, match="dataset_config='': use one of one, two"):
        opened("someone/table", dataset_revision="f" * 40)
    with pytest.raises(
        StageError, match=r"someone/gone \(no such file in .*\): the Hub has no such repository"
    ):
        opened("someone/gone")


def test_whatever_the_hub_answers_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise OSError("Cannot send a request,\nas the client has been closed.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(StageError, match=r"no such file in.*Cannot send a request,$"):
        opened("someone/table")


# ---------------------------------------------------------------------------------------------------------------------
# Tables that are broken

HEADER = "question,answer\n"
PLAIN = HEADER + "".join(f"{q},{a.replace(', and', ' and')}\n" for q, a in GOOD)
LINES = [json.dumps(dict(zip(NAMES, row, strict=True))) for row in GOOD]


def with_line(line):
    return "\n".join([*LINES, line])


BAD = {
    "empty.csv": ("", "has no rows"),
    "blank lines.csv": ("\n\r\n\n", "has no rows"),
    "byte order mark only.csv": (b"\xef\xbb\xbf", "has no rows"),
    "header only.csv": (HEADER, "has no rows"),
    "no header.csv": (PLAIN.removeprefix(HEADER), "header: false"),
    "no header, long cells.csv": ("x" * 100_000 + "," + "y\u2028" * 50_000 + "\n1,2\n", "header: false"),
    "header twice.csv": ("question,answer,answer\na,b,c\n", "more than one column 'answer'"),
    "the end of a file in DOS.csv": (PLAIN + "\x1a", "line 6.*1 cell"),
    "a comment first.csv": ("# made in 2020\n" + PLAIN, "line 2.*2 cells.*first 1"),
    "overlong.csv": ("é,é\n".encode() + PLAIN.encode() + b"a,\xc0\x80\n", "is UTF-8 with damaged bytes"),
    "cut in a character.csv": ("é,é\né,b".encode() + b"\xc3", "is UTF-8 with damaged bytes"),
    "a cell too many in the first row.csv": (HEADER + "a,b,c\nd,e\n", "line 2.*3 cells.*first 2"),
    "a cell too many in every row.csv": (HEADER + "a,b,c\nd,e,f\n", "line 2.*3 cells"),
    "a cell too many at the end.csv": (PLAIN + "a,b,c\n", "line 6.*3 cells"),
    "a cell too few.csv": (PLAIN + "a\n", "line 6.*1 cell"),
    "a line break without quotes.csv": (PLAIN + "Why?,first\nsecond\n", "line 7.*1 cell"),
    "a quote never closed.csv": (HEADER + 'a,"b\n' + "c,d\n" * 9, "line 2 has a double quote too many or too few"),
    "a quote closed by the next one.csv": (HEADER + 'a,"b\nc,d\ne,"f"\ng,h\n', "line 2 has a double quote"),
    "backslashes for quotes.csv": (HEADER + 'a,"say \\"b\\" twice, and rest"\n', "line 2 has a double quote"),
    "HTML.csv": ("<!doctype html>\n<html>\n<p>Not found, sorry</p>\n</html>\n", "line 3.*2 cells|not recognized"),
    "another answer only.csv": (PLAIN.replace("answer", "Antwort"), "not recognized. Say which are which"),
    "all answers missing.csv": (HEADER + "a,\nb, \nc,\t\n", "3 of 3 rows would be lost.*3 no answer"),
    "all questions missing.csv": (HEADER + ",a\n,b\n \t,c\n", "3 of 3 rows would be lost.*3 no question"),
    "one question.csv": (HEADER + "a,b\na,c\nA!,d\n", "Only 1 different questions"),
    "two questions.csv": (HEADER + "a,b\nb,c\n", "Only 2 different questions"),
    "gzip.csv": (b"\x1f\x8b\x08\x00" + bytes(range(256)), "could not be read"),
    "Excel.csv": (b"PK\x03\x04\x14\x00\x06\x00\x08\x00" + bytes(range(256)), "not UTF-8"),
    "empty.jsonl": ("", "has no rows"),
    "empty objects.jsonl": ("{}\n{}\n", "has no rows"),
    "empty array.json": ("[]", "has no rows"),
    "a number.jsonl": (with_line("5"), "line 5 is not JSON.*must be an object"),
    "null.jsonl": (with_line("null"), "line 5.*must be an object"),
    "a list in a line.jsonl": (with_line('["a", "b"]'), "line 5.*must be an object"),
    "cut off.jsonl": (with_line('{"question": "a", "ans'), "line 5 is not JSON"),
    "cut off.json": ("[" + ",\n".join(LINES), "line 4 is not JSON"),
    "single quotes.jsonl": ("{'question': 'a', 'answer': 'b'}", "line 1 is not JSON"),
    "a field twice.jsonl": (with_line('{"question": "a", "answer": "b", "answer": "c"}'), "line 5.*twice"),
    "nested too deep.jsonl": ('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is not JSON"),
    "a number too long.jsonl": ('{"question": ' + "9" * 10_000 + "}", "not recognized"),
    "CSV.jsonl": (PLAIN, "line 1 is not JSON"),
    "empty.parquet": ("", "could not be read.*damaged"),
    "CSV.parquet": (PLAIN, "could not be read.*damaged"),
    "magic only.parquet": (b"PAR1" + b"\0" * 20 + b"PAR1", "could not be read.*damaged"),
    "CSV.xlsx": (PLAIN, "could not be read.*damaged"),
    "cut.csv.gz": (gzip.compress(PLAIN.encode())[:-9], "could not be read"),
    "notes.txt": (PLAIN, "no file of a kind that is read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_explained_in_one_line(name, tmp_path):
    content, explanation = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError, match=explanation):
        formatted(tmp_path, tmp_path / name)


@pytest.mark.parametrize("name", ["gone.csv", "./gone", "a/b/c", "gone*.csv", "~/gone.xlsx"])
def test_a_file_that_is_not_there(name):
    with pytest.raises(StageError, match="no such file"):
        opened(name)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json"])
def test_damaged_files(kind, tmp_path):
    """Bytes cut off, changed or put in: the table is explained, or read with every row accounted for."""
    rows = [*GOOD, ('He said "no", and', "é, 👍🏽\nsecond line")] * 2
    sound = write(tmp_path / f"whole.{kind}", NAMES, rows).read_bytes()

    @examples(25)
    @given(
        st.integers(0, len(sound)),
        st.integers(0, 40),
        st.one_of(st.just(b""), st.binary(max_size=4)),
    )
    def check(start, length, inserted):
        (tmp_path / f"table.{kind}").write_bytes(sound[:start] + inserted + sound[start + length :])
        with contextlib.suppress(StageError):
            report, splits = formatted(tmp_path, tmp_path / f"table.{kind}", max_dropped=1)
            assert (
                report["rows_in"] - sum(report["dropped"].values())
                == report["rows_out"]
                == len(pairs(splits))
            )

    check()


@examples(60)
@given(row=st.integers(0, 5), column=st.integers(0, 1), position=st.integers(0, 12))
def test_a_stray_quote_does_not_swallow_rows(tmp_path_factory, row, column, position):
    tmp_path = tmp_path_factory.mktemp("quote")
    rows = [*GOOD, ("\nWhy?", ",because"), ("Where?", "\nthere")]
    lines = [
        [cell if set(cell).isdisjoint(',"\n') else f'"{cell}"' for cell in cells] for cells in rows
    ]
    lines[row][column] = lines[row][column][:position] + '"' + lines[row][column][position:]
    (tmp_path / "t.csv").write_text(HEADER + "".join(",".join(cells) + "\n" for cells in lines))
    try:
        assert len(list(opened(tmp_path / "t.csv").rows(NAMES))) == len(rows)
    except StageError as error:
        assert re.search("double quote|cells", str(error))


# ---------------------------------------------------------------------------------------------------------------------
# Many rows


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
            row |= {
                "Home Remedy": " ".join(draw.choices(words, k=30)),
                "Yogasan": draw.choice(words),
            }
            file.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_ten_times_the_rows_take_ten_times_as_long_and_no_more_memory(tmp_path):
    """In a process of its own, as memory once taken stays with a process."""
    for number in (500, 2_000, 20_000):
        write_many(tmp_path / f"{number}.jsonl", number)
    program = f"""if True:
        import resource, sys, time
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from test_tables import formatted
        folder = Path({str(tmp_path)!r})
        for number in (500, 2_000, 20_000):
            begun = time.process_time()
            formatted(folder, folder / f"{{number}}.jsonl")
            print("measured", time.process_time() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured")]
    _, (seconds, mib), (seconds_of_more, mib_of_more) = [map(float, line) for line in lines]
    print(seconds, seconds_of_more, mib, mib_of_more)
    assert seconds_of_more < 14 * seconds
    assert mib_of_more - mib < 120  # of which 40 are the conversations that this test reads
