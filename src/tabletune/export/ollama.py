"""Ollama's Modelfile, whose prompts are those of the training."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path

import jinja2

from tabletune.chat.encoding import encode_prompt
from tabletune.chat.templates import render
from tabletune.errors import StageError
from tabletune.export.finished_run import ExportRun
from tabletune.export.llama_cpp import InLlamaCpp
from tabletune.run.files import write_text_if_changed

Messages = list[dict[str, str]]
Parts = dict[tuple[str, str], str]  # {(role before, role after): text}, "" at the beginning and end
MODELFILE = "resources/templates/Modelfile.j2"


def write_modelfile(export_run: ExportRun, file: Path, prompts: list[Messages]) -> str | None:
    """Write Ollama's `Modelfile` beside a GGUF file, and return its text.

    None, with a line that says why, if the chat template cannot be written in Ollama's language.
    Raises StageError if it would make other tokens of one of `prompts` than the training.
    """
    model = InLlamaCpp(file)
    tokenizer = export_run.tokenizer
    try:
        parts = split_template(lambda messages: render(messages, tokenizer))
        if model.adds_bos and tokenizer.bos_token:
            # llama.cpp puts it there
            for roles, text in parts.items():
                if roles[0] == "":
                    parts[roles] = text.removeprefix(tokenizer.bos_token)
        rendered = [render_parts(parts, prompt) for prompt in prompts]
    except (ValueError, KeyError, StageError) as error:
        print(f"No Modelfile: the chat template cannot be written in Ollama's language: {error}")
        return None
    for prompt, text in zip(prompts, rendered, strict=True):
        if model.tokenize(text) != encode_prompt(prompt, tokenizer):
            raise StageError(
                f"Ollama's prompt for {prompt[-1]['content']!r} would differ from that of the "
                "training, so no Modelfile is written."
            )
    text = modelfile(export_run, file.name, parts)
    write_text_if_changed(file.with_name("Modelfile"), text)
    return text


def modelfile(export_run: ExportRun, file: str, parts: Parts) -> str:
    """The text of a Modelfile for the GGUF file named `file`.

    `parts` are those of the chat template.
    """
    source = (resources.files("tabletune") / MODELFILE).read_text(encoding="utf-8")
    template = jinja2.Template(source, keep_trailing_newline=True)
    to_json = partial(json.dumps, ensure_ascii=False)  # Go quotes texts in the same way
    return template.render(run=export_run, file=file, parts=parts, to_json=to_json)


def split_template(render: Callable[[Messages], str]) -> Parts:
    """The texts that a chat template puts around messages.

    `render` takes messages and returns what the template makes of them, up to where the next answer
    begins. Raises ValueError if the template does more than put texts around the messages.
    """
    # between every two roles that can follow each other stands one text; that is all that Ollama's
    # template needs
    parts = parts_around(render, "user", "assistant", "user")
    with suppress(jinja2.TemplateError, StageError, ValueError):
        # a template may have no place for a system message
        parts = parts_around(render, "system", "user") | parts
    # longer conversations would show a template that counts turns, or writes the first one
    # otherwise
    check_parts(parts, render, ["user"])
    check_parts(parts, render, ["user", "assistant", "user", "assistant", "user"])
    check_parts(parts, render, ["system", "user", "assistant", "user"])
    return parts


def parts_around(render: Callable[[Messages], str], *roles: str) -> Parts:
    """The texts around messages of these roles.

    Raises ValueError if not every message stands there once, in order.
    """
    marks = [f"«{k}»" for k in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    text = render(messages)
    if re.findall("«.»", text) != marks:
        raise ValueError("it leaves out messages or repeats them")
    return dict(zip(pairwise(["", *roles, ""]), re.split("«.»", text), strict=True))


def check_parts(parts: Parts, render: Callable[[Messages], str], roles: list[str]) -> None:
    """Raise ValueError unless the parts make of messages what the template makes.

    The messages have these roles.
    """
    if ("", roles[0]) not in parts:
        return  # the template takes no system message
    # with white space, marks and quotes, in case the template trims or escapes
    messages = [{"role": role, "content": f'{k}. *Say* "{role}"'} for k, role in enumerate(roles)]
    if render_parts(parts, messages) != render(messages):
        raise ValueError("it does more than put texts around the messages")


def render_parts(parts: Parts, messages: Messages) -> str:
    """What the Ollama template of `parts` makes of messages."""
    text = ""
    before = ""
    for message in messages:
        text += parts[before, message["role"]] + message["content"]
        before = message["role"]
    return text + parts[before, ""]
