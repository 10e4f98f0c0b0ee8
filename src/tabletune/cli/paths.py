"""Where the repository's own files are: notebooks, profiles, the menu of models."""

from pathlib import Path

import tabletune
from tabletune.errors import StageError

MARK = Path("notebooks") / "01_format_dataset.ipynb"


def repository() -> Path:
    """The folder of the repository.

    The clone that we stand in, or the one that this package is installed from.

    Raises StageError if neither is one.
    """
    clone = Path(tabletune.__file__).resolve().parents[2]
    for folder in [Path.cwd(), *Path.cwd().parents, clone]:
        if (folder / MARK).exists():
            return folder
    raise StageError(
        "The notebooks are not on this machine. Clone the repository, and install it with: "
        "python -m pip install -r requirements.txt"
    )


def shown(path: Path) -> Path:
    """A path for people: relative to the working directory if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def notebook(name: str) -> Path:
    """The notebook of a stage, by its name."""
    return shown(repository() / "notebooks" / f"{name}.ipynb")


def folder_title(name: str) -> str:
    """What a profile, a model or a grid is called in the name of a folder.

    That is its file's name without .yaml: a point is part of a name (llama-3.1-8b-instruct).
    """
    return Path(name).name.removesuffix(".yaml").removesuffix(".yml")


def find_choice(kind: str, name: str) -> Path:
    """The YAML file of a profile or a model (`kind` is "profiles" or "models").

    `name` is a file's name without .yaml, looked for in the working directory's folder of that kind
    and then in the repository's, or a path that ends in .yaml. What is not there is found out when
    it is read.
    """
    if name.endswith(".yaml"):
        return Path(name)
    local = Path(kind) / f"{name}.yaml"
    if local.exists():
        return local
    return shown(repository() / kind / f"{name}.yaml")
