"""data.pipeline."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import base_models
import pytest
from conftest import ROOT, TINY
from hypothesis import given
from hypothesis import strategies as st
from table_helpers import (
    NAMES,
    TURNS,
    chats,
    examples,
    formatted,
    jsonl,
    pairs,
    tokenizer_of,
    write,
)

from tabletune.chat.encoding import encode
from tabletune.chat.markers import break_markers
from tabletune.chat.tokenizer import special_ids


def write_many(path, number):
    """A table of so many rows, in the columns of the bundled one: a third as many questions, 30 of
    2,000 words each.
    """
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
        sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests" / "data")!r}]
        from table_helpers import formatted
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


def test_system_prompt_is_for_rows_that_have_none(tmp_path):
    rows = [*chats(3), *({"messages": chat["messages"][1:]} for chat in chats(6)[3:])]
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), system_prompt="Be kind.")
    said = [prompt[0] for split in splits.values() for prompt, _ in split]
    assert report["system_prompt"] == "Be kind."
    assert not any("system role" in note for note in report["notes"])
    assert Counter(turn["content"] for turn in said) == {"Be a parrot.": 3, "Be kind.": 3}
    columns = [
        {"question": f"q{i}", "answer": "a", "system": "Own." if i else ""} for i in range(4)
    ]
    _, splits = formatted(tmp_path, jsonl(tmp_path, *columns), system_prompt="Be kind.")
    assert Counter(prompt[0]["content"] for split in splits.values() for prompt, _ in split) == {
        "Own.": 3,
        "Be kind.": 1,
    }


def test_system_text_goes_before_the_question_without_a_system_role(tmp_path):
    """It would refuse the row; so the text goes in front of the first question, and that is
    said.
    """
    report, splits = formatted(tmp_path, jsonl(tmp_path, *chats()), base_models.cached("gemma"))
    assert any("no system role" in note for note in report["notes"])
    assert report["rows_out"] == 6
    assert {prompt[0]["content"][:-2] for split in splits.values() for prompt, _ in split} == {
        "Be a parrot.\n\nSay "
    }


def with_system_turn(text, **columns):
    """Rows whose turns begin with a system turn."""
    turn = {"role": "system", "content": text}
    return [{"messages": [turn, *chat["messages"][1:]], **columns} for chat in chats()]


def first_messages(splits):
    """The texts of the first messages of all prompts."""
    return {prompt[0]["content"] for split in splits.values() for prompt, _ in split}


def test_an_empty_system_turn_leaves_the_place_to_the_system_prompt(tmp_path):
    table = jsonl(tmp_path, *with_system_turn(""))
    _, splits = formatted(tmp_path, table, system_prompt="Be kind.")
    assert first_messages(splits) == {"Be kind."}


def test_an_empty_system_turn_leaves_the_place_to_the_system_column(tmp_path):
    _, splits = formatted(tmp_path, jsonl(tmp_path, *with_system_turn("", system="Own.")))
    assert first_messages(splits) == {"Own."}


def test_system_column_and_system_turn_are_both_kept(tmp_path):
    _, splits = formatted(tmp_path, jsonl(tmp_path, *with_system_turn("Turn.", system="Own.")))
    assert first_messages(splits) == {"Own.\n\nTurn."}


def test_system_column_that_repeats_the_system_turn_is_kept_once(tmp_path):
    _, splits = formatted(tmp_path, jsonl(tmp_path, *with_system_turn("Own.", system="Own.")))
    assert first_messages(splits) == {"Own."}


def test_an_empty_system_turn_adds_no_blank_lines_without_a_system_role(tmp_path):
    table = jsonl(tmp_path, *with_system_turn(""))
    report, splits = formatted(tmp_path, table, base_models.cached("gemma"))
    assert report["rows_out"] == 6
    assert all(text.startswith("Say ") for text in first_messages(splits))


def test_refused_conversation_is_dropped_and_counted(tmp_path):
    """Gemma's wants turns in strict order."""
    broken = {"messages": [TURNS[0], TURNS[0], TURNS[1]]}
    report, _ = formatted(
        tmp_path, jsonl(tmp_path, *chats(12), broken), base_models.cached("gemma")
    )
    assert report["dropped"] == {"refused by the chat template": 1}
    assert formatted(tmp_path, jsonl(tmp_path, *chats(12), broken))[0]["dropped"] == {}


def test_lone_text_is_all_in_the_loss(tmp_path):
    report, splits = formatted(
        tmp_path, jsonl(tmp_path, *({"text": f"Q: {i}+{i}?\nA: {2 * i}"} for i in range(12)))
    )
    assert any("the loss is on the whole text" in note for note in report["notes"])
    tokenizer, stops = tokenizer_of(TINY)
    prompt, text = splits["train"][0]
    encoded = encode(
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}]}, tokenizer, stops
    )
    assert prompt == []
    assert set(encoded["completion_mask"]) == {1}
    assert encoded["input_ids"][-1] in stops


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


def test_marker_of_two_cells_is_broken_up(tmp_path):
    rows = [{"q": f"Q{i}", "left": "<", "right": "/s> more"} for i in range(5)]
    templates = {"question_template": "{q}", "answer_template": "{left}{right}"}
    report, splits = formatted(tmp_path, jsonl(tmp_path, *rows), **templates)
    assert {answer for _, answer in pairs(splits)} == {"< /s> more"}
    assert report["changed"]["special tokens broken up"]["rows"] == 5


def test_answers_are_never_cut(tmp_path):
    rows = [(f"Question {i}?", f"Answer {i}.") for i in range(20)] + [
        ("Long?", "Drink a cup of tea. " * 2000)
    ]
    report, splits = formatted(tmp_path, write(tmp_path / "t.csv", NAMES, rows), max_length=256)
    assert report["dropped"] == {"too long": 1}
    assert "Long?" not in [question for question, _ in pairs(splits)]
