"""What the package uses of the insides of libraries, and what has other names in other versions.

`INTERNALS` lists each name that a library does not promise: one with an underscore, or one that its
documentation does not mention. Each has the module that uses it, the reason, and the place upstream
where it is defined. tests/model/test_compat.py has a canary for each: it fails, and says which,
when the name is gone or means something else. Other tests there fail when a workaround is no longer
needed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    Cache,
    PreTrainedModel,
    conversion_mapping,
    core_model_loading,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Internal:
    """A name that a library does not promise, who uses it and why, and where upstream has it."""

    path: str  # module, class and attribute, with dots; or what a file or an argument is called
    used_in: str  # the module of the package
    reason: str
    upstream: str


TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers"
TORCH = "https://github.com/pytorch/pytorch/blob/main/torch"
PEFT = "https://github.com/huggingface/peft/blob/main/src/peft"
BITSANDBYTES = "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes"
DATASETS = "https://github.com/huggingface/datasets/blob/main/src/datasets"
ACCELERATE = "https://github.com/huggingface/accelerate/blob/main/src/accelerate"
PAPERMILL = "https://github.com/nteract/papermill/blob/main/papermill"
MERGING = "merging one tensor at a time needs the name that each stored tensor gets in the model"
LAUNCHING = "one process a GPU, and the error of the process that failed first"
FUSING = "whether a layer is plain LoRA, whose product is computed here"
INTERNALS = (
    # --- transformers
    Internal(
        "transformers.core_model_loading.rename_source_key",
        "model/compat.py",
        MERGING,
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.core_model_loading.WeightRenaming",
        "model/compat.py",
        MERGING,
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.core_model_loading.WeightConverter",
        "model/compat.py",
        MERGING,
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "model/compat.py",
        MERGING,
        f"{TRANSFORMERS}/conversion_mapping.py",
    ),
    Internal(
        "transformers.core_model_loading.revert_weight_conversion",
        "model/compat.py",
        "what PEFT has merged in memory is written under the names that the base's files have",
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.core_model_loading.dot_natural_key",
        "model/compat.py",
        "the order in which transformers asks for tensors, so that the next ones are read ahead",
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.PreTrainedModel.from_pretrained(state_dict)",
        "model/loading.py",
        "its values may be read when they are asked for with [...]: a model is read one tensor at "
        "a time, not mapped as a whole",
        f"{TRANSFORMERS}/modeling_utils.py",
    ),
    Internal(
        "transformers.PreTrainedModel._can_compile_fullgraph",
        "model/compat.py",
        "only transformers knows which models never wait for the GPU; others have no CUDA graph",
        f"{TRANSFORMERS}/modeling_utils.py",
    ),
    Internal(
        "transformers.PreTrainedModel.supports_gradient_checkpointing",
        "model/compat.py",
        "some models cannot recompute activations; undocumented, though without an underscore",
        f"{TRANSFORMERS}/modeling_utils.py",
    ),
    Internal(
        "transformers.modeling_layers.GradientCheckpointingLayer.gradient_checkpointing",
        "model/recompute.py",
        "only as many layers are recomputed as memory needs; transformers knows all or every nth",
        f"{TRANSFORMERS}/modeling_layers.py",
    ),
    Internal(
        "transformers.TrainingArguments._n_gpu",
        "model/compat.py",
        "Trainer takes all GPUs that a process sees, and multiplies batch and loss by their number",
        f"{TRANSFORMERS}/training_args.py",
    ),
    Internal(
        "transformers.Trainer: model.load_adapter",
        "training/trainer.py",
        "Trainer puts the best checkpoint's adapter on the model with it; here that is refused if "
        "it does not fit",
        f"{TRANSFORMERS}/trainer.py",
    ),
    Internal(
        "transformers.Trainer.train: apply_liger_kernel",
        "training/trainer.py",
        "Liger's loss is switched on when the training starts, so after SFTTrainer has been made",
        f"{TRANSFORMERS}/trainer.py",
    ),
    Internal(
        "transformers.TrainerState.stateful_callbacks",
        "training/checkpoints.py",
        "a checkpoint says there whether the training had ended with it",
        f"{TRANSFORMERS}/trainer_callback.py",
    ),
    # --- torch
    Internal(
        "torch.distributed.fsdp.FSDPModule._set_unshard_async_op",
        "model/compat.py",
        "gathered layers are allocated in the stream that computes, so memory is used again",
        f"{TORCH}/distributed/fsdp/_fully_shard/_fully_shard.py",
    ),
    Internal(
        "torch.Tensor._version",
        "model/compat.py",
        "model/recompute.py notices a tensor that was changed in place since it was kept",
        f"{TORCH}/_C/_VariableFunctions.pyi.in",
    ),
    Internal(
        "torch.Generator.set_offset",
        "model/fused_lora.py",
        "the same dropout is drawn again in the backward pass; the whole state is slow to set",
        f"{TORCH}/_C/__init__.pyi.in",
    ),
    # --- peft
    Internal(
        "peft.tuners.lora.LoraLayer.lora_variant",
        "model/fused_lora.py",
        FUSING,
        f"{PEFT}/tuners/lora/layer.py",
    ),
    Internal(
        "peft.tuners.lora.LoraLayer.lora_bias",
        "model/fused_lora.py",
        FUSING,
        f"{PEFT}/tuners/lora/layer.py",
    ),
    Internal(
        "peft.tuners.lora.Linear4bit",
        "model/fused_lora.py",
        FUSING,
        f"{PEFT}/tuners/lora/bnb.py",
    ),
    Internal(
        "peft.get_peft_model_state_dict: the model's own memory",
        "model/adapters.py",
        "writing into the tensors that it returns is how an adapter gets its weights",
        f"{PEFT}/utils/save_and_load.py",
    ),
    Internal(
        "peft: base_model.model.NAME.lora_A.weight",
        "merging/lora.py",
        "the names of an adapter's tensors say which layer of the base they belong to",
        f"{PEFT}/utils/save_and_load.py",
    ),
    # --- bitsandbytes
    Internal(
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
        "model/compat.py",
        "on some CPUs a layer that was evaluated once is repacked without a gradient: it would "
        "never learn again",
        f"{BITSANDBYTES}/nn/modules.py",
    ),
    Internal(
        "bitsandbytes.nn.Linear4bit.compute_dtype",
        "model/compat.py",
        "a base stored in 4 bits computes in the dtype of the training, not of whoever stored it",
        f"{BITSANDBYTES}/nn/modules.py",
    ),
    Internal(
        "bitsandbytes.nn.Params4bit.quant_state",
        "model/compat.py",
        "the statistics of a weight in 4 bits: its shape, and what it takes to dequantize it",
        f"{BITSANDBYTES}/nn/modules.py",
    ),
    Internal(
        "bitsandbytes: NAME.quant_state.bitsandbytes__nf4",
        "model/compat.py",
        "a base stored in 4 bits is recognized by the names of its statistics, quant_state.*",
        f"{BITSANDBYTES}/functional.py",
    ),
    # --- accelerate, liger-kernel
    Internal(
        "accelerate.commands.launch.launch_command",
        "cli/notebooks.py",
        LAUNCHING,
        f"{ACCELERATE}/commands/launch.py",
    ),
    Internal(
        "accelerate.commands.launch.launch_command_parser",
        "cli/notebooks.py",
        LAUNCHING,
        f"{ACCELERATE}/commands/launch.py",
    ),
    Internal(
        "accelerate.FullyShardedDataParallelPlugin.ignored_modules",
        "training/fsdp.py",
        "the output layer stays whole: Liger's loss takes its weights without calling it",
        f"{ACCELERATE}/utils/dataclasses.py",
    ),
    Internal(
        "accelerate.FullyShardedDataParallelPlugin.mixed_precision_policy",
        "training/fsdp.py",
        "a cast would change 4-bit numbers that are stored as floats",
        f"{ACCELERATE}/utils/dataclasses.py",
    ),
    Internal(
        "accelerate.state.AcceleratorState.fsdp_plugin",
        "training/fsdp.py",
        "Trainer makes the plugin itself, and has no argument for these two",
        f"{ACCELERATE}/state.py",
    ),
    Internal(
        "liger_kernel.transformers.model.llama.lce_forward(skip_logits)",
        "training/trainer.py",
        "logits are left out of the validation, too: they take more memory than the training",
        "https://github.com/linkedin/Liger-Kernel/blob/main/src/liger_kernel/transformers/model/"
        "llama.py",
    ),
    # --- notebooks
    Internal(
        "IPython: In",
        "run/stage.py",
        "the cells that ran: a misspelt parameter that papermill has set is refused",
        "https://github.com/ipython/ipython/blob/main/IPython/core/interactiveshell.py",
    ),
    Internal(
        "papermill: # Parameters",
        "run/parameters.py",
        "the first line of the cell that papermill puts into a notebook",
        f"{PAPERMILL}/translators.py",
    ),
    Internal(
        "papermill: metadata.papermill.status",
        "cli/progress.py",
        "which cell is running now",
        f"{PAPERMILL}/engines.py",
    ),
    Internal(
        "papermill.clientwrap.PapermillNotebookClient",
        "cli/progress.py",
        "the engine starts a kernel itself, and has no argument for one that has started early",
        f"{PAPERMILL}/clientwrap.py",
    ),
    Internal(
        "jupyter_client: died before replying",
        "cli/notebooks.py",
        "two kernels that start at one moment can pick the same port: then it is tried again",
        "https://github.com/jupyter/jupyter_client/blob/main/jupyter_client/client.py",
    ),
    # --- datasets, the Hub
    Internal(
        "datasets: schema.metadata.huggingface.info.features.NAME._type.ClassLabel",
        "data/columnar_files.py",
        "a table that datasets has written stores numbers for labels; their names stand here",
        f"{DATASETS}/features/features.py",
    ),
    Internal(
        "huggingface_hub.errors.HTTPError",
        "errors.py",
        "the error of a network: it is httpx's in huggingface_hub 1, and httpx2's in 2",
        "https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/errors.py",
    ),
    # --- export
    Internal(
        "llama_cpp: llama_model_default_params",
        "export/llama_cpp.py",
        "`Llama` has no argument for the layout of weights, with which it crashes on some Xeons",
        "https://github.com/abetlen/llama-cpp-python/blob/main/llama_cpp/llama_cpp.py",
    ),
)


# --- merging


def model_names(stored: Iterable[str], model: PreTrainedModel) -> dict[str, list[str]]:
    """The names in `model` of the tensors with these `stored` names: {name: [name, ...]}.

    Several names, or one that several stored tensors have, are of weights that are split or fused
    when transformers reads them. Names that the model does not know are left out. This follows
    `convert_and_load_state_dict_in_model` in transformers 5.13.
    """
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, core_model_loading.WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, core_model_loading.WeightConverter)]
    targets = {}
    for converter in converters:
        for source in converter.source_patterns:
            targets[source] = converter.target_patterns
    parameters = model.state_dict()
    names = {}
    for name in in_loading_order(stored):
        # a name that needs no change may fit a rule by chance, so it is tried without rules, too
        for rules in ((renamings, converters), ([], [])):
            new, source = core_model_loading.rename_source_key(
                name, *rules, model.base_model_prefix, parameters
            )
            if new in parameters and name not in names:
                # one stored tensor may be split: its first target stands in `new`
                first, *rest = targets.get(source, [""])
                names[name] = [new, *(new.replace(first, target) for target in rest)]
    return names


def in_loading_order(names: Iterable[str]) -> list[str]:
    """The names of stored tensors in the order in which transformers asks for them."""
    return sorted(names, key=core_model_loading.dot_natural_key)


def stored_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the names that its files have."""
    return core_model_loading.revert_weight_conversion(model, model.state_dict())


# --- what a model can


def never_waits_for_gpu(model: PreTrainedModel) -> bool:
    """Whether a forward pass asks the GPU for no value, by what transformers says of the model."""
    return model._can_compile_fullgraph


def can_recompute_activations(model: PreTrainedModel) -> bool:
    """Whether a model can do without stored activations (gradient checkpointing)."""
    return model.supports_gradient_checkpointing


def changes_in_place(tensor: torch.Tensor) -> int:
    """How often a tensor has been changed in place so far."""
    return tensor._version


def keep_gradients_on_cpu(layer: torch.nn.Module) -> None:
    """Keep a bitsandbytes Linear4bit from repacking its weights, after which it has no gradient."""
    layer.support_avx512bf16_for_cpu = False


def compute_in(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have a bitsandbytes Linear4bit compute in `dtype`."""
    layer.compute_dtype = dtype


def computes_in(layer: torch.nn.Module) -> torch.dtype:
    """The dtype that a bitsandbytes Linear4bit computes in."""
    return layer.compute_dtype


def statistics_of(weight: torch.Tensor) -> Any:
    """The QuantState that dequantizes a weight in 4 bits; None for any other weight."""
    return getattr(weight, "quant_state", None)


def tensors_in_4_bits(names: Iterable[str] | Mapping[str, Any]) -> list[str]:
    """Those of the names of stored tensors that are weights which bitsandbytes has put into NF4."""
    names = set(names)
    return [name for name in sorted(names) if f"{name}.quant_state.bitsandbytes__nf4" in names]


# --- training


def use_one_gpu(arguments: "TrainingArguments") -> None:
    """Have a Trainer take one GPU only, however many this process sees."""
    arguments._n_gpu = 1


def gather_in_compute_stream(model: torch.nn.Module) -> None:
    """Have FSDP allocate gathered layers in the stream that computes."""
    model._set_unshard_async_op(True)


# --- names that changed: transformers 5.24 warns of the older ones, and 5.15 knows no others

OUTPUT_FIELDS = {field.name for field in fields(BaseModelOutputWithPast)}
# what a model returns its cache as, and what `generate` takes it as
CACHE = "cache" if "cache" in OUTPUT_FIELDS else "past_key_values"


@cache
def checkpointing_name() -> str:
    """What the argument of a Trainer is called that says whether activations are recomputed."""
    from transformers import TrainingArguments  # slow to import: a newer one imports peft, too

    newer = "activation_checkpointing"
    names = {field.name for field in fields(TrainingArguments)}
    return newer if newer in names else "gradient_checkpointing"


def cache_of(output: Mapping[str, Any]) -> Cache | None:
    """The cache in the output of a model; None if the model has none."""
    return output.get(CACHE)


def checkpointing_arguments(
    enabled: bool, options: dict[str, Any] | None, set_by_reader: Iterable[str] = ()
) -> dict[str, Any]:
    """Arguments of a Trainer: whether activations are recomputed, and how.

    Those that the reader sets, under their old or their new name, are left out.
    """
    values = {"": enabled, "_kwargs": options}
    arguments = {}
    for ending, value in values.items():
        names = {f"gradient_checkpointing{ending}", f"activation_checkpointing{ending}"}
        if not names & set(set_by_reader):
            arguments[f"{checkpointing_name()}{ending}"] = value
    return arguments


def checkpointing_of(arguments: "TrainingArguments") -> tuple[bool, dict[str, Any]]:
    """Whether a Trainer with these arguments recomputes activations, and the options for that."""
    name = checkpointing_name()
    return getattr(arguments, name), getattr(arguments, f"{name}_kwargs") or {}
