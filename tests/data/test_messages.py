"""What is read of a turn, above all the model's thinking, which can stand in many places."""

import pytest

from tabletune.data.messages import TurnOptions, messages_in, read_content
from tabletune.errors import StageError

THINKING = TurnOptions(thinking=True)
PARTS = [{"type": "thinking", "thinking": "Hm."}]


def answer_of(options, **turn):
    """The text of an answer with more keys."""
    turn = {"role": "assistant", "content": "Yes."} | turn
    (message,) = messages_in([turn], str.strip, options)
    return message["content"]


def test_two_keys_with_different_thinking_are_refused():
    message = "different thinking under 'reasoning_content' and 'reasoning'"
    with pytest.raises(StageError, match=message):
        answer_of(THINKING, reasoning_content="a", reasoning="b")


def test_the_same_thinking_under_two_keys_is_read_once():
    text = answer_of(THINKING, reasoning_content="a", reasoning="a")
    assert text == "<think>\na\n</think>\n\nYes."


@pytest.mark.parametrize(
    "reasoning",
    [
        PARTS,
        [{"type": "text", "text": "Hm."}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}],
        [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]}],
        ["Hm."],
    ],
)
def test_thinking_that_is_a_list_of_parts_is_read(reasoning):
    assert answer_of(THINKING, reasoning=reasoning) == "<think>\nHm.\n</think>\n\nYes."


def test_thinking_that_is_a_list_of_parts_is_refused_like_a_text():
    with pytest.raises(StageError, match=r"The turns have 'reasoning'.*thinking: true"):
        answer_of(TurnOptions(), reasoning=PARTS)


def test_thinking_in_the_content_can_be_ignored_as_the_message_says():
    content = [*PARTS, {"type": "text", "text": "Yes."}]
    with pytest.raises(StageError, match=r"ignore_turn_keys: \[thinking\]"):
        answer_of(TurnOptions(), content=content)
    assert answer_of(TurnOptions(ignore_turn_keys=("thinking",)), content=content) == "Yes."


def test_thinking_in_two_parts_is_read_on_two_lines():
    assert read_content([*PARTS, {"type": "thinking", "thinking": "So."}]).reasoning == "Hm.\nSo."


def test_thinking_of_a_user_is_noted():
    options = TurnOptions()
    messages_in([{"role": "user", "content": "Why?", "reasoning": "Hm."}], str.strip, options)
    assert options.left_out == {"reasoning": 1}
