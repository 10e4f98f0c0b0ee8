"""Checkpoints that can be trusted, and resuming from them."""

import json
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from tabletune.run.files import archive, remove, write_json

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
            archive(run, "checkpoints", "adapter", "training")
        if not file.exists():
            archive(run, "adapter", "training")
            write_json(file, settings)
    return False


def newest_checkpoint(folder):
    """The newest whole checkpoint, a path as a text, or None. What is not whole is deleted.

    One is whole when its trainer_state.json, which is written last, can be read.
    """
    while newest := get_last_checkpoint(folder):
        try:
            trainer_state(newest)
            return newest
        except (OSError, ValueError):
            remove(Path(newest))
    return None


def trainer_state(checkpoint):
    """What a checkpoint says of the training."""
    with open(f"{checkpoint}/trainer_state.json", encoding="utf-8") as file:
        return json.load(file)


def checkpoint_to_resume(trainer):
    """The newest whole checkpoint in a trainer's folder, or None. If the training had ended there, it is only read."""
    checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
    if training_has_ended(checkpoint):
        trainer.args.num_train_epochs, trainer.args.max_steps = 0, -1
    print(f"going on from {Path(checkpoint).name}" if checkpoint else "starting from the beginning")
    return checkpoint


def training_has_ended(checkpoint):
    """Whether the training had come to its end, early or not, at this checkpoint."""
    state = trainer_state(checkpoint) if checkpoint else {}
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return control.get("should_training_stop", False)
