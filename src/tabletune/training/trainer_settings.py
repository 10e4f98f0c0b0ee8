"""The settings of the Trainer that follow from a run and its plan, and not from a parameter alone.

Which checkpoint becomes the adapter is decided here: the best by the validation loss
(`load_best_model_at_end`), which `TokenTrainer` in training/trainer.py computes.
"""

import math
import os
from typing import Any

import torch

from tabletune.model.compat import checkpointing_arguments
from tabletune.run.stage import Stage
from tabletune.training.room import Room, StepPlan


def sft_arguments(
    stage: Stage,
    done: bool,
    dtype: torch.dtype,
    room: Room,
    plan: StepPlan,
    packed: bool,
) -> dict[str, Any]:
    """The arguments of `SFTConfig` that follow from the plan: where, on what, when to evaluate.

    `include_num_input_tokens_seen` is not among them: it waits for the GPU after each batch, which
    took a tenth of the time.
    """
    parameters = stage.parameters
    gpu = torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.folder / "training" / "tensorboard")
    # these have the same name in SFTConfig as in the notebook
    same_names = ("seed", "use_liger_kernel", "max_length", "lr_scheduler_type", "max_grad_norm")
    settings = {name: parameters[name] for name in same_names}
    settings |= when_to_evaluate(
        parameters["training_options"], math.ceil(plan.steps / parameters["evaluations"])
    )
    recomputes = room.recomputed_layers(plan.batch_size) > 0
    # Without dropout nothing random is recomputed, and a CUDA graph could not restore it.
    options = {"use_reentrant": False, "preserve_rng_state": room.has_dropout}
    settings |= checkpointing_arguments(recomputes, options, parameters["training_options"])
    return settings | {
        "output_dir": str(stage.folder / "checkpoints"),
        "warmup_steps": parameters["warmup"],  # below 1 it is a share of all steps
        "report_to": "none" if done else parameters["report_to"],
        "use_cpu": not gpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "per_device_eval_batch_size": room.evaluation_rows(plan.batch_size),
        "train_sampling_strategy": "random" if packed else "group_by_length",
        "fsdp": room.sharded,
        "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
        "ddp_find_unused_parameters": False,
        "load_best_model_at_end": True,  # the best by the validation loss
        "save_total_limit": 2,
        "restore_callback_states_from_checkpoint": parameters["early_stopping_patience"] > 0,
        "logging_steps": 0.05,
        # Filtering would hide a loss that is NaN, and wait for the GPU in every step.
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "dataloader_pin_memory": gpu,
    }


def when_to_evaluate(options: dict[str, Any], each: int) -> dict[str, Any]:
    """SFTConfig's arguments that say when to take the validation loss and save a checkpoint.

    The two belong together: every `each` steps. Where `options` sets one of them, the other
    follows.
    """
    # Trainer loads the best checkpoint at the end, so each evaluation needs a checkpoint of its own
    # step
    strategy = options.get("eval_strategy", options.get("save_strategy", "steps"))
    if strategy == "best":
        strategy = "steps"
    steps = options.get("eval_steps", options.get("save_steps", each))
    return {
        "eval_strategy": strategy,
        "save_strategy": strategy,
        "eval_steps": steps,
        "save_steps": steps,
    }
