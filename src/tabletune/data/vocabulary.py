"""The words by which files, columns and turns are recognized: `resources/texts/shapes.yaml`."""

from importlib import resources
from typing import Any

from tabletune.run.parameters import from_yaml


def read_vocabulary() -> dict[str, Any]:
    """The content of shapes.yaml, {topic: {what it means: names}}."""
    file = resources.files("tabletune").joinpath("resources/texts/shapes.yaml")
    return from_yaml(file.read_text(encoding="utf-8"))


WORDS = read_vocabulary()
ROLES: dict[str, str] = {}  # {name in lower case: "system", "user", "assistant" or "tool"}
for role, names in WORDS["roles"].items():
    ROLES |= dict.fromkeys(names, role)
