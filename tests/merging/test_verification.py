"""The verification of a merge: a wrong one does not pass, however weak the adapter."""

import json
import shutil

import pytest
import torch
from base_models import cached
from conftest import TINY
from datasets import Dataset, DatasetDict, load_from_disk
from safetensors.torch import load_file, save_file
from test_merge_adapter import make_run, merge

from tabletune.errors import StageError
from tabletune.merging import lora as lora_module
from tabletune.merging import plan as plan_module
from tabletune.merging import verification
from tabletune.merging import write as write_module
from tabletune.merging.verification import difference_to_effect

REFUSED = "is not the base model with its adapter"


def weaken(run, factor):
    """Multiply the matrices B of a run's adapter, and with them what it changes."""
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if "lora_B" in name:
            weights[name] *= factor
    save_file(weights, file, metadata={"format": "pt"})
    return run


def merge_without(monkeypatch, is_left_out):
    """Have `add_lora` leave out the layers for which `is_left_out(number of the layer)`."""
    real, layers = plan_module.add_lora, []

    def add_lora(weight, adapter, config, module):
        layers.append(module)
        if is_left_out(len(layers)):
            return weight
        return real(weight, adapter, config, module)

    monkeypatch.setattr(plan_module, "add_lora", add_lora)


LEFT_OUT = {
    "the whole adapter": lambda number: True,
    "every other layer": lambda number: number % 2 == 0,
    "the first half": lambda number: number <= 4,
    "the second half": lambda number: number > 4,
}


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
@pytest.mark.parametrize("strength", [1, 0.03, 0.001])
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_a_merge_that_leaves_layers_out_is_refused(
    tmp_path, monkeypatch, left_out, strength, base_weights
):
    run = weaken(make_run(tmp_path / "run", TINY), strength)
    merge_without(monkeypatch, LEFT_OUT[left_out])
    with pytest.raises(StageError, match=REFUSED):
        merge(run, base_weights=base_weights)
    assert not list(run.glob("merged*"))


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt_oss", "qwen3_moe"])
def test_so_is_one_whose_rounding_is_larger_than_the_adapters_effect(
    tmp_path, monkeypatch, name, base_weights
):
    """These bases are stored in bf16, whose rounding hides half of such an adapter."""
    run = weaken(make_run(tmp_path / "run", cached(name)), 0.001)
    merge_without(monkeypatch, LEFT_OUT["every other layer"])
    with pytest.raises(StageError, match=rf"{REFUSED}.* Wrong: model\.layers"):
        merge(run, cached(name), base_weights)


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_a_right_merge_of_a_weak_adapter_is_kept_and_its_rounding_is_said(
    tmp_path, capsys, name, base_weights
):
    run = weaken(make_run(tmp_path / "run", cached(name)), 0.001)
    report = merge(run, cached(name), base_weights)
    assert report["difference_to_effect"] > verification.ROUNDING_SHARE
    assert "Rounding to torch.bfloat16 hides" in capsys.readouterr().out


def test_that_holds_for_float32(tmp_path, capsys):
    run = weaken(make_run(tmp_path / "run", TINY), 1e-7)
    assert merge(run)["difference_to_effect"] > verification.ROUNDING_SHARE
    assert "Rounding to torch.float32 hides" in capsys.readouterr().out


def change_written(monkeypatch, change):
    """Have `change(tensors)` alter the tensors of the merged model before they are written."""
    real = write_module.save_file

    def save_changed(tensors, path, metadata):
        change(tensors)
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(write_module, "save_file", save_changed)


def one_number(name):
    """A change of one number of a tensor."""

    def change(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] += 1

    return change


@pytest.mark.parametrize("strength", [1, 0.001])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_damaged_tensor_that_the_adapter_does_not_change_is_refused(
    tmp_path, monkeypatch, name, strength
):
    """The last number of the embeddings belongs to a token that the compared rows do not have."""
    run = weaken(make_run(tmp_path / "run", TINY), strength)
    change_written(monkeypatch, one_number(name))
    with pytest.raises(StageError, match=f"{REFUSED}.*Wrong: {name}"):
        merge(run)
    assert not list(run.glob("merged*"))


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
def test_so_is_one_beside_an_adapter_that_rounding_hides(tmp_path, monkeypatch, base_weights):
    base = cached("llama_tied")
    run = weaken(make_run(tmp_path / "run", base), 0.001)
    change_written(monkeypatch, one_number("model.norm.weight"))
    with pytest.raises(StageError, match=rf"{REFUSED}.*Wrong: model\.norm\.weight"):
        merge(run, base, base_weights)


def test_so_is_one_beside_an_adapter_that_peft_merges(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", TINY, use_dora=True)
    change_written(monkeypatch, one_number("model.norm.weight"))
    with pytest.raises(StageError, match=rf"{REFUSED}.*Wrong: model\.norm\.weight"):
        merge(run)


def test_so_is_one_where_memory_does_not_suffice_for_the_logits(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(verification, "available_memory_gib", lambda: 0.001)
    change_written(monkeypatch, one_number("model.norm.weight"))
    with pytest.raises(StageError, match=REFUSED):
        merge(run)


def to_half(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


CHANGES = {
    "one that is missing": lambda tensors: tensors.pop("model.norm.weight"),
    "one of another dtype": to_half,
    "one too many": lambda tensors: tensors.update(extra=torch.ones(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_tensors_than_the_base_models_are_refused(tmp_path, monkeypatch, change):
    run = make_run(tmp_path / "run", TINY)
    change_written(monkeypatch, CHANGES[change])
    with pytest.raises(StageError, match=REFUSED):
        merge(run)


def test_a_number_that_the_adapter_does_not_change_is_compared_too(tmp_path, monkeypatch):
    """Rounding to bf16 hides most of this adapter, and the damage is in one number of a layer."""
    base = cached("llama_tied")
    run = weaken(make_run(tmp_path / "run", base), 0.001)
    change_written(monkeypatch, one_number("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(
        StageError, match=rf"{REFUSED}.* Wrong: model\.layers\.0\.self_attn\.q_proj"
    ):
        merge(run, base)


@pytest.mark.parametrize("base_weights", ["original", "dequantized"])
def test_right_weights_with_other_settings_of_the_model_are_refused(
    tmp_path, monkeypatch, base_weights
):
    """Rounding hides the adapter, so its share of the difference says nothing."""
    base = cached("llama_tied")
    run = weaken(make_run(tmp_path / "run", base), 0.001)
    real = write_module.write_model_settings

    def write_other_settings(plan, folder, *rest):
        real(plan, folder, *rest)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 10.0}))

    monkeypatch.setattr(write_module, "write_model_settings", write_other_settings)
    with pytest.raises(StageError, match=REFUSED):
        merge(run, base, base_weights)


@pytest.mark.parametrize("strength", [1, 0.03, 0.001, 0])
def test_a_right_merge_reproduces_what_the_adapter_does(tmp_path, strength):
    run = weaken(make_run(tmp_path / "run", TINY), strength)
    assert merge(run)["difference_to_effect"] < 0.001


def test_a_wrong_factor_is_refused(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(
        lora_module, "scaling", lambda config, module: 1.5 * config.lora_alpha / config.r
    )
    with pytest.raises(StageError, match=REFUSED):
        merge(run)
    assert not list(run.glob("merged*"))


def test_a_wrong_merge_by_peft_is_refused(tmp_path, monkeypatch):
    """DoRA is more than plain LoRA; its merge is not compared number by number."""
    run = make_run(tmp_path / "run", TINY, use_dora=True)
    monkeypatch.setattr(plan_module, "merge_in_memory", lambda model, *_: model)
    with pytest.raises(StageError, match=REFUSED):
        merge(run)


def test_difference_to_effect_is_the_median_over_tokens():
    base = torch.zeros(5, 3)
    adapted = torch.ones(5, 3)
    merged = adapted.clone()
    merged[0] = 9  # one token that went to another expert
    assert difference_to_effect(base, adapted, merged) == 0
    assert difference_to_effect(base, adapted, base) == 1
    assert difference_to_effect(base, adapted, adapted * 1.5) == 0.5
    assert difference_to_effect(base, base, base) == 0
    assert difference_to_effect(base, base, adapted) == float("inf")


# --- memory and precision


def test_without_memory_for_the_comparison_the_report_says_so(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(verification, "available_memory_gib", lambda: 0.001)
    report = merge(run)
    assert "UNPROVEN: comparing takes" in capsys.readouterr().out
    assert report["max_logit_difference"] is None
    assert report["difference_to_effect"] is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_said_and_nothing_else_is_tried(
    tmp_path, monkeypatch, capsys, error
):
    """Not computed again in fewer bits: the result would be taken for one in float32."""
    tried = []

    def fail(model, rows, exactly=True):
        tried.append(exactly)
        raise error

    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(verification, "logits_of", fail)
    report = merge(run)
    assert "UNPROVEN: memory ran out while comparing" in capsys.readouterr().out
    assert report["max_logit_difference"] is None
    assert tried == [True]


def test_another_error_of_the_gpu_is_not_hidden(tmp_path, monkeypatch):
    def fail(model, rows, exactly=True):
        raise torch.AcceleratorError("an illegal memory access was encountered", 700)

    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(verification, "logits_of", fail)
    with pytest.raises(torch.AcceleratorError):
        merge(run)


def test_a_model_that_cannot_compute_in_float32_is_compared_in_its_dtype(
    tmp_path, monkeypatch, capsys
):
    real, computed = verification.logits_of, []

    def logits_of(model, rows, exactly=True):
        if exactly:
            raise RuntimeError("expected scalar type Half but found Float")
        computed.append(type(model).__name__)
        return real(model, rows, exactly)

    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(verification, "logits_of", logits_of)
    assert merge(run)["difference_to_effect"] < 0.001
    assert "cannot compute in float32 (expected scalar type Half" in capsys.readouterr().out
    assert len(computed) == 3  # base, adapted, merged: all in the same dtype


def test_long_rows_are_cut(tmp_path, monkeypatch):
    """The logits of 100,000 tokens would not fit."""
    lengths, real = [], verification.logits_of

    def logits_of(model, rows, exactly=True):
        lengths.extend(map(len, rows))
        return real(model, rows, exactly)

    run = make_run(tmp_path / "run", TINY)
    monkeypatch.setattr(verification, "logits_of", logits_of)
    monkeypatch.setattr(verification, "MAX_TOKENS", 5)
    merge(run)
    assert set(lengths) == {5}


@pytest.mark.parametrize("splits", [["test"], ["test", "validation", "train"]])
def test_a_run_with_a_single_test_row_is_merged(tmp_path, splits):
    """A table of 4 rows leaves one for each split."""
    run = make_run(tmp_path / "run", TINY)
    row = load_from_disk(run / "dataset")["test"].to_list()[:1]
    shutil.rmtree(run / "dataset")
    DatasetDict({name: Dataset.from_list(row) for name in splits}).save_to_disk(run / "dataset")
    (run / "dataset" / "report.json").write_text('{"fingerprint": "abc"}')
    assert merge(run)["difference_to_effect"] < 0.001
