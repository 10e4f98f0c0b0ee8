"""data.turns."""

import re

from conftest import TINY
from table_helpers import TURNS, chats, formatted, jsonl, pairs, tokenizer_of

from tabletune.chat.encoding import encode


def test_every_answer_is_in_the_loss(tmp_path):
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


def test_conversations_that_cannot_teach_are_dropped(tmp_path):
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


def test_prompt_and_completion_of_messages(tmp_path):
    rows = [
        {"prompt": chat["messages"][:-1], "completion": chat["messages"][-1:]} for chat in chats()
    ]
    assert (
        formatted(tmp_path, jsonl(tmp_path, *rows))[1]
        == formatted(tmp_path, jsonl(tmp_path, *chats()))[1]
    )
