"""The trainer: TRL's SFTTrainer for examples that are token ids already, and its callbacks."""

import gc
import math
import sys
import time
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from tabletune.errors import StageError, first_line
from tabletune.model.adapters import load_adapter_weights
from tabletune.model.compat import use_one_gpu
from tabletune.model.cuda_graphs import CudaGraphCallback, dtype_of
from tabletune.model.dequantize import dequantize_layers
from tabletune.model.fused_lora import fuse_adapters
from tabletune.model.recompute import RecomputeFirstLayers, recompute_cheap_parts
from tabletune.training.answer_logits import loss_of_answers, worth_it
from tabletune.training.examples import IGNORED, count_labels
from tabletune.training.fsdp import shard


def free_memory() -> None:
    """Let go of what an earlier pass through a notebook left on the GPU.

    That includes the frames of a traceback.
    """
    for name in ("last_traceback", "last_value", "last_exc"):
        if hasattr(sys, name):
            delattr(sys, name)
    if not torch.cuda.is_available() or torch.cuda.memory_allocated():
        gc.collect()  # a quarter of a second, so not where nothing is left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class TokenTrainer(SFTTrainer):
    """SFTTrainer whose losses are those of a token, for a model with an adapter.

    - transformers' validation loss is a mean over batches, each counted by its rows: the same
      adapter got 6.22 in batches of 1 and 6.44 in batches of 16. Here each batch counts by its
      tokens in the loss.
    - SFTTrainer's own metrics count padding, and wait for the GPU at each step. They are left out:
      the loss is computed by its parent class, Trainer. `num_input_tokens_seen` counts no padding,
      and waits for the GPU only when it is logged.
    - The adapter is trained in fp32: TRL casts that of a 4-bit model to bf16, and a T4's fp16
      gradient scaler fails with bf16 at the first step
      (https://github.com/huggingface/trl/issues/4901).
    - On a CPU the 4-bit weights are unpacked once, if there is room: every step would do that
      again, with the same numbers.
    - Liger's fused loss is switched on after SFTTrainer is made: TRL from 1.10 on replaces it by a
      fused output layer of its own, which is slower with the metrics that belong to it.
    - It stops where a loss is no number, pads Gemma 3n with EOS (`avoid_zero_embedding`), and
      writes no model card for a checkpoint.

    Raises StageError if TRL refuses the model or the arguments.
    """

    def __init__(self, model: PeftModel, args: SFTConfig, **kwargs: Any) -> None:
        model.load_adapter = partial(load_adapter_weights, model)  # see `attach_adapter`
        if not torch.cuda.is_available():
            dequantize_layers(model)
        use_one_gpu(args)
        use_liger_kernel = args.use_liger_kernel
        args.use_liger_kernel = False
        try:
            super().__init__(model=model, args=args, **kwargs)
        except ValueError as error:
            raise StageError(f"TRL cannot train this: {first_line(error)}") from error
        args.use_liger_kernel = use_liger_kernel
        self.tokens_since_log = torch.zeros((), dtype=torch.long, device=args.device)
        self.tokens_per_row = 0.0  # of the validation, in the loss
        self.avoid_zero_embedding()
        for parameter in self.model.parameters():  # TRL has cast the adapter to bf16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        on_cpu = args.device.type == "cpu"
        self.answers_only = on_cpu and worth_it(model, self.train_dataset["labels"])
        if args.fsdp:
            shard(self, model, dtype_of(args))
        elif args.device.type == "cuda":  # on a CPU the sums would be in another order
            fuse_adapters(self.model)
            recompute_cheap_parts(self.model, dtype_of(args))

    def avoid_zero_embedding(self) -> None:
        """Pad with EOS where the pad token's embedding is 0 and the model takes its root.

        Gemma 3n does. The gradient of a root at 0 is NaN, also of padding that counts for nothing.
        """
        takes_root = any("AltUp" in type(module).__name__ for module in self.model.modules())
        embeddings = self.model.get_input_embeddings().weight
        if takes_root and not embeddings[self.data_collator.pad_token_id].any():
            self.data_collator.pad_token_id = self.processing_class.eos_token_id

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch: in training by the tokens of a whole step, else by its own."""
        if model.training:
            tokens = inputs.get("attention_mask")
            # packed rows have positions and no mask: what is no padding is a token
            if tokens is None:
                tokens = inputs["input_ids"] != self.data_collator.pad_token_id
            self.tokens_since_log += tokens.sum()
        else:
            num_items_in_batch = None
        inputs["use_cache"] = False
        if self.answers_only:
            loss, outputs = loss_of_answers(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self.args.use_liger_kernel:
            inputs["skip_logits"] = True  # also in the validation: they take more than training
        # of Trainer, past SFTTrainer's metrics
        return super(SFTTrainer, self).compute_loss(
            model, inputs, return_outputs, num_items_in_batch
        )

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of a validation batch, weighted so that Trainer's mean is that of a token."""
        # labels [rows, tokens]; the first column predicts nothing
        tokens = (inputs["labels"][:, 1:] != IGNORED).sum()
        rows = len(inputs["labels"])
        loss, logits, labels = super(SFTTrainer, self).prediction_step(
            model, inputs, True, ignore_keys
        )
        # Trainer multiplies by the rows of the batch, adds up, and divides by all rows
        return loss * tokens / rows / self.tokens_per_row, logits, labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log with the number of tokens seen so far, also over interruptions.

        Raises StageError if the training loss is no number.
        """
        if "loss" in logs:
            self.check_training_loss(logs["loss"])
        key = "num_input_tokens_seen"
        # the history comes from the checkpoint, so an interrupted training goes on counting
        logged = [entry[key] for entry in self.state.log_history if key in entry]
        new = self.accelerator.gather(self.tokens_since_log).sum().item()
        self.tokens_since_log.zero_()
        super().log({**logs, key: new + (logged[-1] if logged else 0)}, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none for checkpoints.

        TRL reads its template in the locale's encoding, and stops where that is ASCII.
        """

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The validation loss, in nats a token. Raises StageError if it is no number."""
        self.tokens_per_row = count_labels(self.eval_dataset) / len(self.eval_dataset)
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics["eval_loss"]):
            raise StageError(self.diverged("validation", metrics["eval_loss"]))
        return metrics

    def check_training_loss(self, loss: float) -> None:
        """Raise StageError if the training has diverged: if the loss that it logs is no number.

        With fp16 once is no sign of that: the gradient scaler leaves out steps whose numbers are
        too large. Twice in a row is. The decision is the same in all processes.
        """
        earlier = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        is_repeated = bool(earlier) and not math.isfinite(earlier[-1])
        if not math.isfinite(loss) and (is_repeated or not self.args.fp16):
            raise StageError(self.diverged("training", loss))

    def diverged(self, name: str, loss: float) -> str:
        """The message for a loss that is no number."""
        return (
            f"The {name} loss is {loss} at step {self.state.global_step}: the training has "
            f"diverged. Lower learning_rate, {self.args.learning_rate:g} now, or raise warmup."
        )


class TrainingStopwatch(TrainerCallback):
    """Keep the seconds spent in training in the log history, also over interruptions."""

    start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, at the seconds that an interrupted training has logged."""
        logged = [entry["seconds"] for entry in state.log_history if "seconds" in entry]
        self.start = time.perf_counter() - (logged[-1] if logged else 0)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the seconds to the entry that was just logged."""
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 2)


def training_callbacks(
    early_stopping_patience: int, recomputed_layers: int = 0
) -> list[TrainerCallback]:
    """The callbacks of a training: a stopwatch, which layers are recomputed, CUDA graphs.

    Early stopping comes with them if it has an `early_stopping_patience`, in evaluations.
    """
    callbacks = [TrainingStopwatch(), RecomputeFirstLayers(recomputed_layers), CudaGraphCallback()]
    if early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience))
    return callbacks
