"""data.text_encoding."""

import pytest
from table_helpers import GOOD, NAMES, as_csv, opened, write

from tabletune.errors import StageError


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_unicode_encodings_are_detected(tmp_path, encoding, line_end):
    rows = [("Où est-ce ?", 'Là-bas, "€" 你好\nsecond line'), ("a", "b")]
    write(tmp_path / "t.csv", NAMES, rows, encoding, line_end=line_end)
    table = opened(tmp_path / "t.csv")
    assert [tuple(cells) for _, cells in table.rows(NAMES)] == rows


@pytest.mark.parametrize(
    ("encoding", "said"), [("cp1252", "Windows-1252"), ("latin-1", "Windows-1252")]
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_windows_1252_is_guessed_and_reported(tmp_path, encoding, said, kind):
    rows = [("Wie spät öffnet die Bücherei?", "Um neun Uhr, täglich."), ("¿Dónde?", "Allí, señor.")]
    how = {"ensure_ascii": False} if kind.startswith("json") else {}
    table = opened(write(tmp_path / f"t.{kind}", NAMES, rows, encoding, **how))
    assert [tuple(cells) for _, cells in table.rows(NAMES)] == rows
    assert said in table.descriptions[0]
    assert "set `encoding`" in table.descriptions[0]


@pytest.mark.parametrize(
    "rows", [[("plain", "café")], [("ü", "ö")] * 3 + [("Where is the harbour?", "Left of it.")]]
)
def test_few_letters_are_enough_to_guess(tmp_path, rows):
    (tmp_path / "t.csv").write_bytes(as_csv(NAMES, rows).rstrip("\n").encode("cp1252"))
    assert [tuple(cells) for _, cells in opened(tmp_path / "t.csv").rows(NAMES)] == rows


def test_windows_quotes_far_down_are_detected(tmp_path):
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
def test_other_encodings_are_refused_until_set(tmp_path, encoding, text):
    """Read as Windows-1252 they would be a table of nonsense."""
    write(tmp_path / "t.csv", NAMES, [(text, text)] * 3, encoding)
    with pytest.raises(
        StageError, match=r"not UTF-8, and does not look like Windows-1252.*set `encoding`: cp1251"
    ):
        opened(tmp_path / "t.csv")
    assert next(opened(tmp_path / "t.csv", encoding=encoding).rows(NAMES)) == ("", [text, text])


def test_encoding_setting_is_used_and_checked(tmp_path):
    write(tmp_path / "t.csv", NAMES, GOOD, "utf-8-sig")
    assert opened(tmp_path / "t.csv", encoding="utf-8").columns == NAMES
    with pytest.raises(StageError, match=r"unknown encoding: utf-9.*`encoding`"):
        opened(tmp_path / "t.csv", encoding="utf-9")
    write(tmp_path / "t.csv", NAMES, [("ü", "ö")], "cp1252")
    with pytest.raises(StageError, match=r"could not be read.*utf-8.*`encoding`"):
        opened(tmp_path / "t.csv", encoding="utf-8")
