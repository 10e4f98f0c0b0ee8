"""Training: batches, how many rows a step takes, checkpoints that can be trusted, and what is left of a training."""

import gc
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

from .chat_format import save_tokenizer
from .inference import unpack_weights
from .models import load_adapter_weights
from .recording import RecordedLayers, dtype_of
from .run import StageError, hand_over, peak_memory_gib, remove, set_aside, whole, write_json
from .sharding import shard

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


# --- batches


class Collator:
    """Makes a batch of rows, {name: tensor [rows, length]}.

    A packed row has `seq_lengths`, the lengths of its examples. Its `position_ids` begin anew with each example, which
    is how transformers knows that they must not see each other; padding has the position 0 throughout, so that nothing
    sees it. Other rows have an `attention_mask`. `labels` are the ids in the loss, and -100 elsewhere. Rows are padded
    to the longest of the batch; packed ones on a GPU, whose kernels are compiled for one shape, to `max_length`.
    """

    def __init__(self, pad_token_id, max_length):
        self.pad_token_id, self.max_length = pad_token_id, max_length

    def __call__(self, examples):
        packed = "seq_lengths" in examples[0]
        longest = max(len(example["input_ids"]) for example in examples)
        length = self.max_length if packed and torch.cuda.is_available() else longest
        shape = (len(examples), length)
        batch = {"input_ids": torch.full(shape, self.pad_token_id), "labels": torch.full(shape, IGNORED)}
        seen = "position_ids" if packed else "attention_mask"
        batch[seen] = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            ids, in_loss = torch.tensor(example["input_ids"]), torch.tensor(example["completion_mask"]).bool()
            batch["input_ids"][row, : len(ids)] = ids
            batch["labels"][row, : len(ids)] = ids.where(in_loss, IGNORED)
            positions = [torch.arange(n) for n in example["seq_lengths"]] if packed else [torch.ones_like(ids)]
            batch[seen][row, : len(ids)] = torch.cat(positions)
        return batch


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
        model.load_adapter = partial(load_adapter_weights, model)  # peft's fails, see `models.attach_adapter`
        if not torch.cuda.is_available():
            unpack_weights(model)
        args._n_gpu = 1  # of several GPUs Trainer takes all, and multiplies batch and loss by their number
        super().__init__(model=model, args=args, **kwargs)
        self.tokens_seen = torch.zeros((), dtype=torch.long, device=args.device)  # since the last log
        altup = any("AltUp" in type(module).__name__ for module in model.modules())
        if altup and not model.get_input_embeddings().weight[self.data_collator.pad_token_id].any():
            # Gemma 3n takes a root, whose gradient at 0 is NaN, also of padding that counts for nothing
            self.data_collator.pad_token_id = self.processing_class.eos_token_id
        for parameter in self.model.parameters():  # TRL has cast the adapter of a 4-bit model to bf16
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if args.fsdp:
            shard(self, model, dtype_of(args))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("_prediction_loss_only", None)
        if model.training:
            tokens = inputs.get("attention_mask", inputs["input_ids"] != self.data_collator.pad_token_id)
            self.tokens_seen += tokens.sum()
        inputs["use_cache"] = False
        if self.args.use_liger_kernel:
            inputs["skip_logits"] = True  # in the evaluation, too: whole logits take more memory than training
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        tokens, rows = (inputs["labels"][:, 1:] != IGNORED).sum(), len(inputs["labels"])
        loss, logits, labels = super().prediction_step(model, inputs, True, ignore_keys)
        return loss * tokens / rows / self.tokens_a_row, logits, labels

    def log(self, logs, *args, **kwargs):
        self.state.num_input_tokens_seen += self.accelerator.gather(self.tokens_seen).sum().item()
        self.tokens_seen.zero_()
        super().log(logs | {"num_input_tokens_seen": self.state.num_input_tokens_seen}, *args, **kwargs)

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
        self.start = time.perf_counter() - next((e["seconds"] for e in state.log_history[::-1] if "seconds" in e), 0)

    def on_log(self, args, state, control, **kwargs):
        state.log_history[-1]["seconds"] = round(time.perf_counter() - self.start, 2)


def callbacks(early_stopping_patience):
    """The callbacks of a training: a stopwatch, recorded steps where a step is small, and early stopping if so many
    evaluations of patience are given."""
    stopping = [EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else []
    return [Stopwatch(), RecordedLayers(), *stopping]


# --- checkpoints


def claim_checkpoints(stage, inputs, processes):
    """Whether this training is done; if not, what the run has of other settings or data moves aside.

    `inputs` are what it depends on beside its parameters. Checkpoints of the same settings stay, to go on from.
    """
    run, file = stage.folder, stage.folder / "checkpoints" / "settings.json"
    settings = json.loads(json.dumps(stage.settings | inputs))
    with processes.main_process_first():
        if done := stage.is_done(inputs, ["adapter", "training/metrics.json"]):
            return done
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings:
            set_aside(run, "checkpoints", "adapter", "training")
        if not file.exists():
            set_aside(run, "adapter", "training")
            write_json(file, settings)
    return False


def newest_checkpoint(folder):
    """The newest whole checkpoint, a path as a text, or None. What is not whole is deleted.

    One is whole when its trainer_state.json, which is written last, can be read.
    """
    while newest := get_last_checkpoint(folder):
        try:
            state_of(newest)
            return newest
        except (OSError, ValueError):
            remove(Path(newest))
    return None


def state_of(checkpoint):
    """What a checkpoint says of the training."""
    with open(f"{checkpoint}/trainer_state.json", encoding="utf-8") as file:
        return json.load(file)


def checkpoint_to_resume(trainer):
    """The newest whole checkpoint in a trainer's folder, or None. If the training had ended there, it is only read."""
    checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
    if has_ended(checkpoint):
        trainer.args.num_train_epochs, trainer.args.max_steps = 0, -1
    print(f"going on from {Path(checkpoint).name}" if checkpoint else "starting from the beginning")
    return checkpoint


def has_ended(checkpoint):
    """Whether the training had come to its end, early or not, at this checkpoint."""
    state = state_of(checkpoint) if checkpoint else {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return control.get("should_training_stop", False)


# --- what is left of it


def loss_of_base(trainer):
    """The validation loss of the untouched base, in nats a token: that of the model with its adapter switched off."""
    logged = len(trainer.state.log_history)
    with trainer.model.disable_adapter():
        loss = trainer.evaluate()["eval_loss"]
    del trainer.state.log_history[logged:]  # not of the trained model
    return loss


def training_metrics(trainer, tokens_an_epoch, examples, before):
    """The content of `training/metrics.json`: steps, tokens without padding, seconds, losses in nats a token."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry] or [history[-1]["train_loss"]]
    seconds = next(entry["seconds"] for entry in history[::-1] if "seconds" in entry and "eval_loss" not in entry)
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    tokens, peak = round(tokens_an_epoch * trainer.state.epoch), peak_memory_gib()
    after = trainer.state.best_metric
    if after is None:  # training_options have left out the choice of a checkpoint
        after = trainer.evaluate()["eval_loss"]
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "examples": examples,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_gib": peak.get("gpu", peak["host"]),
        "trainable_parameters": trainable,
        "trainable_percent": round(100 * trainable / trainer.model.base_model.model.num_parameters(), 4),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "eval_loss_before": before,
        "eval_loss_after": after,
    }


def save_training(stage, trainer, metrics, tokenizer, stops, inputs):
    """Write `training/`, `adapter/` with its tokenizer, its stops and its provenance, and the entry in the manifest.

    Several processes call it together, since shards are gathered; the first one writes.
    """
    adapter = {
        name: parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    if trainer.is_world_process_zero():
        run, chosen = stage.folder, stage.parameters
        provenance = {name: chosen[name] for name in ("base_model", "base_model_revision", "quantization")}
        provenance |= {"dataset_fingerprint": inputs["dataset"], "dtype": inputs["dtype"]}
        write_json(run / "training" / "metrics.json", metrics)
        write_json(run / "training" / "log_history.json", trainer.state.log_history)
        set_aside(run, "adapter")
        with whole(run / "adapter") as folder:
            trainer.model.save_pretrained(folder, state_dict=adapter)
            save_tokenizer(folder, tokenizer, stops)
            write_json(folder / "provenance.json", provenance)
        hand_over(chosen["run_dir"], run / "adapter")
        stage.record(inputs["dataset"], inputs)
    trainer.accelerator.wait_for_everyone()
