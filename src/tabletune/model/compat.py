"""What the package uses of the insides of libraries, in one place.

`INTERNALS` lists each name that a library does not promise: one with an underscore, or one that its
documentation does not mention. Each has the reason for its use and the place upstream where it is
defined. tests/model/test_compat.py has a canary for each, which fails when the name is gone or
means something else, and when a workaround is no longer needed. The functions below are the only
users of these names, but for those that the last entries name.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping


@dataclass(frozen=True)
class Internal:
    """A name that a library does not promise, why it is used, and where it is defined upstream."""

    path: str  # module, class and attribute, with dots
    reason: str
    upstream: str


TRANSFORMERS = "https://github.com/huggingface/transformers/blob/main/src/transformers"
MERGING = "merging one tensor at a time needs the name that each stored tensor gets in the model"
INTERNALS = (
    Internal(
        "transformers.core_model_loading.rename_source_key",
        MERGING,
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.core_model_loading.WeightRenaming",
        MERGING,
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.core_model_loading.WeightConverter",
        MERGING,
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        MERGING,
        f"{TRANSFORMERS}/conversion_mapping.py",
    ),
    Internal(
        "transformers.core_model_loading.revert_weight_conversion",
        "what PEFT has merged in memory is written under the names that the base's files have",
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.core_model_loading.dot_natural_key",
        "the order in which transformers asks for tensors, so that the next ones are read ahead",
        f"{TRANSFORMERS}/core_model_loading.py",
    ),
    Internal(
        "transformers.PreTrainedConfig._attn_implementation",
        "no public attribute says which attention a model has got",
        f"{TRANSFORMERS}/configuration_utils.py",
    ),
    Internal(
        "transformers.PreTrainedModel._can_compile_fullgraph",
        "only transformers knows which models never wait for the GPU; others have no CUDA graph",
        f"{TRANSFORMERS}/modeling_utils.py",
    ),
    Internal(
        "transformers.PreTrainedModel.supports_gradient_checkpointing",
        "some models cannot recompute activations; undocumented, though without an underscore",
        f"{TRANSFORMERS}/modeling_utils.py",
    ),
    Internal(
        "transformers.TrainingArguments._n_gpu",
        "Trainer takes all GPUs that a process sees, and multiplies batch and loss by their number",
        f"{TRANSFORMERS}/training_args.py",
    ),
    Internal(
        "torch.distributed.fsdp.FSDPModule._set_unshard_async_op",
        "gathered layers are allocated in the stream that computes, so memory is used again",
        "https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/"
        "_fully_shard.py",
    ),
    Internal(
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
        "on some CPUs a layer that was evaluated once is repacked without a gradient: it would "
        "never learn again",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/nn/"
        "modules.py",
    ),
    Internal(
        "bitsandbytes.functional.QuantState.as_dict",
        "a base stored in 4 bits is recognized by the names of its statistics, quant_state.*",
        "https://github.com/bitsandbytes-foundation/bitsandbytes/blob/main/bitsandbytes/"
        "functional.py",
    ),
    Internal(
        "accelerate.commands.launch.launch_command",
        "cli/notebooks.py starts one process a GPU, in the kernel's own environment",
        "https://github.com/huggingface/accelerate/blob/main/src/accelerate/commands/launch.py",
    ),
    Internal(
        "accelerate.commands.launch.launch_command_parser",
        "cli/notebooks.py starts one process a GPU, in the kernel's own environment",
        "https://github.com/huggingface/accelerate/blob/main/src/accelerate/commands/launch.py",
    ),
    Internal(
        "torch.Tensor._version",
        "model/recompute.py notices a tensor that was changed in place since it was kept",
        "https://github.com/pytorch/pytorch/blob/main/torch/_C/_VariableFunctions.pyi.in",
    ),
    Internal(
        "trl.SFTTrainer.compute_loss",
        "training/trainer.py calls Trainer's past it: it gathers metrics from the GPU at each step",
        "https://github.com/huggingface/trl/blob/main/trl/trainer/sft_trainer.py",
    ),
)


def resolve(path: str) -> Any:
    """The object of an INTERNALS path. Raises AttributeError or ImportError if there is none."""
    parts = path.split(".")
    # the longest part of the path that is a module; the rest are attributes
    for length in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            target = getattr(target, name)
        return target
    raise ImportError(path)


def model_names(stored: Iterable[str], model: PreTrainedModel) -> dict[str, list[str]]:
    """The names in `model` of the tensors with these `stored` names: {name: [name, ...]}.

    Several names, or one that several stored tensors have, are of weights that are split or fused
    when transformers reads them. Names that the model does not know are left out. This follows
    `convert_and_load_state_dict_in_model` in transformers 5.13.
    """
    mapping = get_model_conversion_mapping(model)
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


def attention_in_use(model: PreTrainedModel) -> str:
    """The name of the attention implementation that a model has: "sdpa", "eager", …"""
    return model.config._attn_implementation


def never_waits_for_gpu(model: PreTrainedModel) -> bool:
    """Whether a forward pass asks the GPU for no value, by what transformers says of the model."""
    return model._can_compile_fullgraph


def can_recompute_activations(model: PreTrainedModel) -> bool:
    """Whether a model can do without stored activations (gradient checkpointing)."""
    return model.supports_gradient_checkpointing


def use_one_gpu(arguments: TrainingArguments) -> None:
    """Have a Trainer take one GPU only, however many this process sees."""
    arguments._n_gpu = 1


def gather_in_compute_stream(model: torch.nn.Module) -> None:
    """Have FSDP allocate gathered layers in the stream that computes."""
    model._set_unshard_async_op(True)


def keep_gradients_on_cpu(layer: torch.nn.Module) -> None:
    """Keep a bitsandbytes Linear4bit from repacking its weights, after which it has no gradient."""
    layer.support_avx512bf16_for_cpu = False


def tensors_in_4_bits(names: Iterable[str] | Mapping[str, Any]) -> list[str]:
    """Those of the names of stored tensors that are weights which bitsandbytes has put into NF4."""
    names = set(names)
    return [name for name in sorted(names) if f"{name}.quant_state.bitsandbytes__nf4" in names]
