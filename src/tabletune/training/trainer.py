"""The trainer: TRL's SFTTrainer for examples that are token ids already, and its callbacks."""

import gc
import math
import sys
import time
from functools import partial

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from trl import SFTTrainer

from tabletune.errors import StageError
from tabletune.model.adapters import load_adapter_weights
from tabletune.model.cuda_graphs import CudaGraphCallback, dtype_of
from tabletune.model.dequantize import dequantize_layers
from tabletune.model.fused_lora import fuse_adapters
from tabletune.model.recompute import RecomputeFirstLayers, recompute_cheap_parts
from tabletune.training.answer_logits import loss_of_answers, worth_it
from tabletune.training.fsdp import shard

IGNORED = -100  # what PyTorch's cross entropy leaves out


def free_memory():
    """Let go of what an earlier pass through a notebook left on the GPU, a traceback's frames included."""
    for name in ("last_traceback", "last_value", "last_exc"):
        if hasattr(sys, name):
            delattr(sys, name)
    if not torch.cuda.is_available() or torch.cuda.memory_allocated():
        gc.collect()  # a quarter of a second, so not where nothing is left
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- the trainer


class TokenTrainer(SFTTrainer):
    """SFTTrainer whose losses are those of a token.

    transformers' validation loss is a mean over batches, each counted by its rows: the same adapter got 6.22 in batches
    of 1 and 6.44 in batches of 16. Here each batch counts by its tokens in the loss. What TRL 0.29 logs beside the loss
    counts padding, and is left out. `num_input_tokens_seen` counts none, and waits for the GPU only when it is logged:
    Trainer's own way waits after each batch, which took a tenth of the time.

    The adapter is trained in fp32: TRL casts that of a 4-bit model to bf16, and a T4's fp16 gradient scaler fails with
    bf16 at the first step (https://github.com/huggingface/trl/issues/4901). On a CPU the 4-bit weights are unpacked
    once, if there is room: every step would do that again, with the same numbers.
    """

    def __init__(self, model, args, **kwargs):
        model.load_adapter = partial(
            load_adapter_weights, model
        )  # peft's fails, see `models.attach_adapter`
        if not torch.cuda.is_available():
            dequantize_layers(model)
        args._n_gpu = (
            1  # of several GPUs Trainer takes all, and multiplies batch and loss by their number
        )
        super().__init__(model=model, args=args, **kwargs)
        self.tokens_seen = torch.zeros(
            (), dtype=torch.long, device=args.device
        )  # since the last log
        altup = any("AltUp" in type(module).__name__ for module in model.modules())
        if altup and not model.get_input_embeddings().weight[self.data_collator.pad_token_id].any():
            # Gemma 3n takes a root, whose gradient at 0 is NaN, also of padding that counts for nothing
            self.data_collator.pad_token_id = self.processing_class.eos_token_id
        for (
            parameter
        ) in self.model.parameters():  # TRL has cast the adapter of a 4-bit model to bf16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        on_cpu = args.device.type == "cpu"
        self.answers_only = on_cpu and worth_it(model, self.train_dataset["completion_mask"])
        if args.fsdp:
            shard(self, model, dtype_of(args))
        elif args.device.type == "cuda":  # on a CPU the sums would be in another order
            fuse_adapters(self.model)
            recompute_cheap_parts(self.model, dtype_of(args))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("_prediction_loss_only", None)
        if model.training:
            tokens = inputs.get(
                "attention_mask", inputs["input_ids"] != self.data_collator.pad_token_id
            )
            self.tokens_seen += tokens.sum()
        inputs["use_cache"] = False
        if self.answers_only:
            loss, outputs = loss_of_answers(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        if self.args.use_liger_kernel:
            inputs["skip_logits"] = (
                True  # in the evaluation, too: whole logits take more memory than training
            )
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        tokens, rows = (inputs["labels"][:, 1:] != IGNORED).sum(), len(inputs["labels"])
        loss, logits, labels = super().prediction_step(model, inputs, True, ignore_keys)
        return loss * tokens / rows / self.tokens_a_row, logits, labels

    def log(self, logs, *args, **kwargs):
        self.state.num_input_tokens_seen += self.accelerator.gather(self.tokens_seen).sum().item()
        self.tokens_seen.zero_()
        super().log(
            logs | {"num_input_tokens_seen": self.state.num_input_tokens_seen}, *args, **kwargs
        )

    def create_model_card(self, *args, **kwargs):
        """None for checkpoints: TRL reads its template in the locale's encoding, and stops where that is ASCII."""

    def evaluate(self, *args, **kwargs):
        masks = self.eval_dataset["completion_mask"]
        self.tokens_a_row = sum(sum(mask[1:]) for mask in masks) / len(masks)
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics["eval_loss"]):
            raise StageError(
                f"The validation loss is {metrics['eval_loss']} at step {self.state.global_step}: the training has "
                f"diverged. Lower learning_rate, {self.args.learning_rate:g} now, or raise warmup."
            )
        return metrics


class Stopwatch(TrainerCallback):
    """Keep the seconds spent in training in the log history, also over interruptions."""

    start = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter() - next(
            (e["seconds"] for e in state.log_history[::-1] if "seconds" in e), 0
        )

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 2)


def training_callbacks(
    early_stopping_patience: int, recomputed_layers: int = 0
) -> list[TrainerCallback]:
    """The callbacks of a training: a stopwatch, which layers are recomputed, CUDA graphs.

    Early stopping comes with them if it has an `early_stopping_patience`, in evaluations.
    """
    callbacks = [Stopwatch(), RecomputeFirstLayers(recomputed_layers), CudaGraphCallback()]
    if early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience))
    return callbacks
