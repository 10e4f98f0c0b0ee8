"""Templates, ids, masks and stops: what the model is asked is the beginning of what it was
trained on.
"""

import json
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import ROOT, TINY, locked
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from tabletune.chat import tokenizer as tokenizer_module
from tabletune.chat.encoding import answer_text, encode, encode_all, encode_prompt, show_tokens
from tabletune.chat.markers import break_markers
from tabletune.chat.templates import describe_template, render, takes_system, takes_tools
from tabletune.chat.tokenizer import load_tokenizer, load_tokenizer_of_run, save_tokenizer
from tabletune.errors import StageError

LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# small templates, each with one trait of a public family
TEMPLATES = {
    "plain": LOOP + OPEN,
    "no end of turn": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}" + OPEN,
    "a space before the answer": "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "a switch for thinking": "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    + OPEN
    + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}",
    "opens thinking, strips it later": "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "opens thinking, closes it in the whole": "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "a header before the answer": "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}<|channel|>final<|message|>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    + OPEN,
    "a block that the whole has not": "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}<|START_ANSWER|>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><|START_THINKING|><|END_THINKING|>{% endif %}",
    "no system message": "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}" + OPEN,
    "today's date": "Today is {{ strftime_now('%d %b %Y') }}.\n" + LOOP + OPEN,
    "a last turn of its own": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}" + OPEN,
}
SPECIAL = [
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|return|>",
    "<|channel|>",
    "<|message|>",
]
ONE = {
    "prompt": [{"role": "user", "content": "What helps?"}],
    "completion": [{"role": "assistant", "content": "Tea, twice a day."}],
}
TWO = {
    "prompt": [
        *ONE["prompt"],
        *ONE["completion"],
        {"role": "user", "content": "And then?"},
    ],
    "completion": [{"role": "assistant", "content": "Rest."}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function that makes a tiny base model with a chat template."""

    def make(template, eos="<|end|>", special=SPECIAL, rows=None, **generation):
        folder = tmp_path_factory.mktemp("base")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY)
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.eos_token, tokenizer.chat_template = eos, template
        small = {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        model = LlamaForCausalLM(LlamaConfig(vocab_size=rows or len(tokenizer), **small))
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, **generation
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("example", [ONE, TWO], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_beginning_of_what_is_trained(base, name, example):
    """Token by token, for every kind of template, and all that is in the loss is the answers and
    their stops.
    """
    tokenizer, stops = load_tokenizer(base(TEMPLATES[name]))
    encoded, prompt = encode(example, tokenizer, stops), encode_prompt(example["prompt"], tokenizer)
    ids, mask = encoded["input_ids"], encoded["completion_mask"]
    assert ids[: len(prompt)] == prompt
    assert len(ids) == len(mask)
    assert prompt == tokenizer.apply_chat_template(
        example["prompt"], add_generation_prompt=True, return_dict=False
    )
    answer = ids[len(prompt) :]
    assert mask[len(prompt) :] == [1] * len(answer)
    assert answer[-1] in stops
    assert not set(answer[:-1]) & set(stops)
    assert (
        tokenizer.decode(answer, skip_special_tokens=True).strip()
        == example["completion"][0]["content"]
    )
    earlier = [i for i, m in zip(prompt, mask, strict=False) if m]
    wanted = "".join(m["content"] for m in example["prompt"] if m["role"] == "assistant")
    assert tokenizer.decode(earlier, skip_special_tokens=True).strip() == wanted
    if wanted and name not in (
        "no end of turn",
        "a last turn of its own",
    ):  # their earlier turns end with no stop
        assert earlier[-1] in stops


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_saved_asks_in_the_same_way(base, name, tmp_path):
    """`pipeline`, vLLM and llama.cpp know nothing of this package: the saved template does it
    all.
    """
    tokenizer, stops = load_tokenizer(base(TEMPLATES[name]))
    save_tokenizer(tmp_path, tokenizer, stops)
    again, stops_again = load_tokenizer_of_run(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert stops_again == stops
    for example in (ONE, TWO):
        asked = plain.apply_chat_template(
            example["prompt"], add_generation_prompt=True, return_dict=False
        )
        assert (
            asked
            == encode_prompt(example["prompt"], tokenizer)
            == encode_prompt(example["prompt"], again)
        )
        assert encode(example, again, stops) == encode(example, tokenizer, stops)


def test_thinking_off_is_closed_in_the_prompt_and_on_is_learned(base):
    for name in (
        "a switch for thinking",
        "opens thinking, strips it later",
        "opens thinking, closes it in the whole",
    ):
        folder = base(TEMPLATES[name])
        tokenizer, stops = load_tokenizer(folder)
        prompt = render(ONE["prompt"], tokenizer)
        assert prompt.rstrip().endswith("</think>")
        assert prompt.count("<think>") == 1
        encoded = encode(ONE, tokenizer, stops)
        learned = [
            i for i, m in zip(encoded["input_ids"], encoded["completion_mask"], strict=True) if m
        ]
        assert "think" not in tokenizer.decode(learned)

        tokenizer, stops = load_tokenizer(folder, thinking=True)
        thought = {
            **ONE,
            "completion": [{"role": "assistant", "content": "<think>\nHm.\n</think>\n\nTea."}],
        }
        ids = encode(thought, tokenizer, stops)["input_ids"]
        text = tokenizer.decode(ids)
        assert text.count("<think>") == text.count("</think>") == 1
        assert "Hm." in text
        prompt = encode_prompt(ONE["prompt"], tokenizer)
        assert ids[: len(prompt)] == prompt
        assert answer_text(ids[len(prompt) :], tokenizer, stops)[:2] == ("Tea.", True)
    with pytest.raises(
        StageError, match="thinking=true, but this model's chat template has no <think>"
    ):
        load_tokenizer(base(TEMPLATES["plain"]), thinking=True)
    with pytest.raises(StageError, match="begins to think in a way that this notebook cannot end"):
        load_tokenizer(
            base(LOOP + "{% if add_generation_prompt %}<|assistant|><|START_THINKING|>{% endif %}")
        )


def test_a_date_is_pinned(base):
    tokenizer, _ = load_tokenizer(base(TEMPLATES["today's date"]), date="2020-02-03")
    assert "Today is 03 Feb 2020." in render(ONE["prompt"], tokenizer)
    assert "strftime_now" not in tokenizer.chat_template


def test_the_stops_are_those_of_the_generation_config_the_tokenizer_and_the_template(base):
    """A base whose turn marker is neither in its generation config nor its EOS would never stop
    otherwise.
    """
    tokenizer, stops = load_tokenizer(base(TEMPLATES["plain"], eos="</s>"))
    assert tokenizer.convert_ids_to_tokens(stops) == ["</s>", "<|end|>"]
    assert encode(ONE, tokenizer, stops)["input_ids"][-1] == stops[1]
    text, stopped, tokens = answer_text(
        [*encode_prompt([], tokenizer), 300, 301, stops[1], 302], tokenizer, stops
    )
    assert stopped
    assert tokens == 3 + len(encode_prompt([], tokenizer))
    assert "<|end|>" not in text
    assert answer_text([300, 301], tokenizer, stops)[1:] == (False, 2)


def test_no_bos_is_added_that_the_template_has_not(base):
    tokenizer, stops = load_tokenizer(base(TEMPLATES["plain"]))
    assert tokenizer.bos_token_id not in encode(ONE, tokenizer, stops)["input_ids"]
    tokenizer, stops = load_tokenizer(str(TINY))
    assert encode(ONE, tokenizer, stops)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_a_base_without_bos_and_template(base):
    folder = base(None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)
    tokenizer, stops = load_tokenizer(folder)
    assert render(ONE["prompt"], tokenizer) == f"[INST] {ONE['prompt'][0]['content']} [/INST]"
    answered = f"[INST] {ONE['prompt'][0]['content']} [/INST] {ONE['completion'][0]['content']} {tokenizer.eos_token}"
    assert render(ONE["prompt"] + ONE["completion"], tokenizer, False) == answered, (
        "Llama 2's turns"
    )
    assert encode(ONE, tokenizer, stops)["input_ids"][-1] in stops


def test_tokens_without_a_row_are_refused(base):
    with pytest.raises(
        StageError,
        match=r"its template uses '<\|user\|>', which has no row among the model's 2,048",
    ):
        load_tokenizer(base(TEMPLATES["plain"], rows=2048))


def test_a_lone_text_is_learned_whole(tokenizer):
    tokenizer, stops = tokenizer
    example = {"prompt": [], "completion": [{"role": "assistant", "content": "Q: 1+1?\nA: 2"}]}
    encoded = encode(example, tokenizer, stops)
    assert set(encoded["completion_mask"]) == {1}
    assert encoded["input_ids"][-1] in stops
    assert encoded["input_ids"][:-1] == tokenizer("Q: 1+1?\nA: 2")["input_ids"]


def test_many_are_encoded_as_one(base):
    tokenizer, stops = load_tokenizer(base(TEMPLATES["a switch for thinking"]))
    assert encode_all([ONE, TWO, ONE], tokenizer, stops) == [
        encode(e, tokenizer, stops) for e in (ONE, TWO, ONE)
    ]


def test_system_and_tools(base):
    tokenizer, _ = load_tokenizer(base(TEMPLATES["no system message"]))
    assert not takes_system(tokenizer)
    assert not takes_tools(tokenizer)
    with_tools = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATES["plain"]
    tokenizer, stops = load_tokenizer(base(with_tools))
    assert takes_system(tokenizer)
    assert takes_tools(tokenizer)
    tool = '[{"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}]'
    assert "weather" in tokenizer.decode(
        encode({**ONE, "tools": tool}, tokenizer, stops)["input_ids"]
    )


def test_a_template_that_changes_earlier_answers_is_refused(base):
    tokenizer, stops = load_tokenizer(base(LOOP.replace("m.content", "m.content | upper") + OPEN))
    encode(ONE, tokenizer, stops)
    with pytest.raises(StageError, match="changes an earlier answer: 'Tea, twice a day"):
        encode(TWO, tokenizer, stops)
    with pytest.raises(StageError, match="leaves out the answer or repeats it"):
        load_tokenizer(base("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"))
    with pytest.raises(StageError, match="refuses messages of the roles user"):
        load_tokenizer(base("{{ nothing.at.all }}"))


def test_only_special_tokens_are_broken_up(base):
    """Gemma's added tokens include line breaks and HTML tags, which are ordinary text."""
    folder = base(TEMPLATES["plain"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["\n\n", "<b>", "<think>"])
    tokenizer.chat_template = TEMPLATES["plain"]
    text = "A <b>line</b>\n\n<|end|> and [INST] </s> <think>"
    broken = break_markers(text, tokenizer)
    assert broken == "A <b>line</b>\n\n< |end|> and [INST] < /s> <think>"
    assert not set(tokenizer(broken)["input_ids"]) & tokenizer_module.special_ids(tokenizer) - {
        tokenizer.bos_token_id
    }
    llama = load_tokenizer(str(TINY))[0]
    assert break_markers("[INST] <<SYS>>", llama) == "[ INST] < <SYS>>"


def test_coloured_tokens(tokenizer):
    encoded = encode(ONE, *tokenizer)
    html = show_tokens(encoded, tokenizer[0]).data
    assert html.count("<span") == len(encoded["input_ids"])
    assert html.count("background") == sum(encoded["completion_mask"])


def test_the_description_says_what_matters(base):
    tokenizer, stops = load_tokenizer(base(TEMPLATES["a switch for thinking"]))
    said = describe_template(tokenizer, stops)
    assert said["thinking"] == "off: the prompt ends it before it begins"
    assert "<|end|>" in said["an answer stops at"]
    tokenizer, stops = load_tokenizer(base(TEMPLATES["today's date"]))
    assert describe_template(tokenizer, stops)["date in the template"] == "01 Jan 2026"
    assert describe_template(tokenizer, stops)["thinking"] == "none"


def test_a_pad_token_that_is_eos_or_has_no_row_is_replaced(tokenizer, base, tmp_path):
    assert tokenizer[0].pad_token == "<unk>"
    assert tokenizer[0].padding_side == "right"
    folder = base(TEMPLATES["plain"], rows=2055)
    beyond = PreTrainedTokenizerFast.from_pretrained(folder)
    beyond.add_special_tokens({"pad_token": "<pad>"})
    assert beyond.pad_token_id >= 2055
    beyond.save_pretrained(folder)
    loaded, _ = load_tokenizer(folder)
    assert loaded.pad_token_id < 2055
    assert loaded.pad_token_id != loaded.eos_token_id


def test_a_missing_model_is_named():
    with pytest.raises(StageError, match="no-such-folder-here: not on this machine, and the Hub"):
        load_tokenizer("no-such-folder-here")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A real vocabulary of Llama's kind, Mistral 7B's (Apache-2.0), as the Hub has it:
    tokenizer.json and config.
    """
    wheels = ROOT / ".cache" / "mistral-common"
    with locked(wheels.with_name("mistral-common.lock")):
        if not list(wheels.glob("*.whl")):
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                wheels,
                "mistral-common==1.12.0",
            ]
            assert subprocess.run(pip).returncode == 0, "mistral-common could not be downloaded"
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        content = wheel.read("mistral_common/data/tokenizer.model.v1")
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(content)
    scores = {piece.piece: piece.score for piece in proto.pieces}
    vocabulary = {piece: i for i, piece in enumerate(scores)}
    merges = generate_merges(vocabulary, scores, skip_tokens=["<unk>", "<s>", "</s>"])
    bpe = Tokenizer(
        models.BPE(
            vocabulary,
            [tuple(m) for m in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])

    def make(**config):
        folder = tmp_path_factory.mktemp("sentencepiece")
        bpe.save(str(folder / "tokenizer.json"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {**special, "add_bos_token": True, "tokenizer_class": "LlamaTokenizer", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        small = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        LlamaConfig(vocab_size=len(vocabulary), **small).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("config", [{}, {"legacy": False}, {"legacy": True}], ids=str)
def test_ids_of_a_real_vocabulary_of_llamas_kind(sentencepiece, tmp_path, config):
    """`<s>[INST]` is the marker that the model was made with, before and after saving, by whatever
    class it is read.

    transformers 5.13's LlamaTokenizer ignores the normalizer in tokenizer.json and gives another;
    the first assertion fails when that is mended, and `read_tokenizer` can go back to
    AutoTokenizer.
    """
    folder = sentencepiece(**config)
    tokenizer, stops = load_tokenizer(str(folder))
    right = [1, 733, 16289]
    if not config.get("legacy"):
        assert (
            AutoTokenizer.from_pretrained(folder)("<s>[INST]", add_special_tokens=False)[
                "input_ids"
            ]
            != right
        )
    ids = encode(ONE, tokenizer, stops)["input_ids"]
    assert ids[:3] == right
    save_tokenizer(tmp_path, tokenizer, stops)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    whole = ONE["prompt"] + ONE["completion"]
    assert (
        plain.apply_chat_template(whole, return_dict=False)
        == ids
        == encode(ONE, *load_tokenizer_of_run(tmp_path))["input_ids"]
    )


def test_a_tokenizer_that_would_read_otherwise_is_not_saved(sentencepiece, tmp_path, monkeypatch):
    tokenizer, stops = load_tokenizer(str(sentencepiece()))
    other = load_tokenizer(str(TINY))[0]
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda folder: other)
    with pytest.raises(StageError, match="gives other token ids than in training"):
        save_tokenizer(tmp_path, tokenizer, stops)


def test_gradients_need_ids_that_exist(tokenizer):
    """The ids of an example are rows of the embedding matrix."""
    ids = torch.tensor(encode(ONE, *tokenizer)["input_ids"])
    assert ids.max() < 2048
    assert ids.min() >= 0
