"""data.readers."""

import contextlib
import gzip
import json
import shutil
import unicodedata

import pytest
from conftest import TINY
from hypothesis import example, given
from hypothesis import strategies as st
from table_helpers import (
    GOOD,
    HEADER,
    NAMES,
    cells,
    examples,
    formatted,
    opened,
    pairs,
    tokenizer_of,
    write,
)

from tabletune.chat.markers import break_markers
from tabletune.data.readers import READERS
from tabletune.data.tables import table_digest
from tabletune.errors import StageError


def kept(text):
    """What must be left of a text with no rule on but the usual ones, and with its special tokens
    broken up.
    """
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
def test_same_table_in_every_container(tmp_path_factory, rows):
    """And its answers are those of the table, up to the rules that are always on."""
    tmp_path, rows = tmp_path_factory.mktemp("containers"), GOOD + rows
    usual = {
        "max_length": 100_000,
        "max_dropped": 1,
        "near_duplicate_threshold": 1.01,
        "quotes": "cells",
    }
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


@pytest.mark.parametrize("name", ["t.CSV", "t.JsonL", "t.Parquet", "T.CSV.GZ", "t.ndjson"])
def test_case_of_a_file_ending_does_not_matter(tmp_path, name):
    made = write(tmp_path / name.lower().replace("ndjson", "jsonl"), NAMES, GOOD)
    made.rename(tmp_path / name)
    assert len(list(opened(tmp_path / name).rows(NAMES))) == 4


def test_gzip_members_are_joined(tmp_path):
    """Several members in one file, as `cat a.gz b.gz` makes them; and a compressed file that does
    not say so.
    """
    lines = [json.dumps(dict(zip(NAMES, row, strict=True))) + "\n" for row in GOOD]
    (tmp_path / "t.jsonl.gz").write_bytes(b"".join(gzip.compress(line.encode()) for line in lines))
    shutil.copy(tmp_path / "t.jsonl.gz", tmp_path / "u.jsonl")
    for name in ("t.jsonl.gz", "u.jsonl"):
        assert [tuple(cells) for _, cells in opened(tmp_path / name).rows(NAMES)] == GOOD


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
    "notes.txt": (PLAIN, "there is no file that can be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_table_is_explained_in_one_line(name, tmp_path):
    content, explanation = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError, match=explanation):
        formatted(tmp_path, tmp_path / name)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json"])
def test_damaged_file_is_explained_or_every_row_accounted_for(kind, tmp_path):
    """Bytes cut off, changed or put in: the table is explained, or read with every row accounted
    for.
    """
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


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "xlsx", "arrow"])
def test_pointer_of_git_lfs_is_named(tmp_path, kind):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2145\nsize 12345\n"
    (tmp_path / f"t.{kind}").write_text(pointer)
    with pytest.raises(
        StageError, match="is a pointer of Git LFS: the data itself was not downloaded"
    ):
        opened(tmp_path / f"t.{kind}")


@pytest.mark.parametrize("name", ["~$train.xlsx", "._train.csv", ".train.csv"])
def test_files_that_programs_leave_are_skipped(tmp_path, name):
    write(tmp_path / "t" / "train.csv", NAMES, GOOD)
    (tmp_path / "t" / name).write_bytes(b"\x05Zo\xc3\xab" + b" " * 100)
    assert len(list(opened(tmp_path / "t").rows(NAMES))) == 4


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_second_file_is_named_if_it_cannot_be_read(tmp_path, kind):
    write(tmp_path / "t" / f"a.{kind}", NAMES, GOOD)
    path = write(tmp_path / "t" / f"b.{kind}", NAMES, GOOD * 100)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff\x81\xff" + content[len(content) // 2 :])
    with pytest.raises(StageError, match=rf"b\.{kind}") as refusal:
        list(opened(tmp_path / "t").rows(NAMES))
    assert f"a.{kind}" not in str(refusal.value)


def test_mistake_of_ours_is_not_called_damage(tmp_path, monkeypatch):
    def broken(path, name, options):
        return None.columns

    monkeypatch.setitem(READERS, ".csv", broken)
    with pytest.raises(AttributeError):
        opened(write(tmp_path / "t.csv", NAMES, GOOD))


def test_damage_keeps_its_cause(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + b"\0" * 20 + b"PAR1")
    with pytest.raises(StageError) as refusal:
        opened(tmp_path / "t.parquet")
    assert refusal.value.__cause__ is not None


def test_digest_of_a_table_needs_no_rows(tmp_path):
    path = write(tmp_path / "t.csv", NAMES, GOOD)
    digest = opened(path).digest
    assert table_digest(str(path)) == digest
    write(path, NAMES, [*GOOD, ("a", "b")])
    assert table_digest(str(path)) != digest
