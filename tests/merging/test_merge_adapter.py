"""Merging: the merged model computes what the adapter on its base computes, and is else what the
base was.
"""

import json
import shutil
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import bitsandbytes as bnb
import psutil
import pytest
import torch
import transformers
from base_models import BASES, cached
from conftest import TINY, run_script
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, pipeline
from transformers.core_model_loading import revert_weight_conversion

from tabletune.chat.tokenizer import load_tokenizer, save_tokenizer
from tabletune.errors import StageError
from tabletune.merging import verification
from tabletune.merging import write as write_module
from tabletune.merging.in_memory import merge_in_memory, nf4_round_trip_model, quantized_layers
from tabletune.merging.lora import nf4_round_trip
from tabletune.merging.plan import MergePlan
from tabletune.model.adapters import attach_adapter
from tabletune.model.loading import load_model, skeleton
from tabletune.model.quantization import load_base
from tabletune.run.stage import Stage
from tabletune.training.lora_targets import lora_targets

QUICK = [
    "llama_tied",
    "qwen2",
    "phi3",
    "gpt_neox",
    "qwen3_moe",
    "gemma3",
    "granite_hybrid",
]  # each another structure


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EVERY = [name if name in QUICK else slow(name) for name in BASES if name != "beyond"]
STORED_IN_4_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
)


def make_run(folder, base, dtype="float32", quantization="nf4", targets="auto", seed=1, **lora):
    """A run folder with two test rows and a random adapter on `base`, none of whose matrices is
    zero.
    """
    row = {"prompt": [{"role": "user", "content": "I am suffering from Cold."}]}
    row["completion"] = [{"role": "assistant", "content": "Drink ginger tea, warm and sweet."}]
    DatasetDict(test=Dataset.from_list([row, row])).save_to_disk(folder / "dataset")
    (folder / "dataset" / "report.json").write_text(json.dumps({"fingerprint": "abc"}))
    return new_adapter(folder, base, dtype, quantization, targets, seed, **lora)


def new_adapter(folder, base, dtype="float32", quantization="nf4", targets="auto", seed=1, **lora):
    """Put a random adapter into a run folder. Returns the folder."""
    torch.manual_seed(seed)
    model = load_model(base, None, torch.float32)
    targets = lora_targets(model, targets) if targets in ("auto", "all-linear") else targets
    options = {"r": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    config = LoraConfig(target_modules=targets, **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_" not in name or options["init_lora_weights"]):
                parameter.add_(torch.randn_like(parameter) / 10)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    save_tokenizer(folder / "adapter", *load_tokenizer(str(base)))
    provenance = {
        "base_model": str(base),
        "dataset_fingerprint": "abc",
        "dtype": dtype,
        "quantization": quantization,
    }
    (folder / "adapter" / "provenance.json").write_text(json.dumps(provenance))
    return folder


def merge(run, base=TINY, base_weights="original", max_shard_gb=1.0, run_dir=None):
    """Merge as notebook 3 does. Returns the report."""
    parameters = {
        "run_dir": run_dir or str(run),
        "base_weights": base_weights,
        "max_shard_gb": max_shard_gb,
    }
    stage = Stage("03_merge_adapter", run, parameters)
    return write_module.merge_adapter(
        MergePlan(run, str(base), None, base_weights), stage, max_shard_gb
    )[1]


def stored(folder):
    """All tensors of a folder's files."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 67)[None]).logits


def logits_of(folder):
    return logits(load_model(folder, None, torch.float32))


def by_peft(base, run):
    """What PEFT's merge_and_unload gives in fp32, under the names that the base's files have."""
    model = attach_adapter(
        load_model(base, None, torch.float32), run / "adapter"
    ).merge_and_unload()
    return revert_weight_conversion(model, model.state_dict())


@pytest.fixture
def run(tmp_path):
    """A run folder with a random adapter on the tiny base model."""
    return make_run(tmp_path / "run", TINY)


# --- every architecture


@pytest.mark.parametrize(
    "name",
    [
        "llama_tied",
        "gpt_neox",
        "gpt_oss",
        *(slow(n) for n in BASES if n not in ("mamba2", "beyond")),
    ],
)
def test_the_proof_computes_in_fp32_with_weights_of_16_bits(name):
    """Computed in bf16, the logits of gpt-oss move by 14% of their range, as its router picks other
    experts.
    """
    model, exact = (
        load_model(cached(name), None, dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    for weight in exact.parameters():
        weight.data = weight.data.bfloat16().float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    in_fp32, in_bf16 = (
        verification.logits_of(model, [list(range(3, 67))], exactly) for exactly in (True, False)
    )
    assert torch.equal(in_fp32, logits(exact)[0])
    assert torch.equal(in_bf16, logits(model)[0].float())
    assert not torch.equal(in_fp32, in_bf16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
        "the weights are as before"
    )


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_merges_as_peft_does(tmp_path, name):
    """Tensor by tensor; what the adapter does not change stays bit for bit, whatever transformers
    makes of it.
    """
    base = cached(name)
    run = make_run(tmp_path, base, "bfloat16", r=4, lora_alpha=8)
    report = merge(run, base)
    before, after, expected = stored(base), stored(run / "merged"), by_peft(base, run)
    assert after.keys() == before.keys()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == report["merged_modules"] > 0
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert tensor.shape == before[name].shape
        if name in expected:  # rounded once, to eight bits
            assert torch.allclose(
                tensor.float(), expected[name].float(), rtol=1.01 * 2**-8, atol=1e-7
            ), name
        else:
            assert name not in changed
    assert report["same_next_token"] is not None
    merged, original = (
        json.loads((folder / "config.json").read_text()) for folder in (run / "merged", base)
    )
    assert merged == original


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma3", slow("gpt2")])
def test_dequantized_is_the_quantized_model_that_was_trained(tmp_path, name):
    """Experts and vision layers keep their weights: bitsandbytes quantizes no experts, and training
    sees no images.
    """
    base = cached(name)
    run = make_run(tmp_path, base)
    report = merge(run, base, "dequantized")
    assert report["max_logit_difference"] < 0.01 * report["logit_range"]
    before, after = stored(base), stored(run / "merged")
    for name in before:
        if "expert" in name or "vision" in name:
            assert torch.equal(before[name], after[name]), name
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    assert changed == len(quantized_layers(skeleton(AutoConfig.from_pretrained(base))))


@pytest.mark.parametrize("name", EVERY)
def test_the_linear_layers_are_those_that_bitsandbytes_quantizes(name):
    model = load_base(cached(name), None, torch.float32)
    text = set(model.get_decoder().modules())
    quantized = {
        n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit) and m in text
    }
    assert (
        quantized
        == {n for n, _ in quantized_layers(skeleton(AutoConfig.from_pretrained(cached(name))))}
        != set()
    )


@pytest.mark.parametrize("name", ["gemma3", slow("qwen3_5")])
def test_a_model_that_reads_images_is_whole_again(tmp_path, name):
    base = cached(name)
    merge(make_run(tmp_path, base), base)
    merged = tmp_path / "merged"
    kind = AutoConfig.from_pretrained(merged).architectures[0]
    loaded, info = getattr(transformers, kind).from_pretrained(merged, output_loading_info=True)
    assert kind.endswith("ForConditionalGeneration")
    assert not info["missing_keys"]
    assert loaded.config.vision_config
    assert (merged / "preprocessor_config.json").read_bytes() == (
        base / "preprocessor_config.json"
    ).read_bytes()
    images = {
        name: tensor for name, tensor in stored(base).items() if "vis" in name or "mtp" in name
    }
    assert images
    assert all(torch.equal(tensor, stored(merged)[name]) for name, tensor in images.items())


# --- every kind of adapter


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 16, "targets": ["q_proj", "v_proj"]},
        {"lora_alpha": 16, "use_rslora": True, "targets": "all-linear"},
        {
            "lora_alpha": 4,
            "targets": "all-linear",
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": {"v_proj": 9},
        },
        {"targets": ["q_proj", "lm_head"]},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "norm"]},
        slow({"targets": ["q_proj", "v_proj"], "lora_bias": True}),
        slow({"bias": "all"}),
        slow({"targets": ["q_proj", "embed_tokens"]}),
        slow({"targets": "all-linear", "init_lora_weights": "olora"}),
    ],
    ids=[
        "plain",
        "rslora",
        "patterns",
        "head",
        "dora",
        "modules",
        "lora_bias",
        "bias",
        "embeddings",
        "olora",
    ],
)
def test_original_equals_peft(tmp_path, capsys, request, config):
    base = cached("qwen2") if {"bias", "lora_bias"} & config.keys() else TINY  # qwen2 has biases
    run = make_run(tmp_path, base, **config)
    merge(run, base)
    expected = logits(attach_adapter(load_model(base, None, torch.float32), run / "adapter"))
    assert torch.allclose(logits_of(run / "merged"), expected, atol=1e-4 if base == TINY else 0.05)
    assert not torch.allclose(logits_of(base), expected, atol=0.05), "the adapter changes something"
    one_by_one = request.node.callspec.id in ("plain", "rslora", "patterns", "head")
    assert (
        "PEFT merges it with the whole model in memory" in capsys.readouterr().out
    ) != one_by_one


@pytest.mark.slow
def test_experts_with_adapters_are_merged_by_peft(tmp_path):
    base = cached("gpt_oss")
    run = make_run(tmp_path, base, r=2, target_parameters=["mlp.experts.down_proj"])
    merge(run, base)
    before, after, expected = stored(base), stored(run / "merged"), by_peft(base, run)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.self_attn.q_proj.weight",
    } <= changed
    assert all(
        torch.allclose(after[name].float(), expected[name].float(), rtol=0.02, atol=1e-3)
        for name in after
    )


def test_dequantized_equals_the_model_that_was_trained(run):
    report = merge(run, base_weights="dequantized")
    trained = attach_adapter(load_base(str(TINY), None, torch.float32), run / "adapter")
    assert torch.allclose(logits_of(run / "merged"), logits(trained), atol=1e-4)
    assert report["base_weights"] == "dequantized"
    merge(run, base_weights="original")
    assert not torch.allclose(logits_of(run / "merged"), logits(trained), atol=1e-3)


@pytest.mark.slow
def test_dequantized_dora(tmp_path):
    run = make_run(tmp_path, TINY, use_dora=True)
    merge(run, base_weights="dequantized")
    trained = attach_adapter(load_base(str(TINY), None, torch.float32), run / "adapter")
    assert torch.allclose(logits_of(run / "merged"), logits(trained), atol=1e-3)


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
@pytest.mark.parametrize("config", [{}, slow({"use_dora": True})], ids=["plain", "dora"])
def test_merging_in_memory_gives_what_is_written(tmp_path, base_weights, config):
    run = make_run(tmp_path, TINY, **config)
    merge(run, base_weights=base_weights)
    model = merge_in_memory(
        load_model(TINY, None, torch.float32), run / "adapter", base_weights, torch.float32
    )
    for name, tensor in stored(run / "merged").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_quantize_again_is_keeping_it_in_4_bits():
    again = logits(nf4_round_trip_model(load_model(TINY, None, torch.float32)))
    assert torch.allclose(again, logits(load_base(str(TINY), None, torch.float32)), atol=1e-4)
    assert not torch.allclose(again, logits_of(TINY), atol=1e-3)


@pytest.mark.parametrize(
    ("stored_as", "trained_in", "merged_in"),
    [
        ("bfloat16", "float16", "float16"),
        slow("float32", "float32", "float32"),
        slow("bfloat16", "float32", "bfloat16"),
    ],
)
def test_a_base_that_is_stored_in_4_bits(tmp_path, stored_as, trained_in, merged_in):
    """Stored as bf16 and trained in fp16, it merges in fp16: at 7B, bf16's rounding came to 6% of
    the logits' range.
    """
    base, dtype = tmp_path / "stored", getattr(torch, stored_as)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=STORED_IN_4_BITS, dtype=dtype
    )
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(base)
    run = make_run(tmp_path, TINY, trained_in, targets="all-linear")
    rebase(run, base)
    report = merge(run, base)
    assert (report["dtype"], report["base_weights"]) == (merged_in, "dequantized")
    assert report["max_logit_difference"] < 0.01 * report["logit_range"] or merged_in == "bfloat16"
    config = AutoConfig.from_pretrained(run / "merged")
    assert config.dtype == getattr(torch, merged_in)
    assert not getattr(config, "quantization_config", None)
    assert {tensor.dtype for tensor in stored(run / "merged").values()} == {config.dtype}
    trained = attach_adapter(load_base(str(base), None, torch.float32), run / "adapter")
    rounding = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}[merged_in]
    assert torch.allclose(logits_of(run / "merged"), logits(trained), atol=rounding)


def rebase(run, base):
    """Say of the adapter in a run that it was trained on another base."""
    for file, key in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("provenance.json", "base_model"),
    ):
        path = run / "adapter" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), key: str(base)}))


# --- what is written


def test_several_files_hold_the_same_tensors(run):
    assert merge(run)["shards"] == 1
    expected = stored(run / "merged")
    assert merge(run, max_shard_gb=0.0005)["shards"] > 3
    merged = stored(run / "merged")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)
    for file in (run / "merged").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            alone = len(opened.keys()) == 1
        assert file.stat().st_size < 0.51e6 or alone
    assert torch.equal(
        logits_of(run / "merged"),
        logits(transformers.LlamaForCausalLM.from_pretrained(run / "merged")),
    )


def test_the_merged_model_works_by_itself(tmp_path):
    base = cached("gemma")
    merged = make_run(tmp_path, base) / "merged"
    merge(tmp_path, base)
    answer = pipeline("text-generation", model=str(merged))
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template
    assert tokenizer.pad_token == "<pad>"
    assert tokenizer.padding_side == "right"
    stops = tokenizer.convert_tokens_to_ids(["</s>", "<end_of_turn>"])
    assert set(answer.model.generation_config.eos_token_id) == set(stops)
    assert answer.model.generation_config.pad_token_id == tokenizer.pad_token_id
    made = answer(
        [{"role": "user", "content": "I am suffering from Cold."}],
        max_new_tokens=5,
        do_sample=False,
    )
    assert made[0]["generated_text"][-1]["role"] == "assistant"


def test_files_of_the_base_stay_and_the_tokenizer_is_the_runs(tmp_path):
    base = shutil.copytree(TINY, tmp_path / "base")
    for name in (
        "LICENSE",
        "processor_config.json",
        "tokenizer.model",
        "README.md",
        "merges.txt",
        "original.pth",
    ):
        (base / name).write_text("{}")
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 5}
    (base / "generation_config.json").write_text(json.dumps(generation))
    merge(make_run(tmp_path / "run", base), base)
    merged = tmp_path / "run" / "merged"
    there = {path.name for path in merged.iterdir()}
    assert {
        "LICENSE",
        "processor_config.json",
        "config.json",
        "merge_report.json",
        "tokenizer.json",
    } <= there
    assert not there & {
        "tokenizer.model",
        "README.md",
        "merges.txt",
        "original.pth",
        "adapter_config.json",
    }
    assert (merged / "tokenizer.json").read_bytes() == (
        tmp_path / "run/adapter/tokenizer.json"
    ).read_bytes()
    written = json.loads((merged / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert 2 in written["eos_token_id"]


def everything_in(folder):
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_second_time_all_is_done(run, capsys):
    first = merge(run)
    before = everything_in(run)
    assert merge(run) == first
    assert everything_in(run) == before
    assert "All is done already" in capsys.readouterr().out


def test_what_another_adapter_gave_is_set_aside(run):
    first = merge(run)
    for name in ("evaluation", "baselines", "trust", "rating"):
        (run / name).mkdir()
        (run / name / "metrics.json").write_text("{}")
    new_adapter(run, TINY, seed=2)
    second = merge(run)
    [aside] = (run / "earlier").iterdir()
    assert json.loads((aside / "merged" / "merge_report.json").read_text()) == first != second
    for name in ("evaluation", "baselines", "trust", "rating"):
        assert (aside / name / "metrics.json").exists()
        assert not (run / name).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("No space left on device")])
def test_an_interruption_leaves_nothing_that_looks_complete(run, monkeypatch, error):
    files = []

    def save(tensors, path, metadata):
        if files:
            raise error
        files.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(write_module, "save_file", save)
    with pytest.raises((KeyboardInterrupt, StageError)):
        merge(run, max_shard_gb=0.0005)
    assert files
    assert not list(run.glob("merged*"))
    monkeypatch.undo()
    (run / "merged.partial").mkdir()  # of a kernel that was killed
    assert merge(run)["shards"] == 1
    assert not (run / "merged.partial").exists()


@pytest.mark.parametrize(
    ("files", "free_gib", "cores", "expected"),
    [(9, 100, 16, 4), (9, 100, 2, 2), (9, 7, 16, 3), (9, 1.5, 16, 1), (1, 100, 16, 1)],
)
def test_as_many_files_are_written_at_once_as_half_of_the_free_memory_holds(
    monkeypatch, files, free_gib, cores, expected
):
    room = psutil.virtual_memory()._replace(available=free_gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    monkeypatch.setattr(write_module.os, "cpu_count", lambda: cores)
    plan = SimpleNamespace(gib=lambda shards: 1.0)
    assert write_module.writers(plan, [[]] * files) == expected


def test_files_are_written_at_the_same_time(run, monkeypatch):
    """Each of two files waits until the other one is being written, too."""
    both = Barrier(2, timeout=20)

    def save(tensors, path, metadata):
        both.wait()
        save_file(tensors, path, metadata)

    monkeypatch.setattr(write_module, "writers", lambda *_: 2)
    monkeypatch.setattr(write_module, "save_file", save)
    size = sum(tensor.nbytes for tensor in MergePlan(run, str(TINY)).tensors.values())
    shards = merge(run, max_shard_gb=0.7 * size / 1e9)["shards"]
    assert shards == 2


def test_a_model_too_large_for_drive_stays_here(run, tmp_path, monkeypatch, capsys):
    """Nothing on Drive is deleted, and the second time it is found."""
    merge(run)
    monkeypatch.chdir(tmp_path)
    free = {run: 5e6, Path("runs/run"): 1e9}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free[place]))
    new_adapter(run, TINY, seed=2)
    report = merge(run, run_dir="drive:run")
    assert (
        "too much for Google Drive: the merged model stays here, in runs/run"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "runs/run/merged/merge_report.json").read_text()) == report
    assert not (run / "merged").exists()
    assert list(run.glob("earlier/*/merged/merge_report.json"))
    assert merge(run, run_dir="drive:run") == report
    assert "All is done already" in capsys.readouterr().out


# --- what it takes


# Peak of resident memory in GiB of merging two layers of Llama-2-7B's shape, 0.567 of it there
# beforehand
MERGING = [
    ("q_proj k_proj v_proj o_proj", "original", 1.0, 1.50),
    ("all", "original", 1.0, 1.52),
    ("all", "dequantized", 1.0, 1.92),
    ("q_proj k_proj v_proj o_proj", "original", 0.25, 0.83),
    ("all", "dequantized", 0.25, 1.45),
    ("all", "original", 2.0, 1.85),
]


@pytest.mark.parametrize(("adapted", "base_weights", "max_shard_gb", "measured"), MERGING)
def test_the_expected_memory_is_near_the_measured(adapted, base_weights, max_shard_gb, measured):
    model = skeleton(LlamaConfig(intermediate_size=11008, num_hidden_layers=2, dtype=torch.float16))
    tensors = {name: parameter.half() for name, parameter in model.named_parameters()}
    linear = [name for name in tensors if "_proj" in name]
    modules = [name for name in linear if adapted == "all" or name.split(".")[-2] in adapted]
    quantized = set(linear) if base_weights == "dequantized" else set()
    plan = SimpleNamespace(tensors=tensors, modules=modules, quantized=quantized, plain=True)
    split = write_module.split_torch_state_dict_into_shards(
        tensors, max_shard_size=int(max_shard_gb * 1e9)
    )
    expected = MergePlan.gib(plan, split.filename_to_tensors.values())
    assert expected + 0.567 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("memory", r"Merging takes 0\.0 GiB of RAM, and 0\.0 GiB are free\. Lower max_shard_gb"),
        ("disk", r"The merged model needs \d\.\d MiB, and .* has 0\.0\. Free some space"),
    ],
)
def test_a_merge_without_room_does_not_begin(run, monkeypatch, lacking, message):
    if lacking == "memory":
        room = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: room)
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(StageError, match=message):
        merge(run)
    assert not list(run.glob("merged*"))


# --- what is refused


def test_an_adapter_of_another_base_is_refused(run, tmp_path):
    other = shutil.copytree(TINY, tmp_path / "other")
    with pytest.raises(StageError, match=rf"trained on {TINY}, but base_model is {other}"):
        MergePlan(run, str(other))


def test_an_adapter_without_numbers_is_refused(run):
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match="holds infinity or NaN: its training diverged"):
        MergePlan(run, str(TINY))


@pytest.mark.parametrize("damage", ["truncated", "missing", "garbage config", "no adapter"])
def test_a_damaged_adapter_is_named(run, damage):
    weights = run / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing":
        weights.unlink()
    elif damage == "garbage config":
        (run / "adapter" / "adapter_config.json").write_text("{")
    else:
        shutil.rmtree(run / "adapter")
    with pytest.raises(StageError, match=r"is damaged|is missing\. Run 02_finetune_qlora first"):
        MergePlan(run, str(TINY))


def test_a_damaged_base_is_named(tmp_path):
    base = shutil.copytree(TINY, tmp_path / "base")
    run = make_run(tmp_path / "run", base)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(StageError, match=rf"{file} is damaged"):
        MergePlan(run, str(base))


@pytest.mark.parametrize("change", ["name", "shape"])
def test_an_adapter_that_does_not_fit_is_refused(run, change):
    path = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    if change == "name":
        weights = {name.replace("q_proj", "z_proj"): tensor for name, tensor in weights.items()}
    else:
        weights = {
            name: tensor[:, :-1].clone() if "lora_A" in name else tensor
            for name, tensor in weights.items()
        }
    save_file(weights, path)
    with pytest.raises(
        StageError, match=r"The adapter changes .*_proj, which .* does not have in that shape"
    ):
        MergePlan(run, str(TINY))


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["lm_head"]}, {"targets": ["q_proj", "embed_tokens"]}]
)
def test_an_adapter_on_tied_layers_is_refused(tmp_path, config):
    base = cached("llama_tied")
    run = make_run(tmp_path, base, **config)
    with pytest.raises(StageError, match="which is tied to another layer: it cannot be merged"):
        MergePlan(run, str(base))


def test_base_weights_that_mean_nothing_are_refused(tmp_path, run):
    with pytest.raises(StageError, match='base_weights=\'half\': use "original" or "dequantized"'):
        MergePlan(run, str(TINY), base_weights="half")
    plain = make_run(tmp_path / "plain", TINY, quantization="none")
    with pytest.raises(StageError, match=r"was not trained on NF4\. Use .original"):
        MergePlan(plain, str(TINY), base_weights="dequantized")
    assert MergePlan(plain, str(TINY)).base_weights == "original"


def test_what_is_more_than_plain_cannot_go_into_4_bits(tmp_path):
    base = tmp_path / "stored"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=STORED_IN_4_BITS
    )
    model.save_pretrained(base)
    run = make_run(tmp_path, TINY, use_dora=True)
    rebase(run, base)
    with pytest.raises(
        StageError, match="is stored in 4 bits, and only plain LoRA can be merged into that"
    ):
        MergePlan(run, str(base))


# --- the notebook


def test_the_notebook_finds_on_its_second_pass_that_all_is_done(run, capsys):
    parameters = {"run_dir": str(run), "base_model": str(TINY)}
    first = run_script("03_merge_adapter", **parameters)
    before = everything_in(run)
    capsys.readouterr()
    second = run_script("03_merge_adapter", **parameters)
    assert second.report == first.report
    assert everything_in(run) == before
    assert "the same next token most likely" in capsys.readouterr().out


def test_nf4_is_what_bitsandbytes_makes_of_a_weight():
    weight = load_model(TINY, None, torch.float32).model.layers[0].self_attn.q_proj.weight.data
    layer = load_base(str(TINY), None, torch.float32).model.layers[0].self_attn.q_proj
    identity = torch.eye(weight.shape[1])
    assert torch.allclose(nf4_round_trip(weight, torch.float32), layer(identity).T, atol=1e-6)
