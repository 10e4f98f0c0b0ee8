"""The plan of a training before anything long: what fits, what a step is, what it takes."""

import os
from collections.abc import Sized
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tabletune.chat.templates import describe_template
from tabletune.errors import StageError
from tabletune.model.checks import check_forward, packing_leak
from tabletune.model.compat import can_recompute_activations
from tabletune.model.cuda_graphs import layers_support_cuda_graph, uses_dropout
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import skeleton
from tabletune.training.base_summary import summarize_base_model
from tabletune.training.fsdp import check_sharding
from tabletune.training.lora_targets import lora_targets, shortest_target_names
from tabletune.training.memory import GIB, TrainingMemory
from tabletune.training.option_checks import check_option_values, targets_to_adapt
from tabletune.training.room import Room, StepPlan, divide_steps
from tabletune.training.step_advice import few_steps_advice

LEAK = 1e-5  # of the range of the logits: what is masked contributes exactly 0


def check_parameters(
    parameters: dict[str, Any],
    config: PretrainedConfig,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
) -> tuple[list[str], pd.DataFrame]:
    """The names of the layers that get an adapter, and a table that describes the base model.

    Raises StageError if the `parameters` of notebook 2 cannot work here or with this base.
    """
    check_option_values(parameters, config, dtype)
    model = skeleton(config)
    summary = summarize_base_model(
        model,
        parameters["lora_target_modules"],
        parameters["attn_implementation"],
        parameters["quantization"],
        dtype,
    )
    summary |= describe_template(tokenizer, stops)
    table = pd.Series(summary, name="this base model").to_frame()
    return targets_to_adapt(parameters, model), table


def plan_steps(
    parameters: dict[str, Any],
    rows: Sized,
    examples: Sized,
    room: Room,
    processes: PartialState,
) -> StepPlan:
    """`divide_steps` for these rows of examples; prints in one line what a step will be."""
    plan = divide_steps(parameters, len(rows), room, processes.num_processes)
    parts = [with_noun(plan.batch_size, "row")]
    if plan.accumulated > 1:
        parts.append(f"× {plan.accumulated} accumulated")
    if processes.num_processes > 1:
        parts.append(f"× {processes.num_processes} GPUs")
    rows_in_step = plan.batch_size * plan.accumulated * processes.num_processes
    examples_in_step = rows_in_step * len(examples) / len(rows)
    in_words = f"about {examples_in_step:.0f} examples"
    if len(rows) == len(examples):  # not packed
        in_words = with_noun(round(examples_in_step), "example")
    max_steps = parameters["training_options"].get("max_steps", -1)
    note = ""
    by_batch_size = parameters["batch_size"] != "auto" and max_steps <= 0
    if by_batch_size and plan.steps < parameters["min_steps"]:
        note = (
            f", fewer than min_steps={parameters['min_steps']}: batch_size=auto makes smaller ones"
        )
    print(f"a step is {' '.join(parts)}, {in_words}; {plan.steps:,} steps{note}")
    advice = few_steps_advice(plan.steps, len(examples), parameters["epochs"], max_steps)
    if advice:
        print(advice)
    return plan


def with_noun(number: int, noun: str) -> str:
    """A number and its noun: "1 row", "2 rows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# --- the memory


def room_for_training(
    parameters: dict[str, Any],
    config: PretrainedConfig,
    dtype: torch.dtype,
    targets: str | list[str],
    rows: int,
    processes: PartialState,
) -> Room:
    """The Room of a training on so many full rows with notebook 2's parameters; prints the sum.

    With `gradient_checkpointing`, as many layers are recomputed as a GPU has no room for. A model
    that does not fit on one of several GPUs is sharded over them. Raises StageError if the weights
    alone do not fit, unless `ignore_memory`; that the rest may not fit is only said.
    """
    model = skeleton(config)
    memory = memory_of_training(parameters, model, dtype, targets, processes.num_processes)
    has_dropout = bool(parameters["lora_dropout"]) or uses_dropout(model)
    # a graph records one process's work, and would repeat the same random numbers
    can_record = memory.gpu and processes.num_processes == 1 and not has_dropout
    room = Room(
        memory=memory,
        # the least of all processes, so that all of them plan the same
        available_gib=min(gather_object([available_memory_gib()])),
        may_recompute=may_recompute(parameters["gradient_checkpointing"], model),
        uses_cuda_graph=can_record and layers_support_cuda_graph(model),
        has_dropout=has_dropout,
    )
    # as if each GPU held the whole model; if that does not fit, they share it, and we plan again
    plan = divide_steps(parameters, rows, room, processes.num_processes)
    if processes.distributed_type == DistributedType.MULTI_GPU:
        one_gpu_gib = room.total(plan.batch_size, room.recomputed_layers(plan.batch_size))
        if one_gpu_gib > room.available_gib:
            shard_over_gpus(room, one_gpu_gib, parameters, config, processes.num_processes)
            plan = divide_steps(parameters, rows, room, processes.num_processes)
    if processes.num_processes > 1 and not room.sharded:
        print(
            f"each of {processes.num_processes} processes has the whole model, "
            "and its share of the rows (DDP)"
        )
    report_room(room, plan.batch_size, parameters["ignore_memory"])
    return room


def memory_of_training(
    parameters: dict[str, Any],
    model: PreTrainedModel,
    dtype: torch.dtype,
    targets: str | list[str],
    processes: int,
) -> TrainingMemory:
    """The TrainingMemory of a model, which may be a `skeleton`, held by each of the processes."""
    trained = None
    if parameters["lora_options"]:  # they may give layers ranks of their own, say
        trained = count_trained(parameters, model.config, targets)
    allocator = "blocks"
    if "expandable_segments:True" in os.environ.get("PYTORCH_ALLOC_CONF", ""):
        allocator = "expandable"
    return TrainingMemory(
        model,
        dtype,
        gpu=torch.cuda.is_available(),
        targets=targets,
        lora_r=parameters["lora_r"],
        lora_dropout=parameters["lora_dropout"],
        lora_options=parameters["lora_options"],
        optim=parameters["optim"],
        use_liger_kernel=parameters["use_liger_kernel"],
        quantization=parameters["quantization"],
        max_length=parameters["max_length"],
        trained=trained,
        replicas=processes,
        allocator=allocator,
    )


def count_trained(
    parameters: dict[str, Any], config: PretrainedConfig, targets: str | list[str]
) -> int:
    """How many weights an adapter with these options trains, as PEFT makes it, without memory."""
    from peft import LoraConfig, get_peft_model

    model = skeleton(config)
    # A start that is computed from the weights is left out, as a skeleton has none.
    options = parameters["lora_options"] | {"init_lora_weights": True}
    names = shortest_target_names(model, lora_targets(model, targets))
    lora_config = LoraConfig(r=parameters["lora_r"], target_modules=names, **options)
    with torch.device("meta"):
        adapted = get_peft_model(model, lora_config)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def may_recompute(gradient_checkpointing: bool, model: PreTrainedModel) -> bool:
    """Whether layers may be recomputed; says so where the model cannot, though it is set."""
    if not gradient_checkpointing:
        return False
    if can_recompute_activations(model):
        return True
    print(
        f"{type(model).__name__} does not support gradient checkpointing: all activations are kept"
    )
    return False


def shard_over_gpus(
    room: Room, one_gpu_gib: float, parameters: dict[str, Any], config: PretrainedConfig, gpus: int
) -> None:
    """Change a Room to that of a model that GPUs share, as each would take `one_gpu_gib` alone.

    Prints so. Raises StageError if this model or optimizer cannot be sharded.
    """
    print(
        f"on each GPU the whole model would take {one_gpu_gib:.1f} GiB, "
        f"and there is room for {room.available_gib:.1f} GiB"
    )
    print(f"so it is sharded over {gpus} GPUs (FSDP)")
    weights_gib = room.memory.base_model() / GIB
    check_sharding(config, parameters["base_model"], parameters["optim"], weights_gib)
    # fused=None: decided again, as sharded adapters are not fused
    room.memory = replace(room.memory, shards=gpus, replicas=1, fused=None)
    room.sharded = True


def report_room(room: Room, rows: int, ignore_memory: bool) -> None:
    """Estimate what batches of `rows` rows take, as `room.expected`; print the sum.

    Raises StageError if the weights alone do not fit, unless `ignore_memory`.
    """
    recomputed = room.recomputed_layers(rows)
    layers = room.memory.shape.layers
    tokens = rows * room.memory.max_length
    room.expected = room.memory.parts(tokens, recomputed, room.is_cuda_graph(rows))
    if room.may_recompute and not recomputed:
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
        advice = "" if room.may_recompute else ", or set gradient_checkpointing"
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
            f"{len(examples):,} examples are packed into {len(packed):,} rows.\n"
            "They do not see each other: a change of one changes the logits of the next by "
            f"{leak:.1%}."
        )
        return packed
    reason = "as `packing` is off"
    if packing:
        reason = f"as packed examples would see each other in this model ({leak:.1%})"
    print(f"Not packed, {reason}: a row is one example, and a batch has rows of similar length.")
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
