"""Notebook 03: the merged model computes what the adapter on its base computes."""

import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import TINY, run_tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, pipeline


@pytest.fixture
def run_dir(finished_run, tmp_path):
    """A run folder in which stages 01 and 02 have run, on the base model in .cache."""
    folder = tmp_path / "run"
    for part in ("dataset", "adapter"):
        shutil.copytree(finished_run / part, folder / part)
    return folder


def merge_stage(run_dir, **parameters):
    return run_tiny("03_merge_adapter", run_dir, **parameters)


def logits(model):
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def new_adapter(run_dir, base=TINY, **config):
    """Put a random adapter of another configuration into the run folder; returns the adapted model, in fp32."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(run_dir / "adapter")
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
        {
            "r": 8,
            "lora_alpha": 4,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"v_proj": 9},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_original_equals_peft(run_dir, config):
    expected = logits(new_adapter(run_dir, **config))
    merge_stage(run_dir)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert not torch.allclose(logits(base), expected, atol=0.1), "the adapter changes something"


def test_dequantized_equals_the_model_that_was_trained(run_dir, finetune):
    stage = merge_stage(run_dir, base_weights="dequantized")
    trained = PeftModel.from_pretrained(finetune.load_base(str(TINY), None, torch.float32, "sdpa"), run_dir / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(trained), atol=1e-4)
    assert stage.report["base_weights"] == "dequantized"
    merge_stage(run_dir, base_weights="original")
    original = AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype=torch.float32)
    assert not torch.allclose(logits(original), logits(trained), atol=1e-3)


def test_a_base_that_is_stored_in_4_bits(run_dir, tmp_path, finetune):
    stored = tmp_path / "stored"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(TINY, quantization_config=nf4, dtype=torch.float32).save_pretrained(stored)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(stored)
    new_adapter(run_dir, base=stored, r=8, target_modules="all-linear")
    merge_stage(run_dir, base_model=str(stored))
    trained = PeftModel.from_pretrained(
        finetune.load_base(str(stored), None, torch.float32, "sdpa"), run_dir / "adapter"
    )
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), logits(trained), atol=1e-4)
    assert not getattr(merged.config, "quantization_config", None)
    assert json.loads((run_dir / "merged" / "merge_report.json").read_text())["base_weights"] == "dequantized"


def test_a_base_stored_in_4_bits_as_bf16_and_trained_in_fp16_merges_in_fp16(run_dir, tmp_path, finetune):
    """At 7B on a GPU, bf16's rounding of such a merge came to 6% of the range of the logits."""
    stored = tmp_path / "stored"
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(TINY, quantization_config=nf4, dtype=torch.bfloat16).save_pretrained(stored)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(stored)
    new_adapter(run_dir, base=stored, r=8, target_modules="all-linear")
    provenance = run_dir / "adapter" / "provenance.json"
    provenance.write_text(json.dumps({**json.loads(provenance.read_text()), "dtype": "float16"}))
    report = merge_stage(run_dir, base_model=str(stored)).report
    assert report["dtype"] == "float16"
    assert report["max_logit_difference"] < 0.01 * report["logit_range"]
    assert AutoModelForCausalLM.from_pretrained(run_dir / "merged").dtype == torch.float16


def test_several_shards_and_an_interruption(run_dir):
    """Many small files hold the same model as one; files that are whole are not written again."""
    whole = merge_stage(run_dir)
    expected = logits(AutoModelForCausalLM.from_pretrained(run_dir / "merged"))
    (run_dir / "merged").rename(run_dir / "merged.partial")
    sharded = merge_stage(run_dir, max_shard_gb=0.0005)
    assert len(whole.shards) == 1 and len(sharded.shards) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(run_dir / "merged")), expected)
    partial = run_dir / "merged.partial"
    (run_dir / "merged").rename(partial)
    (partial / "plan.json").write_text(json.dumps(sharded.plan))
    first, *others = sorted(partial.glob("*.safetensors"))
    others[-1].unlink()
    stamp = first.stat().st_mtime_ns
    merge_stage(run_dir, max_shard_gb=0.0005)
    assert (run_dir / "merged" / first.name).stat().st_mtime_ns == stamp
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(run_dir / "merged")), expected)
    with safe_open(run_dir / "merged" / first.name, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_was_finished_is_merged_anew(run_dir):
    """Whoever runs the notebook again may have changed its code."""
    merge_stage(run_dir)
    file = run_dir / "merged" / "model-00001-of-00001.safetensors"
    stamp = file.stat().st_mtime_ns
    merge_stage(run_dir)
    assert file.stat().st_mtime_ns != stamp
    assert not (run_dir / "merged.partial").exists() and not (run_dir / "merged" / "plan.json").exists()


def test_half_a_merged_model_counts_as_room_for_the_whole(merge_adapter, tmp_path, monkeypatch):
    """Else a merge into Google Drive that is interrupted would begin again elsewhere."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
    (tmp_path / "merged.partial").mkdir()
    (tmp_path / "merged.partial" / "model-1.safetensors").write_bytes(b"x" * 50)
    assert merge_adapter.free_for_model(tmp_path) == 150


# Peak of resident memory in GiB of merging two layers of Llama-2-7B's shape, 0.567 of it there beforehand
MERGING = [
    ("q_proj k_proj v_proj o_proj", "original", 1.0, 1.50),
    ("all", "original", 1.0, 1.52),
    ("all", "dequantized", 1.0, 1.92),
    ("q_proj k_proj v_proj o_proj", "original", 0.25, 0.83),
    ("all", "dequantized", 0.25, 1.45),
    ("all", "original", 2.0, 1.85),
]


@pytest.mark.parametrize(("adapted", "base_weights", "max_shard_gb", "measured"), MERGING)
def test_the_expected_memory_is_near_the_measured(merge_adapter, adapted, base_weights, max_shard_gb, measured):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=11008, num_hidden_layers=2))
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    sizes = {name: 2 * number for name, number in numbers.items()}
    linear = {name: 4 * number for name, number in numbers.items() if "_proj" in name}
    changed = {name: size for name, size in linear.items() if adapted == "all" or name.split(".")[-2] in adapted}
    shards = merge_adapter.plan_shards(sizes, max_shard_gb * 1e9)
    expected = merge_adapter.merging_gib(sizes, shards, changed, base_weights)
    assert expected + 0.567 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("memory", r"Merging takes 0\.0 GiB of RAM, and 0\.0 GiB are free\. Lower max_shard_gb"),
        ("disk", r"The merged model needs \d\.\d MiB; .* has room for 0\.0 MiB\. Free some space"),
    ],
)
def test_a_merge_without_room_does_not_begin(run_dir, monkeypatch, lacking, message):
    if lacking == "memory":
        room = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(Exception, match=message) as caught:
        merge_stage(run_dir)
    assert type(caught.value).__name__ == "StageError"
    assert not list(run_dir.glob("merged*/*.safetensors"))


def test_plan_shards(merge_adapter):
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 1}
    assert merge_adapter.plan_shards(sizes, 8) == [["a", "b"], ["c"], ["d", "e"]]


def test_the_merged_model_works_by_itself(finished_run):
    answer = pipeline("text-generation", model=str(finished_run / "merged"))
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "merged")
    assert tokenizer.chat_template and tokenizer.pad_token == "<unk>" and tokenizer.padding_side == "right"
    generation = answer.model.generation_config
    assert tokenizer.eos_token_id in generation.eos_token_id and generation.pad_token_id == tokenizer.pad_token_id
    made = answer([{"role": "user", "content": "I am suffering from Cold."}], max_new_tokens=5)
    assert made[0]["generated_text"][-1]["role"] == "assistant"


def test_an_adapter_of_another_base_is_refused(run_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(TINY, other)
    with pytest.raises(Exception, match=rf"trained on .cache/tiny-llama, but base_model is {other}"):
        merge_stage(run_dir, base_model=str(other))


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage config"])
def test_a_damaged_adapter_is_named(run_dir, damage):
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    else:
        (run_dir / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(Exception, match="is damaged"):
        merge_stage(run_dir)
    assert not (run_dir / "merged").exists()


def test_a_damaged_base_is_named(run_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    new_adapter(run_dir, base=base, r=8, target_modules="all-linear")
    shard = base / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(Exception, match=rf"{shard} is damaged"):
        merge_stage(run_dir, base_model=str(base))
    assert not (run_dir / "merged").exists()


def test_an_adapter_of_other_shapes_is_refused(run_dir):
    config = run_dir / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"q_proj"', '"z_proj"'))
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k.replace("q_proj", "z_proj"): v for k, v in load_file(weights).items()}, weights)
    with pytest.raises(Exception, match=r"z_proj, which .* does not have"):
        merge_stage(run_dir)
