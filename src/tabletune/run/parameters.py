"""What a notebook can be told: the names of its parameters, and values of YAML's types wherever they come from."""

import ast
import json
import math
import re
from contextlib import suppress
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

import yaml

# {notebook: {parameter: its default}}; `make sync` writes it from the notebooks' parameter cells
PARAMETERS = json.loads(
    resources.files("tabletune").joinpath("resources/parameters.json").read_text(encoding="utf-8")
)
DEFAULTS = {name: default for known in PARAMETERS.values() for name, default in known.items()}
ABOVE_0 = 5e-324  # the smallest number above it
RANGES = {  # {parameter: the least and the most}; of other numbers these are 0 and none
    **{
        "max_dropped": (0, 1),
        "validation_fraction": (0, 0.5),
        "test_fraction": (0, 0.5),
        "lora_dropout": (0, 0.99),
    },
    **{"top_p": (ABOVE_0, 1), "seed": (0, 2**32 - 1), "max_length": (1, 10**9)},
    **dict.fromkeys(["window", "bootstrap_samples"], (2, math.inf)),
    **dict.fromkeys(
        ["epochs", "learning_rate", "lora_alpha", "temperature", "max_shard_gb"],
        (ABOVE_0, math.inf),
    ),
    **dict.fromkeys(
        ["lora_r", "gradient_accumulation_steps", "min_steps", "evaluations"], (1, math.inf)
    ),
    **dict.fromkeys(
        ["eval_batch_size", "stride", "max_new_tokens", "safety_tokens"], (1, math.inf)
    ),
}
FRACTIONS = {"epochs"}  # may be no whole numbers, although their defaults are


class Loader(yaml.SafeLoader):
    """YAML as people read it, which is its version 1.2: 1e-2 is a number, and no, 007, 1:30, 2026-01-01 are texts."""


Loader.yaml_implicit_resolvers = {}
for kind, form in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{form})\Z"), None)


class Texts(Loader):
    """The same, with every value as the text that stands there."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  PyYAML's own way


def from_yaml(text, texts=False):
    """The value of a YAML text; with `texts`, what stands there. Raises ValueError, one line, if it is no YAML."""
    try:
        return yaml.load(text, Texts if texts else Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None


def read(path):
    """The text of a file that a person names. Raises ValueError, one line, if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        there = ", ".join(sorted(other.stem for other in Path(path).parent.glob("*.yaml")))
        why = getattr(error, "strerror", "it is not UTF-8") + (
            f"; there are {there}" if there else ""
        )
        raise ValueError(f"{path} cannot be read: {why}") from None


def read_parameters(text, what, grid=False):
    """The parameters of a YAML text, {name: value}, in the types of their defaults (see `fit`).

    In a grid, a list holds values of the parameter. Raises ValueError, one line that begins with `what`, if the text
    holds no parameters.
    """
    try:
        values, texts = from_yaml(text) or {}, from_yaml(text, texts=True)
        if not isinstance(values, dict):
            raise ValueError("parameters are wanted, each as name: value.")
        for name, value in values.items():
            default = DEFAULTS.get(name)
            if grid and isinstance(value, list):
                values[name] = [
                    fit(name, one, default, text)
                    for one, text in zip(value, texts[name], strict=True)
                ]
            else:
                values[name] = fit(name, value, default, texts[name])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return values


def as_yaml(values, title):
    """A parameter file. Each value is written as JSON, which is YAML, so that none is read as something else."""
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join([f"# {title}", *lines, ""])


def number(name, value, default):
    """A number for a parameter: whole where its default is, and in its range. Raises ValueError for what is none."""
    low, high = RANGES.get(name, (0, math.inf))
    whole = isinstance(default, int) and name not in FRACTIONS
    if not isinstance(value, (int, float)) or not low <= value <= high or (whole and value % 1):
        least = (
            "above 0"
            if low == ABOVE_0
            else f"of {low} or more"
            if high == math.inf
            else f"from {low}"
        )
        most = "" if high == math.inf else f" to {high}"
        raise ValueError(f"{name}={value!r}: a {'whole ' * whole}number {least}{most} is wanted.")
    return (
        int(value)
        if isinstance(default, int) and isinstance(value, float) and value.is_integer()
        else value
    )


def fit(name, value, default, text=None):
    """The `value` of a parameter in the type of its default: 2026 can be a name, "1e-2" a number, "[a, b]" a list.

    `text` is what stood where the value comes from. A default of "auto" says nothing about the type. What is left empty
    is an empty text, list or dictionary, and one value for a list is a list of one. Raises ValueError for a value of
    another kind than the default, and for a number that makes no sense.
    """
    if value in (None, "") and isinstance(default, (str, list, dict)) and default != "auto":
        return type(default)()
    if isinstance(default, str) and default != "auto" and isinstance(value, (bool, int, float)):
        return str(value) if text is None else text
    if isinstance(value, str) and (default == "auto" or not isinstance(default, (str, type(None)))):
        with suppress(ValueError):
            typed = from_yaml(value)
            value = typed if isinstance(typed, (bool, int, float, list, type(default))) else value
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: true or false is wanted.")
    elif isinstance(default, (int, float)):
        return number(name, value, default)
    if isinstance(default, dict) and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r}: names and their values are wanted, {{name: value}}.")
    return [value] if isinstance(default, list) and not isinstance(value, (list, dict)) else value


def check_names(names, notebooks):
    """Raise ValueError, one line with a suggestion, if a name is a parameter of none of the notebooks."""
    known = {name for notebook in notebooks for name in PARAMETERS[notebook]}
    for name in sorted(set(names) - known, key=str):
        near = get_close_matches(str(name), known, n=1)
        said = (
            "No notebook has a parameter"
            if len(notebooks) > 1
            else f"{notebooks[0]} has no parameter"
        )
        raise ValueError(f"{said} {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))


def injected_names(cells):
    """The names that papermill set in the cell that it put into a notebook; `cells` are the texts of all that ran."""
    source = next((cell for cell in reversed(cells) if cell.startswith("# Parameters\n")), "")
    return {node.targets[0].id for node in ast.parse(source).body if isinstance(node, ast.Assign)}
