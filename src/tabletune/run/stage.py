"""A notebook at work in its run folder.

What it was started with, what is done already, and what made it. A stage reads only what earlier
stages left in the folder, and writes under a temporary name until it is complete. What is finished
is never deleted: what makes room for something else moves to `earlier/`.
"""

import json
import os
import platform
import weakref
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabletune.errors import StageError
from tabletune.run.files import read_json, write_json
from tabletune.run.hub import open_run
from tabletune.run.lock import RunLock, manifest_lock
from tabletune.run.machine import installed, peak_memory_gib
from tabletune.run.parameters import PARAMETERS, check_names, coerce, injected_names
from tabletune.run.provenance import git_commit
from tabletune.run.quiet import quiet_libraries
from tabletune.run.stopwatch import Stopwatch

# the libraries whose version can change a figure
PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "accelerate",
    "safetensors",
    "tabletune",
]
# no result depends on these parameters, so changing one does not compute a stage again
NOT_IN_RESULTS = {"run_dir", "push_dataset_to", "your_question", "ignore_memory"}
# What a result was computed on. A finished one counts on another machine, too: whoever trained on a
# GPU and opens the run on a laptop keeps the adapter.
COMPUTED_ON = {"dtype", "device", "processes", "sharded"}


@dataclass
class Stage:
    """A notebook at work: its `name`, the run's `folder`, and its `parameters` by name."""

    name: str
    folder: Path
    parameters: dict[str, Any]
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    lock: RunLock | None = None
    outputs: list[str] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """The parameters that a result depends on."""
        return {
            name: value for name, value in self.parameters.items() if name not in NOT_IN_RESULTS
        }

    def is_done(self, inputs: dict[str, Any], outputs: list[str]) -> bool:
        """Whether this stage has made `outputs` from `inputs` with these settings.

        `outputs` are names in the folder. `inputs` holds what identifies them (fingerprints,
        digests). If it is done, prints a line and releases the lock of the run.
        """
        self.outputs = outputs
        entry = self.entries().get(self.name, {})
        done = is_made_from(entry, inputs, self.parameters)
        done = done and all((self.folder / name).exists() for name in outputs)
        if done:
            finished = entry["finished"][:16].replace("T", " ")
            print(f"All is done already: {', '.join(outputs)}, made on {finished}.")
            self.close()
        return done

    def entries(self) -> dict[str, dict[str, Any]]:
        """What `manifest.json` says, {stage: entry}; empty without one.

        Raises StageError if it is damaged.
        """
        path = self.folder / "manifest.json"
        return read_json(path, self.name) if path.exists() else {}

    def record(
        self,
        dataset_fingerprint: str,
        inputs: dict[str, Any] | None = None,
        outputs: list[str] | None = None,
    ) -> None:
        """Write this stage's entry in `manifest.json`: what ran, from what, on what, for how long.

        `outputs` are names in the folder; without them, those that `is_done` was asked about.
        """
        # slow to import, and `tabletune --help` imports this module
        import torch

        entry = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(self.stopwatch.seconds, 1),
            "peak_memory_gib": peak_memory_gib(),
            "dataset_fingerprint": dataset_fingerprint,
            "inputs": inputs,
            "outputs": outputs or self.outputs,
            "parameters": self.parameters,
            "packages": {name: installed(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "git_commit": git_commit(),
        }
        # read and written under one lock: two notebooks that end together lose no entry
        with manifest_lock(self.folder):
            write_json(self.folder / "manifest.json", self.entries() | {self.name: entry})
        self.close()

    def close(self) -> None:
        """Let other programs work in the run folder: what this stage makes is complete."""
        if self.lock is not None:
            self.lock.release()


def is_made_from(entry: dict[str, Any], inputs: dict[str, Any], parameters: dict[str, Any]) -> bool:
    """Whether an entry of a manifest is of these inputs and parameters.

    Or of other parameters that give the same result. What it was computed on does not count.
    """
    recorded = entry.get("inputs")
    # inputs are fingerprints, so equal ones mean equal content
    if recorded is None or identifying(recorded) != identifying(inputs):
        return False
    return normalized_parameters(entry.get("parameters", {})) == normalized_parameters(parameters)


def identifying(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that say what a result was made from, without what it was computed on."""
    return {name: value for name, value in inputs.items() if name not in COMPUTED_ON}


def normalized_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters that a result depends on, as JSON has them, with absolute paths."""
    relevant = {name: value for name, value in parameters.items() if name not in NOT_IN_RESULTS}
    # through JSON, as the manifest's are: a tuple becomes a list, a key a text
    return with_absolute_paths(json.loads(json.dumps(relevant)))


def with_absolute_paths(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with absolute paths of local files.

    These are a base model or a table that is a file or a folder here.
    """
    result = dict(parameters)
    for name in ("base_model", "dataset"):
        value = result.get(name)
        if isinstance(value, str) and Path(value).exists():
            result[name] = str(Path(value).resolve())
    return result


def stage_parameters(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """All parameters of the notebook `name`.

    Those of its defaults that are in `values`, in the defaults' types. The default of
    `base_model_revision` is a commit of the default `base_model`: with another model it becomes
    "main". Raises StageError if a value cannot be stored in JSON or is of another type.
    """
    defaults = PARAMETERS[name]
    parameters = {
        key: coerce(key, values[key], default) for key, default in defaults.items() if key in values
    }
    for key, value in parameters.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise StageError(
                f"{key}={value!r}: use a text, a number, a truth value, a list or a dictionary."
            ) from None
    model = parameters.get("base_model")
    other_model = model != defaults.get("base_model") and not Path(str(model)).is_dir()
    default_revision = defaults.get("base_model_revision")
    if other_model and parameters.get("base_model_revision") == default_revision:
        parameters["base_model_revision"] = "main"
    return parameters


def start_stage(name: str, variables: dict[str, Any]) -> Stage:
    """Start the notebook `name`, whose `variables` are its globals().

    Opens and locks the run folder. The parameters are those of the notebook's parameter cell, by
    name (`parameters.json`, which `make sync` writes); other variables of the kernel do not count.
    The values that a stage works with are written back to `variables`. Raises StageError if a value
    is of another type, if papermill was given a name that is none, or if another program is at work
    in the folder.
    """
    quiet_libraries()
    is_numbered = name[0] == "0"
    # a profile is read by the whole series: a name that any of its notebooks takes is no slip
    notebooks = [other for other in PARAMETERS if other[0] == "0"] if is_numbered else [name]
    check_names(injected_names(variables.get("In", [])), notebooks)
    parameters = stage_parameters(name, variables)
    if parameters.get("base_model_revision") != variables.get("base_model_revision"):
        model = parameters["base_model"]
        print(
            f"base_model_revision: main of {model}. Set it to a commit to get the same model "
            "tomorrow."
        )
    variables.update(parameters)
    # tokenizers warns at each fork if it is not set
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    stage = Stage(name, open_run(parameters["run_dir"]), parameters)
    weakref.finalize(stage, stage.stopwatch.stop)
    # of several processes, the one that started them holds the lock
    if is_numbered and "RANK" not in os.environ:
        stage.lock = RunLock(stage.folder, name)
        # a kernel that starts the stage again drops the old one, and its lock with it
        weakref.finalize(stage, stage.lock.release)
    return stage
