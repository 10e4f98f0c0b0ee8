"""Which version of this package made a result."""

import json
import shutil
import subprocess
from pathlib import Path

import tabletune


def git_commit() -> str | None:
    """The commit of the code that runs; None if it cannot be known.

    pip notes the commit of what it installs from a repository. A clone says it itself; the
    repository around a virtual environment, in which the package is installed, is another one and
    says nothing.
    """
    return commit_noted_by_pip() or commit_of_clone(Path(tabletune.__file__))


def commit_noted_by_pip() -> str | None:
    """The commit from which pip installed this package; None if it was installed from elsewhere."""
    from importlib import metadata  # slow to import, and `tabletune --help` imports this module

    try:
        text = metadata.distribution("tabletune").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(text) if text else {}
    return origin.get("vcs_info", {}).get("commit_id")


def commit_of_clone(file: Path) -> str | None:
    """The commit of the repository that holds `file`.

    None without git, or if that repository does not track it.
    """
    if not shutil.which("git"):
        return None
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    if tracked is None:
        return None
    return _git(file.parent, "rev-parse", "HEAD")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says in a folder; None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
