"""data.rendered."""

import pytest
from table_helpers import CITIES, conversation_of, formatted, jsonl

from tabletune.data.rendered import turns_of_rendered_text, unread_marker
from tabletune.errors import StageError

ASKED = [("user", "Where is Lima?"), ("assistant", "Lima is a city.")]
RENDERED = {
    "ChatML": "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n",
    "Llama 2": "<s>[INST] {q} [/INST] {a} </s>",
    "Mistral": "[INST] {q} [/INST]{a}</s>",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{a}<|eot_id|>",
    "Gemma": "<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n{a}<end_of_turn>\n",
    "Phi": "<|user|>\n{q}<|end|>\n<|assistant|>\n{a}<|end|>",
    "Zephyr": "<|user|>\n{q}</s>\n<|assistant|>\n{a}</s>",
    "OpenAssistant": "<|prompter|>{q}<|endoftext|><|assistant|>{a}<|endoftext|>",
    "Guanaco": "### Human: {q}### Assistant: {a}",
    "Guanaco in lines": "### Human: {q}\n### Assistant: {a}",
    "Anthropic": "\n\nHuman: {q}\n\nAssistant: {a}",
    "Vicuna": "USER: {q} ASSISTANT: {a}</s>",
    "Alpaca": "### Instruction:\n{q}\n\n### Response:\n{a}",
}


@pytest.mark.parametrize("form", RENDERED)
def test_rendered_rows_are_read_as_turns(tmp_path, form):
    def row(city):
        text = RENDERED[form].format(q=f"Where is {city}?", a=f"{city} is a city.")
        return {"text": text}

    assert conversation_of(tmp_path, row) == ASKED


def test_system_texts_and_several_turns_are_read():
    text = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>"
    roles = [turn["role"] for turn in turns_of_rendered_text(text)]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    text = "Below is an instruction.\n\n### Instruction:\na\n\n### Input:\nb\n\n### Response:\nc"
    assert [turn["content"] for turn in turns_of_rendered_text(text)] == [
        "Below is an instruction.",
        "a\n\nb",
        "c",
    ]


@pytest.mark.parametrize(
    "text",
    ["Plain words.", "Q: a\nA: b", "Human: hello", "What does [INST] mean?", "# Instruction", ""],
)
def test_other_texts_are_no_conversations(text):
    assert turns_of_rendered_text(text) is None
    assert unread_marker(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
        "<|im_start|>user\n{}<|im_end|>",
    ],
)
def test_rendered_rows_that_cannot_be_read_are_refused(tmp_path, text):
    rows = [{"text": text.format(city)} for city in CITIES]
    with pytest.raises(
        StageError, match="'text' contains texts that a chat template has already rendered"
    ):
        formatted(tmp_path, jsonl(tmp_path, *rows), shape="text")


def test_rendered_questions_are_refused(tmp_path):
    rows = [{"prompt": f"[INST] {city}? [/INST]", "completion": f"{city}."} for city in CITIES]
    with pytest.raises(
        StageError, match="'prompt' contains texts that a chat template has already rendered"
    ):
        formatted(tmp_path, jsonl(tmp_path, *rows))


def test_text_beside_a_question_and_an_answer_is_not_used(tmp_path):
    """Alpaca's own table has such a column."""

    def row(city):
        text = RENDERED["Alpaca"].format(q="x", a=city)
        return {
            "instruction": f"Where is {city}?",
            "input": "",
            "output": f"{city} is a city.",
            "text": text,
        }

    assert conversation_of(tmp_path, row) == ASKED
