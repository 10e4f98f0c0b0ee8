"""data.turns."""

import json
import re

import datasets
import pytest
from conftest import TINY
from table_helpers import (
    CITIES,
    TURNS,
    chats,
    conversation_of,
    conversations_of,
    formatted,
    jsonl,
    pairs,
    tokenizer_of,
)

from tabletune.chat.encoding import encode
from tabletune.errors import StageError


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
    assert report["shape"] == "messages"
    assert [turn["role"] for turn in prompt] == [
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
    assert report["changed"]["turns after the last answer"]["rows"] == 2
    assert (
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


ASKED = [("user", "Where is Lima?"), ("assistant", "Lima is a city.")]


def asked(city):
    return f"Where is {city}?", f"{city} is a city."


def turns_of(city, role="role", content="content", names=("user", "assistant")):
    question, answer = asked(city)
    return [{role: names[0], content: question}, {role: names[1], content: answer}]


FORMS = {
    "role and content": lambda c: {"messages": turns_of(c)},
    "from and value": lambda c: {"conversations": turns_of(c, "from", "value", ("human", "gpt"))},
    "turns with text": lambda c: {"messages": turns_of(c, content="text")},
    "speaker and text": lambda c: {"dialog": turns_of(c, "speaker", "text", ("user", "bot"))},
    "author and message": lambda c: {
        "chat": turns_of(c, "author", "message", ("customer", "agent"))
    },
    "speaker SYSTEM as in MultiWOZ": lambda c: {
        "turns": turns_of(c, "speaker", "utterance", ("USER", "SYSTEM"))
    },
    "Gemini": lambda c: {
        "contents": [
            {"role": "user", "parts": [{"text": asked(c)[0]}]},
            {"role": "model", "parts": [{"text": asked(c)[1]}]},
        ]
    },
    "Anthropic": lambda c: {
        "messages": [
            {"role": "user", "content": asked(c)[0]},
            {"role": "assistant", "content": [{"type": "text", "text": asked(c)[1]}]},
        ]
    },
    "parts with value": lambda c: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": asked(c)[0]}]},
            {"role": "assistant", "content": [asked(c)[1]]},
        ]
    },
    "LIMA": lambda c: {"conversations": list(asked(c)), "source": "x"},
    "pairs of texts": lambda c: {"conversations": [list(asked(c))]},
    "pairs of turns": lambda c: {"messages": [turns_of(c)]},
    "human and assistant": lambda c: {
        "conversations": [{"human": asked(c)[0], "assistant": asked(c)[1]}]
    },
    "questions and answers": lambda c: {
        "conversations": [{"input": asked(c)[0], "output": asked(c)[1]}]
    },
    "an object of lists": lambda c: {
        "messages": {"role": ["user", "assistant"], "content": list(asked(c))}
    },
    "an object with messages": lambda c: {"data": {"messages": turns_of(c)}},
    "JSON in a text": lambda c: {"messages": json.dumps(turns_of(c))},
    "columns human and assistant": lambda c: {"human": asked(c)[0], "assistant": asked(c)[1]},
    "null fields": lambda c: {"messages": [{**t, "tool_calls": None} for t in turns_of(c)]},
    "metadata": lambda c: {"messages": [{**t, "id": 7, "timestamp": "x"} for t in turns_of(c)]},
    "history of pairs": lambda c: {
        "instruction": asked(c)[0],
        "output": asked(c)[1],
        "history": [],
    },
    "chosen and rejected": lambda c: {
        "rejected": [turns_of(c)[0], {"role": "assistant", "content": "no"}],
        "chosen": turns_of(c),
    },
    "prompt, chosen and rejected": lambda c: {
        "prompt": asked(c)[0],
        "rejected": "On the moon.",
        "chosen": asked(c)[1],
    },
    "a prompt and chosen messages": lambda c: {
        "prompt": asked(c)[0],
        "chosen": turns_of(c)[1:],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "OpenAI's preferences": lambda c: {
        "input": {"messages": turns_of(c)[:1]},
        "preferred_output": turns_of(c)[1:],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    },
    "a prompt and a completion of messages": lambda c: {
        "prompt": asked(c)[0],
        "completion": turns_of(c)[1:],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_are_read_in_every_form(tmp_path, form):
    assert conversation_of(tmp_path, FORMS[form]) == ASKED


@pytest.mark.parametrize(
    "history",
    [
        [["a", "b"]],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        '[["a", "b"]]',
    ],
)
def test_history_is_read_in_every_form(tmp_path, history):
    turns = conversation_of(
        tmp_path, lambda c: {"question": asked(c)[0], "answer": asked(c)[1], "history": history}
    )
    assert turns == [("user", "a"), ("assistant", "b"), *ASKED]


def test_system_instruction_of_gemini(tmp_path):
    turns = conversation_of(
        tmp_path,
        lambda c: {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be kind."}]},
            **FORMS["Gemini"](c),
        },
    )
    assert turns == [("system", "Be kind."), *ASKED]


def test_history_comes_before_the_question(tmp_path):
    turns = conversation_of(
        tmp_path,
        lambda c: {
            "instruction": "And how many live there?",
            "output": f"Many in {c}.",
            "history": [list(asked(c))],
        },
    )
    assert turns == [*ASKED, ("user", "And how many live there?"), ("assistant", "Many in Lima.")]


@pytest.mark.parametrize("content", [4, 4.5, True])
def test_content_that_is_no_text_is_read_as_text(tmp_path, content):
    def row(city):
        return {"messages": [turns_of(city)[0], {"role": "assistant", "content": content}]}

    assert conversation_of(tmp_path, row)[-1] == ("assistant", json.dumps(content))


def test_content_keeps_the_text_of_a_number(tmp_path):
    lines = [
        f'{{"messages": [{{"role": "user", "content": "{city}?"}}, {{"role": "assistant", "content": 1.50}}]}}'
        for city in CITIES
    ]
    (tmp_path / "n.jsonl").write_text("\n".join(lines))
    _, splits = formatted(tmp_path, tmp_path / "n.jsonl")
    assert {answer for _, answer in pairs(splits)} == {"1.50"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("emotion", "happy"),
        ("refusal", "I cannot."),
        ("images", ["a.png"]),
        ("prefix", True),
        ("weight", 0.5),
        ("loss_weight", 2),
    ],
)
def test_key_that_is_not_understood_is_refused_by_name(tmp_path, key, value):
    rows = [{"messages": [turns_of(city)[0], {**turns_of(city)[1], key: value}]} for city in CITIES]
    with pytest.raises(StageError, match=f"A turn has (the key )?'?{key}"):
        formatted(tmp_path, jsonl(tmp_path, *rows))
    assert conversations_of(tmp_path, *rows, ignore_turn_keys=[key])[0][-1][0] == "assistant"


def test_keys_that_are_left_out_are_noted(tmp_path):
    rows = [{"messages": [{**turn, "timestamp": 1} for turn in turns_of(c)]} for c in CITIES]
    report, _ = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert "Keys of turns that nothing is learned from: timestamp (24)." in report["notes"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_refused_until_it_is_said_what_becomes_of_it(tmp_path, key):
    rows = [{"messages": [turns_of(c)[0], {**turns_of(c)[1], key: "Hm."}]} for c in CITIES]
    with pytest.raises(StageError, match=f"{key}.*thinking: true.*ignore_turn_keys"):
        formatted(tmp_path, jsonl(tmp_path, *rows))
    turns = conversations_of(tmp_path, *rows, ignore_turn_keys=[key])[0]
    assert "Hm." not in str(turns)
    answer = conversations_of(tmp_path, *rows, thinking=True)[0][-1][1]
    assert answer.startswith("<think>\nHm.\n</think>\n\n")


def learned_texts(folder, *rows, **parameters):
    """What is in the loss of the first training row, decoded."""
    formatted(folder, jsonl(folder, *rows), **parameters)
    example = datasets.load_from_disk(folder / "dataset")["train"][0]
    tokenizer, stops = tokenizer_of(TINY)
    encoded = encode(example, tokenizer, stops)
    pairs_ = zip(encoded["input_ids"], encoded["completion_mask"], strict=True)
    return tokenizer.decode([token for token, in_loss in pairs_ if in_loss])


def two_answers(city, first=None, second=None):
    question, answer = asked(city)
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "WRONG", **(first or {})},
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": answer, **(second or {})},
        ]
    }


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": "0"},
        {"loss_weight": 0.0},
        {"loss": False},
        {"train": False},
        {"training": "false"},
        {"trainable": False},
        {"masked": True},
    ],
)
def test_answer_that_is_not_to_be_learned_is_only_read(tmp_path, flag):
    rows = [two_answers(city, flag) for city in CITIES]
    assert "WRONG" not in learned_texts(tmp_path, *rows)
    assert "WRONG" in learned_texts(tmp_path, *(two_answers(city) for city in CITIES))
    assert "WRONG" in conversations_of(tmp_path, *rows)[0][1][1], "but it is still in the prompt"


def test_turns_after_the_last_learned_answer_are_cut_off(tmp_path):
    rows = [two_answers(city, {"weight": 1}, {"weight": 0}) for city in CITIES]
    assert {turns[-1][1] for turns in conversations_of(tmp_path, *rows)} == {"WRONG"}
    nothing = [two_answers(city, {"weight": 0}, {"weight": 0}) for city in CITIES]
    with pytest.raises(StageError, match="12 no answer"):
        formatted(tmp_path, jsonl(tmp_path, *nothing))


def test_loss_on_the_last_answer_alone(tmp_path):
    rows = [two_answers(city) for city in CITIES]
    learned = learned_texts(tmp_path, *rows, loss_on_last_answer=True)
    assert "WRONG" not in learned
    assert "is a city." in learned


def test_weights_change_the_fingerprint(tmp_path):
    """The texts are the same, but what is learned of them is not."""
    one, _ = formatted(tmp_path, jsonl(tmp_path, *(two_answers(c) for c in CITIES)))
    rows = [two_answers(city, {"weight": 0}) for city in CITIES]
    other, _ = formatted(tmp_path, jsonl(tmp_path, *rows))
    assert one["fingerprint"] != other["fingerprint"]


def test_speakers_with_names_of_their_own(tmp_path):
    rows = [{"dialog": turns_of(c, "speaker", "text", ("Alice", "Bob"))} for c in CITIES]
    with pytest.raises(StageError, match=r"a turn of an unknown role.*roles: {"):
        formatted(tmp_path, jsonl(tmp_path, *rows))
    roles = {"Alice": "user", "Bob": "assistant"}
    assert conversations_of(tmp_path, *rows, roles=roles)[6] == ASKED


@pytest.mark.parametrize("kind", ["image", "image_url", "audio", "document"])
def test_parts_that_are_no_text_are_named(tmp_path, kind):
    part = {"type": kind, "text": None}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": city}]},
                TURNS[1],
            ]
        }
        for city in CITIES
    ]
    with pytest.raises(StageError, match=f"12 a turn with a part of the type '{kind}'"):
        formatted(tmp_path, jsonl(tmp_path, *rows))


@pytest.mark.parametrize("system", [[{"type": "text", "text": "Be kind."}], "Be kind."])
def test_system_column_may_be_a_list_of_parts(tmp_path, system):
    rows = [{"messages": turns_of(city), "system": system} for city in CITIES]
    assert conversations_of(tmp_path, *rows)[0][0] == ("system", "Be kind.")


def test_turn_with_two_texts_is_refused(tmp_path):
    rows = [{"messages": [{**t, "text": "other"} for t in turns_of(city)]} for city in CITIES]
    with pytest.raises(StageError, match="A turn has a text under 'content' and 'text'"):
        formatted(tmp_path, jsonl(tmp_path, *rows))
