"""The menu of models/: each entry at full size on `meta`, against what is published of it and what
docs/models.md says.

What is published stands in tests/model_configs/: a config, cut down to its sizes, the ids that end
a turn, and what has to come out. Nothing is downloaded.
"""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

from tabletune.chat.tokenizer import find_stop_token_ids
from tabletune.model.checks import packing_leak
from tabletune.model.cuda_graphs import layers_support_cuda_graph, supports_cuda_graph
from tabletune.model.loading import model_class, skeleton
from tabletune.run.parameters import DEFAULTS
from tabletune.training.base_summary import summarize_base_model
from tabletune.training.lora_targets import lora_targets, shortest_target_names
from tabletune.training.memory import TrainingMemory

ROOT = Path(__file__).parent.parent.parent
MENU = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(ROOT.glob("models/*.yaml"))
}
CARDS = {
    "t4": 14,
    "a100": 38.5,
    "kaggle_t4x2": 14,
    "a100x2": 38.5,
}  # GiB: half a GiB less than PyTorch can have

# the marks that each family's template sets around a turn, in its order
TEMPLATES = {
    "chatml": "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|> ",
    "phi-4": "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>",
    "llama3": "<|start_header_id|>{{ m.role }}<|end_header_id|> {{ m.content }}<|eot_id|>",
    "gemma": "<start_of_turn>{{ m.role }} {{ m.content }}<end_of_turn> ",
    "inst": "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}",
    "phi-4-mini": "<|{{ m.role }}|>{{ m.content }}<|end|>",
    "harmony": (
        "{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% endif %}"
    ),
}


@cache
def facts(name):
    """What is published of an entry's model.

    One that is stored in 4 bits has the shape of the other.
    """
    path = ROOT / "tests" / "model_configs" / f"{name.removesuffix('-4bit')}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def shape_of(name):
    """The model of the published config on `meta`, built once."""
    return skeleton(AutoConfig.for_model(**facts(name)["config"]))


@pytest.mark.parametrize("name", MENU)
def test_an_entry_is_a_parameter_file(name):
    settings = MENU[name]
    assert {"base_model", "base_model_revision"} <= settings.keys() <= DEFAULTS.keys()
    assert re.fullmatch(r"main|[0-9a-f]{40}", settings["base_model_revision"])
    text = (ROOT / "models" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"https://huggingface.co/{settings['base_model']}\n" in text
    assert re.search(r"gated", text)
    assert "Tried here: " in text


@pytest.mark.parametrize("name", MENU)
def test_its_skeleton_is_as_large_as_published(name):
    published, shape = facts(name), shape_of(name)
    assert type(shape).__name__ in published["config"]["architectures"]
    assert shape.num_parameters() / 1e9 == pytest.approx(published["billion_parameters"], rel=0.01)


@pytest.mark.parametrize("name", MENU)
def test_adapters_go_on_all_of_its_attention_and_on_nothing_that_sees(name):
    published = facts(name)
    model = shape_of(name)
    found = lora_targets(model)
    assert Counter(layer.rpartition(".")[2] for layer in found) == published["adapters_on"]
    assert not re.search("vision|visual", " ".join(found))
    named = [layer for layer, _ in model.named_modules()]
    ends = shortest_target_names(model, found)
    assert {
        layer for layer in named if any(layer == end or layer.endswith(f".{end}") for end in ends)
    } == set(found)
    looked = summarize_base_model(model)
    for layer, count in published["adapters_on"].items():
        assert f"{count} × {layer}" in looked["adapters on"]


@pytest.mark.parametrize("name", {json.dumps(facts(name)["turns"]): name for name in MENU}.values())
def test_an_answer_stops_where_the_model_was_made_to_stop(name, tmp_path):
    published = facts(name)
    turns, config = published["turns"], shape_of(name).config
    named = {number: token for token, number in {"<unk>": 0, **turns["tokens"]}.items()}
    last = max([*named, *turns["stops"]])
    vocabulary = {named.get(number, f"word{number}"): number for number in range(last + 1)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        eos_token=turns["eos_token"],
        unk_token="<unk>",
        additional_special_tokens=list(turns["tokens"]),
    )
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{TEMPLATES[turns['template']]}{{% endfor %}}"
    )
    if "generation" in turns:
        GenerationConfig(eos_token_id=turns["generation"]).save_pretrained(tmp_path)
    stops = find_stop_token_ids(tokenizer, str(tmp_path), None, config)
    assert sorted(stops) == turns["stops"]
    assert max(stops) < config.get_text_config().vocab_size


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
SEEING = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "depth": 1,
}
SEEING |= {"num_heads": 4, "out_hidden_size": 64, "head_dim": 16}


def small(values):
    """The same kind of config, small enough to compute with."""
    new = {key: SMALL.get(key, value) for key, value in values.items()}
    new |= {"layer_types": values["layer_types"][:4]} if "layer_types" in values else {}
    new |= {"head_dim": 16} if "head_dim" in values else {}
    if (
        values.get("rope_parameters", {}).get("rope_type") == "longrope"
    ):  # a factor for each pair that rotates, of 16
        new["rope_parameters"] = values["rope_parameters"] | dict.fromkeys(
            ["short_factor", "long_factor"], [1.0] * 6
        )
    if "text_config" in values:
        seeing = {key: SEEING.get(key, value) for key, value in values["vision_config"].items()}
        new |= {"text_config": small(values["text_config"]), "vision_config": seeing}
    marks = [
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "image_token_id",
        "image_token_index",
        "boi_token_index",
    ]
    marks += ["eoi_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id"]
    return new | {key: 3 for key in marks if key in values}


@pytest.mark.parametrize(
    "name", {facts(name)["config"]["model_type"]: name for name in MENU}.values()
)
def test_examples_are_packed_only_where_they_do_not_see_each_other(name):
    published = facts(name)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**small(published["config"]))
    leak = packing_leak(model_class(config)(config).eval())
    assert (leak < 1e-4) == published["packed"], leak


@pytest.mark.parametrize(
    ("name", "model", "layers"),
    [
        ("llama-2-7b-chat", True, True),
        ("qwen3-4b", True, True),
        (
            "gemma-3-4b-it",
            True,
            False,
        ),  # layers that are recorded and get embeddings cost memory, and do nothing
        ("gpt-oss-20b", False, False),
    ],
)
def test_layers_are_recorded_where_they_get_token_ids(name, model, layers):
    shape = shape_of(name)
    assert (supports_cuda_graph(shape), layers_support_cuda_graph(shape)) == (model, layers)


def settings_of(name, profile):
    """The parameters of `make run-all PROFILE=… MODEL=…`: the model's on top of the profile's."""
    return (
        DEFAULTS
        | yaml.safe_load((ROOT / "profiles" / f"{profile}.yaml").read_text(encoding="utf-8"))
        | MENU[name]
    )


@cache
def memory_of(name, profile, shards=1):
    """Notebook 2's estimate for an entry of the menu under a profile."""
    settings = settings_of(name, profile)
    same = ("lora_r", "lora_dropout", "optim", "use_liger_kernel", "max_length")
    return TrainingMemory(
        shape_of(name),
        torch.float16,
        gpu=True,
        targets=settings["lora_target_modules"],
        shards=shards,
        **{option: settings[option] for option in same},
    )


def gib(name, profile, rows, shards=1, checkpointing=None):
    """Its sum in GiB on each GPU, with all layers recomputed or none."""
    settings = settings_of(name, profile)
    if checkpointing is None:
        checkpointing = settings["gradient_checkpointing"]
    memory = memory_of(name, profile, shards)
    return memory.total(rows * settings["max_length"], memory.shape.layers * checkpointing)


def cell(name, profile):
    """What docs/models.md has to say: as many rows as fit and what they take, or what one would."""
    most = settings_of(name, profile)["batch_size"]
    most = most if isinstance(most, int) else 16
    ways = [("", 1, None), (", checkpointing", 1, True)]
    if "x2" in profile:
        ways[1] = (", sharded", 2, None)
    for how, shards, checkpointing in ways:
        for rows in range(most, 0, -1):
            takes = gib(name, profile, rows, shards, checkpointing)
            if takes <= CARDS[profile]:
                return f"{rows} row{'s' * (rows > 1)}{how}: {takes:.1f}"
    return f"no: {gib(name, profile, 1, ways[-1][1], True):.1f}"


def tables_of_models():
    """The tables of docs/models.md with a line for each model: {heading: {name: cells}}."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    tables = {}
    for section in text.split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        rows = re.findall(r"(?m)^\| `([\w.-]+)` \|(.*)\|$", section)
        tables[heading] = {name: [part.strip() for part in row.split("|")] for name, row in rows}
    return tables


@pytest.mark.parametrize("name", MENU)
def test_docs_say_what_it_takes_as_the_notebook_does(name):
    assert tables_of_models()["Memory"][name] == [cell(name, profile) for profile in CARDS]


@pytest.mark.parametrize("heading", ["The menu", "Memory"])
def test_docs_have_the_whole_menu(heading):
    assert set(tables_of_models()[heading]) == set(MENU)
