"""The settings of the worked example, and the disclaimer above every answer."""

from importlib import resources
from typing import Any

from tabletune.run.parameters import from_yaml

NEUTRAL_DISCLAIMER = "Answers may be wrong."


def example_settings(report: dict[str, Any]) -> dict[str, Any]:
    """The worked example's settings for the later notebooks, {parameter: value}.

    `report` is the content of `dataset/report.json`. For a reader's own table the result is empty.
    """
    name = report.get("example")
    return read_example(name) if name else {}


def disclaimer_of(report: dict[str, Any], text: str = "") -> str:
    """What stands above every answer: a text of the reader's, else the example's or a neutral one.

    `report` is the content of `dataset/report.json`.
    """
    return text or example_settings(report).get("disclaimer", NEUTRAL_DISCLAIMER)


def read_example(name: str) -> dict[str, Any]:
    """The settings of a worked example, {parameter: value}."""
    file = resources.files("tabletune").joinpath(f"resources/examples/{name}.yaml")
    return from_yaml(file.read_text(encoding="utf-8"))
