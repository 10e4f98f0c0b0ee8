"""From messages to token ids, and back.

What the model reads, and which tokens count in the loss; and what a person reads of the ids that a
model wrote, and whether its answer stopped (`answer_text`).

One rule holds for every chat template: the prompt at inference is, token by token, the beginning of
the training example. So the ids of an example are the ids of its prompt, up to where the template
opens the answer, followed by the answer and the token that ends the turn.
"""

import json
from html import escape
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabletune.chat.caching import cached_per_template
from tabletune.chat.templates import MARK, USER, around, render, thinking_is_on
from tabletune.chat.tokenizer import special_ids
from tabletune.errors import StageError

THOUGHT_END = "</think>"

Messages = list[dict[str, Any]]


def encode_prompt(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None = None
) -> list[int]:
    """Token ids of messages up to where the answer begins.

    Without messages these are the ids that the tokenizer puts before a text.
    """
    if messages:
        text = render(messages, tokenizer, True, tools)
        # the template has written BOS already: the tokenizer would put a second one before it
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    first_ids = tokenizer("")["input_ids"][:1]
    return first_ids if first_ids == [tokenizer.bos_token_id] else []


def encode(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> dict[str, list]:
    """Token ids of a conversation and its loss mask.

    `input_ids` and `completion_mask`, lists of equal length. `example` has `prompt`, the messages
    up to the last answer, `completion`, that answer as a list of one message, and perhaps `tools`
    as a JSON text. The mask is 1 for the answers of all turns, each with the stop token that ends
    it, and 0 elsewhere. `learned` may leave out earlier answers: "1 0" are a flag for each of them,
    "" means all. Without a prompt the completion is a plain text, all of it in the loss. Raises
    StageError if the template cannot be used.
    """
    return encode_all([example], tokenizer, stop_token_ids)[0]


def encode_all(
    examples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> list[dict[str, list]]:
    """`encode` for many examples: their texts are tokenized in one call."""
    if not examples:
        return []
    texts = [prompt_and_completion(example, tokenizer) for example in examples]
    prompts = [prompt for prompt, _ in texts]
    # Prompt and conversation are tokenized apart, to see where the prompt ends among the ids.
    all_prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    conversations = [prompt + completion for prompt, completion in texts]
    all_ids = tokenizer(conversations, add_special_tokens=False)["input_ids"]
    encoded = []
    for example, (prompt, completion), prompt_ids, ids in zip(
        examples, texts, all_prompt_ids, all_ids, strict=True
    ):
        if not example["prompt"]:
            encoded.append(
                encode_text(example["completion"][0]["content"], tokenizer, stop_token_ids)
            )
            continue
        if ids[: len(prompt_ids)] == prompt_ids:
            answer_ids = ids[len(prompt_ids) :]
        else:  # the tokenizer would merge the end of the prompt with the beginning of the answer
            answer_ids = continuation(completion, tokenizer)
        answer_ids = end_at_stop(answer_ids, tokenizer, stop_token_ids)
        mask = mask_of_prompt(example, prompt, prompt_ids, tokenizer, stop_token_ids)
        encoded.append(
            {"input_ids": prompt_ids + answer_ids, "completion_mask": mask + [1] * len(answer_ids)}
        )
    return encoded


def encode_text(
    text: str, tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> dict[str, list]:
    """The ids of a text that is no conversation, all of them in the loss.

    With the tokenizer's own BOS, if it has one, and a stop token at the end.
    """
    ids = tokenizer(text)["input_ids"]
    if not ids or ids[-1] not in stop_token_ids:
        ids = [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "completion_mask": [1] * len(ids)}


def decode_all(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of rows of token ids, special tokens included.

    In one call where the tokenizer can do that.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend.decode_batch(rows, skip_special_tokens=False)
    return [tokenizer.decode(ids) for ids in rows]


def prompt_and_completion(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """An example as two texts.

    The prompt as the model will be asked, and all that the model is to write after it.
    """
    if not example["prompt"]:
        return "", ""
    prompt = render(example["prompt"], tokenizer, True, tools_of(example))
    roles = tuple(message["role"] for message in example["prompt"])
    between, after = template_parts(tokenizer, roles)
    answer = example["completion"][0]["content"]
    if thinking_is_on(tokenizer):
        # templates write the thought of a last answer in many ways; this is how the model itself
        # begins
        reasoning, _, answer = answer.rpartition(THOUGHT_END)
        reasoning = reasoning.rpartition("<think>")[2].strip("\n")
        opening = "" if prompt.rstrip().endswith("<think>") else "<think>\n"
        between = f"{opening}{reasoning}\n{THOUGHT_END}\n\n"
        answer = answer.lstrip("\n")
    return prompt, between + answer + after


def tools_of(example: dict[str, Any]) -> list[dict] | None:
    """The tools of an example, or None."""
    return json.loads(example["tools"]) if example.get("tools") else None


@cached_per_template
def template_parts(tokenizer: PreTrainedTokenizerBase, roles: tuple[str, ...]) -> tuple[str, str]:
    """What the template writes around the last answer.

    The white space before it, and all that follows it. `roles` are those of the prompt's messages:
    some templates end the last turn of a longer conversation otherwise.
    """
    try:
        opened, before, after = around(
            [{"role": role, "content": "x"} for role in roles], tokenizer
        )
    except StageError:  # a tool's turn, for example, needs more than a text
        opened, before, after = around([USER], tokenizer)
    between = before[len(opened) :] if before.startswith(opened) else ""
    # more than white space belongs to the model's own answer, such as an empty thought
    if between.strip():
        between = ""
    return between, after


def continuation(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text that continues another one.

    Without the space that some tokenizers put at the start.
    """
    # A text that is tokenized on its own may get a space in front (SentencePiece). Behind a known
    # token it gets none; one of these three does not merge with what follows.
    for before in ("\n", "a", "."):
        first_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if ids[: len(first_ids)] == first_ids:
            return ids[len(first_ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_at_stop(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> list[int]:
    """The ids up to their first stop token.

    With EOS at the end if there is no stop token among them.
    """
    for position, token_id in enumerate(ids):
        if token_id in stop_token_ids:
            return ids[: position + 1]
    return [*ids, tokenizer.eos_token_id]


def mask_of_prompt(
    example: dict[str, Any],
    text: str,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: list[int],
) -> list[int]:
    """The loss mask of an example's prompt, as long as `ids`.

    It is 1 for the tokens of the earlier answers, each with its stop token. `text` is the rendered
    prompt, and `ids` are its tokens. White space between an answer and its stop token is in the
    loss, as the model has to write it. An earlier turn may end with a token that is no stop token
    (gpt-oss has one for the last turn only): then only the answer itself is in the loss. Raises
    StageError if an answer cannot be located.
    """
    mask = [0] * len(ids)
    spans = earlier_answer_spans(example, text, tokenizer)
    if not spans:
        return mask
    if not tokenizer.is_fast:
        raise StageError(
            "This model's tokenizer does not report where its tokens stand in a text, so only the "
            "last answer of a conversation could be trained. Use a table with one answer a row, "
            "or another model."
        )
    # [tokens, 2]: the first character of each token, and the one after its last
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    for start, end in spans:
        # a token that reaches over an edge of the answer counts as the answer's
        inside = [k for k, (first, last) in enumerate(offsets) if last > start and first < end]
        stop = inside[-1]
        # then on to the token that ends the turn: the model has to write that, too
        for k in range(inside[-1] + 1, len(ids)):
            if ids[k] in stop_token_ids:
                stop = k
                break
            if text[slice(*offsets[k])].strip():
                break  # the next turn begins, or the turn ends with a token that is no stop token
        mask[inside[0] : stop + 1] = [1] * (stop + 1 - inside[0])
    return mask


def earlier_answer_spans(
    example: dict[str, Any], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Where the earlier answers that are learned stand in `text`, the rendered prompt.

    (start, end) in characters. An answer is located by its position, never by its text, which may
    occur anywhere ("a" is in "assistant"). The conversation is rendered once more with a mark in
    place of that answer: what is before and after the mark is the template's and the other turns',
    and what remains of `text` between them is the answer:

        text:       [INST] Tea? [/INST] Yes. </s>[INST] Why? [/INST]
        with mark:  [INST] Tea? [/INST] * </s>[INST] Why? [/INST]
        the span:                       ^^^^

    White space around an answer is left out, and so is a thought that
    the template drops. Raises StageError if the template writes an earlier answer otherwise than it
    stands in the data.
    """
    messages, tools = example["prompt"], tools_of(example)
    mark = unused_mark(messages)
    spans = []
    for index in learned_turns(example):
        message = messages[index]
        # the same conversation, with a mark where this answer was
        with_mark = [*messages[:index], {**message, "content": mark}, *messages[index + 1 :]]
        rendered = render(with_mark, tokenizer, True, tools)
        before, _, after = rendered.partition(mark)
        start, end = len(before), len(text) - len(after)
        is_located = (
            rendered.count(mark) == 1
            and start <= end
            and text.startswith(before)
            and text.endswith(after)
        )
        content = message["content"]
        written = text[start:end]
        # templates drop the thoughts of earlier answers, so the text may be shorter than the data's
        without_thought = content.rpartition(THOUGHT_END)[2]
        if not is_located or written.strip() not in (content.strip(), without_thought.strip()):
            raise StageError(
                "The model's chat template changes an earlier answer: "
                f"{content.strip()[:60]!r} is not in the prompt as it stands in the data. "
                "Use a table with one answer a row, or another model."
            )
        if written.strip():
            # white space around the answer is the template's
            start += len(written) - len(written.lstrip())
            spans.append((start, start + len(written.strip())))
    return spans


def learned_turns(example: dict[str, Any]) -> list[int]:
    """The positions, in the prompt, of the earlier answers that are in the loss.

    An answer counts if it has a text, and no flag 0.
    """
    messages = example["prompt"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    flags = (example.get("learned") or "").split() or ["1"] * len(answers)
    learned = [i for i, flag in zip(answers, flags, strict=True) if flag != "0"]
    return [i for i in learned if messages[i]["content"].strip()]


def unused_mark(messages: Messages) -> str:
    """A character for private use that occurs in none of the messages.

    Icon fonts use some of these characters in texts.
    """
    contents = "".join(message["content"] for message in messages)
    return next(mark for mark in map(chr, range(ord(MARK), 0xF8FF)) if mark not in contents)


def answer_text(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> tuple[str, bool, int]:
    """What a person reads of generated ids.

    (text, whether it stopped, number of tokens with the stop token).
    """
    end = next((k for k, token_id in enumerate(ids) if token_id in stop_token_ids), None)
    if end is not None:
        ids = ids[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if thinking_is_on(tokenizer):
        text = text.rpartition(THOUGHT_END)[2]
    return text.strip(), end is not None, len(ids)


def show_tokens(encoded: dict[str, list], tokenizer: PreTrainedTokenizerBase):
    """An HTML object of an encoded row.

    Tokens in the loss on colour, the others grey, special tokens bold.
    """
    from IPython.display import HTML

    special = special_ids(tokenizer)
    spans = []
    for token_id, in_loss in zip(encoded["input_ids"], encoded["completion_mask"], strict=True):
        text = escape(tokenizer.decode([token_id])).replace("\n", "⏎")
        style = "background:#cfe8fc;color:#000" if in_loss else "color:#777"
        if token_id in special:
            style += ";font-weight:bold;text-decoration:underline"
        style += ";border:1px solid #bbb;margin:1px;padding:0 2px"
        spans.append(f'<span style="{style}">{text or "&nbsp;"}</span>')
    return HTML("<div style='line-height:1.9'>" + " ".join(spans) + "</div>")
