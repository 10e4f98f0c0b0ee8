"""The two base models that are made on this machine, because they need no Hub."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabletune.cli.paths import repository
from tabletune.errors import StageError

KINDS = {".cache/SmolLM2-135M-Instruct": "smollm2", ".cache/tiny-llama": "tiny"}


def make_base_models(kinds: list[str]) -> None:
    """Make the base models of these kinds, or both, where they are not there. Raises StageError."""
    for place, kind in KINDS.items():
        if not kinds or kind in kinds:
            make_base_model(str(repository() / place))


def make_base_model(base_model: Any) -> None:
    """Make a base model if it is one of ours and is not there. Raises StageError if that fails."""
    for place, kind in KINDS.items():
        folder = repository() / place
        is_ours = isinstance(base_model, str) and Path(base_model).resolve() == folder.resolve()
        if is_ours and not (folder / "config.json").exists():
            _make(folder, kind)


def _make(folder: Path, kind: str) -> None:
    """Make a base model under another name, and rename it when it is complete."""
    import shutil

    print(f"making the base model {folder.name}", flush=True)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    program = repository() / "profiles" / "base_models.py"
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    command = [sys.executable, str(program), kind, str(partial)]
    if subprocess.run(command, env=environment).returncode:
        raise StageError(f"The base model {folder} could not be made; see the message above.")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
