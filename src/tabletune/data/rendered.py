"""Rows that are rendered already, by some model's chat template, read back as turns.

Without this their markers would be broken up as text that only looks like a marker, and learned as
such.
"""

import re
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]


@dataclass(frozen=True)
class RenderedFormat:
    """A way to write conversations: `start` finds where a turn begins, `role` gives its role by the
    name that `start` has found, `end` are marks that end a turn, and `first` is how a text has
    to begin.
    """

    name: str
    start: re.Pattern[str]
    end: re.Pattern[str] | None
    first: re.Pattern[str]


END_OF_TEXT = r"(?:</s>|<\|end_of_text\|>|<\|endoftext\|>|<eos>)"
FORMATS = [
    RenderedFormat(
        "ChatML",
        re.compile(r"<\|im_start\|>\s*(\w+)[ \t]*\n"),
        re.compile(r"<\|im_end\|>"),
        re.compile(r"\s*(?:<s>|<\|begin_of_text\|>|<\|startoftext\|>)?\s*<\|im_start\|>"),
    ),
    RenderedFormat(
        "Llama 3",
        re.compile(r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>\n{0,2}"),
        re.compile(r"<\|eot_id\|>|<\|eom_id\|>"),
        re.compile(r"\s*(?:<\|begin_of_text\|>)?\s*<\|start_header_id\|>"),
    ),
    RenderedFormat(
        "Llama 4",
        re.compile(r"<\|header_start\|>\s*(\w+)\s*<\|header_end\|>\n{0,2}"),
        re.compile(r"<\|eot\|>|<\|eom\|>"),
        re.compile(r"\s*(?:<\|begin_of_text\|>)?\s*<\|header_start\|>"),
    ),
    RenderedFormat(
        "Gemma",
        re.compile(r"<start_of_turn>\s*(\w+)[ \t]*\n"),
        re.compile(r"<end_of_turn>"),
        re.compile(r"\s*(?:<bos>)?\s*<start_of_turn>"),
    ),
    RenderedFormat(
        "Phi and Zephyr",
        re.compile(r"<\|(system|user|prompter|assistant|tool)\|>\s?"),
        re.compile(r"</s>|<\|end\|>|<\|endoftext\|>"),
        re.compile(r"\s*(?:<s>|<bos>)?\s*<\|(?:system|user|prompter)\|>"),
    ),
    RenderedFormat(
        "### Human:",
        re.compile(r"\s*###\s*(Human|Assistant|User|System|Bot|GPT):[ \t]*", re.IGNORECASE),
        None,
        re.compile(r"\s*(?:<s>)?\s*###\s*(?:Human|User|System):", re.IGNORECASE),
    ),
    RenderedFormat(
        "Human: and Assistant:",
        re.compile(r"(?:^|\n)\s*(Human|User|Assistant|HUMAN|USER|ASSISTANT):[ \t]*"),
        None,
        re.compile(r"\s*(?:<s>)?\s*(?:Human|User|HUMAN|USER):(?s:.*)\n\s*(?:Assistant|ASSISTANT):"),
    ),
    RenderedFormat(
        "USER: and ASSISTANT:",
        re.compile(r"(?:^|\s|</s>)(USER|ASSISTANT):[ \t]*"),
        re.compile(r"</s>"),
        re.compile(r"\s*(?:<s>)?[^\n]{0,300}?\bUSER:(?s:.*)\bASSISTANT:"),
    ),
]
LLAMA_2_PROMPT = re.compile(r"\[INST\](.*?)\[/INST\]", re.DOTALL)
LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>", re.DOTALL)
ALPACA = re.compile(
    r"(?P<system>.{0,400}?)###\s*Instruction:\s*(?P<instruction>.*?)"
    r"(?:\n###\s*Input:\s*(?P<input>.*?))?\n###\s*(?:Response|Answer|Output):\s*(?P<answer>.*)",
    re.DOTALL,
)
# a marker of some template, in a text that no format above could read
UNREAD_MARKER = re.compile(r"<\|[A-Za-z_]{2,30}\|>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>")


def turns_of_rendered_text(text: str) -> list[Turn] | None:
    """The turns of a rendered conversation, [{"role", "content"}, ...]; None if a text is none."""
    if "[INST]" in text and re.match(r"\s*(?:<s>)?\s*\[INST\]", text):
        return _turns_of_llama_2(text)
    alpaca = ALPACA.fullmatch(text.strip()) if "###" in text else None
    if alpaca:
        return _turns_of_alpaca(alpaca)
    for rendered_format in FORMATS:
        if rendered_format.first.match(text):
            return _turns_of_format(text, rendered_format)
    return None


def unread_marker(text: str) -> str:
    """A marker of a chat template that a text begins with or has twice; "" if it has none."""
    markers = UNREAD_MARKER.findall(text)
    if len(markers) > 1 or UNREAD_MARKER.match(text.lstrip()):
        return markers[0]
    return ""


def _turns_of_format(text: str, rendered_format: RenderedFormat) -> list[Turn]:
    starts = list(rendered_format.start.finditer(text))
    turns: list[Turn] = []
    before = re.sub(r"<s>|<bos>", "", text[: starts[0].start()]).strip() if starts else ""
    if before and not before.startswith("<|"):
        turns.append({"role": "system", "content": before})
    for place, start in enumerate(starts):
        last = starts[place + 1].start() if place + 1 < len(starts) else len(text)
        content = text[start.end() : last]
        if rendered_format.end:
            content = rendered_format.end.split(content)[0]
        content = re.sub(rf"{END_OF_TEXT}\s*$", "", content)
        turns.append({"role": start[1].lower(), "content": content.strip()})
    if turns and turns[-1]["content"] == "":
        turns.pop()  # the opening of an answer at the end
    return turns


def _turns_of_llama_2(text: str) -> list[Turn]:
    turns: list[Turn] = []
    prompts = list(LLAMA_2_PROMPT.finditer(text))
    for place, prompt in enumerate(prompts):
        question = prompt[1]
        system = LLAMA_2_SYSTEM.match(question)
        if system:
            turns.append({"role": "system", "content": system[1].strip()})
            question = question[system.end() :]
        turns.append({"role": "user", "content": question.strip()})
        last = prompts[place + 1].start() if place + 1 < len(prompts) else len(text)
        answer = re.sub(r"</?s>", "", text[prompt.end() : last]).strip()
        if answer:
            turns.append({"role": "assistant", "content": answer})
    return turns


def _turns_of_alpaca(match: re.Match[str]) -> list[Turn]:
    turns: list[Turn] = []
    system = re.sub(r"^<s>", "", match["system"].strip()).strip()
    if system:
        turns.append({"role": "system", "content": system})
    question = "\n\n".join(
        filter(None, [match["instruction"].strip(), (match["input"] or "").strip()])
    )
    turns.append({"role": "user", "content": question})
    turns.append(
        {"role": "assistant", "content": re.sub(rf"{END_OF_TEXT}\s*$", "", match["answer"]).strip()}
    )
    return turns
