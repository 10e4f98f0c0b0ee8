"""Chat templates: what a model's own template makes of messages, pinned so that it is the same everywhere."""

import json
import re
from datetime import date as Date

from tabletune.errors import StageError

# for a base model that brings no template: Llama 2's turns, with a BOS where there is one
PLAIN_TEMPLATE = (
    "{{ bos_token | default('', true) }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARK = "\ue000"  # a character for private use stands for an answer, to see what a template writes around it
USER = {"role": "user", "content": "Hello"}
THINKING_ON = "{# the prompt leaves the thinking to the model #}"


def render(messages, tokenizer, generation_prompt=True, tools=None):
    """What the chat template makes of messages: a text. Raises StageError if it refuses them."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:  # jinja's own, and whatever a template raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        roles = ", ".join(message["role"] for message in messages)
        raise StageError(
            f"The model's chat template refuses messages of the roles {roles}: {reason}"
        ) from None


def around(prompt, tokenizer):
    """What a template writes around an answer, three texts: the prompt, all before the answer, all after it.

    Mostly the second begins with the first. Raises StageError if the answer is left out or repeated.
    """
    whole = render([*prompt, {"role": "assistant", "content": MARK}], tokenizer, False)
    if whole.count(MARK) != 1:
        raise StageError(
            "The model's chat template leaves out the answer or repeats it, so it cannot be trained."
        )
    return render(prompt, tokenizer), *whole.split(MARK)


def pinned_template(tokenizer, thinking, date):
    """The tokenizer's chat template with `date` for today's, and with the model's thinking on or off.

    Off, the prompt goes on to where the answer proper begins: past an empty block of thinking, or past the header that
    the model would write first. On, it stays as it is, and the model begins with its thinking. Either way the template
    says it without being asked, so that whoever loads it later (`pipeline`, vLLM, llama.cpp) asks as in the training.
    Raises StageError if the template has no thinking of a kind that is known here, and it is to be on, or to be closed.
    """
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()))
    day = Date.fromisoformat(str(date))
    today = r"strftime_now\(\s*(['\"])(.+?)\1\s*\)"
    template = re.sub(today, lambda match: json.dumps(day.strftime(match[2])), template)
    template = template.replace("strftime_now is defined", "true")
    if thinking and "<think>" not in template:
        raise StageError(
            "thinking=true, but this model's chat template has no <think>. Set it to false."
        )
    for name in ("enable_thinking", "thinking"):
        if re.search(rf"(?<![\w.'\"]){name}\b(?!['\"])", template):
            value = "true" if thinking else "false"
            template = f"{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}{template}"
    if thinking:
        return THINKING_ON + template
    tokenizer.chat_template = template
    closing = json.dumps(thinking_suffix(tokenizer))
    return template + (
        f"{{%- if add_generation_prompt %}}{{{{ {closing} }}}}{{%- endif %}}"
        if closing != '""'
        else ""
    )


def thinking_suffix(tokenizer):
    """What is missing between a template's prompt and an answer without thinking; "" if nothing is.

    Raises StageError if the prompt opens a thinking with a mark that is not known here.
    """
    opened, before, _ = around([USER], tokenizer)
    same = next(
        k
        for k in range(len(opened) + 1)
        if opened[k : k + 1] != before[k : k + 1] or k == len(opened)
    )
    if opened.rfind("<", 0, same) > opened.rfind(
        ">", 0, same
    ):  # two marks that begin alike are two marks
        same = opened.rfind("<", 0, same)
    extra, lead = opened[same:], before[same:]
    if opened.rstrip().endswith("<think>"):
        return (
            lead
            if not extra and "</think>" in lead
            else ("\n" if opened.endswith("\n") else "\n\n") + "</think>\n\n"
        )
    if re.search(r"think|reason", extra, re.IGNORECASE) and not re.search(
        r"</|END|<\w+\|>$", extra
    ):
        raise StageError(
            f"The model's chat template opens a thinking that cannot be closed here: {extra!r}."
        )
    closes_itself = extra and "think" in lead
    return lead if lead.strip() and not closes_itself else ""


def thinking_is_on(tokenizer):
    """Whether a pinned template leaves the thinking to the model."""
    return (tokenizer.chat_template or "").startswith(THINKING_ON)


def takes_system(tokenizer):
    """Whether the chat template has a place for a system message."""
    try:
        return MARK in render([{"role": "system", "content": MARK}, USER], tokenizer)
    except StageError:
        return False


def takes_tools(tokenizer):
    """Whether the chat template shows tools to the model."""
    tool = {
        "type": "function",
        "function": {"name": MARK, "description": "", "parameters": {"properties": {}}},
    }
    try:
        return MARK in render([USER], tokenizer, tools=[tool])
    except StageError:
        return False


def describe_template(tokenizer, stops):
    """What a reader should know of the format, {what: a short text}."""
    opened = render([USER], tokenizer)
    dated = re.search(r"\d{1,2} \w{3} 20\d\d|20\d\d-\d\d-\d\d|[A-Z]\w+ \d{1,2}, 20\d\d", opened)
    thinks = re.search(r"<think>|thinking|analysis", tokenizer.chat_template)
    off = "off: the prompt closes it" if thinks else "none"
    return {
        "an answer follows": repr("…" * (len(opened) > 60) + opened[-60:]),
        "an answer stops at": ", ".join(tokenizer.convert_ids_to_tokens(stops)),
        "system message": "has a place"
        if takes_system(tokenizer)
        else "no place: it goes before the first question",
        "thinking": "on: the answer begins with it" if thinking_is_on(tokenizer) else off,
        "date in the template": dated[0] if dated else "none",
    }
