"""Planning a training: whether the rows fit, how many a step takes, what memory that wants, before anything long."""

import math
import os
from dataclasses import dataclass

import pandas as pd
import torch
from accelerate import DistributedType
from accelerate.utils import gather_object

from tabletune.chat.templates import describe_template
from tabletune.errors import StageError
from tabletune.model.checks import check_forward, packing_leak
from tabletune.model.cuda_graphs import is_small_batch, layers_support_cuda_graph
from tabletune.model.devices import available_memory_gib
from tabletune.model.loading import skeleton
from tabletune.training.base_summary import summarize_base_model
from tabletune.training.fsdp import check_sharding
from tabletune.training.memory import expected_gib
from tabletune.training.validation import check_choices, targets_to_adapt, when_to_evaluate

LEAST_TOKENS = 2048  # to take at once: every batch unpacks all weights, which takes as long as some hundred tokens
LEAK = 1e-5  # of the range of the logits: what is masked contributes exactly 0, so anything more is a leak


def look_and_check(chosen, config, dtype, tokenizer, stops):
    """The names of the layers that get an adapter, and a table of what this base is and how it will be treated.

    Raises StageError if the parameters of notebook 2, `chosen`, cannot work here or with this base.
    """
    check_choices(chosen, config, dtype)
    model = skeleton(config)
    look = summarize_base_model(
        model, *(chosen[n] for n in ("lora_target_modules", "attn_implementation", "quantization"))
    )
    look = pd.Series(look | describe_template(tokenizer, stops), name="this base").to_frame()
    return targets_to_adapt(chosen, model), look


def rows_and_steps(
    rows,
    epochs,
    batch_size,
    min_steps,
    accumulation=1,
    processes=1,
    fits=16,
    kept=math.inf,
    least=1,
):
    """What an optimizer step is: (rows that each GPU takes at once, how often before it, how many steps there are).

    `batch_size` is taken as it is. "auto" is as many as fit, at most 16, but so few that there are `min_steps` steps: a
    small table would end before the model has learned (5 steps an epoch taught nothing, 300 did). If more than `kept`,
    for which nothing is recomputed, they are taken in equal parts of as many as can be kept, at least `least`. Raises
    StageError if batch_size is neither a number nor "auto".
    """
    if batch_size != "auto" and not (isinstance(batch_size, int) and batch_size > 0):
        raise StageError(f'batch_size={batch_size!r}: use a whole number of rows, or "auto".')
    if batch_size == "auto":
        wanted = max(1, min(16, fits, int(rows * epochs / (min_steps * accumulation * processes))))
        parts = [part for part in range(least, min(wanted, kept) + 1) if wanted % part == 0]
        batch_size = max(parts, default=wanted)
        accumulation *= wanted // batch_size
    batches = math.ceil(rows / (batch_size * processes))
    return batch_size, accumulation, math.ceil(math.ceil(batches / accumulation) * epochs)


def steps_as_chosen(chosen, rows, processes, fits, kept):
    """`rows_and_steps` with the parameters of notebook 2, `chosen`."""
    names = ("epochs", "batch_size", "min_steps", "gradient_accumulation_steps")
    least = math.ceil(LEAST_TOKENS / chosen["max_length"])
    return rows_and_steps(
        rows, *(chosen[n] for n in names), processes.num_processes, max(1, fits), kept, least
    )


def plan_steps(chosen, rows, examples, room, processes):
    """`steps_as_chosen` where there is such room; prints in one line what a step on these rows of examples will be."""
    batch_size, accumulation, steps = steps_as_chosen(
        chosen, len(rows), processes, room.fits, room.kept
    )
    parts = [f"{batch_size} rows"] + [f"× {accumulation} accumulated"] * (accumulation > 1)
    parts += [f"× {processes.num_processes} GPUs"] * (processes.num_processes > 1)
    of_all = batch_size * accumulation * processes.num_processes * len(examples) / len(rows)
    smaller = f", fewer than min_steps={chosen['min_steps']}: batch_size=auto makes smaller ones"
    few = smaller if steps < chosen["min_steps"] and chosen["batch_size"] != "auto" else ""
    print(f"a step is {' '.join(parts)}, about {of_all:.0f} examples; {steps:,} steps{few}")
    return batch_size, accumulation, steps


@dataclass
class Room:
    """What a training will take: GiB by part, how many rows of a batch fit, of how many all activations can be kept,
    and whether the model must be sharded."""

    expected: pd.Series
    fits: int
    kept: float
    sharded: bool


def room_for_training(chosen, config, dtype, targets, rows, processes):
    """The Room of a training on so many full rows with the parameters of notebook 2, `chosen`; prints the sum.

    With `gradient_checkpointing`, nothing is recomputed where a GPU has room for all of it. The validation takes less
    than the training: its batches have room, and it keeps no activations. Raises StageError if the weights alone do not
    fit, unless `ignore_memory`; that the rest may not fit is only said.
    """
    gpu, model = torch.cuda.is_available(), skeleton(config)
    checkpointing = chosen["gradient_checkpointing"] and model.supports_gradient_checkpointing
    if checkpointing != chosen["gradient_checkpointing"]:
        print(f"{type(model).__name__} knows no gradient_checkpointing: all activations are kept")
    names = ("lora_r", "lora_dropout", "optim", "use_liger_kernel", "quantization")
    options = {name: chosen[name] for name in names}

    def memory(batch, shards=1, recomputed=checkpointing):
        tokens, how = (
            batch * chosen["max_length"],
            {"shards": shards, "gradient_checkpointing": recomputed},
        )
        return expected_gib(model, dtype, tokens, gpu, targets, **options, **how)

    def most_that_fit(room, **how):
        one, two = (
            memory(batch, **how).sum() for batch in (1, 2)
        )  # what each row adds is the same
        return max(0, int((room - (2 * one - two)) / (two - one)))

    room = min(gather_object([available_memory_gib()]))
    several = processes.distributed_type == DistributedType.MULTI_GPU
    fits, kept = most_that_fit(room), 0 if checkpointing else math.inf
    if checkpointing and gpu:
        kept = most_that_fit(0.8 * room, recomputed=False)  # the sum may be 15% too low
    batch_size = steps_as_chosen(chosen, rows, processes, fits, kept)[0]
    expected = whole = memory(batch_size, recomputed=batch_size > kept)
    sharded = several and bool(whole.sum() > room)
    if sharded:
        print(
            f"on each GPU the whole model would take {whole.sum():.1f} GiB, and there is room for {room:.1f} GiB"
        )
        print(f"so it is sharded over {processes.num_processes} GPUs (FSDP)")
        check_sharding(config, chosen["base_model"], chosen["optim"], whole["base model"])
        fits, kept = (
            most_that_fit(room, shards=processes.num_processes),
            0 if checkpointing else math.inf,
        )
        batch_size = steps_as_chosen(chosen, rows, processes, fits, kept)[0]
        expected = memory(batch_size, processes.num_processes)
    elif processes.num_processes > 1:
        print(
            f"each of {processes.num_processes} processes has the whole model, and its share of the rows (DDP)"
        )
    if checkpointing and batch_size <= kept:
        print("there is room to keep all activations: nothing is recomputed in the backward pass")
    small = is_small_batch(batch_size, chosen["max_length"], processes.num_processes)
    if gpu and small and batch_size <= kept and layers_support_cuda_graph(model):
        # what is recorded keeps its memory to itself, and the validation takes other: 0.5 to 0.6 GiB more of a 7B
        expected = pd.concat(
            [expected, pd.Series({"recorded steps": 0.1 * expected.sum()}, name=expected.name)]
        )
    print(f"expected peak memory: {expected.sum():.1f} GiB; there is room for {room:.1f} GiB")
    if expected["base model"] > room and not chosen["ignore_memory"]:
        raise StageError(
            f"The weights alone take {expected['base model']:.1f} GiB of memory, and there are {room:.1f} GiB. Take a "
            "smaller base_model, or set ignore_memory if you know better."
        )
    if expected.sum() > room:
        advice = "" if checkpointing else ", or set gradient_checkpointing"
        print(
            f"If it does not fit: lower batch_size and raise gradient_accumulation_steps by as much{advice}."
        )
    return Room(expected, max(1, min(16, fits)), kept, sharded)


def rows_to_train_on(model, examples, packed, packing):
    """The packed rows where they may be packed, else the examples by themselves; says which, and why.

    Whether they may be is measured on the model at hand: what the second of two packed examples sees of the first.
    Raises StageError if this model computes no numbers, or is no causal one.
    """
    check_forward(model, torch.tensor([examples[0]["input_ids"][:32]]))
    leak = 0 if not packing else packing_leak(model)
    if packing and leak <= LEAK:
        print(
            f"{len(examples):,} examples packed into {len(packed):,} rows; they do not see each other ({leak:.1%})"
        )
        return packed
    reason = "as asked" if not packing else "packed examples would see each other in this model"
    print(
        f"not packed, {reason} ({leak:.1%}): a row is one example, and a batch has rows of like length"
    )
    return examples


def inputs_of(report, dtype, processes, room):
    """What a training depends on beside its parameters: the data set, and what computes."""
    hardware = {"dtype": str(dtype).removeprefix("torch."), "device": processes.device.type}
    return {
        "dataset": report["fingerprint"],
        **hardware,
        "processes": processes.num_processes,
        "sharded": room.sharded,
    }


def trainer_settings(stage, done, dtype, room, batch_size, steps, packed):
    """What `SFTConfig` is told beside the choices of a reader: where, on what, when to evaluate, what is logged.

    `include_num_input_tokens_seen` is not among it: it waits for the GPU after each batch, a tenth of the time.
    """
    chosen, gpu = stage.parameters, torch.cuda.is_available()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.folder / "training" / "tensorboard")
    each = math.ceil(steps / chosen["evaluations"])
    same = ("seed", "use_liger_kernel", "max_length", "lr_scheduler_type", "max_grad_norm")
    return (
        {name: chosen[name] for name in same}
        | {
            "output_dir": str(stage.folder / "checkpoints"),
            "warmup_steps": chosen["warmup"],
            "report_to": "none" if done else chosen["report_to"],
            "use_cpu": not gpu,
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "per_device_eval_batch_size": max(batch_size, min(8, room.fits)) if gpu else batch_size,
            "train_sampling_strategy": "random" if packed else "group_by_length",
            "gradient_checkpointing": batch_size > room.kept,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "fsdp": room.sharded,
            "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"},
            "ddp_find_unused_parameters": False,
            **when_to_evaluate(chosen["training_options"], each),
            "save_total_limit": 2,
            "restore_callback_states_from_checkpoint": chosen["early_stopping_patience"] > 0,
            "logging_steps": 0.05,
            "logging_nan_inf_filter": False,  # it would hide a loss that is NaN, and wait for the GPU in every step
            "disable_tqdm": False,
            "dataloader_pin_memory": gpu,
        }
    )
