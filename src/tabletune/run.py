"""The run folder: where it lives, files that are whole or absent, what is done already, and who made what.

A stage reads only what earlier stages left in the folder, and writes under a temporary name until it is whole. What is
finished is never deleted: what makes room for something else moves to `earlier/`.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tabletune.parameters import PARAMETERS, check_names, fit, injected_names

warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm looks for widgets, and does without

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
NOT_IN_RESULTS = {"run_dir", "push_dataset_to", "your_question", "ignore_memory"}  # they change no result


class StageError(Exception):
    """A problem that the reader can mend. It shows as one line, without a traceback."""

    def _render_traceback_(self):
        return [f"StageError: {self}"]


def remove(path):
    """Delete a file or a folder, if it is there. For what is not finished only: see `set_aside`."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(run, *names):
    """Move what there is of `names` in the folder `run` to `earlier/`, into a folder named by the time, and say so.

    Returns that folder, or None if there was nothing to move.
    """
    there = [name for name in names if (run / name).exists()]
    if not there:
        return None
    aside = run / "earlier" / datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S.%f")
    for name in there:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).rename(aside / name)
    print(f"{', '.join(there)} of other settings or data: kept in {aside}")
    return aside


@contextmanager
def whole(path):
    """Yield a temporary path that becomes `path` when the block ends without an error, and is deleted otherwise.

    A file takes the place of an earlier one; a folder does only after `set_aside`. Raises StageError if the disk is
    full, or if there is a folder of that name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        yield partial
        if path.is_dir():
            raise StageError(f"{path} is there already, and nothing finished is deleted. Move it away and run again.")
        partial.replace(path)
    except BaseException as error:
        remove(partial)
        if "No space left" in str(error):
            raise StageError(f"The disk is full, so {path} was not written. Free some space and run again.") from None
        raise


def write_json(path, content):
    """Write a JSON file that is whole or absent."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def read_json(path, stage, otherwise=""):
    """What `stage` left in a JSON file. Raises StageError if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if not path.exists() else f"is damaged ({error})"
        raise StageError(
            f"{path} {reason}. Run {stage} first, with the same run_dir, in Colab one in Drive.{otherwise}"
        ) from None


def hub_error(what, error):
    """A StageError of one line from whatever went wrong with the Hub; a repository without access says so."""
    from httpx import TransportError
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return StageError(f"{what} is gated: accept its terms on its page, and set HF_TOKEN or run `hf auth login`.")
    if isinstance(error, RepositoryNotFoundError):
        return StageError(
            f"{what}: the Hub has no such repository, or a private one that this token may not read. "
            "Check the name; for a private one set HF_TOKEN (in Colab a secret) or run `hf auth login`."
        )
    if isinstance(error, (TransportError, LocalEntryNotFoundError)):
        return StageError(f"{what}: not on this machine, and the Hub cannot be reached. Is there a network?")
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if "custom code" in said:
        return StageError(f"{what} wants to run code of its own, which is not done here. Take another model.")
    if "Repo id must" in said:
        return StageError(f"{what}: there is no such folder here, and on the Hub names are OWNER/NAME.")
    other = " Perhaps it is an adapter, or GGUF files." if "model_type" in said or "file named config" in said else ""
    where = "" if Path(what.rpartition("=")[2]).exists() else " not to be had from the Hub:"
    return StageError(f"{what}:{where} {said}{other}")


def open_run(run_dir):
    """The folder of the run. Mounts Google Drive for "drive:NAME", fetches what the Hub has for "hub:OWNER/NAME".

    Raises StageError if there is no Drive here, or if the Hub cannot be asked.
    """
    place, _, name = str(run_dir).rpartition(":")
    if place == "drive":
        try:
            from google.colab import drive
        except ImportError:
            raise StageError(f"run_dir={run_dir}: only Colab can mount Google Drive. Use a folder here.") from None
        drive.mount(str(Path.cwd() / "drive"))
        return Path.cwd() / "drive" / "MyDrive" / name
    if place != "hub":
        return Path(run_dir).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    run = Path("runs") / name.replace("/", "--")
    for kind, part in (("dataset", "dataset"), ("model", "adapter")):
        if not (run / part).exists():
            try:
                with whole(run / part) as folder:
                    snapshot_download(name, repo_type=kind, local_dir=folder)
            except RepositoryNotFoundError as error:  # not made yet; but to those who are not its owner, private is 404
                if not is_mine(name.split("/")[0]):
                    raise hub_error(f"run_dir={run_dir}", error) from None
            except (OSError, ValueError) as error:
                raise hub_error(f"run_dir={run_dir}", error) from None
    return run


def is_mine(owner):
    """Whether an owner on the Hub is the reader or an organization of theirs; no without a token that the Hub takes."""
    from huggingface_hub import HfApi

    try:
        who = HfApi().whoami()
    except (OSError, ValueError):
        return False
    return owner in [who["name"], *(org["name"] for org in who.get("orgs", []))]


def hand_over(run_dir, folder):
    """Upload a finished folder of the run to its private repository, if the run lives on the Hub.

    Raises StageError if the Hub refuses.
    """
    from huggingface_hub import create_repo, upload_folder

    place, _, name = str(run_dir).rpartition(":")
    kind = "dataset" if folder.name == "dataset" else "model"
    try:
        if place == "hub":
            create_repo(name, repo_type=kind, private=True, exist_ok=True)
            upload_folder(repo_id=name, repo_type=kind, folder_path=folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise StageError(f"{folder} is here, but could not go to the Hub as {name}: {reason}") from None


def peak_memory_gib():
    """Peak memory of this process in GiB: {"host": resident, "gpu": reserved, if there is one}."""
    import resource

    import torch

    unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return peak


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
        return {name: value for name, value in self.parameters.items() if name not in NOT_IN_RESULTS}

    def is_done(self, inputs, outputs):
        """Whether this stage has made `outputs`, names in the folder, from these `inputs` with these settings.

        `inputs` is a dict of what identifies them (fingerprints, digests). Says so in a line if it is done.
        """
        entry = self.entries().get(self.name, {})
        same = entry.get("inputs") == inputs and settled(entry.get("parameters", {})) == settled(self.parameters)
        done = same and all((self.folder / name).exists() for name in outputs)
        if done:
            print(f"All is done already: {', '.join(outputs)}, made on {entry['finished'][:16].replace('T', ' ')}.")
        return done

    def entries(self):
        """What `manifest.json` says, {stage: entry}; empty if there is none. Raises StageError if it is damaged."""
        path = self.folder / "manifest.json"
        return read_json(path, self.name) if path.exists() else {}

    def record(self, dataset_fingerprint, inputs=None):
        """Write this stage's entry in `manifest.json`: what ran, from what, on what, for how long."""
        import torch

        ask = {"args": ["git", "rev-parse", "HEAD"], "cwd": Path(__file__).parent, "capture_output": True, "text": True}
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
    kept = json.loads(json.dumps({name: value for name, value in parameters.items() if name not in NOT_IN_RESULTS}))
    here = {name: Path(kept[name]) for name in ("base_model", "dataset") if isinstance(kept.get(name), str)}
    return kept | {name: str(path.resolve()) for name, path in here.items() if path.exists()}


def installed(package):
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def begin(name, variables):
    """Begin the notebook `name`, whose `variables` are its globals(): opens the run. Returns a Stage.

    The parameters are those of the notebook's parameter cell, by name (`parameters.json`, which `make sync` writes), so
    that whatever else the kernel holds is none; their values take the types of the defaults. The default of
    `base_model_revision` is a commit of the default `base_model`: with another one it is "main". Raises StageError if a
    value cannot be stored or is of another type, or if papermill was given a name that is none.
    """
    try:
        injected = injected_names(variables.get("In", []))
        check_names(injected, [name] if name[0] != "0" else [known for known in PARAMETERS if known[0] == "0"])
        known = {key: default for key, default in PARAMETERS[name].items() if key in variables}
        parameters = {key: fit(key, variables[key], default) for key, default in known.items()}
    except ValueError as error:
        raise StageError(str(error)) from None
    for key, value in parameters.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise StageError(f"{key}={value!r}: use a text, a number, a truth value, a list or a dictionary.") from None
    model, usual = parameters.get("base_model"), PARAMETERS[name].get("base_model_revision")
    same = model == PARAMETERS[name].get("base_model") or parameters["base_model_revision"] != usual
    if not same and not Path(model).is_dir():
        print(f"base_model_revision: main of {model}. Set it to a commit to get the same model tomorrow.")
        parameters["base_model_revision"] = "main"
    variables.update(parameters)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said, as it warns at each fork otherwise
    return Stage(name, open_run(parameters["run_dir"]), parameters)
