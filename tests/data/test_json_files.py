"""data.json_files."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from table_helpers import NAMES, TURNS, examples, formatted, opened, pairs, values, write

from tabletune.errors import StageError


@pytest.mark.parametrize("text", [
    json.dumps([{"q": 1, "a": "x"}, {"q": 2, "a": "y"}]),
    json.dumps([{"q": 1, "a": "x"}, {"q": 2, "a": "y"}], indent=4),
    '{"q": 1, "a": "x"}\n{"q": 2, "a": "y"}\n',
    '\n\n{"q": 1,\n "a": "x"}\r\n\r\n{"q": 2, "a": "y"}',
    '[\n{"q": 1, "a": "x"},\n{"q": 2, "a": "y"}\n]\n',
])  # fmt: skip
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_line_breaks_do_not_matter(tmp_path, text, kind):
    (tmp_path / f"t.{kind}").write_text(text)
    assert list(opened(tmp_path / f"t.{kind}").rows(["q", "a"])) == [
        ("", ["1", "x"]),
        ("", ["2", "y"]),
    ]


def test_values_larger_than_a_block_are_read(tmp_path):
    rows = [(f"Question {i}?", "x" * (i * 1000)) for i in range(100)] + [("Long?", "y" * 5_000_000)]
    assert [
        tuple(cells) for _, cells in opened(write(tmp_path / "t.json", NAMES, rows)).rows(NAMES)
    ] == rows


def as_cell(value):
    """What a JSON value in a cell must arrive as."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@examples(50)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional={"q": values, "a": values, "x": values}),
        min_size=1,
        max_size=6,
    )
)
@example([{"q": 1, "a": 1.50}, {"q": None, "a": "2020-01-01"}, {}, {"a": [None, 1.5]}, {"x": True}])
def test_values_of_mixed_types_keep_their_text(tmp_path_factory, rows):
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


PEOPLE = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}]


@pytest.mark.parametrize(
    "content",
    [
        PEOPLE,
        {"data": PEOPLE},
        {"version": "1.0", "rows": PEOPLE},
        {"examples": PEOPLE, "meta": {"by": "x"}},
        {"question": ["a?", "c?"], "answer": ["b", "d"]},
        {"question": {"0": "a?", "1": "c?"}, "answer": {"0": "b", "1": "d"}},
        {"0": PEOPLE[0], "1": PEOPLE[1]},
        {"columns": ["question", "answer"], "index": [0, 1], "data": [["a?", "b"], ["c?", "d"]]},
        {"schema": {"fields": []}, "data": PEOPLE},
    ],
)
def test_json_that_holds_its_rows_is_read(tmp_path, content):
    """As lists under a name, and in the forms in which pandas writes tables."""
    (tmp_path / "t.json").write_text(json.dumps(content, indent=1))
    assert list(opened(tmp_path / "t.json").rows(NAMES)) == [("", ["a?", "b"]), ("", ["c?", "d"])]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_lists_of_turns_are_conversations(tmp_path, kind):
    rows = [[{"role": "user", "content": f"q{i}"}, TURNS[1]] for i in range(5)]
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    (tmp_path / f"t.{kind}").write_text(text)
    report, splits = formatted(tmp_path, tmp_path / f"t.{kind}")
    assert report["shape"] == "messages"
    assert pairs(splits)[0] == ("q0", "b")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([["a", "b"], ["c", "d"]], r"a list of 2 \(the first is: text\)"),
        ([1, 2], "a single value"),
        ({"train": PEOPLE, "test": PEOPLE}, "several lists of rows: 'train', 'test'"),
    ],
)
def test_json_that_is_no_table_is_named(tmp_path, content, found):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(StageError, match=found):
        opened(tmp_path / "t.json")


def test_one_object_may_be_a_row(tmp_path):
    row = {"messages": TURNS, "notes": [{"by": "x"}]}
    (tmp_path / "t.json").write_text(json.dumps(row))
    assert opened(tmp_path / "t.json").columns == ["messages", "notes"]


@pytest.mark.parametrize("number", ["1.50", "1e6", "0.10", "-0", "12345678901234567890.5"])
def test_numbers_inside_objects_keep_their_text(tmp_path, number):
    text = f'{{"a": [{number}, {{"x": {number}}}]}}'
    (tmp_path / "t.jsonl").write_text(f'{{"q": "x", "a": {text}}}\n' * 2)
    assert next(opened(tmp_path / "t.jsonl").rows(["a"])) == ("", [text])
