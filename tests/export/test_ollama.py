"""Ollama's Modelfile: the template, stops, system message and disclaimer."""

import re
from types import SimpleNamespace

import pytest
import yaml
from export_runs import CONVERSATIONS, read, run_dir  # noqa: F401
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tabletune.errors import StageError
from tabletune.export import gguf, ollama

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # as Meta published it
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ONLY = "{{ messages[-1]['content'] }}"
COUNTED = "{% for message in messages %}{{ loop.index }}: {{ message['content'] }} ({{ messages | length }}){% endfor %}"
TEMPLATES = pytest.mark.parametrize(
    "template", [CHATML, LLAMA2, NO_SYSTEM], ids=["ChatML", "Llama 2", "no system"]
)


def renderer(template):
    def refuse(message):
        raise TemplateError(message)

    compiled = ImmutableSandboxedEnvironment().from_string(template)
    known = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "raise_exception": refuse,
        "add_generation_prompt": True,
    }
    return lambda messages: compiled.render(messages=messages, **known)


@TEMPLATES
def test_a_template_taken_apart_goes_together_again(template):
    render = renderer(template)
    parts = ollama.split_template(render)
    assert (("", "system") in parts) == (template != NO_SYSTEM)
    for messages in CONVERSATIONS[: 2 if template == NO_SYSTEM else 4]:
        assert ollama.render_parts(parts, messages) == render(messages)


@pytest.mark.parametrize("template", [LAST_ONLY, COUNTED], ids=["last only", "counted"])
def test_a_template_that_is_more_than_texts_is_refused(template):
    with pytest.raises(
        ValueError, match=r"leaves out messages or repeats them|more than put texts"
    ):
        ollama.split_template(renderer(template))


def modelfile_of(template, **more):
    """The Modelfile of a run of that template, and Ollama's template in it."""
    tokenizer = SimpleNamespace(decode=lambda ids: {2: "</s>", 7: "<|im_end|>"}[ids[0]])
    run = {
        "disclaimer": 'Do not "trust" it.',
        "name": "herbs",
        "stop_token_ids": [2, 7],
        "tokenizer": tokenizer,
        "parameters": {"window": 1024, "max_new_tokens": 99, "license": "mit"},
    }
    run |= {
        "base_on_hub": None,
        "base_model": "/home/me/base",
        "report": {"system_prompt": ""},
        **more,
    }
    text = ollama.modelfile(
        SimpleNamespace(**run), "herbs-F16.gguf", ollama.split_template(renderer(template))
    )
    return text, re.search('TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]


@pytest.mark.export
@TEMPLATES
def test_ollamas_template_renders_the_same_in_go(template, tmp_path):
    """The template that goes into the Modelfile, run by Go's own text/template, the engine of
    Ollama.
    """
    import go_template

    render = renderer(template)
    (tmp_path / "t").write_text(modelfile_of(template)[1], encoding="utf-8")
    for messages in CONVERSATIONS[: 2 if template == NO_SYSTEM else 4]:
        values = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
        (tmp_path / "v.yml").write_text(
            yaml.safe_dump(values, allow_unicode=True), encoding="utf-8"
        )
        go_template.render_template(
            str(tmp_path / "t"), str(tmp_path / "v.yml"), str(tmp_path / "out")
        )
        assert (tmp_path / "out").read_text(encoding="utf-8") == render(messages)


def test_the_modelfile_says_the_stops_the_system_message_and_the_disclaimer():
    text, _ = modelfile_of(LLAMA2)
    assert re.findall("PARAMETER stop (.*)", text) == ['"</s>"', '"<|im_end|>"']
    assert text.count('Do not "trust" it.') == 2
    assert "SYSTEM" not in text
    assert "/home/me" not in text
    assert "FROM ./herbs-F16.gguf" in text
    assert "num_ctx 1024" in text
    assert "num_predict 99" in text
    text, _ = modelfile_of(LLAMA2, report={"system_prompt": "You are brief."})
    assert '\nSYSTEM """You are brief."""\n' in text


@pytest.mark.export
def test_a_prompt_of_ollama_that_is_another_is_not_kept(run_dir, monkeypatch):
    export_run = read(run_dir, gguf_types=["F16"])
    file = gguf.make_gguf(export_run, "F16")
    asked = export_run.questions()
    text = ollama.write_modelfile(export_run, file, asked)
    assert text == file.with_name("Modelfile").read_text()
    assert len(asked) == 5
    together = ollama.render_parts
    changed = lambda parts, messages: together(parts, messages).replace(asked[0][0]["content"], "x")  # noqa: E731
    monkeypatch.setattr(ollama, "render_parts", changed)
    monkeypatch.setattr(
        ollama, "split_template", lambda _: {("", "user"): "[INST] ", ("user", ""): " [/INST]"}
    )
    with pytest.raises(StageError, match="would differ from that of the training"):
        ollama.write_modelfile(export_run, file, asked)
