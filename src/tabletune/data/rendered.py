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
    """A way to write conversations.

    `first` is how such a text begins, `start` is how a turn of it begins, with its role in a group,
    and `end` are marks that end a turn, None where the next turn does that.
    """

    name: str
    first: re.Pattern[str]
    start: re.Pattern[str]
    end: re.Pattern[str] | None


END_OF_TEXT = r"(?:</s>|<\|end_of_text\|>|<\|endoftext\|>|<eos>)"
BEGIN_OF_TEXT = r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>)?\s*"
# name: (how a text begins, behind its BOS; how a turn begins; what ends a turn)
PATTERNS: dict[str, tuple[str, str, str | None]] = {
    "ChatML": (
        r"<\|im_start\|>",
        r"<\|im_start\|>\s*(\w+)[ \t]*\n",
        r"<\|im_end\|>",
    ),
    "Llama 3": (
        r"<\|start_header_id\|>",
        r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>\n{0,2}",
        r"<\|eot_id\|>|<\|eom_id\|>",
    ),
    "Llama 4": (
        r"<\|header_start\|>",
        r"<\|header_start\|>\s*(\w+)\s*<\|header_end\|>\n{0,2}",
        r"<\|eot\|>|<\|eom\|>",
    ),
    "Gemma": (
        r"<start_of_turn>",
        r"<start_of_turn>\s*(\w+)[ \t]*\n",
        r"<end_of_turn>",
    ),
    "Phi and Zephyr": (
        r"<\|(?:system|user|prompter)\|>",
        r"<\|(system|user|prompter|assistant|tool)\|>\s?",
        r"</s>|<\|end\|>|<\|endoftext\|>",
    ),
    "### Human:": (
        r"(?i:###\s*(?:Human|User|System):)",
        r"(?i:\s*###\s*(Human|Assistant|User|System|Bot|GPT):[ \t]*)",
        None,
    ),
    "Human: and Assistant:": (
        r"(?:Human|User|HUMAN|USER):(?s:.*)\n\s*(?:Assistant|ASSISTANT):",
        r"(?:^|\n)\s*(Human|User|Assistant|HUMAN|USER|ASSISTANT):[ \t]*",
        None,
    ),
    # as Vicuna has it: a system text on the same line, before the first turn
    "USER: and ASSISTANT:": (
        r"[^\n]{0,300}?\bUSER:(?s:.*)\bASSISTANT:",
        r"(?:^|\s|</s>)(USER|ASSISTANT):[ \t]*",
        r"</s>",
    ),
}
FORMATS = [
    RenderedFormat(
        name,
        re.compile(BEGIN_OF_TEXT + first),
        re.compile(start),
        re.compile(end) if end else None,
    )
    for name, (first, start, end) in PATTERNS.items()
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
    parts = [match["instruction"].strip(), (match["input"] or "").strip()]
    turns.append({"role": "user", "content": "\n\n".join(filter(None, parts))})
    answer = re.sub(rf"{END_OF_TEXT}\s*$", "", match["answer"])
    turns.append({"role": "assistant", "content": answer.strip()})
    return turns
