"""What is left of a training: metrics, loss curves, the adapter."""

from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer

from tabletune.chat.tokenizer import save_tokenizer
from tabletune.errors import StageError
from tabletune.model.loading import skeleton
from tabletune.run.files import archive, atomic_write, write_json
from tabletune.run.hub import upload_result
from tabletune.run.machine import peak_memory_gib
from tabletune.run.stage import Stage


def base_model_loss(trainer: Trainer) -> float:
    """The validation loss of the untouched base, in nats a token: with the adapter switched off.

    Call it after the training: a Trainer that has evaluated before does not average the gradients
    of several GPUs. No callback hears of it: in a progress table or in TensorBoard it would
    stand as the last step of the training. Raises StageError if it is no number.
    """
    logged = len(trainer.state.log_history)
    callbacks = trainer.callback_handler.callbacks
    trainer.callback_handler.callbacks = []
    try:
        with trainer.model.disable_adapter():
            loss = trainer.evaluate()["eval_loss"]
    except StageError as error:
        raise StageError(
            "The validation loss of the base model itself is no number: in this precision it "
            "cannot compute. Set precision to bf16 or fp32."
        ) from error
    finally:
        trainer.callback_handler.callbacks = callbacks
    del trainer.state.log_history[logged:]  # not of the trained model
    return loss


def training_metrics(
    trainer: Trainer, tokens_an_epoch: int, examples: int, before: float
) -> dict[str, Any]:
    """The content of `training/metrics.json`.

    Steps, tokens without padding, seconds, losses in nats a token. `trainable_percent` is beside
    the weights of the base model alone.
    """
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry] or [history[-1]["train_loss"]]
    # of the last entry of the training itself: an evaluation that came after it does not count
    of_training = [e for e in history if "seconds" in e and "eval_loss" not in e]
    seconds = of_training[-1]["seconds"]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    # those of the base alone: `trainer.model` has the adapter in it, and may hold packed weights
    base_parameters = skeleton(trainer.model.config).num_parameters()
    tokens = round(tokens_an_epoch * trainer.state.epoch)
    peak = peak_memory_gib()
    after = trainer.state.best_metric
    if after is None or not trainer.args.load_best_model_at_end:
        # training_options have left out the choice of a checkpoint: the last one is the adapter
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
        "trainable_percent": round(100 * trainable / base_parameters, 4),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "eval_loss_before": before,
        "eval_loss_after": after,
    }


def save_training(
    stage: Stage,
    trainer: Trainer,
    metrics: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    stops: list[int],
    inputs: dict[str, Any],
) -> None:
    """Write `training/`, `adapter/`, and the entry in the manifest.

    The adapter's folder also has its tokenizer, its stops and its provenance. Several processes
    call it together, since shards are gathered; the first one writes.
    """
    adapter = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            # a shard is put together from all processes, so all of them must ask for it
            is_shard = hasattr(parameter, "full_tensor")
            adapter[name] = parameter.full_tensor() if is_shard else parameter
    if trainer.is_world_process_zero():
        run, parameters = stage.folder, stage.parameters
        provenance = {
            name: parameters[name] for name in ("base_model", "base_model_revision", "quantization")
        }
        provenance |= {"dataset_fingerprint": inputs["dataset"], "dtype": inputs["dtype"]}
        write_json(run / "training" / "metrics.json", metrics)
        write_json(run / "training" / "log_history.json", trainer.state.log_history)
        archive(run, "adapter")
        with atomic_write(run / "adapter") as folder:
            trainer.model.save_pretrained(folder, state_dict=adapter)
            save_tokenizer(folder, tokenizer, stops)
            write_json(folder / "provenance.json", provenance)
        upload_result(parameters["run_dir"], run / "adapter")
        stage.record(inputs["dataset"], inputs)
    trainer.accelerator.wait_for_everyone()
