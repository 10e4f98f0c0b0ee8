"""What a reader chose for notebook 2, checked before anything long: what cannot work here, or with this base."""

import dataclasses
from importlib.util import find_spec

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from tabletune.errors import StageError, suggestion
from tabletune.merging.plan import CHANGES_BASE, base_module_name, is_plain_lora
from tabletune.model.inspection import context_length, tied_weight_names
from tabletune.training.lora_targets import lora_targets, shortest_target_names

# what SFTConfig takes, and would do nothing here: the rows are made by notebooks 1 and 2
ROWS = "packing packing_strategy eval_packing padding_free pad_to_multiple_of max_length completion_only_loss "
ROWS += "assistant_only_loss dataset_text_field dataset_kwargs chat_template_path eos_token pad_token shuffle_dataset"


def check_choices(chosen, config, dtype):
    """Raise StageError for parameters of notebook 2, {name: value}, that cannot work here or with this base."""
    gpu = torch.cuda.is_available()
    if chosen["quantization"] not in ("nf4", "8bit", "none"):
        raise StageError(f'quantization="{chosen["quantization"]}": use nf4, 8bit or none.')
    if dtype != torch.float32 and not gpu:
        raise StageError(
            f"precision={chosen['precision']}: training in half precision needs a GPU. Use auto or fp32."
        )
    liger = chosen["training_options"].get("use_liger_kernel", chosen["use_liger_kernel"])
    if liger and not (gpu and find_spec("liger_kernel")):
        raise StageError(
            "use_liger_kernel needs a GPU and the package liger-kernel. Install it, or set it to false."
        )
    if chosen["optim"].startswith("paged") and not gpu:
        raise StageError(
            f"optim={chosen['optim']}: the paged optimizers of bitsandbytes need a GPU. Use adamw_torch."
        )
    if chosen["quantization"] == "8bit" and chosen["lora_options"].get("use_dora") and not gpu:
        raise StageError(
            'PEFT has no DoRA on 8-bit weights without a GPU. Set quantization to "nf4".'
        )
    check_options(chosen)
    most = context_length(config)
    if most and chosen["max_length"] > most:
        print(
            f"max_length={chosen['max_length']}, but this base was made to read {most:,} tokens at once."
        )


def when_to_evaluate(options, each):
    """When SFTConfig has the validation loss taken and a checkpoint saved, which belong together: every `each` steps.

    Where `options` has a word on one of the two, the other follows.
    """
    strategy = options.get("eval_strategy", options.get("save_strategy", "steps"))
    every = options.get("eval_steps", options.get("save_steps", each))
    strategy = "steps" if strategy == "best" else strategy
    return {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "eval_steps": every,
        "save_steps": every,
    }


def check_options(chosen):
    """Raise StageError for options and loggers that there are not, that cannot be, or that would do nothing."""
    for name, kind in (("lora_options", LoraConfig), ("training_options", SFTConfig)):
        known = {field.name for field in dataclasses.fields(kind)}
        for option in chosen[name].keys() - known:
            raise StageError(
                f"{name}: {kind.__name__} has no {option!r}.{suggestion(option, known)}"
            )
    options = chosen["training_options"]
    for option in options.keys() & set(ROWS.split()):
        raise StageError(
            f"training_options: {option!r} would do nothing, as the rows are made here. Leave it out."
        )
    if options.get("metric_for_best_model", "eval_loss") not in ("loss", "eval_loss"):
        raise StageError(
            "training_options: metric_for_best_model can only be the validation loss. Leave it out."
        )
    for name, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        try:
            known(chosen[name])
        except ValueError as error:
            raise StageError(f"{name}={chosen[name]}: {error}") from None
    usual = {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "load_best_model_at_end": True,
    }
    usual |= {"report_to": "none", "lr_scheduler_type": chosen["lr_scheduler_type"]}
    try:
        made = SFTConfig(**usual | when_to_evaluate(options, 1) | options)
        optimizer = torch.optim.SGD([torch.zeros(1)])
        get_scheduler(made.lr_scheduler_type, optimizer, 1, 2, made.lr_scheduler_kwargs)
    except (ValueError, TypeError, ImportError) as error:
        raise StageError(f"training_options: {error}") from None
    if chosen["early_stopping_patience"] and (
        made.eval_strategy == "no" or not made.metric_for_best_model
    ):
        lacking = "evaluations" if made.eval_strategy == "no" else "a metric_for_best_model"
        raise StageError(
            f"early_stopping_patience needs {lacking}, of which training_options leave none. Set it to 0."
        )
    loggers = options.get("report_to", chosen["report_to"])
    for logger in [loggers] if isinstance(loggers, str) else loggers:
        if logger not in ("none", "all", *get_available_reporting_integrations()):
            raise StageError(
                f"report_to={logger}: there is no such package here. Install it, or take another one."
            )
    begun = str(chosen["lora_options"].get("init_lora_weights"))
    if begun.startswith(CHANGES_BASE) and chosen["quantization"] != "none":
        raise StageError(
            f'lora_options: "{begun}" changes the base\'s weights. Set quantization to "none".'
        )


def targets_to_adapt(chosen, model):
    """The names of the layers of a `skeleton` that get an adapter.

    It is tried on the skeleton, which is of no use afterwards. Raises StageError if it could not be merged.
    """
    targets, tied = lora_targets(model, chosen["lora_target_modules"]), tied_weight_names(model)
    layers = {name for name, _ in model.named_modules()}
    options = {
        "r": chosen["lora_r"],
        "lora_alpha": chosen["lora_alpha"],
        "lora_dropout": chosen["lora_dropout"],
    }
    options |= (
        {"target_modules": shortest_target_names(model, targets)}
        | chosen["lora_options"]
        | {"init_lora_weights": True}
    )
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, LoraConfig(**options))
        saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        adapted.merge_and_unload()
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise StageError(f"lora_options: {error}") from None
    if getattr(model.config, "quantization_config", None) and not is_plain_lora(
        adapted.peft_config["default"], saved
    ):
        raise StageError(
            "lora_options: this base is stored in 4 bits, and only plain LoRA can be merged into that."
        )
    for module in map(base_module_name, saved):
        if f"{module}.weight" in tied:
            raise StageError(
                f"lora_options would change {module}, which is tied to another layer: that has no merge."
            )
        if module not in layers:
            raise StageError(
                f"lora_options would make {module}, which the base does not have: that has no merge."
            )
    return targets
