"""The estimate of a training's memory, against what was measured on GPUs."""

import json
from functools import cache

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, LlamaConfig

from tabletune.model.loading import skeleton
from tabletune.training.memory import TrainingMemory, adapter_inputs, model_shape

MEASURED = json.loads((ROOT / "benchmarks" / "memory.json").read_text(encoding="utf-8"))["rows"]
# Before adapters were fused; over two H100 each keeps half (FSDP). Rows of 512 tokens, r 64 on
# attention. The last one is a 70B.
SHARDED = [
    ({"rows": 2, "recomputed_layers": 32}, 3.40),
    ({"rows": 16, "recomputed_layers": 0}, 28.77),
    ({"rows": 5, "recomputed_layers": 0, "name": "70B"}, 68.1),
]
SHAPES = {"7B": (4096, 11008, 32, 32), "70B": (8192, 28672, 80, 8)}


@cache
def published_skeleton(name):
    """The skeleton of an entry of models/."""
    file = ROOT / "tests" / "model_configs" / f"{name}.json"
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    return skeleton(AutoConfig.for_model(**config))


@cache
def llama_2(name):
    """The skeleton of a Llama 2, by its size."""
    hidden, intermediate, layers, heads = SHAPES[name]
    return skeleton(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            num_key_value_heads=heads,
        )
    )


def memory_of(model="llama-2-7b-chat", dtype=torch.bfloat16, **options):
    """The TrainingMemory of a published model on a GPU."""
    options = {"gpu": True, "optim": "adamw_torch_fused"} | options
    return TrainingMemory(published_skeleton(model), dtype, **options)


@pytest.mark.parametrize("row", MEASURED, ids=range(len(MEASURED)))
def test_the_estimate_is_near_the_measured_peak(row):
    """Within 10%, and never under it by more than 5%."""
    names = ("targets", "lora_r", "optim", "max_length", "quantization", "lora_dropout")
    options = {name: row[name] for name in (*names, "lora_options")}
    memory = memory_of(row["model"], getattr(torch, row["dtype"]), **options)
    tokens = row["rows"] * row["max_length"]
    expected = memory.total(tokens, row["recomputed_layers"], row["cuda_graph"])
    assert 0.95 * row["peak_gib"] < expected < 1.1 * row["peak_gib"]


def test_the_measurements_cover_what_people_train():
    covered = {(row["model"], row["targets"]) for row in MEASURED}
    models = ("llama-2-7b-chat", "llama-3.1-8b-instruct", "qwen3-4b")
    assert covered >= {(model, targets) for model in models for targets in ("auto", "all-linear")}
    assert {row["lora_r"] for row in MEASURED} >= {16, 64, 256}
    assert {row["max_length"] for row in MEASURED} >= {512, 2048, 4096}
    assert {row["quantization"] for row in MEASURED} == {"nf4", "8bit", "none"}
    assert any(row["lora_options"].get("use_dora") for row in MEASURED)
    assert any(0 < row["recomputed_layers"] < 32 for row in MEASURED)


@pytest.mark.parametrize(("row", "measured"), SHARDED)
def test_the_estimate_of_a_sharded_model_is_near_the_measured(row, measured):
    model = llama_2(row.get("name", "7B"))
    memory = TrainingMemory(model, torch.bfloat16, True, optim="adamw_torch_fused", shards=2)
    expected = memory.total(row["rows"] * 512, row["recomputed_layers"])
    assert expected == pytest.approx(measured, rel=0.15)


def test_the_estimate_of_the_cpu_profile():
    """2.76 GiB were the peak on two cores, 0.62 GiB of it before the model was loaded."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        vocab_size=49152,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    memory = TrainingMemory(
        skeleton(config), torch.float32, False, "all-linear", use_liger_kernel=False
    )
    parts = memory.parts(2 * 256).drop("Python and its libraries")
    assert parts.sum() + 0.62 == pytest.approx(2.76, rel=0.15)


def test_the_terms_of_a_7b():
    memory = memory_of(targets="all-linear", lora_r=64)
    shape = memory.shape
    assert shape.linear_weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert memory.base_model() == pytest.approx(3.60 * 2**30, rel=0.01)
    assert memory.trained_weights() == 32 * 64 * (4 * 8192 + 3 * (4096 + 11008))
    assert memory.adapter() == memory.trained_weights() * 16
    # two norms, queries, keys, values and results, gate and up, the thin products, a row of the
    # mask
    numbers = 2 * 4096 + 4 * 4096 + 2 * 11008 + 7 * 64 + 512
    assert memory.layer_activations(fused=True) == 2 * numbers


def test_what_fused_adapters_save():
    """Two norms' outputs and the input of the MLP's last layer; with attention alone, one
    norm's.
    """
    everything = memory_of(targets="all-linear")
    assert adapter_inputs(everything.model, everything.adapted) == (32 * (2 * 4096 + 11008), 0)
    attention = memory_of(targets="auto")
    assert adapter_inputs(attention.model, attention.adapted) == (32 * 4096, 0)
    saved = everything.layer_activations(False) - everything.layer_activations(True)
    assert saved == 2 * (2 * 4096 + 11008)


@pytest.mark.parametrize(
    ("change", "term"),
    [
        ({"lora_r": 128}, "adapter"),
        ({"lora_options": {"modules_to_save": ["lm_head"]}}, "adapter"),
        ({"quantization": "8bit"}, "base_model"),
        ({"quantization": "none"}, "base_model"),
    ],
)
def test_each_choice_changes_its_term(change, term):
    assert getattr(memory_of(**change), term)() > getattr(memory_of(), term)()


@pytest.mark.parametrize(
    "change", [{"use_liger_kernel": False}, {"lora_options": {"use_dora": True}}, {"fused": False}]
)
def test_what_keeps_more_activations_is_known(change):
    assert memory_of(**change).activations(8192, 0) > memory_of().activations(8192, 0)


def test_recomputed_layers_take_less_and_all_of_them_least():
    memory = memory_of(targets="all-linear")
    totals = [memory.total(8192, count) for count in (0, 8, 16, 31)]
    assert totals == sorted(totals, reverse=True)
    assert memory.total(8192, 32) < totals[2]


def test_paged_states_may_move_to_ram_and_are_not_counted():
    assert memory_of(optim="paged_adamw_32bit").adapter() == memory_of().adapter() / 2


def test_each_of_several_gpus_has_buckets_for_its_gradients():
    assert memory_of(replicas=2).adapter() == memory_of().adapter() * 20 / 16


def test_memory_that_is_freed_in_blocks_is_used_again_less():
    assert memory_of(allocator="blocks").total(8192) > memory_of().total(8192)


def test_a_shape_is_read_from_modules_and_config():
    shape = model_shape(published_skeleton("llama-3.1-8b-instruct"))
    assert (shape.layers, shape.hidden, shape.intermediate) == (32, 4096, 14336)
    assert shape.norms == 2
    assert model_shape(published_skeleton("qwen3-4b")).attention == 5 * 32 * 128  # norms of q and k
