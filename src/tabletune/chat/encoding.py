"""From messages to token ids: the chat template, what the loss sees, and where an answer stops.

One rule is kept for every template: what the model sees when it is asked is, token by token, the beginning of what it
was trained on. So the ids of an example are the ids of its prompt, as the template opens the answer, and after them the
answer and the token that ends the turn.
"""

import json
from functools import lru_cache
from html import escape

from tabletune.chat.templates import USER, around, render, thinking_is_on
from tabletune.chat.tokenizer import special_ids
from tabletune.errors import StageError


def encode_prompt(messages, tokenizer, tools=None):
    """Token ids of messages up to where the answer begins. Without messages: what the tokenizer puts before a text."""
    if not messages:
        return (
            tokenizer("")["input_ids"][:1]
            if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
            else []
        )
    return tokenizer(render(messages, tokenizer, True, tools), add_special_tokens=False)[
        "input_ids"
    ]


def encode(example, tokenizer, stops):
    """Token ids of a conversation and the mask of what the loss sees: `input_ids`, `completion_mask`, equally long.

    `example` has `prompt`, messages up to the last answer, `completion`, that answer as one message, and perhaps
    `tools` as a JSON text. In the loss are the answers of all turns, each with the stop that ends it. Without a prompt
    the completion is a plain text, all of it in the loss. Raises StageError if the template cannot be used.
    """
    return encode_all([example], tokenizer, stops)[0]


def encode_all(examples, tokenizer, stops):
    """`encode` for many examples, whose texts are cut into tokens all at once."""
    texts = [prompt_and_completion(example, tokenizer) for example in examples]
    prompts = tokenizer([prompt for prompt, _ in texts] or [""], add_special_tokens=False)[
        "input_ids"
    ]
    turns = any(
        message["role"] == "assistant" for example in examples for message in example["prompt"]
    )
    wholes = tokenizer(
        [prompt + answer for prompt, answer in texts] or [""],
        add_special_tokens=False,
        return_offsets_mapping=turns,
    )
    encoded = []
    for i, example in enumerate(examples):
        if not example["prompt"]:
            encoded.append(encode_text(example["completion"][0]["content"], tokenizer, stops))
            continue
        ids, prompt = wholes["input_ids"][i], prompts[i]
        joined = ids[: len(prompt)] == prompt
        answer = ids[len(prompt) :] if joined else continuation(texts[i][1], tokenizer)
        end = min((answer.index(stop) for stop in stops if stop in answer), default=None)
        answer = [*answer, tokenizer.eos_token_id] if end is None else answer[: end + 1]
        mask = [0] * len(prompt)
        if any(message["role"] == "assistant" for message in example["prompt"]):
            offsets = tokenizer(texts[i][0], add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            mask = mask_of_turns(example["prompt"], texts[i][0], prompt, offsets, stops)
        encoded.append({"input_ids": prompt + answer, "completion_mask": mask + [1] * len(answer)})
    return encoded


def decode_all(rows, tokenizer):
    """The texts of rows of ids, special tokens included, all at once where the tokenizer can do that."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend.decode_batch(rows, skip_special_tokens=False) if backend else tokenizer.decode(rows)
    )


def encode_text(text, tokenizer, stops):
    """A text that is no conversation, with the tokenizer's own BOS if it has one, and a stop at its end."""
    ids = tokenizer(text)["input_ids"]
    ids = ids if ids and ids[-1] in stops else [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "completion_mask": [1] * len(ids)}


def prompt_and_completion(example, tokenizer):
    """An example as two texts: the prompt as the model will be asked, and all that it is to write."""
    if not example["prompt"]:
        return "", ""
    tools = json.loads(example["tools"]) if example.get("tools") else None
    prompt = render(example["prompt"], tokenizer, True, tools)
    roles = tuple(message["role"] for message in example["prompt"])
    between, after = template_parts(tokenizer.chat_template, roles, tokenizer)
    answer = example["completion"][0]["content"]
    if thinking_is_on(tokenizer):
        reasoning, _, answer = answer.rpartition("</think>")
        reasoning = reasoning.rpartition("<think>")[2].strip("\n")
        opening = "" if prompt.rstrip().endswith("<think>") else "<think>\n"
        between = f"{opening}{reasoning}\n</think>\n\n"
        answer = answer.lstrip("\n")
    return prompt, between + answer + after


@lru_cache(maxsize=256)
def template_parts(template, roles, tokenizer):
    """The white space that `template` writes between a prompt of these roles and the answer, and all after it."""
    try:
        opened, before, after = around(
            [{"role": role, "content": "x"} for role in roles], tokenizer
        )
    except StageError:  # a tool's turn, say, needs more than a text
        opened, before, after = around([USER], tokenizer)
    between = before[len(opened) :] if before.startswith(opened) else ""
    return between if not between.strip() else "", after


def continuation(text, tokenizer):
    """The ids of a text that follows something, which is not to merge with it: without a space put in front."""
    for before in ("\n", "a", "."):
        first = tokenizer(before, add_special_tokens=False)["input_ids"]
        ids = tokenizer(before + text, add_special_tokens=False)["input_ids"]
        if ids[: len(first)] == first:
            return ids[len(first) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def mask_of_turns(messages, text, ids, offsets, stops):
    """The mask of the earlier answers in a prompt, each with its stop: a list as long as `ids`.

    Raises StageError if the template changes an earlier answer, so that it cannot be found.
    """
    mask, place = [0] * len(ids), 0
    for message in messages:
        content = message["content"].strip()
        kept = next(
            (
                part
                for part in (content, content.rpartition("</think>")[2].strip())
                if part in text[place:]
            ),
            None,
        )
        if kept is None:
            raise StageError(
                f"The model's chat template changes a {message['role']}'s turn: {content[:60]!r} is not in it."
            )
        start = text.index(kept, place)
        place = start + len(kept)
        if message["role"] != "assistant" or not kept:
            continue
        inside = [k for k, (first, last) in enumerate(offsets) if last > start and first < place]
        end = next((k for k in range(inside[-1] + 1, len(ids)) if ids[k] in stops), inside[-1])
        mask[inside[0] : end + 1] = [1] * (end + 1 - inside[0])
    return mask


def answer_text(ids, tokenizer, stops):
    """What a person reads of generated ids: (text, whether it stopped, how many tokens it took, the stop included)."""
    end = next((k for k, token in enumerate(ids) if token in stops), None)
    ids = ids if end is None else ids[: end + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if thinking_is_on(tokenizer):
        text = text.rpartition("</think>")[2]
    return text.strip(), end is not None, len(ids)


def show_tokens(encoded, tokenizer):
    """HTML of an encoded row: what is not in the loss grey, what is on colour, special tokens bold."""
    from IPython.display import HTML

    spans, special = [], special_ids(tokenizer)
    for token_id, in_loss in zip(encoded["input_ids"], encoded["completion_mask"], strict=True):
        text = escape(tokenizer.decode([token_id])).replace("\n", "⏎")
        style = "background:#cfe8fc;color:#000" if in_loss else "color:#777"
        style += ";font-weight:bold;text-decoration:underline" if token_id in special else ""
        spans.append(
            f'<span style="{style};border:1px solid #bbb;margin:1px;padding:0 2px">{text or "&nbsp;"}</span>'
        )
    return HTML("<div style='line-height:1.9'>" + " ".join(spans) + "</div>")
