"""A notebook at work in its run folder: its parameters, whether it is done, and its entry in the manifest."""

import json
import os
import platform
import shutil
import subprocess
import time
import warnings
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tabletune.errors import StageError
from tabletune.run.files import read_json, write_json
from tabletune.run.hub import open_run
from tabletune.run.machine import installed, peak_memory_gib
from tabletune.run.parameters import PARAMETERS, check_names, fit, injected_names

warnings.filterwarnings(
    "ignore", message="IProgress not found"
)  # tqdm looks for widgets, and does without
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
NOT_IN_RESULTS = {
    "run_dir",
    "push_dataset_to",
    "your_question",
    "ignore_memory",
}  # they change no result


@dataclass
class Stage:
    """A notebook at work: its `name`, the run's `folder`, its `parameters` by name, and when it `started`."""

    name: str
    folder: Path
    parameters: dict
    started: float = field(default_factory=time.perf_counter)

    @property
    def settings(self):
        """The parameters that a result depends on."""
        return {
            name: value for name, value in self.parameters.items() if name not in NOT_IN_RESULTS
        }

    def is_done(self, inputs, outputs):
        """Whether this stage has made `outputs`, names in the folder, from these `inputs` with these settings.

        `inputs` is a dict of what identifies them (fingerprints, digests). Says so in a line if it is done.
        """
        entry = self.entries().get(self.name, {})
        same = entry.get("inputs") == inputs and settled(entry.get("parameters", {})) == settled(
            self.parameters
        )
        done = same and all((self.folder / name).exists() for name in outputs)
        if done:
            print(
                f"All is done already: {', '.join(outputs)}, made on {entry['finished'][:16].replace('T', ' ')}."
            )
        return done

    def entries(self):
        """What `manifest.json` says, {stage: entry}; empty if there is none. Raises StageError if it is damaged."""
        path = self.folder / "manifest.json"
        return read_json(path, self.name) if path.exists() else {}

    def record(self, dataset_fingerprint, inputs=None):
        """Write this stage's entry in `manifest.json`: what ran, from what, on what, for how long."""
        import torch

        ask = {
            "args": ["git", "rev-parse", "HEAD"],
            "cwd": Path(__file__).parent,
            "capture_output": True,
            "text": True,
        }
        commit = subprocess.run(**ask).stdout.strip() if shutil.which("git") else ""
        entry = {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.started, 1),
            "peak_memory_gib": peak_memory_gib(),
            "dataset_fingerprint": dataset_fingerprint,
            "inputs": inputs,
            "parameters": self.parameters,
            "packages": {name: installed(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "git_commit": commit or None,
        }
        write_json(self.folder / "manifest.json", self.entries() | {self.name: entry})


def settled(parameters):
    """The parameters that a result depends on, as JSON has them, a file or folder of this machine by its full path."""
    kept = json.loads(
        json.dumps(
            {name: value for name, value in parameters.items() if name not in NOT_IN_RESULTS}
        )
    )
    here = {
        name: Path(kept[name])
        for name in ("base_model", "dataset")
        if isinstance(kept.get(name), str)
    }
    return kept | {name: str(path.resolve()) for name, path in here.items() if path.exists()}


def begin(name, variables):
    """Begin the notebook `name`, whose `variables` are its globals(): opens the run. Returns a Stage.

    The parameters are those of the notebook's parameter cell, by name (`parameters.json`, which `make sync` writes), so
    that whatever else the kernel holds is none; their values take the types of the defaults. The default of
    `base_model_revision` is a commit of the default `base_model`: with another one it is "main". Raises StageError if a
    value cannot be stored or is of another type, or if papermill was given a name that is none.
    """
    try:
        injected = injected_names(variables.get("In", []))
        check_names(
            injected,
            [name] if name[0] != "0" else [known for known in PARAMETERS if known[0] == "0"],
        )
        known = {key: default for key, default in PARAMETERS[name].items() if key in variables}
        parameters = {key: fit(key, variables[key], default) for key, default in known.items()}
    except ValueError as error:
        raise StageError(str(error)) from None
    for key, value in parameters.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise StageError(
                f"{key}={value!r}: use a text, a number, a truth value, a list or a dictionary."
            ) from None
    model, usual = parameters.get("base_model"), PARAMETERS[name].get("base_model_revision")
    same = model == PARAMETERS[name].get("base_model") or parameters["base_model_revision"] != usual
    if not same and not Path(model).is_dir():
        print(
            f"base_model_revision: main of {model}. Set it to a commit to get the same model tomorrow."
        )
        parameters["base_model_revision"] = "main"
    variables.update(parameters)
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "true"
    )  # said, as it warns at each fork otherwise
    return Stage(name, open_run(parameters["run_dir"]), parameters)
