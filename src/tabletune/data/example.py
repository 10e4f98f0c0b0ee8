"""The settings of the worked example, and the disclaimer above every answer."""

from importlib import resources

from tabletune.run.parameters import from_yaml

NEUTRAL_DISCLAIMER = "Educational example: what the model says may be wrong."


def example_settings(report):
    """What the worked example sets for the later notebooks, by a `report.json`; {} for the reader's
    own table.
    """
    return read_example(report["example"]) if report.get("example") else {}


def read_example(name):
    """The settings of a worked example, {parameter: value}."""
    return from_yaml(
        resources.files("tabletune")
        .joinpath(f"resources/examples/{name}.yaml")
        .read_text(encoding="utf-8")
    )
