"""What the tests of data/ share: tables in every container, and what notebook 1 makes of them."""

import contextlib
import gzip
import io
import json
import re
import shutil
import tempfile
from functools import lru_cache

import datasets
import hypothesis.configuration
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import ROOT, TINY
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from tabletune.chat.tokenizer import load_tokenizer
from tabletune.data.pipeline import format_table
from tabletune.data.shapes import recognize, with_example
from tabletune.data.table_file import ReadOptions
from tabletune.data.tables import open_table
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS

# it would keep tables of Unicode in a folder of its own, which should not lie in the project
hypothesis.configuration.set_hypothesis_home_dir(tempfile.mkdtemp())

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
    """What notebook 1 makes of a table: the report, and the conversations [(prompt, answer), ...]
    of each split.

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
        assert len(message.splitlines()) == 1, message
        assert 20 < len(message) < 3000, message
        assert message.isprintable(), message
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


def as_csv(header, rows, mark=",", line_end="\n"):
    """A table as RFC 4180 says. Python's own writer leaves line breaks without quotes that are not
    `line_end`.
    """

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


HEADER = "question,answer\n"


ANSWER = "Here is a suggested remedy:\n\n**Item:** {item}\n**Remedy:** {remedy}\n**Recommended Yoga:** {yoga}"


def row(issue="Cold", item="Ginger", remedy="Sip ginger tea twice a day.", yoga="Balasana"):
    return {"issue": issue, "item": item, "remedy": remedy, "yoga": yoga}


def jsonl(folder, *rows):
    """A table of these rows, dicts."""
    path = folder / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def chats(number=6, **extra):
    """Rows of two questions and two answers, after a system message."""
    turns = [
        ("system", "Be a parrot."),
        ("user", "Say {}."),
        ("assistant", "{}!"),
        ("user", "Again."),
        ("assistant", "{} {}!"),
    ]
    return [
        {
            "messages": [{"role": role, "content": text.format(i, i)} for role, text in turns],
            **extra,
        }
        for i in range(number)
    ]


TERMINAL = ROOT / "data" / "terminal.jsonl"


def terminal_rows():
    return [json.loads(line) for line in TERMINAL.read_text(encoding="utf-8").splitlines()]


CITIES = [
    "Lima",
    "Oslo",
    "Cairo",
    "Quito",
    "Dakar",
    "Hanoi",
    "Riga",
    "Perth",
    "Turin",
    "Kyoto",
    "Accra",
    "Bergen",
]


def conversations_of(folder, *rows, **parameters):
    """The conversations of a table of rows, [[(role, text), ...], ...], sorted by their
    question.
    """
    _, splits = formatted(folder, jsonl(folder, *rows), **parameters)
    conversations = []
    for split in splits.values():
        for prompt, answer in split:
            turns = [(turn["role"], turn["content"]) for turn in prompt]
            conversations.append([*turns, ("assistant", answer)])
    return sorted(conversations, key=lambda turns: turns[-2][1] if len(turns) > 1 else turns[0][1])


def conversation_of(folder, make, **parameters):
    """What becomes of the first of twelve rows, each of which `make` makes of a city's name: its
    turns.
    """
    rows = [make(city) for city in CITIES]
    return next(
        turns for turns in conversations_of(folder, *rows, **parameters) if "Lima" in str(turns)
    )


def write_parquet(path, rows):
    """Write rows, dicts, as a .parquet file, with the keys of each object in the order of all
    rows.
    """
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
