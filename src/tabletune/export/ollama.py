"""Ollama's Modelfile, which asks as in training."""

import json
import re
from contextlib import suppress
from functools import partial
from importlib import resources
from itertools import pairwise

import jinja2

from tabletune.chat.encoding import encode_prompt
from tabletune.chat.templates import render
from tabletune.errors import StageError
from tabletune.export.llama_cpp import InLlamaCpp
from tabletune.run.files import whole

# --- Ollama


def put_text(path, text):
    """Write a text file, unless it says just that already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with whole(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def take_apart(render):
    """The texts that a chat template puts around messages: {(role before, this role): text}, "" at beginning and end.

    `render` takes messages and gives what the template makes of them, up to where the next answer begins. Raises
    ValueError if the template is more than texts around the messages.
    """

    def around(*roles):
        marks = [f"«{k}»" for k in range(len(roles))]
        text = render(
            [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        )
        if re.findall("«.»", text) != marks:
            raise ValueError("it leaves out messages or repeats them")
        return dict(zip(pairwise(["", *roles, ""]), re.split("«.»", text), strict=True))

    texts = around("user", "assistant", "user")
    with suppress(
        jinja2.TemplateError, StageError, ValueError
    ):  # it may have no place for a system message
        texts = around("system", "user") | texts
    for roles in (
        ["user"],
        ["user", "assistant"] * 2 + ["user"],
        ["system", "user", "assistant", "user"],
    ):
        messages = [
            {"role": role, "content": f'{k}. *Say* "{role}"'} for k, role in enumerate(roles)
        ]
        if ("", roles[0]) in texts and put_together(texts, messages) != render(messages):
            raise ValueError("it does more than put texts around the messages")
    return texts


def put_together(texts, messages):
    """What the Ollama template of `texts` makes of messages."""
    roles = ["", *(message["role"] for message in messages)]
    parts = [texts[pair] + m["content"] for pair, m in zip(pairwise(roles), messages, strict=True)]
    return "".join(parts) + texts[roles[-1], ""]


def write_modelfile(found, file, prompts):
    """Write Ollama's `Modelfile` for a GGUF beside it: its text, or None, with a line why, if there can be none.

    Raises StageError if it would make another prompt of one of `prompts` than the training, token for token.
    """
    model, tokenizer = InLlamaCpp(file), found.tokenizer
    bos = tokenizer.bos_token or "" if model.adds_bos else ""
    try:
        texts = take_apart(lambda messages: render(messages, tokenizer))
        texts = {(a, b): text if a else text.removeprefix(bos) for (a, b), text in texts.items()}
        asked = [put_together(texts, prompt) for prompt in prompts]
    except (ValueError, KeyError, StageError) as error:
        print(
            f"No Modelfile: the chat template cannot be written in Ollama's language, as {error}."
        )
        return None
    for prompt, text in zip(prompts, asked, strict=True):
        if model.cut(text) != encode_prompt(prompt, tokenizer):
            raise StageError(
                f"Ollama's prompt for {prompt[-1]['content']!r} is not the training's: no Modelfile."
            )
    text = modelfile(found, file.name, texts)
    put_text(file.with_name("Modelfile"), text)
    return text


def modelfile(found, file, texts):
    """The text of a Modelfile for the GGUF named `file`, from the `texts` of the chat template."""
    source = (resources.files("tabletune") / "resources/templates/Modelfile.j2").read_text(
        encoding="utf-8"
    )
    template = jinja2.Template(source, keep_trailing_newline=True)
    quoted = partial(json.dumps, ensure_ascii=False)  # which is how Go quotes, too
    return template.render(**vars(found), file=file, texts=texts, quoted=quoted)
