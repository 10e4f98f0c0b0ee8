"""A model that is too large for each of several GPUs: each keeps a part of every layer (FSDP)."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from tabletune.errors import StageError
from tabletune.model.compat import gather_in_compute_stream


def check_sharding(
    config: PreTrainedConfig, base_model: str, optim: str, unsharded_gib: float
) -> None:
    """Raise StageError if a model of this config cannot be sharded here.

    Else let the CPU quantize with all its cores. It takes 4-bit weights stored as floating-point
    numbers, an optimizer that knows shards, and enough RAM for all processes to quantize the model
    at once, `unsharded_gib` each. One that is stored in 4 bits is only mapped.
    """
    stored = (getattr(config, "quantization_config", None) or {}).get("bnb_4bit_quant_storage")
    if stored not in (None, "float32"):
        raise StageError(
            f"{base_model} stores its 4-bit weights as {stored}, which FSDP cannot shard. Take a "
            "copy in 16 bits, or one in 4 bits stored as float32."
        )
    if any(name in optim for name in ("paged", "bit", "bnb")):
        raise StageError(
            f"optim={optim}: the optimizers of bitsandbytes cannot be divided among GPUs. Use "
            "adamw_torch_fused."
        )
    processes = int(os.environ["LOCAL_WORLD_SIZE"])  # on this machine
    needed_gib = 0.0 if stored else unsharded_gib * processes
    free_gib = psutil.virtual_memory().available / 2**30
    if needed_gib > free_gib:
        raise StageError(
            f"Reading the model takes {needed_gib:.1f} GiB of RAM before it is sharded, and "
            f"{free_gib:.1f} GiB are free. Use a machine with more RAM, or a copy that is stored "
            "in 4 bits as float32."
        )
    # `accelerate launch` leaves each process one thread, and the CPU has billions of weights to
    # quantize
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


class ShardedTraining(TrainerCallback):
    """What a sharded model needs.

    Layers gathered with less memory, and the folder of a checkpoint made in time.

    FSDP allocates what it gathers in streams of its own, and memory that one stream has freed
    serves no other. Gathered asynchronously, layers are allocated in the stream that computes, and
    each has to ask for the next ahead of time (`FSDPModule._set_unshard_async_op`, documented but
    not public in torch 2.13).

    Trainer notes a checkpoint as the best only if its folder is there, and of a sharded model that
    is decided before the first file (`Trainer._save_checkpoint` in transformers 5.13): an earlier
    checkpoint would be loaded at the end, or by one process only, and the others would wait for it
    for ever.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Have each sharded layer ask for the next one ahead of time."""
        gather_in_compute_stream(model)
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit, following in pairwise(units):
            unit.set_modules_to_forward_prefetch([following])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the folder of the checkpoint that is going to be saved."""
        Path(args.output_dir, f"checkpoint-{state.global_step}").mkdir(parents=True, exist_ok=True)


def shard(trainer: Trainer, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make a trainer ready to shard its model.

    Gathered as it is stored, computing in `dtype` like a whole one. A cast would change its 4-bit
    numbers, so autocast computes in `dtype`, without keeping the casts of all layers. The output
    layer stays whole: Liger's loss takes its weights without calling it, and some models have them
    in common with the input layer.
    """
    plugin, device = trainer.accelerator.state.fsdp_plugin, trainer.accelerator.device
    plugin.mixed_precision_policy = None  # no casts
    plugin.ignored_modules = [model.get_output_embeddings().to(device)]
    autocast = torch.autocast(
        device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
    )
    model.forward = autocast(model.forward)
    trainer.add_callback(ShardedTraining())
