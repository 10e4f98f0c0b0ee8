"""The plan of a training before anything long: what fits, what a step is, what it takes."""

import math
import os
from bisect import bisect_left
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from tabletune.chat.templates import describe_template
from tabletune.errors import StageError
from tabletune.model.checks import check_forward, packing_leak
from tabletune.model.compat import can_recompute_activations, checkpointing_arguments
from tabletune.model.cuda_graphs import (
    is_small_batch,
    layers_support_cuda_graph,
    uses_dropout,
)
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import skeleton
from tabletune.run.stage import Stage
from tabletune.training.base_summary import summarize_base_model
from tabletune.training.fsdp import check_sharding
from tabletune.training.lora_targets import lora_targets, shortest_target_names
from tabletune.training.memory import GIB, TrainingMemory
from tabletune.training.option_checks import check_choices, targets_to_adapt, when_to_evaluate
from tabletune.training.step_advice import few_steps_advice

MOST_ROWS = 16  # of a step that "auto" makes
LEAST_TOKENS = 2048  # to take at once where there are as many: every batch dequantizes all weights
LEAK = 1e-5  # of the range of the logits: what is masked contributes exactly 0
# What a batch costs, in tokens of training, measured with a 7B on H100 and H200: dequantizing all
# weights takes as long as 280 tokens, recomputing all layers as long as a third of the batch.
DEQUANTIZING_TOKENS = 280
RECOMPUTING_SHARE = 1 / 3
# Of the memory that there is. The estimate was at most 5% too low, in 49 measurements.
SAFE_SHARE = 0.96


def look_and_check(
    chosen: dict[str, Any],
    config: PretrainedConfig,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
) -> tuple[list[str], pd.DataFrame]:
    """The names of the layers that get an adapter, and a table that describes the base model.

    Raises StageError if the parameters of notebook 2, `chosen`, cannot work here or with this base.
    """
    check_choices(chosen, config, dtype)
    model = skeleton(config)
    summary = summarize_base_model(
        model,
        chosen["lora_target_modules"],
        chosen["attn_implementation"],
        chosen["quantization"],
        dtype,
    )
    summary |= describe_template(tokenizer, stops)
    table = pd.Series(summary, name="this base").to_frame()
    return targets_to_adapt(chosen, model), table


# --- what a step is


@dataclass
class Room:
    """What a training takes beside what there is, and what follows from it for its batches."""

    memory: TrainingMemory
    available_gib: float
    recomputes: bool  # whether layers may be recomputed
    graphs: bool = False  # whether steps on small batches become a CUDA graph
    draws: bool = True  # whether there is dropout, so that recomputing must draw the same again
    sharded: bool = False
    expected: pd.Series | None = None  # GiB by part of the step that is planned

    def is_graph(self, rows: int) -> bool:
        """Whether a step on batches of `rows` rows becomes a CUDA graph."""
        return self.graphs and is_small_batch(rows, self.memory.max_length, 1)

    def total(self, rows: int, recomputed_layers: int) -> float:
        """The estimate in GiB for batches of `rows` full rows."""
        tokens = rows * self.memory.max_length
        return self.memory.total(tokens, recomputed_layers, self.is_graph(rows))

    def recomputed_layers(self, rows: int) -> int:
        """How many layers must be recomputed for batches of `rows` full rows: the first that many.

        Without a GPU, and where the model is sharded, it is all or none of them.
        """
        layers = self.memory.shape.layers
        if not self.recomputes:
            return 0
        if not self.memory.gpu or self.sharded:
            return layers
        safe_gib = SAFE_SHARE * self.available_gib
        if self.total(rows, 0) <= safe_gib:
            return 0
        # each layer more takes less memory, so halves of the range are enough to look at
        return bisect_left(range(layers), True, key=lambda n: self.total(rows, n) <= safe_gib)

    def fits(self, rows: int) -> bool:
        """Whether batches of `rows` full rows fit, with as much recomputed as they need."""
        needed = self.total(rows, self.recomputed_layers(rows))
        return needed <= SAFE_SHARE * self.available_gib

    def cost(self, rows: int) -> float:
        """What a batch of `rows` full rows takes a row, in tokens of training."""
        share = self.recomputed_layers(rows) / self.memory.shape.layers
        tokens = rows * self.memory.max_length * (1 + share * RECOMPUTING_SHARE)
        return (tokens + DEQUANTIZING_TOKENS) / rows

    def rows_at_once(self, rows: int) -> int:
        """In how large equal parts a GPU takes the `rows` rows of a step: those that cost least."""
        parts = [part for part in range(1, rows + 1) if rows % part == 0 and self.fits(part)]
        full = [part for part in parts if part * self.memory.max_length >= LEAST_TOKENS]
        if rows in parts and not full:
            return rows
        return min(full or parts, key=self.cost, default=1)


def rows_of_step(chosen: dict[str, Any], rows: int, processes: int) -> int:
    """How many rows each GPU takes in a step, `gradient_accumulation_steps` apart.

    `batch_size` is taken as it is. "auto" is at most 16, but so few that there are `min_steps`
    steps: a small table would end before the model has learned (5 steps an epoch taught nothing,
    300 did).
    Raises StageError if batch_size is neither a number nor "auto".
    """
    batch_size = chosen["batch_size"]
    is_count = isinstance(batch_size, int) and batch_size > 0
    if batch_size != "auto" and not is_count:
        raise StageError(f'batch_size={batch_size!r}: use a whole number of rows, or "auto".')
    if is_count:
        return batch_size
    steps = chosen["min_steps"] * chosen["gradient_accumulation_steps"] * processes
    return max(1, min(MOST_ROWS, int(rows * chosen["epochs"] / steps)))


class StepPlan(NamedTuple):
    """What a step of the optimizer is."""

    batch_size: int  # rows in one forward pass, on each GPU
    accumulated: int  # forward passes before a step
    steps: int  # of the whole training


def divide_steps(chosen: dict[str, Any], rows: int, room: Room, processes: int) -> StepPlan:
    """The StepPlan of a training on so many rows.

    A number as `batch_size` is taken at once, whatever it takes.
    """
    step_rows = rows_of_step(chosen, rows, processes)
    at_once = room.rows_at_once(step_rows) if chosen["batch_size"] == "auto" else step_rows
    accumulated = chosen["gradient_accumulation_steps"] * (step_rows // at_once)
    batches = math.ceil(rows / (at_once * processes))
    steps = math.ceil(math.ceil(batches / accumulated) * chosen["epochs"])
    max_steps = chosen["training_options"].get("max_steps", -1)
    if max_steps > 0:  # then it counts, and not the epochs
        steps = max_steps
    return StepPlan(at_once, accumulated, steps)


def plan_steps(
    chosen: dict[str, Any],
    rows: Sized,
    examples: Sized,
    room: Room,
    processes: PartialState,
) -> StepPlan:
    """`divide_steps` for these rows of examples; prints in one line what a step will be."""
    plan = divide_steps(chosen, len(rows), room, processes.num_processes)
    parts = [with_noun(plan.batch_size, "row")]
    if plan.accumulated > 1:
        parts.append(f"× {plan.accumulated} accumulated")
    if processes.num_processes > 1:
        parts.append(f"× {processes.num_processes} GPUs")
    rows_in_step = plan.batch_size * plan.accumulated * processes.num_processes
    examples_in_step = rows_in_step * len(examples) / len(rows)
    note = ""
    if plan.steps < chosen["min_steps"] and chosen["batch_size"] != "auto":
        note = f", fewer than min_steps={chosen['min_steps']}: batch_size=auto makes smaller ones"
    in_words = f"about {examples_in_step:.0f} examples"
    if len(rows) == len(examples):  # not packed
        in_words = with_noun(round(examples_in_step), "example")
    print(f"a step is {' '.join(parts)}, {in_words}; {plan.steps:,} steps{note}")
    advice = few_steps_advice(plan.steps, len(examples), chosen["epochs"])
    if advice:
        print(advice)
    return plan


def with_noun(number: int, noun: str) -> str:
    """A number and its noun: "1 row", "2 rows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def count_trained(
    chosen: dict[str, Any], config: PretrainedConfig, targets: str | list[str]
) -> int:
    """How many weights an adapter with these options trains, as PEFT makes it, without memory."""
    from peft import LoraConfig, get_peft_model

    model = skeleton(config)
    # A start that is computed from the weights is left out, as a skeleton has none.
    options = chosen["lora_options"] | {"init_lora_weights": True}
    names = shortest_target_names(model, lora_targets(model, targets))
    lora_config = LoraConfig(r=chosen["lora_r"], target_modules=names, **options)
    with torch.device("meta"):
        adapted = get_peft_model(model, lora_config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def room_for_training(
    chosen: dict[str, Any],
    config: PretrainedConfig,
    dtype: torch.dtype,
    targets: str | list[str],
    rows: int,
    processes: PartialState,
) -> Room:
    """The Room of a training on so many full rows with notebook 2's parameters; prints the sum.

    With `gradient_checkpointing`, as many layers are recomputed as a GPU has no room for. Raises
    StageError if the weights alone do not fit, unless `ignore_memory`; that the rest may not fit is
    only said.
    """
    gpu = torch.cuda.is_available()
    model = skeleton(config)
    recomputes = chosen["gradient_checkpointing"] and can_recompute_activations(model)
    if recomputes != chosen["gradient_checkpointing"]:
        print(
            f"{type(model).__name__} does not support gradient checkpointing: all activations are "
            "kept"
        )
    names = ("lora_r", "lora_dropout", "optim", "use_liger_kernel", "quantization", "max_length")
    options = {name: chosen[name] for name in names}
    options["lora_options"] = chosen["lora_options"]
    if chosen["lora_options"]:  # it may give layers ranks of their own, say
        options["trained"] = count_trained(chosen, config, targets)
    if "expandable_segments:True" not in os.environ.get("PYTORCH_ALLOC_CONF", ""):
        options["allocator"] = "blocks"
    replicas = processes.num_processes
    memory = TrainingMemory(model, dtype, gpu, targets, replicas=replicas, **options)
    one_process = processes.num_processes == 1
    draws = bool(chosen["lora_dropout"]) or uses_dropout(model)
    room = Room(
        memory=memory,
        available_gib=min(gather_object([available_memory_gib()])),
        recomputes=recomputes,
        graphs=gpu and one_process and not draws and layers_support_cuda_graph(model),
        draws=draws,
    )
    at_once = divide_steps(chosen, rows, room, processes.num_processes)[0]
    if processes.distributed_type == DistributedType.MULTI_GPU:
        unsharded = room.total(at_once, room.recomputed_layers(at_once))
        if unsharded > room.available_gib:
            print(
                f"on each GPU the whole model would take {unsharded:.1f} GiB, "
                f"and there is room for {room.available_gib:.1f} GiB"
            )
            print(f"so it is sharded over {processes.num_processes} GPUs (FSDP)")
            weights_gib = memory.base_model() / GIB
            check_sharding(config, chosen["base_model"], chosen["optim"], weights_gib)
            shards = processes.num_processes
            room.memory = TrainingMemory(model, dtype, gpu, targets, shards=shards, **options)
            room.sharded = True
            at_once = divide_steps(chosen, rows, room, processes.num_processes)[0]
    if processes.num_processes > 1 and not room.sharded:
        print(
            f"each of {processes.num_processes} processes has the whole model, "
            "and its share of the rows (DDP)"
        )
    report_room(room, at_once, chosen["ignore_memory"])
    return room


def report_room(room: Room, rows: int, ignore_memory: bool) -> None:
    """Estimate what batches of `rows` rows take, as `room.expected`; print the sum.

    Raises StageError if the weights alone do not fit, unless `ignore_memory`.
    """
    recomputed = room.recomputed_layers(rows)
    layers = room.memory.shape.layers
    tokens = rows * room.memory.max_length
    room.expected = room.memory.parts(tokens, recomputed, room.is_graph(rows))
    if room.recomputes and not recomputed:
        print("there is room to keep all activations: nothing is recomputed in the backward pass")
    elif recomputed:
        print(f"in the backward pass {recomputed} of {layers} layers are recomputed")
    total = room.expected.sum()
    available = room.available_gib
    print(f"expected peak memory: {total:.1f} GiB; there is room for {available:.1f} GiB")
    weights = room.expected["base model"]
    if weights > available and not ignore_memory:
        raise StageError(
            f"The weights alone take {weights:.1f} GiB of memory, and there are {available:.1f} "
            "GiB. Take a smaller base_model, or set ignore_memory if you know better."
        )
    if total > available:
        advice = "" if room.recomputes else ", or set gradient_checkpointing"
        print(
            "If it does not fit: lower batch_size and raise gradient_accumulation_steps "
            f"by as much{advice}."
        )


def rows_to_train_on(
    model: torch.nn.Module, examples: Dataset, packed: Dataset, packing: bool
) -> Dataset:
    """The packed rows if they may be packed, else the examples by themselves; prints which.

    Whether they may be is measured on this model: what the second of two packed examples sees of
    the first. Raises StageError if this model computes no numbers, or is no causal one.
    """
    check_forward(model, torch.tensor([examples[0]["input_ids"][:32]]))
    leak = packing_leak(model) if packing else 0.0
    if packing and leak <= LEAK:
        print(
            f"{len(examples):,} examples packed into {len(packed):,} rows; "
            f"they do not see each other ({leak:.1%})"
        )
        return packed
    reason = "as `packing` is off"
    if packing:
        reason = f"as packed examples would see each other in this model ({leak:.1%})"
    print(f"not packed, {reason}: a row is one example, and a batch has rows of like length")
    return examples


def inputs_of(
    report: dict[str, Any], dtype: torch.dtype, processes: PartialState, room: Room
) -> dict[str, Any]:
    """What a training depends on beside its parameters: the data set, and what computes."""
    return {
        "dataset": report["fingerprint"],
        "dtype": str(dtype).removeprefix("torch."),
        "device": processes.device.type,
        "processes": processes.num_processes,
        "sharded": room.sharded,
    }


def evaluation_rows(room: Room, rows: int) -> int:
    """How many rows the validation takes at once: those of training, on a GPU up to 8 if they fit.

    It keeps no activations, so it takes less than a training that recomputes all of them.
    """
    if not room.memory.gpu:
        return rows
    return max([rows, *(more for more in range(rows, 9) if room.fits(more))])


def trainer_settings(
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
    options = {"use_reentrant": False, "preserve_rng_state": room.draws}
    settings |= checkpointing_arguments(recomputes, options, parameters["training_options"])
    return settings | {
        "output_dir": str(stage.folder / "checkpoints"),
        "warmup_steps": parameters["warmup"],
        "report_to": "none" if done else parameters["report_to"],
        "use_cpu": not gpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "per_device_eval_batch_size": evaluation_rows(room, plan.batch_size),
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
