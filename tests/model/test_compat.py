"""Canaries: what the package uses of libraries' insides is there, and means what it did.

One fails when a library renames or changes what is in `INTERNALS`, or when a workaround is no
longer needed. Its message says which.
"""

import ast
import inspect
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from conftest import ROOT, TINY
from packaging.version import Version
from safetensors import safe_open
from transformers import AutoConfig, TrainingArguments

from tabletune.model import compat
from tabletune.model.compat import INTERNALS, resolve
from tabletune.model.inspection import tied_weight_names
from tabletune.model.loading import load_model, skeleton
from tabletune.model.quantization import load_base

# they belong to an object, and are not there before it is made
OF_INSTANCES = ("_attn_implementation", "_n_gpu", "support_avx512bf16_for_cpu", "_version")
# beside model/compat.py
ELSEWHERE = {"src/tabletune/model/recompute.py": "_version"}


@pytest.fixture(scope="module")
def model():
    """The skeleton of the tiny base model."""
    return skeleton(AutoConfig.from_pretrained(TINY))


@pytest.fixture(scope="module")
def quantized():
    """The tiny base model in NF4."""
    return load_base(str(TINY), None, torch.float32)


def check_names():
    """Raise AssertionError with the name of an internal that is gone."""
    for internal in INTERNALS:
        if internal.path.endswith(OF_INSTANCES):
            continue
        owner, _, name = internal.path.rpartition(".")
        assert name in vars(resolve(owner)), f"{internal.path} is gone: {internal.upstream}"


def test_every_internal_is_there():
    check_names()


@pytest.mark.parametrize(
    "path", [entry.path for entry in INTERNALS if not entry.path.endswith(OF_INSTANCES)]
)
def test_a_renamed_internal_is_noticed(monkeypatch, path):
    owner, _, name = path.rpartition(".")
    monkeypatch.delattr(resolve(owner), name)
    with pytest.raises(AssertionError, match=f"{path} is gone"):
        check_names()


def test_every_internal_has_a_reason_and_an_address():
    assert all(entry.reason and entry.upstream.startswith("https://") for entry in INTERNALS)


# --- what they mean


def test_attn_implementation_says_which_attention_a_model_has(model):
    assert model.config._attn_implementation == "sdpa"


def test_can_compile_fullgraph_tells_kinds_apart(model):
    assert compat.never_waits_for_gpu(model)
    config = AutoConfig.for_model(
        "falcon_mamba", hidden_size=8, state_size=4, num_hidden_layers=1, vocab_size=16
    )
    assert not compat.never_waits_for_gpu(skeleton(config))


def test_supports_gradient_checkpointing_is_a_truth_value(model):
    assert compat.can_recompute_activations(model) is True


def test_n_gpu_is_the_number_that_trainer_reads(tmp_path):
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    compat.use_one_gpu(arguments)
    assert arguments.n_gpu == 1
    arguments._n_gpu = 3
    assert arguments.n_gpu == 3, "TrainingArguments._n_gpu is no longer what n_gpu gives"


def test_model_names_gives_each_stored_name_its_own(model):
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        stored = list(file.keys())
    assert compat.model_names(stored, model) == {name: [name] for name in stored}


def test_stored_state_dict_has_the_names_of_the_files():
    loaded = load_model(str(TINY), None, torch.float32)
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        assert compat.stored_state_dict(loaded).keys() >= set(file.keys())


def test_the_loading_order_counts():
    assert compat.in_loading_order(["layers.10.a", "layers.2.a"]) == ["layers.2.a", "layers.10.a"]


def test_a_state_dict_may_be_read_when_it_is_needed():
    """`from_pretrained(None, state_dict=...)` asks each value for `[...]`, and once only."""
    asked, config = [], AutoConfig.from_pretrained(TINY)
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    class Lazy:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, index):
            asked.append(self.name)
            return tensors[self.name][index]

    loaded = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict={name: Lazy(name) for name in tensors}
    )
    assert sorted(asked) == sorted(tensors)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"].to(loaded.dtype))


def test_tied_weights_are_those_that_transformers_ties():
    """`all_tied_weights_keys` is transformers' own list, which is undocumented and not used."""
    config = AutoConfig.from_pretrained(TINY)
    config.tie_word_embeddings = True
    tied = skeleton(config)
    assert tied_weight_names(tied) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert tied_weight_names(skeleton(AutoConfig.from_pretrained(TINY))) == set()


def test_a_linear4bit_has_the_switch_that_keeps_its_gradient():
    """Renamed, a model that was evaluated once would never learn again, without an error."""
    layer = bitsandbytes.nn.Linear4bit(8, 8)
    assert hasattr(layer, "support_avx512bf16_for_cpu"), (
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu is gone"
    )


def test_that_switch_is_still_read(quantized):
    source = inspect.getsource(bitsandbytes.nn.Linear4bit.forward)
    assert "support_avx512bf16_for_cpu" in source, "keep_gradients_on_cpu may be needless"
    layers = [m for m in quantized.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_weights_in_4_bits_are_stored_with_the_names_that_are_looked_for(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = compat.tensors_in_4_bits(file.keys())
    assert len(names) == 2 * 7


def test_sfttrainer_still_gathers_metrics_at_each_step():
    """If it does not, TokenTrainer can leave the loss to it."""
    from trl import SFTTrainer

    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "gather_for_metrics" in source, "TokenTrainer.compute_loss may be needless"


def test_trl_still_casts_adapters_of_quantized_models():
    """https://github.com/huggingface/trl/issues/4901: if not, TokenTrainer need not cast back."""
    from trl import SFTTrainer

    assert "param.data.to(torch.bfloat16)" in inspect.getsource(SFTTrainer.__init__)


def test_liger_takes_the_argument_that_leaves_logits_out():
    pytest.importorskip("liger_kernel")
    import importlib.util

    spec = importlib.util.find_spec("liger_kernel")
    source = Path(spec.origin).parent / "transformers" / "model" / "llama.py"
    assert "skip_logits" in source.read_text(encoding="utf-8")


def test_peft_before_0_20_cannot_load_experts():
    """Once the pinned peft can, `attach_adapter` needs its own loading only for its refusals."""
    import peft

    source = (
        Path(peft.__file__).parent / "utils" / "transformers_weight_conversion.py"
    ).read_text()
    fails = "distributed_operation=orig_conversion.distributed_operation" in source
    assert fails == (Version(peft.__version__) < Version("0.20"))


def test_version_counts_the_changes_of_a_tensor_in_place():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


# --- nothing else


def private_names():
    """Underscored attributes of other objects, and imports of underscored names, in src/:
    {place: name}.
    """
    found = {}
    for path in sorted((ROOT / "src" / "tabletune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Attribute):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                names = [] if own else [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(
                "tabletune"
            ):
                names = [alias.name for alias in node.names] + (node.module or "").split(".")
            for name in names:
                if name.startswith("_") and not name.startswith("__"):
                    found[f"{path.relative_to(ROOT)}:{node.lineno}"] = name
    return found


def test_no_private_name_of_a_library_is_used_elsewhere():
    elsewhere = {}
    for place, name in private_names().items():
        file = place.partition(":")[0]
        if not file.endswith("model/compat.py") and ELSEWHERE.get(file) != name:
            elsewhere[place] = name
    assert elsewhere == {}
