"""Canaries: what the package uses of libraries' insides is there, and means what it did.

One fails when a library renames or changes what is in `INTERNALS`, or when a workaround is no
longer needed. Its message says which. Each is seen to fail here: the name is renamed in the
library.
"""

import ast
import copy
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import bitsandbytes
import datasets
import huggingface_hub
import jupyter_client
import nbformat
import papermill.engines
import papermill.parameterize
import papermill.translators
import peft
import pyarrow.parquet
import pytest
import torch
import transformers
from conftest import ROOT, TINY, enable_checkpointing
from IPython.core.interactiveshell import InteractiveShell
from packaging.version import Version
from safetensors import safe_open
from traitlets.config import Config
from transformers import AutoConfig, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from tabletune.cli.progress import running_cell
from tabletune.data.columnar_files import features_of_schema, source_value
from tabletune.errors import is_unreachable
from tabletune.merging.lora import base_module_name
from tabletune.model import compat
from tabletune.model.adapters import load_adapter_weights
from tabletune.model.compat import INTERNALS
from tabletune.model.fused_lora import can_be_fused, frozen_weight
from tabletune.model.inspection import linear_layers, tied_weight_names
from tabletune.model.loading import load_model, skeleton
from tabletune.model.quantization import load_base
from tabletune.model.recompute import decoder_layers, recompute_first_layers
from tabletune.run.parameters import injected_names
from tabletune.training.checkpoints import training_has_ended

BNB_MODULES = bitsandbytes.nn.modules


def source(thing):
    """The source of an object, or of the module of a name, which is not imported."""
    if isinstance(thing, str):
        return Path(importlib.util.find_spec(thing).origin).read_text(encoding="utf-8")
    return inspect.getsource(thing)


# --- what each of the names means: a function that raises if it does not


def tiny_skeleton(kind="llama", **sizes):
    """A model of a kind on `meta`, of two layers."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return skeleton(AutoConfig.for_model(kind, **small, **sizes))


def mixture():
    """A mixture of experts, whose experts are stored one by one."""
    return tiny_skeleton("mixtral", num_local_experts=2, intermediate_size=16)


def names_are_mapped(folder):
    block = "model.layers.0.block_sparse_moe"
    stored = [f"{block}.gate.weight", "model.norm.weight"]
    stored += [f"{block}.experts.{i}.w{j}.weight" for i in range(2) for j in (1, 2, 3)]
    names = compat.model_names(stored, mixture())
    assert names["model.norm.weight"] == ["model.norm.weight"]
    assert names[f"{block}.gate.weight"] == ["model.layers.0.mlp.gate.weight"]
    experts = "model.layers.0.mlp.experts"
    assert names[f"{block}.experts.1.w1.weight"] == [f"{experts}.gate_up_proj"]
    assert names[f"{block}.experts.1.w2.weight"] == [f"{experts}.down_proj"]
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        stored = list(file.keys())
    own = skeleton(AutoConfig.from_pretrained(TINY))
    assert compat.model_names(stored, own) == {name: [name] for name in stored}


def stored_names_come_back(folder):
    loaded = load_model(str(TINY), None, torch.float32)
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        assert compat.stored_state_dict(loaded).keys() >= set(file.keys())
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in compat.stored_state_dict(
        transformers.MixtralForCausalLM(mixture().config)
    )


def loading_order_counts(folder):
    assert compat.in_loading_order(["layers.10.a", "layers.2.a"]) == ["layers.2.a", "layers.10.a"]


def state_dict_is_read_when_it_is_needed(folder):
    """`from_pretrained(None, state_dict=...)` asks each value for `[...]`, and once only."""
    asked = []
    config = AutoConfig.from_pretrained(TINY)
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


def graphs_tell_kinds_apart(folder):
    assert compat.never_waits_for_gpu(tiny_skeleton()) is True
    assert compat.never_waits_for_gpu(tiny_skeleton("falcon_mamba", state_size=4)) is False


def recomputing_is_a_truth_value(folder):
    assert compat.can_recompute_activations(tiny_skeleton()) is True


def layers_are_recomputed_one_by_one(folder):
    model = transformers.LlamaForCausalLM(AutoConfig.from_pretrained(TINY)).train()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    enable_checkpointing(model, use_reentrant=False)
    recompute_first_layers(model, 1)
    passes = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: passes.append(number))
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.sum().backward()
    assert passes.count(0) == 2, "the first layer is not recomputed"
    assert passes.count(1) == 1, "the second layer is recomputed"


def trainer_reads_n_gpu(folder):
    arguments = TrainingArguments(folder, report_to="none", use_cpu=True)
    compat.use_one_gpu(arguments)
    assert arguments.n_gpu == 1
    arguments._n_gpu = 3
    assert arguments.n_gpu == 3, "n_gpu does not give what was set"


def trainer_calls_load_adapter(folder):
    """At the end of a training, and when it goes on from a checkpoint."""
    assert source(transformers.Trainer).count("model.load_adapter(") >= 2


def training_switches_liger_on(folder):
    """Not when a Trainer is made: by then TokenTrainer has not yet said so."""
    assert "apply_liger_kernel(self.model" in source(transformers.Trainer)
    assert "apply_liger_kernel" not in source(transformers.Trainer.__init__)


def checkpoints_say_whether_training_ended(folder):
    for ended in (False, True):
        control = TrainerControl(should_training_stop=ended)
        state = TrainerState(stateful_callbacks=[control])
        state.save_to_json(str(folder / "trainer_state.json"))
        assert training_has_ended(str(folder)) is ended
    assert 'stateful_callbacks["TrainerControl"]' in source(transformers.Trainer)


def fsdp_has_the_switch(folder):
    module = torch.distributed.fsdp.FSDPModule
    assert list(inspect.signature(module._set_unshard_async_op).parameters) == [
        "self",
        "async_op",
    ]


def changes_in_place_are_counted(folder):
    tensor = torch.zeros(2)
    before = compat.changes_in_place(tensor)
    tensor.add_(1)
    assert compat.changes_in_place(tensor) == before + 1


def generators_have_an_offset(folder):
    assert callable(torch.Generator.set_offset)
    assert callable(torch.Generator.get_offset)


def lora_layer():
    """A LoRA layer of PEFT on a plain linear layer."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    config = peft.LoraConfig(target_modules=["layer"], r=2)
    return peft.inject_adapter_in_model(config, model)["layer"]


def plain_lora_is_recognized(folder):
    layer = lora_layer()
    layer.get_base_layer().requires_grad_(False)
    assert can_be_fused(layer)


def layers_in_4_bits_are_recognized(folder):
    model = load_base(str(TINY), None, torch.float32)
    config = peft.LoraConfig(target_modules=["q_proj"])
    layer = peft.get_peft_model(model, config).get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    )
    assert can_be_fused(layer)


def adapters_are_read_into_the_model(folder):
    """An adapter is saved, changed in the model, and read again."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4)})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["layer"], r=2))
    weight = adapted.base_model.model["layer"].lora_A["default"].weight
    saved = weight.detach().clone()
    adapted.save_pretrained(folder)
    weight.data.zero_()
    load_adapter_weights(adapted, folder)
    assert torch.equal(weight, saved), "the tensors are copies"


def adapters_name_their_layers(folder):
    model = tiny_skeleton()
    layers = set(linear_layers(model))
    config = peft.LoraConfig(target_modules="all-linear")
    saved = peft.get_peft_model_state_dict(peft.get_peft_model(model, config))
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in saved)
    assert {base_module_name(name) for name in saved} == layers


def repacking_is_switched_off(folder):
    """On a CPU that has the instructions, a layer that was evaluated is repacked; not here."""
    repacked = RuntimeError("repacked")
    with (
        mock.patch.object(BNB_MODULES, "has_avx512bf16", return_value=True),
        mock.patch.object(BNB_MODULES, "_convert_weight_packed_for_cpu", side_effect=repacked),
    ):
        model = load_base(str(TINY), None, torch.float32).eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        layer = model.model.layers[0].mlp.up_proj
        layer.support_avx512bf16_for_cpu = True
        with torch.no_grad(), pytest.raises(RuntimeError, match="repacked"):
            model(input_ids=torch.tensor([[5, 6, 7]]))


def layers_compute_in_the_dtype_that_is_set(folder):
    layer = load_base(str(TINY), None, torch.float32).model.layers[0].mlp.up_proj
    x = torch.randn(1, layer.in_features)
    expected = layer(x)
    assert compat.computes_in(layer) == torch.float32
    compat.compute_in(layer, torch.bfloat16)
    assert not torch.equal(layer(x), expected), "compute_dtype changes nothing"


def weights_have_their_statistics(folder):
    layer = load_base(str(TINY), None, torch.float32).model.layers[0].mlp.up_proj
    x = torch.eye(layer.in_features)
    torch.testing.assert_close(frozen_weight(layer, torch.float32), layer(x).T)


def weights_in_4_bits_are_recognized(folder):
    load_base(str(TINY), None, torch.float32).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = compat.tensors_in_4_bits(file.keys())
    assert len(names) == 2 * 7


def launcher_takes_a_command(folder):
    from accelerate.commands.launch import launch_command, launch_command_parser

    command = ["--num_processes", "2", "--module", "tabletune", "run", "a", "b"]
    arguments = launch_command_parser().parse_args(command)
    assert arguments.training_script == "tabletune"
    assert arguments.training_script_args == ["run", "a", "b"]
    assert callable(launch_command)


def plugin_has(name):
    """A canary: accelerate's plugin for FSDP has a field of this name."""

    def check(folder):
        plugin = accelerate.FullyShardedDataParallelPlugin
        assert name in {field.name for field in dataclasses.fields(plugin)}

    return check


def state_has_the_plugin(folder):
    assert "self.fsdp_plugin = fsdp_plugin" in source(accelerate.state.AcceleratorState)
    assert "accelerator.state.fsdp_plugin" in source(transformers.Trainer)


def liger_takes_skip_logits(folder):
    """Read, not imported: without a GPU it looks for one."""
    text = (Path(importlib.util.find_spec("liger_kernel").origin).parent).joinpath(
        "transformers/model/llama.py"
    )
    assert "skip_logits: Optional[bool]" in read(text)


def read(path):
    """The text of a file."""
    return path.read_text(encoding="utf-8")


def shell_keeps_the_cells(folder):
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    try:
        shell.run_cell("# Parameters\nseed = 1", store_history=True)
        assert injected_names(shell.user_ns["In"]) == {"seed"}
    finally:
        shell.restore_sys_module_state()


def empty_notebook():
    """A notebook with one cell, as papermill has it while it runs one."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("seed = 0")])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python"}
    notebook.metadata.papermill = {}
    notebook.cells[0].metadata.update(tags=["parameters"], papermill={})
    return notebook


def papermill_writes_its_first_line(folder):
    notebook = papermill.parameterize.parameterize_notebook(empty_notebook(), {"seed": 1})
    assert injected_names([cell.source for cell in notebook.cells]) == {"seed"}


def papermill_says_what_runs(folder):
    notebook = empty_notebook()
    manager = papermill.engines.NotebookExecutionManager(notebook, progress_bar=False)
    assert running_cell(manager.nb.cells) == (0, None)
    manager.cell_start(manager.nb.cells[0], 0)
    assert running_cell(manager.nb.cells)[0] == 1


def papermill_has_a_client(folder):
    """It takes a kernel, and says whether it has to end it."""
    from papermill.clientwrap import PapermillNotebookClient

    manager = papermill.engines.NotebookExecutionManager(empty_notebook(), progress_bar=False)
    assert PapermillNotebookClient(manager).owns_km is True
    assert PapermillNotebookClient(manager, km=jupyter_client.KernelManager()).owns_km is False


def kernels_die_with_this_message(folder):
    assert "died before replying" in source("jupyter_client.client")


def labels_have_their_names(folder):
    features = datasets.Features({"a": datasets.ClassLabel(names=["no", "yes"])})
    file = folder / "table.parquet"
    datasets.Dataset.from_dict({"a": [1]}, features=features).to_parquet(file)
    schema = pyarrow.parquet.read_schema(file)
    feature = features_of_schema(schema)["a"]
    assert source_value(1, schema.field("a").type, feature) == "yes"


def unreachable_hub_is_recognized(folder):
    """It is the error of the library that the Hub's client uses: httpx or httpx2."""
    kind = huggingface_hub.errors.HTTPError
    network = importlib.import_module(kind.__module__.partition(".")[0])
    assert is_unreachable(network.ConnectError("Name or service not known"))


def llama_takes_its_settings_from_it(folder):
    low_level = importlib.import_module("llama_cpp.llama_cpp")
    assert low_level.llama_model_default_params
    assert "llama_cpp.llama_model_default_params()" in source(sys.modules["llama_cpp"].Llama)


# --- what a library does when it renames one


class Renamed:
    """An attribute that only its library still finds, since only the library knows the new name.

    What our code, or a test, sets under the old name has no effect on the library.
    """

    def __init__(self, name):
        self.name = name

    def key(self):
        """Where the caller's value is: our code has another one than the library."""
        frame = sys._getframe(2)
        while frame.f_globals["__name__"].startswith("torch"):  # torch's modules pass it on
            frame = frame.f_back
        ours = frame.f_globals["__name__"].startswith(("tabletune", __name__))
        return f"our own {self.name}" if ours else self.name

    def __get__(self, instance, owner=None):
        try:
            return vars(instance)[self.key()]
        except (KeyError, TypeError):
            raise AttributeError(self.name) from None

    def __set__(self, instance, value):
        vars(instance)[self.key()] = value


def subclasses(kind):
    """A class and all that are derived from it."""
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def resolve(path):
    """The object of a path with dots. Raises AttributeError or ImportError if there is none."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            target = getattr(target, name)
        return target
    raise ImportError(path)


def rename_attribute(monkeypatch, path):
    """Rename the attribute of a module or of a class, or that its instances get when made."""
    owner, _, name = path.rpartition(".")
    owner = resolve(owner)
    classes = subclasses(owner) if isinstance(owner, type) else [owner]
    own = [kind for kind in classes if name in vars(kind)]
    for kind in own:
        monkeypatch.delattr(kind, name)
    if not own:
        monkeypatch.setattr(owner, name, Renamed(name), raising=False)


def rename_of_instances(monkeypatch, path):
    """Rename an attribute that instances get, although the class has a default."""
    owner, _, name = path.rpartition(".")
    monkeypatch.setattr(resolve(owner), name, Renamed(name), raising=False)


def rename_in_source(*words):
    """Rename words wherever a canary reads the source of a library."""

    def rename(monkeypatch, path):
        def renamed(text):
            for word in words:
                text = text.replace(word, "renamed")
            return text

        read_source, read_file = source, read
        here = sys.modules[__name__]
        monkeypatch.setattr(here, "source", lambda thing: renamed(read_source(thing)))
        monkeypatch.setattr(here, "read", lambda file: renamed(read_file(file)))

    return rename


def rename_state_dict(monkeypatch, path):
    load = transformers.PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, state_dict=None, **kwargs):
        return load(cls, *args, weights=state_dict, **kwargs)

    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)
    )


def rename_stateful_callbacks(monkeypatch, path):
    save = TrainerState.save_to_json

    def save_to_json(state, file):
        save(state, file)
        text = Path(file).read_text(encoding="utf-8")
        Path(file).write_text(text.replace("stateful_callbacks", "callbacks"), encoding="utf-8")

    monkeypatch.setattr(TrainerState, "save_to_json", save_to_json)


def rename_offset(monkeypatch, path):
    monkeypatch.setattr(torch, "Generator", type("Generator", (), {}))


def rename_class(monkeypatch, path):
    name = path.rpartition(".")[2]
    renamed = type("Renamed", (resolve(path),), {})
    monkeypatch.setattr(peft.tuners.lora.bnb, name, renamed)


def copy_state_dict(monkeypatch, path):
    """Nothing is renamed: what PEFT returns is no longer the model's own memory."""
    state_dict = peft.get_peft_model_state_dict

    def copies(*args, **kwargs):
        return {name: value.clone() for name, value in state_dict(*args, **kwargs).items()}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", copies)


def rename_adapter_tensors(monkeypatch, path):
    state_dict = peft.get_peft_model_state_dict

    def renamed(*args, **kwargs):
        tensors = state_dict(*args, **kwargs)
        return {name.replace("base_model.model.", "base."): tensors[name] for name in tensors}

    monkeypatch.setattr(peft, "get_peft_model_state_dict", renamed)


def rename_statistics(monkeypatch, path):
    state = bitsandbytes.functional.QuantState
    as_dict = state.as_dict

    def renamed(*args, **kwargs):
        parts = as_dict(*args, **kwargs)
        return {name.replace("bitsandbytes__nf4", "nf4"): parts[name] for name in parts}

    monkeypatch.setattr(state, "as_dict", renamed)


def rename_field(monkeypatch, path):
    fields = accelerate.FullyShardedDataParallelPlugin.__dataclass_fields__
    monkeypatch.delitem(fields, path.rpartition(".")[2])


def rename_cells(monkeypatch, path):
    init_user_ns = InteractiveShell.init_user_ns

    def renamed(shell):
        init_user_ns(shell)
        del shell.user_ns["In"]

    monkeypatch.setattr(InteractiveShell, "init_user_ns", renamed)


def rename_first_line(monkeypatch, path):
    translator = papermill.translators.PythonTranslator
    codify = translator.codify
    monkeypatch.setattr(translator, "codify", lambda values, comment: codify(values, "Values"))


def rename_kinds_of_features(monkeypatch, path):
    to_dict = datasets.Features.to_dict

    def renamed(features):
        return json.loads(json.dumps(to_dict(features)).replace("_type", "_kind"))

    monkeypatch.setattr(datasets.Features, "to_dict", renamed)


def rename_settings_of_llama(monkeypatch, path):
    low_level = importlib.import_module("llama_cpp.llama_cpp")
    monkeypatch.delattr(low_level, "llama_model_default_params")


def rename_status(monkeypatch, path):
    monkeypatch.setattr(papermill.engines.NotebookExecutionManager, "RUNNING", "at work")


@dataclass
class Canary:
    """What must hold for an internal, and what its library does when it renames it."""

    check: Any
    rename: Any = rename_attribute


CANARIES = {
    "transformers.core_model_loading.rename_source_key": Canary(names_are_mapped),
    "transformers.core_model_loading.WeightRenaming": Canary(names_are_mapped),
    "transformers.core_model_loading.WeightConverter": Canary(names_are_mapped),
    "transformers.conversion_mapping.get_model_conversion_mapping": Canary(names_are_mapped),
    "transformers.core_model_loading.revert_weight_conversion": Canary(stored_names_come_back),
    "transformers.core_model_loading.dot_natural_key": Canary(loading_order_counts),
    "transformers.PreTrainedModel.from_pretrained(state_dict)": Canary(
        state_dict_is_read_when_it_is_needed, rename_state_dict
    ),
    "transformers.PreTrainedModel._can_compile_fullgraph": Canary(graphs_tell_kinds_apart),
    "transformers.PreTrainedModel.supports_gradient_checkpointing": Canary(
        recomputing_is_a_truth_value
    ),
    "transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing": Canary(
        layers_are_recomputed_one_by_one, rename_of_instances
    ),
    "transformers.TrainingArguments._n_gpu": Canary(trainer_reads_n_gpu, rename_of_instances),
    "transformers.Trainer: model.load_adapter": Canary(
        trainer_calls_load_adapter, rename_in_source("load_adapter")
    ),
    "transformers.Trainer.train: apply_liger_kernel": Canary(
        training_switches_liger_on, rename_in_source("apply_liger_kernel")
    ),
    "transformers.TrainerState.stateful_callbacks": Canary(
        checkpoints_say_whether_training_ended, rename_stateful_callbacks
    ),
    "torch.distributed.fsdp.FSDPModule._set_unshard_async_op": Canary(fsdp_has_the_switch),
    "torch.Tensor._version": Canary(changes_in_place_are_counted),
    "torch.Generator.set_offset": Canary(generators_have_an_offset, rename_offset),
    "peft.tuners.lora.LoraLayer.lora_variant": Canary(plain_lora_is_recognized),
    "peft.tuners.lora.LoraLayer.lora_bias": Canary(plain_lora_is_recognized),
    "peft.tuners.lora.Linear4bit": Canary(layers_in_4_bits_are_recognized, rename_class),
    "peft.get_peft_model_state_dict: the model's own memory": Canary(
        adapters_are_read_into_the_model, copy_state_dict
    ),
    "peft: base_model.model.NAME.lora_A.weight": Canary(
        adapters_name_their_layers, rename_adapter_tensors
    ),
    "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu": Canary(repacking_is_switched_off),
    "bitsandbytes.nn.Linear4bit.compute_dtype": Canary(layers_compute_in_the_dtype_that_is_set),
    "bitsandbytes.nn.Params4bit.quant_state": Canary(weights_have_their_statistics),
    "bitsandbytes: NAME.quant_state.bitsandbytes__nf4": Canary(
        weights_in_4_bits_are_recognized, rename_statistics
    ),
    "accelerate.commands.launch.launch_command": Canary(launcher_takes_a_command),
    "accelerate.commands.launch.launch_command_parser": Canary(launcher_takes_a_command),
    "accelerate.FullyShardedDataParallelPlugin.ignored_modules": Canary(
        plugin_has("ignored_modules"), rename_field
    ),
    "accelerate.FullyShardedDataParallelPlugin.mixed_precision_policy": Canary(
        plugin_has("mixed_precision_policy"), rename_field
    ),
    "accelerate.state.AcceleratorState.fsdp_plugin": Canary(
        state_has_the_plugin, rename_in_source("fsdp_plugin")
    ),
    "liger_kernel.transformers.model.llama.lce_forward(skip_logits)": Canary(
        liger_takes_skip_logits, rename_in_source("skip_logits")
    ),
    "IPython: In": Canary(shell_keeps_the_cells, rename_cells),
    "papermill: # Parameters": Canary(papermill_writes_its_first_line, rename_first_line),
    "papermill: metadata.papermill.status": Canary(papermill_says_what_runs, rename_status),
    "papermill.clientwrap.PapermillNotebookClient": Canary(papermill_has_a_client),
    "jupyter_client: died before replying": Canary(
        kernels_die_with_this_message, rename_in_source("died before replying")
    ),
    "datasets: schema.metadata.huggingface.info.features.NAME._type.ClassLabel": Canary(
        labels_have_their_names, rename_kinds_of_features
    ),
    "huggingface_hub.errors.HTTPError": Canary(unreachable_hub_is_recognized),
    "llama_cpp: llama_model_default_params": Canary(
        llama_takes_its_settings_from_it, rename_settings_of_llama
    ),
}


def ask_canary(internal, folder):
    """Raise AssertionError, which says what is wrong with an internal, unless it is as it was."""
    try:
        CANARIES[internal.path].check(folder)
    except Exception as error:
        raise AssertionError(
            f"{internal.path} is gone or means something else. {internal.used_in} uses it: "
            f"{internal.reason}. Upstream: {internal.upstream}"
        ) from error


def each_internal(test):
    """Run a test for each internal, in its own name."""
    return pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.path)(test)


def each_installed_internal(test):
    """The same; that of llama.cpp only where `make test-export` has installed it."""
    cases = []
    for internal in INTERNALS:
        marks = [pytest.mark.export] if internal.path.startswith("llama_cpp") else []
        cases.append(pytest.param(internal, id=internal.path, marks=marks))
    return pytest.mark.parametrize("internal", cases)(test)


@each_installed_internal
def test_an_internal_is_what_it_was(internal, tmp_path):
    ask_canary(internal, tmp_path)


@each_installed_internal
def test_a_renamed_internal_is_noticed(internal, tmp_path, monkeypatch):
    CANARIES[internal.path].rename(monkeypatch, internal.path)
    with pytest.raises(AssertionError, match=f"^{re.escape(internal.path)} is gone"):
        ask_canary(internal, tmp_path)


@each_internal
def test_an_internal_has_a_reason_and_an_address(internal):
    assert internal.reason
    assert internal.upstream.startswith("https://github.com/")


def name_in_code(internal):
    """What our code calls an internal."""
    names = {
        "peft: base_model.model.NAME.lora_A.weight": ".lora_A.weight",
        "peft.get_peft_model_state_dict: the model's own memory": "get_peft_model_state_dict",
        "transformers.Trainer.train: apply_liger_kernel": "use_liger_kernel",
        "peft.tuners.lora.Linear4bit": "FUSED_CLASSES",
    }
    return names.get(internal.path, re.findall(r"\w+", internal.path)[-1])


# public names, of which something is used that is not promised: they may stand anywhere
PUBLIC = {
    "FUSED_CLASSES",
    "HTTPError",
    "get_peft_model_state_dict",
    "gradient_checkpointing",
    "state_dict",
    "use_liger_kernel",
}


def names_in(tree):
    """All attributes, imported names and texts of a syntax tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("tabletune"):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return names


@each_internal
def test_an_internal_is_used_in_one_place(internal):
    name = name_in_code(internal)
    users = {path for path, tree in own_code().items() if name in names_in(tree)}
    users = {path.removeprefix("src/tabletune/") for path in users if path.startswith("src/")}
    assert name in PUBLIC or users <= {"model/compat.py", internal.used_in}


@each_internal
def test_an_internal_is_used_where_it_says(internal):
    text = (ROOT / "src" / "tabletune" / internal.used_in).read_text(encoding="utf-8")
    if internal.used_in == "model/compat.py":
        text = text.partition("\n)\n")[2]  # below the table itself
    assert name_in_code(internal) in text


def test_every_internal_has_a_canary_and_no_other():
    assert [internal.path for internal in INTERNALS] == list(CANARIES)


# --- names that differ between versions


@pytest.mark.parametrize(
    ("set_by_reader", "left_out"),
    [
        ([], set()),
        (["gradient_checkpointing"], {compat.checkpointing_name()}),
        (["activation_checkpointing_kwargs"], {f"{compat.checkpointing_name()}_kwargs"}),
    ],
)
def test_what_the_reader_sets_of_recomputing_is_not_set_again(set_by_reader, left_out):
    """Under either name: a newer transformers would take ours, without a word."""
    arguments = compat.checkpointing_arguments(True, {"use_reentrant": False}, set_by_reader)
    expected = {compat.checkpointing_name(): True}
    expected[f"{compat.checkpointing_name()}_kwargs"] = {"use_reentrant": False}
    assert arguments.keys() == expected.keys() - left_out
    assert arguments.items() <= expected.items()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_trainer_is_told_whether_activations_are_recomputed(enabled, tmp_path):
    options = {"use_reentrant": False}
    arguments = SFTConfig(
        tmp_path, report_to="none", use_cpu=True, bf16=False,
        **compat.checkpointing_arguments(enabled, options),
    )  # fmt: skip
    assert compat.checkpointing_of(arguments) == (enabled, options)


def test_options_of_recomputing_are_empty_where_there_are_none(tmp_path):
    arguments = SFTConfig(
        tmp_path, report_to="none", use_cpu=True, bf16=False,
        **compat.checkpointing_arguments(False, None),
    )  # fmt: skip
    assert compat.checkpointing_of(arguments) == (False, {})


def test_the_cache_of_an_output_is_found():
    model = transformers.LlamaForCausalLM(AutoConfig.from_pretrained(TINY))
    output = model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
    assert compat.cache_of(output).get_seq_length() == 2
    assert compat.cache_of(model(input_ids=torch.tensor([[5, 6]]), use_cache=False)) is None


# --- workarounds that are still needed


def test_tied_weights_are_those_that_transformers_ties():
    """`all_tied_weights_keys` is transformers' own list, which is undocumented and not used."""
    config = AutoConfig.from_pretrained(TINY)
    untied = skeleton(copy.deepcopy(config))
    config.tie_word_embeddings = True
    assert tied_weight_names(skeleton(config)) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert tied_weight_names(untied) == set()


def test_sfttrainer_still_gathers_metrics_at_each_step():
    """If it does not, TokenTrainer can leave the loss to it."""
    from trl import SFTTrainer

    text = inspect.getsource(SFTTrainer.compute_loss)
    assert "gather_for_metrics" in text, "TokenTrainer.compute_loss may be needless"


def test_trl_still_casts_adapters_of_quantized_models():
    """https://github.com/huggingface/trl/issues/4901: if not, TokenTrainer need not cast back."""
    from trl import SFTTrainer

    assert "param.data.to(torch.bfloat16)" in inspect.getsource(SFTTrainer.__init__)


def test_bitsandbytes_still_loads_the_compiler():
    """If not, model/bnb.py can be a plain import."""
    assert "@_try_torch_compile" in source("bitsandbytes.backends.default.ops")


def test_trainer_still_wants_the_folder_of_the_best_checkpoint_to_be_there():
    """If not, ShardedTraining need not make it."""
    text = inspect.getsource(transformers.Trainer._save_checkpoint)
    assert "if os.path.exists(best_checkpoint_dir):" in text


def test_peft_before_0_20_cannot_load_experts():
    """Once the pinned peft can, `attach_adapter` needs its own loading only for its refusals."""
    text = source("peft.utils.transformers_weight_conversion")
    fails = "distributed_operation=orig_conversion.distributed_operation" in text
    assert fails == (Version(peft.__version__) < Version("0.20"))


@pytest.mark.pins
def test_the_pinned_transformers_still_needs_the_older_names():
    """Once it does not, the last part of model/compat.py can go."""
    assert compat.CACHE == "past_key_values"
    assert compat.checkpointing_name() == "gradient_checkpointing"


@pytest.mark.pins
def test_the_pinned_hub_still_reads_its_template_in_the_encoding_of_the_locale():
    """Once it does not, TokenTrainer can let TRL write a card for each checkpoint."""
    assert ".read_text()" in source("huggingface_hub.repocard")


# --- nothing else

# modules below the top of the libraries that move, which their documentation names
DOCUMENTED = {
    "accelerate.utils",
    "bitsandbytes.functional",
    "huggingface_hub.constants",
    "huggingface_hub.errors",
    "papermill.engines",
    "peft.tuners.lora",
    "transformers.cache_utils",
    "transformers.integrations",
    "transformers.modeling_outputs",
    "transformers.trainer_utils",
    "transformers.training_args",
    "transformers.utils",
    "trl.data_utils",
}
MOVING = {name.partition(".")[0] for name in DOCUMENTED} | {"datasets"}


def own_code():
    """The syntax trees of all that is ours but the tests: {path: tree}."""
    trees = {}
    for folder in ("src/tabletune", "notebooks_py", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            trees[path.relative_to(ROOT).as_posix()] = tree
    return trees


def private_names(tree):
    """Underscored names of others: (line, name).

    Attributes, also by `getattr` and the like, keys, arguments, and what is imported.
    """
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")
            names = [] if own else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("tabletune"):
            names = [alias.name for alias in node.names] + (node.module or "").split(".")
        elif isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords if keyword.arg]
            if ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
                names.append(getattr(node.args[1], "value", None))
        elif isinstance(node, ast.Subscript):
            names = [getattr(node.slice, "value", None)]
        for name in names:
            if isinstance(name, str) and name.startswith("_") and not name.startswith("__"):
                yield node.lineno, name


@pytest.mark.parametrize(
    "code",
    [
        "model._name",
        "getattr(model, '_name')",
        "setattr(model, '_name', 1)",
        "inputs['_name'] = 1",
        "model(_name=1)",
        "from library import _name",
        "from library._name import function",
    ],
)
def test_a_private_name_is_seen(code):
    assert {name for _, name in private_names(ast.parse(code))} == {"_name"}


@pytest.mark.parametrize(
    "code", ["self._name", "model.__class__", "from tabletune.cli._main import x", "rows[0]"]
)
def test_what_is_our_own_or_public_is_not_seen_as_private(code):
    assert list(private_names(ast.parse(code))) == []


def test_no_private_name_of_a_library_is_used_elsewhere():
    elsewhere = []
    for path, tree in own_code().items():
        if path != "src/tabletune/model/compat.py":
            elsewhere += [(path, *place) for place in private_names(tree)]
    assert elsewhere == []


def test_no_undocumented_module_of_a_library_is_used_without_a_canary():
    """Of those that move: what is neither documented nor among the internals."""
    unknown = []
    internals = {internal.path.rpartition(".")[0] for internal in INTERNALS}
    for path, tree in own_code().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or "." not in (node.module or ""):
                continue
            known = node.module in DOCUMENTED or any(
                internal.startswith(node.module) for internal in internals
            )
            if node.module.partition(".")[0] in MOVING and not known:
                unknown.append((path, node.lineno, node.module))
    assert unknown == []
