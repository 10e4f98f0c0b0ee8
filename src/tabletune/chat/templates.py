"""Chat templates: what a model's own template makes of messages.

A template is pinned, so that it gives the same text wherever the tokenizer is saved.
"""

import json
import re
from datetime import date as Date
from typing import Any

from transformers import PreTrainedTokenizerBase

from tabletune.errors import StageError, first_line

Messages = list[dict[str, Any]]

# for a base model that brings no template: Llama 2's turns, with a BOS where there is one
PLAIN_TEMPLATE = (
    "{{ bos_token | default('', true) }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARK = "\ue000"  # a private-use character stands for an answer, to see what is written around it
USER = {"role": "user", "content": "Hello"}
THINKING_ON = "{# the prompt leaves the thinking to the model #}"


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    generation_prompt: bool = True,
    tools: list[dict] | None = None,
) -> str:
    """What the chat template makes of messages. Raises StageError if the template refuses them."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # jinja's own, and whatever a template raises
        reason = first_line(error)
        roles = ", ".join(message["role"] for message in messages)
        raise StageError(
            f"The model's chat template refuses messages of the roles {roles} ({reason}). Change "
            "the roles in the table, or take another base model."
        ) from error


def around(prompt: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What a template writes around an answer: the prompt, all before the answer, all after it.

    In most templates the second text begins with the first. Raises StageError if the template
    leaves the answer out or repeats it.
    """
    conversation = render([*prompt, {"role": "assistant", "content": MARK}], tokenizer, False)
    if conversation.count(MARK) != 1:
        raise StageError(
            "The model's chat template leaves out the answer or repeats it, so it cannot be "
            "trained. Take the instruction-tuned variant of the model."
        )
    before, after = conversation.split(MARK)
    return render(prompt, tokenizer), before, after


def pinned_template(tokenizer: PreTrainedTokenizerBase, thinking: bool, date: str) -> str:
    """The tokenizer's chat template with a fixed `date`, and with the model's thinking on or off.

    With thinking off, the prompt goes on to where the answer proper begins: past an empty block of
    thinking, or past the header that the model would write first. With thinking on, the prompt
    stays as it is, and the model begins with its thinking. Either is the template's default, so
    that whoever loads it later (`pipeline`, vLLM, llama.cpp) asks as in the training. Raises
    StageError if thinking is to be on or to be closed, and the template has no thinking of a known
    kind.
    """
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    # some tokenizers have several templates, such as one for tools
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    day = Date.fromisoformat(str(date))
    # the date of today would change the prompt, and with it the token ids, from day to day
    today = r"strftime_now\(\s*(['\"])(.+?)\1\s*\)"
    template = re.sub(today, lambda match: json.dumps(day.strftime(match[2])), template)
    template = template.replace("strftime_now is defined", "true")
    if thinking and "<think>" not in template:
        raise StageError(
            "thinking=true, but this model's chat template has no <think>. Set it to false."
        )
    # Templates have one of two names for this. The default is written into the template, so that it
    # holds wherever the template is used; who asks by name still has the last word.
    value = "true" if thinking else "false"
    for name in ("enable_thinking", "thinking"):
        if re.search(rf"(?<![\w.'\"]){name}\b(?!['\"])", template):
            default = f"{{%- set {name} = {value} %}}"
            template = f"{{%- if {name} is not defined %}}{default}{{%- endif %}}{template}"
    if thinking:
        # a Jinja comment: it prints nothing, and tells `thinking_is_on` later
        return THINKING_ON + template
    tokenizer.chat_template = template
    suffix = thinking_suffix(tokenizer)
    if suffix:
        template += f"{{%- if add_generation_prompt %}}{{{{ {json.dumps(suffix)} }}}}{{%- endif %}}"
    return template


def thinking_suffix(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text between a template's prompt and an answer without thinking; "" if there is none.

    Raises StageError if the prompt opens a block of thinking with a mark that is not known here.
    """
    # opened: the prompt that asks for an answer; before: what stands before an answer in a chat
    opened, before, _ = around([USER], tokenizer)
    shared = 0  # characters that both begin with
    while shared < len(opened) and opened[shared : shared + 1] == before[shared : shared + 1]:
        shared += 1
    if opened.rfind("<", 0, shared) > opened.rfind(">", 0, shared):
        shared = opened.rfind("<", 0, shared)  # two marks that begin alike are two marks
    only_in_prompt, only_before_answer = opened[shared:], before[shared:]
    if opened.rstrip().endswith("<think>"):
        # before: "…<think>\n\n</think>\n\n". The template closes the thought itself: as it does.
        if not only_in_prompt and "</think>" in only_before_answer:
            return only_before_answer
        # before: "…" without a thought. The template opens one and closes none: an empty one.
        line_break = "\n" if opened.endswith("\n") else "\n\n"
        return f"{line_break}</think>\n\n"
    opens_thinking = re.search(r"think|reason", only_in_prompt, re.IGNORECASE)
    if opens_thinking and not re.search(r"</|END|<\w+\|>$", only_in_prompt):
        raise StageError(
            "The model's chat template begins to think in a way that this notebook cannot end "
            f"({only_in_prompt!r}). Take another base model."
        )
    # opened: "…<think>\n\n</think>\n\n". The prompt has closed the thought: nothing is missing.
    closes_itself = only_in_prompt and "think" in only_before_answer
    if closes_itself or not only_before_answer.strip():
        return ""
    # before: "…<|channel|>final<|message|>". An answer has a header that the model would write.
    return only_before_answer


def thinking_is_on(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a pinned template leaves the thinking to the model."""
    return (tokenizer.chat_template or "").startswith(THINKING_ON)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for a system message.

    Where it has none, `with_system` in data/formatter.py puts the text before the question.
    """
    try:
        return MARK in render([{"role": "system", "content": MARK}, USER], tokenizer)
    except StageError:
        return False


def takes_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows tools to the model."""
    function = {"name": MARK, "description": "", "parameters": {"properties": {}}}
    try:
        return MARK in render([USER], tokenizer, tools=[{"type": "function", "function": function}])
    except StageError:
        return False


def describe_template(
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: list[int]
) -> dict[str, str]:
    """What a reader should know of the format, {what: a short text}."""
    opened = render([USER], tokenizer)
    opening = opened
    if len(opened) > 60:  # from a mark on, such as "<|im_start|>"
        start = max(opened.find("<", len(opened) - 60), len(opened) - 60)
        opening = f"…{opened[start:]}"
    opening = opening.replace("\n", "⏎")
    system = "not supported: it goes in front of the first question"
    if takes_system(tokenizer):
        system = "supported"
    thinking = "none"
    if thinking_is_on(tokenizer):
        thinking = "on: the answer begins with it"
    elif re.search(r"<think>|thinking|analysis", tokenizer.chat_template):
        thinking = "off: the prompt ends it before it begins"
    # the formats of dates that the templates in the menu of models write
    dated = re.search(r"\d{1,2} \w{3} 20\d\d|20\d\d-\d\d-\d\d|[A-Z]\w+ \d{1,2}, 20\d\d", opened)
    return {
        "a prompt ends with": opening,
        "an answer stops at": ", ".join(tokenizer.convert_ids_to_tokens(stop_token_ids)),
        "system message": system,
        "thinking": thinking,
        "date in the template": dated[0] if dated else "none",
    }
