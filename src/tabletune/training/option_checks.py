"""The parameters of notebook 2, checked before anything long starts."""

import dataclasses
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedConfig, PreTrainedModel, SchedulerType, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from tabletune.errors import StageError, first_line, suggestion
from tabletune.merging.in_memory import CHANGES_BASE, is_plain_lora
from tabletune.merging.lora import base_module_name
from tabletune.model.compat import checkpointing_arguments
from tabletune.model.inspection import context_length, tied_weight_names
from tabletune.training.lora_targets import lora_targets, shortest_target_names
from tabletune.training.trainer_settings import when_to_evaluate

# what SFTConfig takes and would do nothing here: notebooks 1 and 2 make the rows
WITHOUT_EFFECT = {
    "packing",
    "packing_strategy",
    "eval_packing",
    "padding_free",
    "pad_to_multiple_of",
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "dataset_kwargs",
    "remove_unused_columns",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "shuffle_dataset",
}
# what notebook 2 writes into LoraConfig and SFTConfig itself, and the parameter to set instead
PARAMETER_FOR = {
    "lora_options": {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "target_modules": "lora_target_modules",
        "task_type": "",
    },
    "training_options": {
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "gradient_accumulation_steps": "gradient_accumulation_steps",
        "learning_rate": "learning_rate",
        "optim": "optim",
    },
}


def check_option_values(
    parameters: dict[str, Any], config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    """Raise StageError for parameters of notebook 2 that cannot work here or with this base."""
    has_gpu = torch.cuda.is_available()
    if parameters["quantization"] not in ("nf4", "8bit", "none"):
        raise StageError(f'quantization="{parameters["quantization"]}": use nf4, 8bit or none.')
    if dtype != torch.float32 and not has_gpu:
        raise StageError(
            f"precision={parameters['precision']}: training in half precision needs a GPU. Use "
            "auto or fp32."
        )
    # training_options has the last word, as in the notebook
    liger = parameters["training_options"].get("use_liger_kernel", parameters["use_liger_kernel"])
    if liger and not (has_gpu and find_spec("liger_kernel")):
        raise StageError(
            "use_liger_kernel needs a GPU and the package liger-kernel. Install it, or set it to "
            "false."
        )
    if parameters["optim"].startswith("paged") and not has_gpu:
        raise StageError(
            f"optim={parameters['optim']}: the paged optimizers of bitsandbytes need a GPU. Use "
            "adamw_torch."
        )
    uses_dora = parameters["lora_options"].get("use_dora")
    if parameters["quantization"] == "8bit" and uses_dora and not has_gpu:
        raise StageError(
            'PEFT cannot train DoRA on 8-bit weights without a GPU. Set quantization to "nf4".'
        )
    check_options(parameters)
    longest = context_length(config)
    if longest and parameters["max_length"] > longest:
        print(
            f"max_length={parameters['max_length']}, but this base was trained to read {longest:,} "
            "tokens at once."
        )


def check_options(parameters: dict[str, Any]) -> None:
    """Raise StageError for options and loggers that are unknown, impossible or without effect."""
    check_names_of_options("lora_options", parameters["lora_options"], LoraConfig)
    check_names_of_options("training_options", parameters["training_options"], SFTConfig)
    check_training_options(parameters)
    loggers = parameters["training_options"].get("report_to", parameters["report_to"])
    if isinstance(loggers, str):
        loggers = [loggers]
    for logger in loggers:
        if logger not in ("none", "all", *get_available_reporting_integrations()):
            raise StageError(
                f"report_to={logger}: that package is not installed here. Install it, or use "
                "another one."
            )
    initialization = str(parameters["lora_options"].get("init_lora_weights"))
    if initialization.startswith(CHANGES_BASE) and parameters["quantization"] != "none":
        raise StageError(
            f'lora_options: "{initialization}" changes the base\'s weights. Set quantization to '
            '"none".'
        )


def check_names_of_options(name: str, options: dict[str, Any], kind: type) -> None:
    """Raise StageError for options that `kind` does not take, or that another parameter sets."""
    valid = {field.name for field in dataclasses.fields(kind)}
    for option in options:
        if option not in valid:
            raise StageError(
                f"{name}: {kind.__name__} has no {option!r}.{suggestion(option, valid)}"
            )
        if option in PARAMETER_FOR[name]:
            parameter = PARAMETER_FOR[name][option]
            advice = f"Set the parameter {parameter} instead." if parameter else "Leave it out."
            raise StageError(f"{name}: the notebook sets {option!r} itself. {advice}")
        if name == "training_options" and option in WITHOUT_EFFECT:
            raise StageError(
                f"{name}: {option!r} would have no effect, because this notebook prepares the rows "
                "itself. Leave it out."
            )


def check_choice_of_checkpoint(options: dict[str, Any]) -> None:
    """Raise StageError if another checkpoint than that of the least validation loss were kept."""
    if options.get("greater_is_better"):
        raise StageError(
            "training_options: greater_is_better would keep the checkpoint with the largest loss. "
            "Leave it out."
        )
    if options.get("metric_for_best_model", "eval_loss") not in ("loss", "eval_loss"):
        raise StageError(
            "training_options: metric_for_best_model can only be the validation loss. Leave it out."
        )


def check_training_options(parameters: dict[str, Any]) -> None:
    """Raise StageError for training options that SFTConfig or the schedule refuse."""
    options = parameters["training_options"]
    check_choice_of_checkpoint(options)
    for name, kind in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        try:
            kind(parameters[name])
        except ValueError as error:
            raise StageError(f"{name}={parameters[name]}: {error}") from error
    settings = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "load_best_model_at_end": True,
        "report_to": "none",
        "lr_scheduler_type": parameters["lr_scheduler_type"],
        **when_to_evaluate(options, 1),
        **checkpointing_arguments(False, None, options),
    }
    try:
        arguments = SFTConfig(**settings | options)
        # a schedule is tried on an optimizer of one number, before anything is loaded
        optimizer = torch.optim.SGD([torch.zeros(1)])
        get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 2, arguments.lr_scheduler_kwargs)
    except (ValueError, TypeError, ImportError) as error:
        raise StageError(f"training_options: {error}") from error
    if not parameters["early_stopping_patience"]:
        return
    missing = ""
    if arguments.eval_strategy == "no":
        missing = "evaluations"
    elif not arguments.metric_for_best_model:
        missing = "a metric_for_best_model"
    if missing:
        raise StageError(
            f"early_stopping_patience needs {missing}, but training_options switch that off. Set "
            "early_stopping_patience to 0."
        )


def targets_to_adapt(parameters: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """The names of the layers of a `skeleton` that get an adapter.

    The adapter is tried on the skeleton, which is of no use afterwards. Raises StageError if PEFT
    refuses it, or if it could not be merged.
    """
    targets = lora_targets(model, parameters["lora_target_modules"])
    tied = tied_weight_names(model)
    layers = {name for name, _ in model.named_modules()}
    config, saved = try_adapter(parameters, model, targets)
    # its original weights are not there, so PEFT could not merge into them
    is_in_4_bits = getattr(model.config, "quantization_config", None)
    if is_in_4_bits and not is_plain_lora(config, saved):
        raise StageError(
            "lora_options: this base model is stored in 4 bits, and only plain LoRA can be merged "
            "into that. Leave them out, or take the model in 16 bits."
        )
    for module in map(base_module_name, saved):
        if f"{module}.weight" in tied:
            raise StageError(
                f"lora_options would change {module}, which is tied to another layer, so the "
                "adapter could not be merged. Leave that option out."
            )
        if module not in layers:
            raise StageError(
                f"lora_options would add {module}, which the base model does not have, so the "
                "adapter could not be merged. Leave that option out."
            )
    return targets


def try_adapter(
    parameters: dict[str, Any], model: PreTrainedModel, targets: list[str]
) -> tuple[LoraConfig, list[str]]:
    """Make an adapter on a `skeleton`, and merge it; no weight is computed.

    Returns its config, and the names of the tensors that it would save. Raises StageError if PEFT
    refuses to make or to merge it.
    """
    # a start that is computed from the weights is left out, as a skeleton has none
    options = parameters["lora_options"] | {"init_lora_weights": True}
    try:
        config = LoraConfig(
            r=parameters["lora_r"],
            lora_alpha=parameters["lora_alpha"],
            lora_dropout=parameters["lora_dropout"],
            target_modules=shortest_target_names(model, targets),
            **options,
        )
        with torch.device("meta"):
            adapted = get_peft_model(model, config)
        saved = list(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        adapted.merge_and_unload()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise StageError(f"lora_options: {first_line(error)}") from error
    return config, saved
