"""Checkpoints that can be trusted, and resuming from them.

A crash loses the steps since the newest complete checkpoint: at most 1 / `evaluations` of a
training, and twice that if it broke while saving. Incomplete checkpoints are deleted; those of
other settings or data move to `earlier/`. Which checkpoint becomes the adapter is decided in
training/trainer_settings.py: the best by the validation loss.
"""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from tabletune.run.files import archive, remove, write_json
from tabletune.run.stage import COMPUTED_ON, Stage, normalized_parameters


def check_done_or_archive(stage: Stage, inputs: dict[str, Any], processes: PartialState) -> bool:
    """Whether this training is done, on this machine or on another.

    If not, what the run has of other settings or data is archived. `inputs` are what it depends on
    beside its parameters. Checkpoints of the same settings, on the same kind of hardware, stay to
    go on from. Without a settings.json beside them nobody knows their settings, and they go, too.
    """
    run = stage.folder
    file = run / "checkpoints" / "settings.json"
    # with absolute paths, as the training may go on from another folder
    settings = normalized_parameters(stage.settings | inputs)
    # the first process archives before the others look
    with processes.main_process_first():
        if stage.is_done(inputs, ["adapter", "training/metrics.json"]):
            print_other_hardware(stage, inputs)
            return True
        if not file.exists():
            # which settings made what is here is not known; a new run has no checkpoints yet
            names = ["adapter", "training"]
            if any(file.parent.glob("checkpoint-*")):
                names.insert(0, "checkpoints")
            archive(run, *names)
            write_json(file, settings)
        elif normalized_parameters(json.loads(file.read_text(encoding="utf-8"))) != settings:
            archive(run, "checkpoints", "adapter", "training")
            write_json(file, settings)
    return False


def print_other_hardware(stage: Stage, inputs: dict[str, Any]) -> None:
    """Say on what a finished training was computed, if that is not what there is here."""
    recorded = stage.entries()[stage.name]["inputs"]
    trained_on = []
    available = []
    for name in sorted(COMPUTED_ON & inputs.keys()):
        if recorded.get(name) != inputs[name]:
            trained_on.append(f"{name} {recorded.get(name)}")
            available.append(f"{name} {inputs[name]}")
    if trained_on:
        print(
            f"It was trained with {', '.join(trained_on)}; here it would be "
            f"{', '.join(available)}. It is kept. To train it here, move adapter/ elsewhere and "
            "run this notebook again."
        )


def newest_checkpoint(folder: Path) -> str | None:
    """The path of the newest complete checkpoint, or None. Incomplete ones are deleted.

    One is complete when its trainer_state.json, which is written last, can be read. Of several
    processes, only one may call this at a time.
    """
    while newest := get_last_checkpoint(folder):
        try:
            trainer_state(newest)
            return newest
        except (OSError, ValueError):
            remove(Path(newest))
    return None


def trainer_state(checkpoint: str) -> dict[str, Any]:
    """What a checkpoint says of the training. Raises OSError or ValueError if it cannot be read."""
    with open(f"{checkpoint}/trainer_state.json", encoding="utf-8") as file:
        return json.load(file)


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """The newest complete checkpoint in a trainer's folder, or None.

    If the training had ended there, it is only read. Of several processes, the first one deletes
    what is incomplete, and then the others look.
    """
    with trainer.args.main_process_first(local=False):
        checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
    if checkpoint and training_has_ended(checkpoint):
        # zero epochs: `train` loads the checkpoint and its best weights, and makes no step
        trainer.args.num_train_epochs, trainer.args.max_steps = 0, -1
    if checkpoint:
        print(f"going on from {Path(checkpoint).name}")
    else:
        print("starting from the beginning")
    return checkpoint


def training_has_ended(checkpoint: str) -> bool:
    """Whether the training had come to its end, early or not, at this checkpoint.

    A checkpoint has the state of the callbacks and of TrainerControl
    (`TrainerState.stateful_callbacks`).
    """
    callbacks = trainer_state(checkpoint).get("stateful_callbacks", {})
    control = callbacks.get("TrainerControl", {}).get("args", {})
    return control.get("should_training_stop", False)
