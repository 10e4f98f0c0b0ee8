"""The loss mask of conversations: each answer and its stop token, whatever the answers are."""

import pytest
from base_models import BASES, cached
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tabletune.chat.encoding import earlier_answer_spans, encode
from tabletune.chat.markers import break_markers, special_markers
from tabletune.chat.templates import render
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.errors import StageError

# one of each kind of template
TEMPLATES = ["llama", "llama_tied", "qwen2", "qwen3", "r1", "gemma", "gemma4", "phi3", "dated"]
TEMPLATES += ["gpt_oss", "granite_hybrid", "deepseek_v3", "gpt_neox", "bare"]
# parts of templates, of questions and of each other, no letters, several lines, private-use
# characters
ANSWERS = ["a", "d", "1", "s", "user", "assistant", "model", "turn", "im", "os", "end", "start"]
ANSWERS += ["<", "|", "_", "!", "½", "🙂", "- -", "a a", "A\n\na", "What helps?", "Tea.", "\ue000"]
QUESTIONS = ["What helps?", "a", "1", "And then? assistant", "Say: d", "<"]
TURNS = st.lists(
    st.tuples(st.sampled_from(QUESTIONS), st.sampled_from(ANSWERS)), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def loaded():
    """A function that gives the tokenizer and the stop tokens of a base model, each loaded once."""
    tokenizers = {}

    def load(name):
        if name not in tokenizers:
            tokenizers[name] = load_tokenizer(str(cached(name)))
        return tokenizers[name]

    return load


def conversation(turns):
    """An example of (question, answer) pairs: the last answer is the completion."""
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def learned(example, tokenizer, stop_token_ids):
    """The parts of an example that are in the loss, as lists of token ids, and where each
    begins.
    """
    encoded = encode(example, tokenizer, stop_token_ids)
    parts, starts = [], []
    for position, (token_id, in_loss) in enumerate(
        zip(encoded["input_ids"], encoded["completion_mask"], strict=True)
    ):
        if not in_loss:
            continue
        if not position or not encoded["completion_mask"][position - 1]:
            parts.append([])
            starts.append(position)
        parts[-1].append(token_id)
    return parts, starts, encoded["input_ids"]


def without_spaces(text):
    return "".join(text.split())


@pytest.mark.parametrize("name", TEMPLATES)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=TURNS)
def test_the_loss_is_on_the_answers_of_all_turns(loaded, name, turns):
    tokenizer, stop_token_ids = loaded(name)
    parts, _, _ = learned(conversation(turns), tokenizer, stop_token_ids)
    texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in parts]
    assert texts == [answer for _, answer in turns]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=TURNS)
def test_what_is_before_an_answer_is_what_the_template_opens_it_with(loaded, name, turns):
    """Prefix by prefix: the conversation up to an answer, rendered by itself, ends where the loss
    begins.
    """
    tokenizer, stop_token_ids = loaded(name)
    example = conversation(turns)
    _, starts, ids = learned(example, tokenizer, stop_token_ids)
    for turn, start in enumerate(starts[:-1]):
        messages = [*example["prompt"][: 2 * turn + 1], {"role": "assistant", "content": "\ue001"}]
        before = render(messages, tokenizer, False).partition("\ue001")[0]
        before = before.replace("<think>\n\n</think>\n\n", "")  # Qwen3 writes it into the last turn
        assert without_spaces(tokenizer.decode(ids[:start])) == without_spaces(before)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "gpt_oss"])
def test_each_answer_ends_with_its_stop_token(loaded, name):
    tokenizer, stop_token_ids = loaded(name)
    parts, _, _ = learned(
        conversation([("What helps?", "a"), ("a", "d"), ("d", "a")]), tokenizer, stop_token_ids
    )
    assert [part[-1] in stop_token_ids for part in parts] == [True, True, True]


def test_an_earlier_turn_without_stop_token_learns_no_other_turns(loaded):
    """gpt-oss ends earlier turns with <|end|>, at which it does not stop; a later turn's stop is
    not theirs.
    """
    tokenizer, stop_token_ids = loaded("gpt_oss")
    stop_token_ids = [tokenizer.convert_tokens_to_ids("<|return|>")]
    parts, _, _ = learned(conversation([("a", "yes"), ("b", "no")]), tokenizer, stop_token_ids)
    assert [tokenizer.decode(part) for part in parts] == ["yes", "no<|return|>"]


@pytest.mark.parametrize(
    ("name", "answer", "written"),
    [("gpt_neox", "a", "a<|im_end|>"), ("dated", "d", "d<|eot_id|>")],
)
def test_an_answer_that_occurs_in_a_header(loaded, name, answer, written):
    """ "a" is in <|im_start|>assistant, and "d" in <|end_header_id|>."""
    tokenizer, stop_token_ids = loaded(name)
    parts, _, _ = learned(conversation([("Hi", answer), ("Hi", "no")]), tokenizer, stop_token_ids)
    assert tokenizer.decode(parts[0]) == written


def test_thoughts_that_the_template_drops_are_not_looked_for(loaded):
    tokenizer, stop_token_ids = loaded("qwen3")
    turns = [("Hi", "<think>\nHm.\n</think>\n\na"), ("Hi", "no")]
    parts, _, _ = learned(conversation(turns), tokenizer, stop_token_ids)
    assert tokenizer.decode(parts[0]) == "a<|im_end|>"


def test_an_earlier_answer_without_text_is_not_learned(loaded):
    tokenizer, stop_token_ids = loaded("gpt_neox")
    parts, _, _ = learned(conversation([("Hi", "  "), ("Hi", "no")]), tokenizer, stop_token_ids)
    assert len(parts) == 1


@pytest.mark.parametrize(
    ("flags", "texts"),
    [("", ["one", "two", "three"]), ("0 1", ["two", "three"]), ("0 0", ["three"])],
)
def test_answers_that_are_flagged_are_left_out(loaded, flags, texts):
    tokenizer, stop_token_ids = loaded("qwen2")
    example = conversation([("a", "one"), ("b", "two"), ("c", "three")])
    parts, _, _ = learned({**example, "learned": flags}, tokenizer, stop_token_ids)
    assert [tokenizer.decode(part, skip_special_tokens=True) for part in parts] == texts


def test_a_template_that_writes_an_answer_otherwise_is_refused(loaded):
    tokenizer, _ = load_tokenizer(str(cached("gpt_neox")))
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content | upper")
    example = conversation([("Hi", "yes"), ("Hi", "no")])
    with pytest.raises(StageError, match="changes an earlier answer: 'yes'"):
        earlier_answer_spans(example, render(example["prompt"], tokenizer), tokenizer)


def test_markers_follow_a_template_that_is_set_later():
    """A cache that knew the tokenizer alone would go on with the markers of the old template."""
    tokenizer, _ = load_tokenizer(str(cached("gpt_neox")))
    assert "[INST]" not in special_markers(tokenizer)
    tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
    assert break_markers("[INST]", tokenizer) == "[ INST]"


def test_every_kind_of_template_is_among_those_tried():
    assert set(TEMPLATES) <= set(BASES)
