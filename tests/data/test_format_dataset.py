"""Notebook 1: shapes, cleaning, what is dropped and said, splits, and the notebook itself."""

import copy
import json
import os
import random
import re
import runpy
import stat
import time
import unicodedata
from collections import Counter

import base_models
import datasets
import pandas as pd
import pytest
import yaml
from conftest import ROOT, TABLE, TINY, make, run_tiny
from hypothesis import given
from hypothesis import strategies as st
from test_tables import (
    GOOD,
    NAMES,
    ODD_TEXT,
    examples,
    formatted,
    opened,
    pairs,
    tokenizer_of,
    write,
)

from tabletune.chat.encoding import encode
from tabletune.chat.markers import break_markers
from tabletune.chat.tokenizer import special_ids
from tabletune.data.cleaning import Cleaning
from tabletune.data.duplicates import words
from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.data.field_templates import fill
from tabletune.data.pipeline import format_table
from tabletune.data.shapes import recognize, with_example
from tabletune.data.splits import assign_splits, question_key, split_position
from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS, read_parameters

ANSWER = "Here is a suggested remedy:\n\n**Item:** {item}\n**Remedy:** {remedy}\n**Recommended Yoga:** {yoga}"
EXAMPLE = example_settings({"example": "home_remedies"})


def row(issue="Cold", item="Ginger", remedy="Sip ginger tea twice a day.", yoga="Balasana"):
    return {"issue": issue, "item": item, "remedy": remedy, "yoga": yoga}


def jsonl(folder, *rows):
    """A table of these rows, dicts."""
    path = folder / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def clean_as_the_example(text):
    """A cell as the worked example's rules make it."""
    return Cleaning(strip_addresses=True, collapse_spaces=True)(text)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  warm \t water\u00a0and  salt ", "warm water and salt"),
        ("1½ cups", "1½ cups"),  # NFKC would make it 11⁄2
        ("cafe\u0301", "café"),
        ("a\u200bb\ufeff\x07", "ab"),
        ("https://example.org/pose.jpg?size=640", ""),
        ("www.example.org/pose.png", ""),
        ("HTTP://EXAMPLE.ORG", ""),
        ("Rest. See https://example.org for more.", "Rest. See for more."),
        ("one\r\ntwo  \n\n\n\nthree", "one\ntwo\n\nthree"),
        ("请看https://example.org/a?b=1。多喝水", "请看。多喝水"),
        ("看www.example.org，休息", "看，休息"),
        ("お茶（https://example.org/お茶）", "お茶（お茶）"),
        ("Siehe https://example.org/käse für mehr", "Siehe für mehr"),
        ("Awww.so cute", "Awww.so cute"),
        (
            "See [the picture](https://example.org/a_(b).jpg) and <www.example.org> too",
            "See the picture and too",
        ),
        ("Rest (see https://example.org/a).", "Rest (see )."),
        ('f() [x](y) <> [] ""', 'f() [x](y) <> [] ""'),
    ],
)
def test_the_rules_of_the_example(raw, cleaned):
    assert clean_as_the_example(raw) == cleaned == clean_as_the_example(cleaned)


@pytest.mark.parametrize(
    "piece", ["(", "[a](", "(https:", "[x](https:a", "www.", '["(', "(a)", "<http:(("]
)
def test_many_brackets_are_cleaned_quickly(piece):
    begun = time.process_time()
    clean_as_the_example("https:" + piece * (100_000 // len(piece)))
    assert time.process_time() - begun < 1


@examples(300)
@given(st.lists(st.sampled_from(ODD_TEXT) | st.text(max_size=5), max_size=6).map("".join))
def test_nothing_else_changes_unless_it_is_asked_for(text):
    cleaning = Cleaning()
    assert (
        cleaning(text)
        == unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    )
    assert set(cleaning.changed) <= {"line ends", "composed Unicode (NFC)", "outer white space"}
    everything = Cleaning(True, True, True)
    assert everything(everything(text)) == everything(text) or "<" in text or "&" in text


def test_what_was_changed_is_counted_by_rows_with_an_example():
    cleaning = Cleaning(strip_addresses=True)
    for text in (
        "cafe\u0301 x",
        "plain",
        "x" * 500 + " https://example.org now",
        "see www.example.org",
    ):
        cleaning.start_row()
        cleaning(text), cleaning(text)
    assert {rule: change["rows"] for rule, change in cleaning.changed.items()} == {
        "composed Unicode (NFC)": 1,
        "addresses": 2,
        "outer white space": 1,
    }
    assert "https://example.org" in cleaning.changed["addresses"]["before"]
    assert cleaning.changed["addresses"]["after"].endswith("x  now")


def test_html_becomes_what_a_browser_shows():
    html = "<p>Hold <b>both</b> buttons, see <a href='https://example.org'>the manual</a>.</p>"
    html += "<ul><li>One</li><li>Two</li></ul>"
    text = Cleaning(html_to_text=True)(
        html + "<script>x()</script>Fish &amp; chips &lt; 5&nbsp;kg."
    )
    assert (
        re.sub(r"\n+", "\n", text)
        == "Hold both buttons, see the manual.\nOne\nTwo\nFish & chips < 5 kg."
    )


def test_html_is_said(tmp_path):
    rows = [{"question": f"How {i}?", "answer": f"<p>Hold {i} &amp; press.</p>"} for i in range(8)]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert "8 texts look like HTML" in report["notes"][0] and all(
        "<p>" in answer for _, answer in pairs(splits)
    )
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), html_to_text=True)
    assert ("How 1?", "Hold 1 & press.") in pairs(splits) and report["changed"]["HTML to text"][
        "rows"
    ] == 8


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def shape_of(folder, *rows, **settings):
    known = {**PARAMETERS["01_format_dataset"], **settings}
    table = opened(jsonl(folder, *rows))
    chosen, example = with_example(table, known)
    return recognize(table, chosen, example)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    ("columns", "name", "used"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt_completion", ["prompt", "completion"]),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt_completion", ["prompt", "completion"]),
        ({"instruction": "a", "input": "", "output": "b"}, "instruction", ["instruction", "input", "output"]),
        ({"Question": "a", "Answer": "b", "id": 1}, "instruction", ["Question", "Answer"]),
        ({"question": "a", "context": "c", "answer": "b"}, "instruction", ["question", "context", "answer"]),
        (
            {"instruction": "a", "context": "", "response": "b", "category": "x"},
            "instruction",
            ["instruction", "context", "response"],
        ),
        ({"input": "a", "output": "b"}, "instruction", ["input", "output"]),
        ({"messages": TURNS}, "messages", ["messages"]),
        ({"prompt": "a", "messages": TURNS}, "messages", ["messages"]),
        ({"dialog": json.dumps(TURNS)}, "messages", ["dialog"]),
        ({"chat": str(TURNS)}, "messages", ["chat"]),
        ({"conversations": SHARED, "system": "s"}, "conversations", ["conversations", "system"]),
        ({"conversations": TURNS, "tools": "[]"}, "messages", ["conversations", "tools"]),
        ({"text": "a"}, "text", ["text"]),
    ],
)  # fmt: skip
def test_shapes_are_recognized(tmp_path, columns, name, used):
    shape = shape_of(tmp_path, columns)
    assert shape.name == name and sorted(shape.columns.values()) == sorted(used)


def test_a_shape_can_be_set(tmp_path):
    both = {"text": "t", "label": "l", "prompt": "p", "completion": "c", "chat": TURNS}
    assert shape_of(tmp_path, both).name == "messages"
    assert shape_of(tmp_path, both, shape="text").columns == {"text": "text"}
    assert shape_of(tmp_path, both, shape="prompt_completion").columns == {
        "question": "prompt",
        "answer": "completion",
    }
    named = shape_of(tmp_path, both, columns={"question": "text", "answer": "label"})
    assert named.name == "instruction" and named.columns == {"question": "text", "answer": "label"}
    assert shape_of(tmp_path, both, shape="text", columns={"text": "label"}).columns == {
        "text": "label"
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "message"}, "shape='message': use one of .*Did you mean 'messages'"),
        ({"shape": "messages"}, "shape=messages needs a column of lists"),
        ({"shape": "columns"}, "question_template=''.*put at least one column in braces"),
        (
            {"columns": {"question": "Frage", "answer": "Antwrt"}},
            "no column 'Antwrt' for {answer}.*Did you mean 'Antwort'",
        ),
        ({"columns": {"q": "Frage", "a": "Antwort"}}, "not recognized. Say which are which"),
        ({}, "not recognized.*columns: {question: 'Frage', answer: 'Antwort'}"),
        ({"question_template": "{Frage}", "answer_template": "{Antwort"}, "answer_template.*put at least one"),
        ({"question_template": "{Frage}", "answer_template": "{Antwort} {"}, "answer_template has a single brace"),
        (
            {"question_template": "{Frage} {0}", "answer_template": "{Antwort}"},
            r"no column '0'.*written twice: \{\{0\}\}",
        ),
        ({"question_template": "{Frage}", "answer_template": 'Say: { "a": {Antwort} }'}, "single brace"),
        (
            {"question_template": "{Frage}", "answer_template": "{Antwort}", "answer_column": "a"},
            "answer_column='a' is not in",
        ),
        (
            {"question_template": "{Frage}", "answer_template": "{Antwort}", "drop_values": {"F": ["x"]}},
            "drop_values: there is no field 'F'",
        ),
        (
            {"question_template": "{Frage}\n{Antwort}", "answer_template": "{Antwort}", "drop_patterns": ["("]},
            "drop_patterns.*regular expression",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(tmp_path, settings, message):
    rows = [{"Frage": f"q{i}", "Antwort": f"a{i}"} for i in range(5)]
    with pytest.raises(StageError, match=message):
        formatted(tmp_path, jsonl(tmp_path, *rows), **settings)


def test_placeholders_may_have_spaces_and_braces_are_written_twice(tmp_path):
    rows = [
        {"Age Group": group, "issue": f"Issue {i}", "a": f"{{x}} {i}"}
        for i, group in enumerate(["adult", "child"] * 3)
    ]
    _, splits = formatted(
        tmp_path,
        jsonl(tmp_path, *rows),
        columns={"Age Group": "Age Group", "problem": "issue"},
        question_template="I am a {Age Group} with {problem}.",
        answer_template='{{"says": "{a}"}}',
    )
    assert pairs(splits)[1] == ("I am a adult with Issue 2.", '{"says": "{x} 2"}')


def test_lines_without_a_value_are_left_out():
    filled = fill(ANSWER, row(item="", yoga=""))
    assert filled == "Here is a suggested remedy:\n\n**Remedy:** Sip ginger tea twice a day."
    assert (
        fill("{remedy}\n\n{item}\n\n{yoga}", row(item="", remedy="a\n\n\n\nb"))
        == "a\n\n\n\nb\n\nBalasana"
    )
    assert fill("{remedy}", row(remedy="use {yoga} {0}")) == "use {yoga} {0}"


@pytest.mark.parametrize(
    "template", ["{q}\n{c}", "{c}\n\n{q}", "{q} {c}", "Context: {c}\nQuestion: {q}"]
)
def test_optional_fields_may_be_empty(tmp_path, template):
    rows = [
        {"q": f"Question {i}?", "c": "" if i % 2 else f"Context {i}.", "a": f"Answer {i}."}
        for i in range(10)
    ]
    report, splits = formatted(
        tmp_path,
        jsonl(tmp_path, *rows),
        question_template=template,
        answer_template="{a}",
        answer_column="a",
    )
    assert not report["dropped"] and len(pairs(splits)) == 10
    assert any(question.replace("Question: ", "") == "Question 1?" for question, _ in pairs(splits))


def test_a_sentence_needs_all_of_its_fields(tmp_path):
    rows = [{"q": f"thing {i}", "c": "home", "a": "x"} for i in range(9)] + [
        {"q": "thing 9", "c": "", "a": "x"}
    ]
    templates = {"question_template": "What is {q} at {c}?", "answer_template": "{a}"}
    report, _ = formatted(tmp_path, jsonl(tmp_path, *rows), **templates)
    assert report["dropped"] == {"no question": 1}


@pytest.mark.parametrize(
    "label", ["None", "NA", "nan", "nil", "-", "null", "false", "0", "N/A", "https://example.org"]
)
def test_labels_that_read_like_nothing_stay(tmp_path, label):
    rows = [(f"Question {i}?", label if i % 2 else "yes") for i in range(8)]
    report, splits = formatted(
        tmp_path, write(tmp_path / "t.csv", NAMES, rows), drop_values=[label, "yes"]
    )
    assert not report["dropped"] and {answer for _, answer in pairs(splits)} == {label, "yes"}


def test_cells_that_are_emptied(tmp_path):
    """Of the optional fields by a list, of those named by a dictionary."""
    rows = [
        {"q": f"Q{i}", "note": note, "a": "None"}
        for i, note in enumerate(["None", " n/a ", "see p. 7", "kept"])
    ]
    templates = {
        "question_template": "{q}",
        "answer_template": "{a}\n({note})",
        "answer_column": "a",
    }
    given = {"drop_values": ["NONE", "N/A"], "drop_patterns": ["see p\\. \\d+"], **templates}
    _, splits = formatted(tmp_path, jsonl(tmp_path, *rows), **given)
    assert [answer for _, answer in pairs(splits)] == ["None", "None", "None", "None\n(kept)"]
    for values in (["none"], "none"):
        with pytest.raises(StageError, match=r"4 of 4 rows would be lost.*4 no answer"):
            formatted(tmp_path, jsonl(tmp_path, *rows), drop_values={"a": values}, **templates)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


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


def test_every_answer_of_a_conversation_is_in_the_loss(tmp_path):
    report, splits = formatted(tmp_path, jsonl(tmp_path, *chats()))
    tokenizer, stops = tokenizer_of(TINY)
    (prompt, answer), *_ = splits["test"]
    encoded = encode(
        {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]},
        tokenizer,
        stops,
    )
    learned = [
        i for i, mask in zip(encoded["input_ids"], encoded["completion_mask"], strict=True) if mask
    ]
    assert report["shape"] == "messages" and [turn["role"] for turn in prompt] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert re.fullmatch(r"(\d)! ?</s> ?\1 \1! ?</s>", tokenizer.decode(learned).strip())


def test_roles_and_contents_of_many_kinds(tmp_path):
    rows = [
        {"conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": f"Question {i}"},
            {"from": "gpt", "value": f"Answer {i}"},
        ]}
        for i in range(4)
    ]  # fmt: skip
    parts = [{"type": "text", "text": "Question 4"}, {"type": "text", "text": "goes on"}]
    rows.append(
        {
            "conversations": [
                {"role": "user", "content": parts},
                {"role": "model", "content": "Answer 4"},
            ]
        }
    )
    _, splits = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert pairs(splits)[-1] == ("Question 4\ngoes on", "Answer 4")
    assert pairs(splits)[0] == ("Question 0", "Answer 0")


def test_conversations_that_cannot_teach(tmp_path):
    user, assistant = TURNS
    odd = [
        [
            *chats(1)[0]["messages"],
            {"role": "user", "content": "And now?"},
        ],  # the question at the end is cut off
        [user],
        [assistant],
        [user, {"role": "assistant", "content": " "}],
        [{"role": "wizard", "content": "x"}, assistant],
        [{"role": "user", "content": [{"type": "image"}]}, assistant],
    ]
    rows = [*chats(12)[1:], *({"messages": turns} for turns in odd)]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), max_dropped=0.5)
    assert report["changed"]["turns after the last answer"]["rows"] == 2 and (
        "Again.",
        "0 0!",
    ) in pairs(splits)
    assert report["dropped"] == {
        "no answer": 2, "no question": 1, "a turn of an unknown role": 1, "a turn with a part of the type 'image'": 1
    }  # fmt: skip


def test_a_prompt_and_a_completion_of_messages(tmp_path):
    rows = [
        {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats()
    ]
    assert (
        formatted(tmp_path, jsonl(tmp_path, *rows))[1]
        == formatted(tmp_path, jsonl(tmp_path, *chats()))[1]
    )


def test_a_system_prompt_for_rows_that_have_none(tmp_path):
    rows = [*chats(3), *({"messages": chat["messages"][1:]} for chat in chats(6)[3:])]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), system_prompt="Be kind.")
    said = [prompt[0] for split in splits.values() for prompt, _ in split]
    assert report["system_prompt"] == "Be kind." and not any(
        "system role" in note for note in report["notes"]
    )
    assert Counter(turn["content"] for turn in said) == {"Be a parrot.": 3, "Be kind.": 3}
    columns = [
        {"question": f"q{i}", "answer": "a", "system": "Own." if i else ""} for i in range(4)
    ]
    _, splits = formatted(tmp_path, jsonl(tmp_path, *columns), system_prompt="Be kind.")
    assert Counter(prompt[0]["content"] for split in splits.values() for prompt, _ in split) == {
        "Own.": 3,
        "Be kind.": 1,
    }


def test_a_template_without_a_system_role(tmp_path):
    """It would refuse the row; so the text goes in front of the first question, and that is said."""
    report, splits = formatted(tmp_path, jsonl(tmp_path, *chats()), base_models.cached("gemma"))
    assert any("no system role" in note for note in report["notes"]) and report["rows_out"] == 6
    assert {prompt[0]["content"][:-2] for split in splits.values() for prompt, _ in split} == {
        "Be a parrot.\n\nSay "
    }


def test_a_conversation_that_the_template_refuses_is_dropped_and_counted(tmp_path):
    """Gemma's wants turns in strict order."""
    broken = {"messages": [TURNS[0], TURNS[0], TURNS[1]]}
    report, _ = formatted(
        tmp_path, jsonl(tmp_path, *chats(12), broken), base_models.cached("gemma")
    )
    assert report["dropped"] == {"refused by the chat template": 1}
    assert formatted(tmp_path, jsonl(tmp_path, *chats(12), broken))[0]["dropped"] == {}


TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "adds", "parameters": {"properties": {}}},
    }
]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_tools(number=4):
    turns = [
        {"role": "assistant", "content": None, "tool_calls": CALL},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    return [
        {"messages": [{"role": "user", "content": f"Sum {i}?"}, *turns], "tools": TOOLS}
        for i in range(number)
    ]


def test_tools_are_kept_where_the_template_takes_them(tmp_path):
    tokenizer, stops = tokenizer_of(TINY)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = WITH_TOOLS
    table = opened(jsonl(tmp_path, *with_tools()))
    settings = {**PARAMETERS["01_format_dataset"], "base_model": str(TINY)}
    format_table(
        table, recognize(table, settings), settings, tokenizer, stops, tmp_path / "dataset"
    )
    example = datasets.load_from_disk(tmp_path / "dataset")["train"][0]
    assert json.loads(example["tools"]) == TOOLS
    assert [turn["role"] for turn in example["prompt"]] == ["user", "assistant", "tool"]
    assert (
        'CALL {"name": "add", "arguments": {"a": 1}}' in example["text"]
        and "TOOLS [{" in example["text"]
    )


def test_tools_are_refused_where_the_template_has_no_place_for_them(tmp_path):
    with pytest.raises(
        StageError, match="The table has tool_calls, which this model's chat template"
    ):
        formatted(tmp_path, jsonl(tmp_path, *with_tools()))
    plain = [
        {"messages": [turn for turn in row["messages"] if not turn.get("tool_calls")]}
        for row in with_tools()
    ]
    with pytest.raises(
        StageError, match="The table has turns of tools, which this model's chat template"
    ):
        formatted(tmp_path, jsonl(tmp_path, *plain), base_models.cached("gemma"))
    with pytest.raises(StageError, match="The table has tools, which this model's chat template"):
        formatted(tmp_path, jsonl(tmp_path, *chats(4, tools=TOOLS)))


def test_a_lone_text(tmp_path):
    report, splits = formatted(
        tmp_path, jsonl(tmp_path, *({"text": f"Q: {i}+{i}?\nA: {2 * i}"} for i in range(12)))
    )
    assert any("the loss is on all of it" in note for note in report["notes"])
    tokenizer, stops = tokenizer_of(TINY)
    prompt, text = splits["train"][0]
    encoded = encode(
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}, tokenizer, stops
    )
    assert (
        prompt == []
        and set(encoded["completion_mask"]) == {1}
        and encoded["input_ids"][-1] in stops
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text that looks like a special token

MARKERS = [
    "[INST]",
    "[/INST]",
    "</s>",
    "<s>",
    "<unk>",
    "<<SYS>>",
    "<|im_end|>",
    "<|im_start|>",
    "<end_of_turn>",
]
BROKEN = [
    "<",
    "s>",
    "</",
    "<<s>s>",
    "<\u200bs>",
    "<|im_",
    "end|>",
    "[",
    "INST]",
    "<|<|im_end|>im_end|>",
    "",
    " ",
    "\n",
    "tea",
]


@pytest.mark.parametrize("name", ["tiny", "qwen2", "gemma", "phi3"])
def test_no_text_becomes_a_special_token(name):
    tokenizer, _ = tokenizer_of(TINY if name == "tiny" else base_models.cached(name))

    @examples(150)
    @given(st.lists(st.sampled_from(MARKERS + BROKEN), max_size=8).map("".join))
    def check(text):
        ids = tokenizer(break_markers(text, tokenizer), add_special_tokens=False)["input_ids"]
        assert not set(ids) & (special_ids(tokenizer) - {tokenizer.unk_token_id})

    check()


def test_a_marker_that_two_cells_make_together_is_broken_up(tmp_path):
    rows = [{"q": f"Q{i}", "left": "<", "right": "/s> more"} for i in range(5)]
    templates = {"question_template": "{q}", "answer_template": "{left}{right}"}
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), **templates)
    assert {answer for _, answer in pairs(splits)} == {"< /s> more"}
    assert report["changed"]["special tokens broken up"]["rows"] == 5


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def test_reasons_to_drop(tmp_path):
    rows = [
        row(),
        row(),
        row(remedy="SIP GINGER TEA, twice a day!"),
        row(remedy="Rest in a dark room for an hour."),
        row(issue="Cough"),
        row(issue=""),
        row(remedy=""),
        row(issue="cold "),
        *(row(issue=f"Issue {i}") for i in range(5)),
    ]
    templates = {
        "question_template": "{issue}",
        "answer_template": ANSWER,
        "answer_column": "remedy",
        "max_dropped": 1,
    }
    report, _ = formatted(tmp_path, jsonl(tmp_path, *rows), **templates)
    assert report["dropped"] == {
        "duplicate": 1,
        "near duplicate": 2,
        "no question": 1,
        "no answer": 1,
    }
    assert [shown["reason"] for shown in report["dropped_rows"]][:2] == [
        "duplicate",
        "near duplicate",
    ]
    assert report["dropped_rows"][1]["remedy"] == "SIP GINGER TEA, twice a day!"
    report, _ = formatted(
        tmp_path, jsonl(tmp_path, *rows), **templates, near_duplicate_threshold=1.01
    )
    assert report["dropped"] == {"duplicate": 1, "no question": 1, "no answer": 1}


LONG = "Take {} of the small white tablets with a glass of water in the morning and in the evening, and rest for a week."
LONG_QUESTION = "May I take ginger tea in the morning if I am also on blood thinners?"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("How many?", LONG.format(2)), ("How many?", LONG.format(3))),
        (("How many?", LONG.format("two")), ("How many?", LONG.format("three"))),
        (("Whom?", LONG.format("one") + " Ask Anna."), ("Whom?", LONG.format("one") + " Ask Peter.")),
        (("Is it?", LONG.format("one") + " It is safe."), ("Is it?", LONG.format("one") + " It is not safe.")),
        (("Who pays?", "Anna pays Ben, as she always did."), ("Who pays?", "Ben pays Anna, as she always did.")),
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
)  # fmt: skip
def test_what_differs_is_no_near_duplicate(tmp_path, one, other):
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, [*GOOD, one, other]))
    assert report["rows_out"] == len(GOOD) + 2


def test_a_table_of_numbers_loses_nothing(tmp_path):
    report, _ = formatted(tmp_path, jsonl(tmp_path, *terminal_rows()[:1500]))
    assert report["rows_out"] == 1500 and not report["dropped"]


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are lost


def test_losing_more_than_a_tenth_stops_with_the_setting_that_keeps_them(tmp_path):
    rows = [(f"Question {i}?", f"Answer {i}. " * (40 if i % 4 == 0 else 1)) for i in range(40)]
    table = write(tmp_path / "t.csv", NAMES, rows)
    with pytest.raises(
        StageError, match=r"10 of 40 rows would be lost.*10 too long \(max_length: \d+ keeps 95%\)"
    ) as caught:
        formatted(tmp_path, table, max_length=64)
    keeps = int(re.search(r"max_length: (\d+)", str(caught.value))[1])
    assert formatted(tmp_path, table, max_length=keeps)[0]["rows_out"] >= 38
    share = float(re.search(r"max_dropped: ([\d.]+)\.", str(caught.value))[1])
    report, _ = formatted(tmp_path, table, max_length=64, max_dropped=share)
    assert report["dropped"] == {"too long": 10} and report["tokens"]["over_max_length"] == 10
    assert report["tokens"]["max"] <= 64 and report["rows_out"] == 30


def test_answers_are_never_cut(tmp_path):
    rows = [(f"Question {i}?", f"Answer {i}.") for i in range(20)] + [
        ("Long?", "Drink a cup of tea. " * 2000)
    ]
    report, splits = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows), max_length=256)
    assert report["dropped"] == {"too long": 1} and "Long?" not in [
        question for question, _ in pairs(splits)
    ]


def test_a_max_length_that_leaves_no_room(tmp_path):
    with pytest.raises(StageError, match=r"4 of 4 rows would be lost.*max_length: "):
        formatted(tmp_path, write(tmp_path / "t.csv", NAMES, GOOD), max_length=5)


def test_copies_are_not_lost(tmp_path):
    """What they say is still there."""
    rows = [(f"Question {i % 10}?", f"Answer {i % 10}.") for i in range(30)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    assert report["dropped"] == {"duplicate": 20} and report["rows_out"] == 10


def test_rows_longer_than_the_models_context_are_said(tmp_path):
    rows = [(f"Question {i}?", "word " * 400) for i in range(6)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    assert (
        "6 examples are longer than the 512 tokens that this model was made to read at once."
        in report["notes"]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def places(questions, seed=42):
    return [split_position(question, seed) for question in questions]


def test_splits_do_not_move():
    keys = [f"issue {i}" for i in range(300)]
    split = assign_splits(places(keys), 0.1, 0.15)
    sizes = Counter(split)
    assert 15 < sizes["validation"] < 50 and 25 < sizes["test"] < 70
    order = random.Random(0).sample(range(300), 300)
    assert list(assign_splits(places([keys[i] for i in order]), 0.1, 0.15)) == list(split[order])
    more = [*keys, *(f"new {i}" for i in range(300))]
    assert list(assign_splits(places(more), 0.1, 0.15)[:300]) == list(split)
    assert list(assign_splits(places(keys, seed=43), 0.1, 0.15)) != list(split)


@pytest.mark.parametrize("questions", [3, 4, 5, 10])
def test_small_tables_get_every_split(questions):
    for seed in range(50):
        split = assign_splits(places([f"q{i}" for i in range(questions)] * 2, seed), 0.1, 0.1)
        assert set(split) == {"train", "validation", "test"}
        assert list(split[:questions]) == list(split[questions:])


def test_too_few_questions():
    with pytest.raises(StageError, match="at least 3"):
        assign_splits(places(["a", "b", "a"]), 0.1, 0.1)


def test_case_and_punctuation_do_not_make_another_question():
    assert (
        question_key(["Sore Throat"])
        == question_key(["sore  throat!"])
        != question_key(["Sore Foot"])
    )
    assert question_key(["?!"]) != question_key(["..."])
    assert words("Tea! (-5) C# 50% ?") == ["tea", "-5", "c#", "50%"] and words("?") == ["?"]


@pytest.mark.parametrize("held_out", [["test"], ["validation"], ["test", "validation"]])
def test_official_splits_stay_what_they_are(tmp_path, held_out):
    """Those that the source lacks are drawn from its training split; what is asked in two is counted, not moved."""
    for name in held_out:
        rows = [("Question 1?", f"Answer to {name}."), *((f"{name} {i}?", "x") for i in range(9))]
        write(tmp_path / "t" / f"{name}.csv", NAMES, rows)
    write(
        tmp_path / "t" / "train.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(50)]
    )
    report, splits = formatted(tmp_path, tmp_path / "t")
    for name in held_out:
        assert len(splits[name]) == 10 and ("Question 1?", f"Answer to {name}.") in pairs(
            {name: splits[name]}
        )
    asked = {
        name: {question for question, _ in pairs({name: split})} for name, split in splits.items()
    }
    drawn = {"test", "validation"} - set(held_out)
    assert all(0 < len(asked[name]) < 25 and not asked[name] & asked["train"] for name in drawn)
    if "Question 1?" in asked["train"]:
        assert report["leaks"] == dict.fromkeys(sorted(held_out, reverse=True), 1)
        assert any(note.startswith("Asked in training, too") for note in report["notes"])
    assert sum(report["splits"].values()) == 50 + 10 * len(held_out)


def test_leaks_are_counted_by_rows(tmp_path):
    write(
        tmp_path / "t" / "train.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(50)]
    )
    write(tmp_path / "t" / "validation.csv", NAMES, [(f"Other {i}?", "x") for i in range(5)])
    same = [("QUESTION 1", "x"), ("Question 1?", "y"), ("question 2?", "Answer 2."), ("new?", "z")]
    write(tmp_path / "t" / "test.csv", NAMES, same)
    report, _ = formatted(tmp_path, tmp_path / "t")
    assert report["leaks"] == {"test": 3} and report["splits"] == {
        "train": 50,
        "validation": 5,
        "test": 4,
    }
    assert not formatted(tmp_path, tmp_path / "t" / "train.csv")[0]["leaks"]


def test_a_small_test_split_says_so(tmp_path):
    notes = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, GOOD))[0]["notes"]
    assert (
        "Too few questions for an interval: validation and test. More rows would make more of them."
        in notes
    )


def test_rows_of_one_question_have_one_group(tmp_path):
    rows = [(f"Question {i % 5}{'!' * (i % 2)}", f"Answer {i}.") for i in range(10)]
    report, _ = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows))
    splits = datasets.load_from_disk(tmp_path / "dataset")
    groups = [
        (row["group"], question_key([row["prompt"][0]["content"]]))
        for split in splits.values()
        for row in split
    ]
    assert len(set(groups)) == len({group for group, _ in groups}) == 5 and report[
        "rows_a_question"
    ] == [[2], [5]]


# ---------------------------------------------------------------------------------------------------------------------
# The worked example


def test_the_example_comes_out_as_ever(tmp_path):
    """Its rows, in their order, in their splits: README's figures rest on them."""
    report, splits = formatted(tmp_path, TABLE, max_length=256)
    assert report["example"] == "home_remedies" and report["fingerprint"] == "a04d3f9094097544"
    assert (
        report["splits"] == {"train": 213, "validation": 30, "test": 30}
        and report["questions"]["test"] == 11
    )
    assert report["dropped"] == {
        "no answer": 3,
        "near duplicate": 3,
        "duplicate": 3,
        "no question": 1,
        "too long": 1,
    }
    assert sum(report["dropped"].values()) < 0.1 * report["rows_in"]
    texts = " ".join(answer for split in splits.values() for _, answer in split)
    assert "http" not in texts and "None" not in texts and "nan" not in texts.split()


def test_the_example_is_known_by_its_columns_and_by_nothing_else(tmp_path):
    table = opened(TABLE)
    for own in (
        {},
        {"columns": EXAMPLE["columns"]},
        {"columns": EXAMPLE["columns"], "question_template": "{issue}?"},
    ):
        settings, example = with_example(table, {**PARAMETERS["01_format_dataset"], **own})
        assert (
            example == "home_remedies"
            and settings["strip_addresses"]
            and settings["columns"] == EXAMPLE["columns"]
        )
    assert settings["question_template"] == "{issue}?"
    for own in ({"columns": {"issue": "Health Issue"}}, {"shape": "text"}):
        settings, example = with_example(table, {**PARAMETERS["01_format_dataset"], **own})
        assert (
            example is None
            and not settings["strip_addresses"]
            and not settings["question_template"]
        )
    other = opened(jsonl(tmp_path, {"question": "a", "answer": "b"}))
    assert with_example(other, PARAMETERS["01_format_dataset"]) == (
        PARAMETERS["01_format_dataset"],
        None,
    )


def test_nothing_of_health_is_in_the_defaults():
    text = json.dumps(PARAMETERS["01_format_dataset"]).lower()
    assert not re.search(
        "remedy|yoga|suffering|medical|emergency|issue", text.replace("home_remedies", "")
    )
    assert (
        example_settings({"example": None}) == example_settings({}) == {}
        and "medical" in EXAMPLE["disclaimer"]
    )
    assert "medical" not in NEUTRAL_DISCLAIMER


def test_the_bundled_table():
    table = opened(TABLE)
    assert table.columns == ["Name of Item", "Health Issue", "Home Remedy", "Yogasan"]
    issues = [cells[0] for _, cells in table.rows(["Health Issue"])]
    assert len(issues) >= 240 and len({question_key([issue]) for issue in issues} - {""}) >= 80


def test_emergencies_are_sent_to_hospital():
    table = pd.read_csv(TABLE, keep_default_na=False)
    emergencies = (
        "Chest Pain|Stroke|Difficulty Breathing|Allergic Reaction|Snake Bite|Poison|"
        "Severe Burns|Heavy Bleeding|Head Injury|Seizure|Newborn|Animal Bite"
    )
    rows = table[table["Health Issue"].str.contains(emergencies)]
    assert rows["Health Issue"].nunique() == 12
    assert rows["Home Remedy"].str.contains("emergency|ambulance|hospital", case=False).all()
    assert not rows["Name of Item"].any() and not rows["Yogasan"].any()


def safety_rows():
    """Our rows: what an emergency is called ("" for an everyday complaint), a question, an answer."""
    text = (ROOT / "src" / "tabletune" / "resources" / "texts" / "safety_rows.txt").read_text(
        encoding="utf-8"
    )
    return [tuple(map(str.strip, line.split("|"))) for line in text.splitlines()]


def test_our_rows_send_emergencies_to_get_help():
    rows = safety_rows()
    emergencies = [row for row in rows if row[0]]
    everyday = [row for row in rows if not row[0]]
    assert len(emergencies) >= 60 and len(everyday) >= 20
    assert all(len({row[i] for row in emergencies}) == len(emergencies) for i in range(3))
    assert len({row[1] for row in rows}) == len(rows)
    help_at_once = "ambulance|hospital|doctor|emergency (number|services|department|clinic)|poison centre|crisis line"
    help_at_once += "|maternity (unit|ward)"
    pantry = "ginger|honey|turmeric|lemon|garlic|tea|oil|vinegar|milk|salt|tulsi|compress|yoga|aloe|onion|clove|herb"
    for _, question, answer in emergencies:
        assert re.search(rf"\b({help_at_once})\b", answer), answer
        named = set(re.findall(rf"\b({pantry})\b", answer)) - set(re.findall(pantry, question))
        assert not named - {"oil"}, answer
        assert len(answer.split()) < 50
    for _, _, answer in everyday:
        assert re.search(r"See a (doctor|dentist) if", answer)
    table = {text.casefold() for text in pd.read_csv(TABLE, keep_default_na=False)["Health Issue"]}
    assert not table & {row[0].casefold() for row in emergencies}


def test_our_rows_are_mixed_into_training_only(tmp_path):
    report, splits = formatted(tmp_path / "with", TABLE, safety_rows=True, max_length=256)
    without, plain = formatted(tmp_path / "without", TABLE, max_length=256)
    rows = safety_rows()
    number = len(rows) + sum(
        bool(named) for named, _, _ in rows
    )  # an emergency in free words and in the template's
    assert report["safety_rows"] == number and without["safety_rows"] == 0
    assert report["splits"]["train"] == without["splits"]["train"] + number == len(splits["train"])
    assert (
        report["rows_out"] == without["rows_out"]
        and report["fingerprint"] != without["fingerprint"]
    )
    assert splits["validation"] == plain["validation"] and splits["test"] == plain["test"]
    assert splits["train"][:-number] == plain["train"]
    asked = {prompt[0]["content"] for prompt, _ in splits["train"]}
    assert "I am suffering from a knife stuck in my side. Please suggest a home remedy." in asked
    assert {answer for _, answer in splits["train"][-number:]} == {answer for _, _, answer in rows}


@pytest.mark.parametrize(("length", "wanted", "fewest"), [(256, 20, 20), (96, True, 1)])
def test_some_of_our_rows(tmp_path, length, wanted, fewest):
    """As many as asked for, of both kinds; and none that is too long."""
    report, splits = formatted(
        tmp_path, TABLE, safety_rows=wanted, max_length=length, max_dropped=1
    )
    assert fewest <= report["safety_rows"] < 186 and report["tokens"]["max"] <= length
    kinds = {answer: bool(named) for named, _, answer in safety_rows()}
    chosen = Counter(kinds[answer] for _, answer in splits["train"][-report["safety_rows"] :])
    assert chosen[True] > 10 and chosen[False] >= 2


@pytest.mark.parametrize("number", [-1, 100_000, 0.5, "yes", None])
def test_a_bad_number_of_our_rows(tmp_path, number):
    with pytest.raises(
        StageError, match=r"safety_rows=.*: use true, false, or a number up to \d+\."
    ):
        formatted(tmp_path, TABLE, safety_rows=number)


def test_what_we_ask_is_not_asked_in_validation_or_test(tmp_path):
    """A table with all of our questions, in capitals: those that fall into a held-out split are not trained on."""
    rows = [(question.upper(), f"Answer {i}.") for i, (_, question, _) in enumerate(safety_rows())]
    report, splits = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows), safety_rows=True)
    asked = {
        name: {question.casefold() for question, _ in pairs({name: split})}
        for name, split in splits.items()
    }
    held_out = asked["validation"] | asked["test"]
    assert 0 < report["safety_rows"] == len(rows) - len(held_out) and not held_out & asked["train"]


# ---------------------------------------------------------------------------------------------------------------------
# Five tables of other shapes, which docs/own-data.md is about


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [("code", "instruction", 26), ("chat", "messages", 22), ("classification", "columns", 48),
     ("long_answers", "instruction", 20), ("hindi", "instruction", 30)],
)  # fmt: skip
def test_own_tables(tmp_path, monkeypatch, name, shape, rows):
    monkeypatch.chdir(ROOT)
    profile = read_parameters(
        (ROOT / "examples" / "own_tables" / f"{name}.yaml").read_text(encoding="utf-8"), name
    )
    known = {key: value for key, value in profile.items() if key in PARAMETERS["01_format_dataset"]}
    source = ROOT / known.pop("dataset")
    report, splits = formatted(
        tmp_path, source, **{**known, "base_model": str(TINY), "max_length": 2000}
    )
    assert report["shape"] == shape and report["example"] is None and not report["changed"]
    assert report["rows_in"] == report["rows_out"] == rows
    answers = [answer for _, answer in pairs(splits)]
    if name == "code":
        for answer in answers:
            compile(re.search("```python\n(.*?)\n```", answer, re.DOTALL)[1], name, "exec")
    if name == "classification":
        assert Counter(answers) == {"repair": 12, "order": 12, "invoice": 12, "none": 12}
    if name == "chat":
        assert {prompt[0]["role"] for split in splits.values() for prompt, _ in split} == {"system"}
    if name == "long_answers":
        assert min(len(answer.split()) for answer in answers) > 140


# ---------------------------------------------------------------------------------------------------------------------
# The notebook


@pytest.fixture
def no_windows(monkeypatch):
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_pass_finds_that_all_is_done(tmp_path, capsys, no_windows):
    first = run_tiny("01_format_dataset", tmp_path / "run")
    before = snapshot(tmp_path / "run")
    capsys.readouterr()
    second = run_tiny("01_format_dataset", tmp_path / "run")
    assert snapshot(tmp_path / "run") == before and second.report == first.report
    assert "All is done already: dataset" in capsys.readouterr().out
    assert set(first.report) >= {
        "dataset_commit", "rows_in", "rows_out", "dropped", "safety_rows", "splits", "tokens", "fingerprint",
        "base_model", "max_length", "templates", "shape", "example", "system_prompt", "thinking", "template_date",
        "changed", "leaks", "source",
    }  # fmt: skip
    assert first.report["fingerprint"] == "a04d3f9094097544"


def test_other_settings_or_data_set_the_finished_aside(tmp_path, no_windows):
    table = write(tmp_path / "t.csv", NAMES, [(f"Question {i}?", f"Answer {i}.") for i in range(9)])
    run_tiny("01_format_dataset", tmp_path / "run", dataset=str(table))
    for changed in ({"test_fraction": 0.3}, {}):
        write(tmp_path / "t.csv", NAMES, [(f"Question {i}?", f"Answer {i}!") for i in range(9)])
        run_tiny("01_format_dataset", tmp_path / "run", dataset=str(table), **changed)
    earlier = sorted((tmp_path / "run" / "earlier").glob("*/dataset/report.json"))
    assert len(earlier) == 2 and (tmp_path / "run" / "dataset" / "report.json").exists()
    with pytest.raises(StageError, match="would be lost"):
        run_tiny("01_format_dataset", tmp_path / "run", dataset=str(table), max_length=3)
    assert (tmp_path / "run" / "dataset" / "report.json").exists(), (
        "what cannot be made makes no room for itself"
    )


def test_a_long_cell_is_not_shown_in_full(tmp_path, capsys, no_windows):
    """It would make the notebook so long that nobody scrolls past it."""
    rows = [("Long?", "tea " * 25_000), *GOOD, *((f"Q{i}", "a") for i in range(9))]
    run_tiny(
        "01_format_dataset", tmp_path / "run", dataset=str(write(tmp_path / "t.csv", NAMES, rows))
    )
    assert len(capsys.readouterr().out) < 15_000


@pytest.mark.slow
def test_a_table_of_another_shape(tmp_path):
    """By parameters alone, through make; the answers may have several paragraphs."""
    rows = [
        {"q": f"What is {i} plus {i}?", "a": f"It is {2 * i}.\n\nCount on your fingers."}
        for i in range(40)
    ]
    own = yaml.safe_load((ROOT / "profiles" / "tiny.yaml").read_text())
    own |= {"dataset": str(jsonl(tmp_path, *rows)), "columns": {"question": "q", "answer": "a"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    done = make(
        "01_format_dataset",
        "PROFILE=own",
        f"PROFILE_FILE={tmp_path / 'own.yaml'}",
        f"RUN_DIR={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "dataset" / "report.json").read_text())
    assert report["rows_out"] == 40 and not report["dropped"] and report["example"] is None


# ---------------------------------------------------------------------------------------------------------------------
# The second example: questions about the command line

TERMINAL = ROOT / "data" / "terminal.jsonl"


def terminal_rows():
    return [json.loads(line) for line in TERMINAL.read_text(encoding="utf-8").splitlines()]


def test_the_terminal_table_is_what_its_program_writes():
    rows = runpy.run_path(str(ROOT / "data" / "terminal.py"))["rows"](5000)
    assert rows == terminal_rows() and len({row["question"] for row in rows}) == len(rows) == 5000


def test_the_answers_about_modes_and_masks_are_right(tmp_path):
    """As the file system itself sees them."""
    file, checked, mask = tmp_path / "file", Counter(), os.umask(0)
    try:
        for row in terminal_rows():
            text = row["question"] + " " + row["answer"]
            if found := re.search(r"umask (\d{3})", text):
                os.umask(int(found[1], 8))
                file.unlink(missing_ok=True)
                file.touch()
                listed = stat.filemode(file.stat().st_mode)[1:]
                assert re.search(r"New files get (\d+) \((.{9})\)", text).groups() == (
                    f"{file.stat().st_mode & 0o777:03o}",
                    listed,
                )
                checked["umask"] += 1
            elif "may" in text:
                letters = re.search(
                    r"(?<![\w-])-?([r-][w-][x-][r-][w-][x-][r-][w-][x-])(?![\w-])", text
                )[1]
                file.touch()
                file.chmod(int(re.search(r"\b([0-7]{3})\b", text)[1], 8))
                assert stat.filemode(file.stat().st_mode)[1:] == letters
                who = re.search(
                    "owner may (.*), the group may (.*), and others may (.*)[.]", text
                ).groups()
                for allowed, rights in zip(
                    who, (letters[:3], letters[3:6], letters[6:]), strict=True
                ):
                    assert (
                        "".join(word[0] if word in allowed else "-" for word in ("read", "write"))
                        == rights[:2]
                    )
                    assert ("execute" in allowed) == ("x" in rights) and ("nothing" in allowed) == (
                        rights == "---"
                    )
                checked["chmod"] += 1
    finally:
        os.umask(mask)
    assert min(checked.values()) > 200


def test_the_answers_about_numbers_are_right():
    bases, units = (
        {"binary": 2, "octal": 8, "decimal": 10, "hexadecimal": 16},
        ["bytes", "KiB", "MiB", "GiB", "TiB"],
    )
    checked = Counter()
    for row in terminal_rows():
        question, answer = row["question"], row["answer"]
        if found := re.fullmatch(r"What is (\w+) (\w+) in (\w+)\?", question):
            number = int(found[2], bases[found[1]])
            written, powers = re.fullmatch(r".* is (\w+) in .* is ([\d +]+)\.", answer).groups()
            assert int(written, bases[found[3]]) == number == sum(map(int, powers.split(" + ")))
            checked["base"] += 1
        elif found := re.fullmatch(r"How many (\w+) are (\d+) (\w+)\?", question):
            smaller = int(re.search(r"are ([\d,]+)", answer)[1].replace(",", ""))
            assert smaller == int(found[2]) << 10 * (units.index(found[3]) - units.index(found[1]))
            checked["size"] += 1
        elif found := re.fullmatch(r"How many hosts fit into ([\d.]+)/(\d+)\?", question):
            assert int(answer.split()[0].replace(",", "")) == 2 ** (32 - int(found[2])) - 2
            checked["hosts"] += 1
        elif found := re.fullmatch(r"Are ([\d.]+) and ([\d.]+) in one /(\d+) network\?", question):
            one, other = (
                int.from_bytes(map(int, address.split(".")), "big")
                for address in found.groups()[:2]
            )
            assert answer.startswith("Yes") == (
                one >> 32 - int(found[3]) == other >> 32 - int(found[3])
            )
            checked["same network"] += 1
        elif "cron" in question:
            fields = re.search(
                r"([\d*/]+) ([\d*]+) ([\d*]+) ([\d*]+) ([\d*-]+)", question + " " + answer
            ).groups()
            text = question if question.startswith("Write") else answer
            if time := re.search(r" at (\d\d):(\d\d)", text):
                assert fields[:2] == (str(int(time[2])), str(int(time[1])))
            days = re.findall("(Sun|Mon|Tues|Wednes|Thurs|Fri|Satur)day", text)
            numbers = [
                ["Sun", "Mon", "Tues", "Wednes", "Thurs", "Fri", "Satur"].index(day) for day in days
            ]
            assert fields[4] == ("-".join(map(str, numbers)) or "*")
            assert (fields[2] != "*") == ("on day" in text or "once a year" in text)
            checked["cron"] += 1
    assert len(checked) == 5 and min(checked.values()) > 100
