"""The parameters of the notebooks.

Their names and defaults, and values of the right type from every source.
"""

import ast
import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tabletune.errors import StageError, suggestion

# {notebook: {parameter: its default}}; `make sync` writes the file from the notebooks' parameter
# cells
PARAMETERS: dict[str, dict[str, Any]] = json.loads(
    (resources.files("tabletune") / "resources/parameters.json").read_text(encoding="utf-8")
)
# notebooks 1 to 7, which are the series; a profile may hold any of their parameters
NUMBERED = [name for name in PARAMETERS if name[0] == "0"]
RUN_STAGES = NUMBERED[:4]  # these make a run, with `make run-all`; all others need one
# of all notebooks together: a name means the same wherever it stands
DEFAULTS: dict[str, Any] = {}
for parameters in PARAMETERS.values():
    DEFAULTS |= parameters
# What a profile may say besides the notebooks' parameters: it is for the command line.
LAUNCH_DEFAULTS = {"gpus": 1, "extends": ""}


# --- YAML


class Loader(yaml.SafeLoader):
    """YAML 1.2, as people read it: 1e-2 is a number, and no, 007, 1:30 and 2026-01-01 are texts."""


# PyYAML reads YAML 1.1, in which `no` is false and 1:30 is 90. These are the rules of 1.2.
Loader.yaml_implicit_resolvers = {}
for kind, form in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{form})\Z"), None)


class TextLoader(Loader):
    """The same, but every value is the text that is written there."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  this is how PyYAML is configured


def from_yaml(text: str, texts: bool = False) -> Any:
    """The value of a YAML text; with `texts`, every scalar stays the text that is written there.

    Raises StageError, one line, if the text is not YAML.
    """
    try:
        return yaml.load(text, TextLoader if texts else Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise StageError(" ".join(str(error).split())) from None


# --- numbers that make sense


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; with `above`, `low` itself is too small."""

    low: float = 0
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        """Whether a number is in the range. Infinity and NaN never are."""
        if not math.isfinite(value):
            return False
        if self.above and value <= self.low:
            return False
        return self.low <= value <= self.high

    def __str__(self) -> str:
        """The range in words, to follow "a number"."""
        if self.above and self.high == math.inf:
            return f"above {self.low}"
        if self.above:
            return f"above {self.low}, up to {self.high}"
        if self.high == math.inf:
            return f"of {self.low} or more"
        return f"from {self.low} to {self.high}"


AT_LEAST_0 = Range()
AT_LEAST_1 = Range(low=1)
AT_LEAST_2 = Range(low=2)
ABOVE_0 = Range(above=True)
SHARE = Range(high=1)

RANGES = {  # all other numbers must be 0 or more
    "seed": Range(high=2**32 - 1),
    "split_seed": Range(high=2**32 - 1),
    "max_dropped": SHARE,
    "validation_fraction": Range(high=0.5),
    "test_fraction": Range(high=0.5),
    "context_hit_rate": SHARE,
    "reworded_share": SHARE,
    "unknown_threshold": SHARE,
    "certain_threshold": Range(high=2),
    "copies": ABOVE_0,
    "train_rows": ABOVE_0,
    "few_rows": AT_LEAST_1,
    "baseline_samples": AT_LEAST_1,
    "least_right": SHARE,
    "max_length": Range(low=1, high=10**9),
    "lora_r": Range(low=1, high=10**5),
    "lora_alpha": ABOVE_0,
    "lora_dropout": Range(high=0.99),
    "epochs": Range(high=10_000, above=True),
    "learning_rate": Range(high=1, above=True),
    "batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "min_steps": AT_LEAST_1,
    "evaluations": AT_LEAST_1,
    "max_shard_gb": ABOVE_0,
    "eval_batch_size": AT_LEAST_1,
    "window": AT_LEAST_2,
    "stride": AT_LEAST_1,
    "max_new_tokens": AT_LEAST_1,
    "safety_tokens": AT_LEAST_1,
    "bootstrap_samples": AT_LEAST_2,
    "temperature": Range(high=100, above=True),
    "top_p": Range(high=1, above=True),
    "gpus": AT_LEAST_1,
}
FRACTIONS = {"epochs", "copies"}  # these may be fractions although their defaults are whole numbers
TRUE_FOR_ALL = {"safety_rows"}  # a number of rows, or true for all of them
# "auto", or a number: with a whole example only a whole one
AUTO_OR_NUMBER = {"batch_size": 1, "unknown_threshold": 0.5, "certain_threshold": 0.5}
LISTS_OF_WORDS = {"runs", "gguf_types"}  # a text for one of these is a list of words


def check_number(name: str, value: Any, example: float) -> float:
    """`value` if it is a number that makes sense for the parameter; whole where `example` is whole.

    Raises StageError otherwise: also for true and false, which are numbers to Python, and for
    infinity.
    """
    allowed = RANGES.get(name, AT_LEAST_0)
    must_be_whole = isinstance(example, int) and name not in FRACTIONS
    # to Python, True is an int
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or value not in allowed or (must_be_whole and value % 1):
        kind = "whole number" if must_be_whole else "number"
        raise StageError(f"{name}={value!r}: use a {kind} {allowed}.")
    # 3.0 for a whole number is 3, so that a profile and a notebook give the same manifest
    if isinstance(example, int) and float(value).is_integer():
        return int(value)
    return value


# --- values of the right type


def coerce(name: str, value: Any, default: Any, text: str | None = None) -> Any:
    """The `value` of a parameter in the type of its `default`.

    So 2026 can be a name, "1e-2" a number and "[a, b]" a list. A default of "auto" leaves the type
    open. An empty value is an empty text, list or dictionary, and a single value for a list is a
    list of one. `text` is what was written where the value comes from. Raises StageError for a
    value of another kind, and for a number that makes no sense.
    """
    if value in (None, ""):
        value = empty_value(value, default)
    if isinstance(default, str) and default != "auto":
        return as_text(value, text)
    # a command line and an environment have texts only
    if isinstance(value, str) and default is not None:
        value = parse_text(value, default)
    if default == "auto":
        return check_auto(name, value, text)
    return as_type_of(name, value, default)


def as_type_of(name: str, value: Any, default: Any) -> Any:
    """A `value` that is not to be a text, in the type of its `default`.

    Raises StageError for a value of another kind.
    """
    if isinstance(default, bool):
        return check_truth_value(name, value)
    if value is True and name in TRUE_FOR_ALL:
        return True
    if isinstance(default, (int, float)):
        return check_number(name, value, default)
    if isinstance(default, dict):
        return check_dictionary(name, value)
    if isinstance(default, list):
        return as_list_parameter(name, value)
    return value


def empty_value(value: Any, default: Any) -> Any:
    """What an empty `value` means: "auto", an empty text, list or dictionary; else it stays."""
    if default == "auto":
        return "auto"
    if isinstance(default, (str, list, dict)):
        return type(default)()
    return value


def as_text(value: Any, text: str | None) -> Any:
    """A number or a truth value as it was written; other values stay."""
    if isinstance(value, (bool, int, float)):
        return str(value) if text is None else text
    return value


def check_truth_value(name: str, value: Any) -> bool:
    """`value` if it is true or false. Raises StageError otherwise."""
    if not isinstance(value, bool):
        raise StageError(f"{name}={value!r}: use true or false.")
    return value


def check_dictionary(name: str, value: Any) -> dict[str, Any]:
    """`value` if it is a dictionary. Raises StageError otherwise."""
    if not isinstance(value, dict):
        raise StageError(f"{name}={value!r}: use names and their values, {{name: value}}.")
    return value


def parse_text(text: str, default: Any) -> Any:
    """What a text means as YAML, where that is a value of a kind that the parameter takes.

    Else the text.
    """
    with suppress(StageError):
        value = from_yaml(text)
        if isinstance(value, (bool, int, float, list, type(default))):
            return value
    return text


def check_auto(name: str, value: Any, text: str | None) -> Any:
    """The value of a parameter whose default is "auto": a number, a text or a list.

    Raises StageError.
    """
    if name in AUTO_OR_NUMBER and value != "auto":
        example = AUTO_OR_NUMBER[name]
        try:
            return check_number(name, value, example)
        except StageError as error:
            raise StageError(f"{str(error).removesuffix('.')}, or auto.") from None
    if isinstance(value, bool) or value is None:
        raise StageError(
            f"{name}={value!r}: use auto, or one of the values that docs/parameters.md names."
        )
    return as_text(value, text)  # a code page such as 437


def as_list_parameter(name: str, value: Any) -> Any:
    """The value of a parameter that is a list.

    A single value is a list of one, several names in a text are several. A dictionary stays as it
    is: {column: values}.
    """
    if isinstance(value, (list, dict)):
        return value
    if name in LISTS_OF_WORDS and isinstance(value, str) and not Path(value).exists():
        return value.replace(",", " ").split()
    return [value]


# --- files of parameters


def read_text(path: str | Path) -> str:
    """The text of a file that a person names. Raises StageError, one line, if it cannot be read."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8")
        profiles = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        if profiles:
            reason += f"; there are {profiles}"
        raise StageError(f"{path} cannot be read: {reason}") from None


def read_parameters(text: str, source: str, grid: bool = False) -> dict[str, Any]:
    """The parameters of a YAML text, {name: value}, each in the type of its default (see `coerce`).

    In a grid, a list holds several values of a parameter. Raises StageError, one line that begins
    with `source`, if the text does not hold parameters.
    """
    defaults = DEFAULTS | LAUNCH_DEFAULTS
    try:
        values = from_yaml(text) or {}
        texts = from_yaml(text, texts=True)
        if not isinstance(values, dict):
            raise StageError("parameters are expected, each as name: value.")
        for name in values:
            if not isinstance(name, str):  # YAML reads 1: and true: as no text
                raise StageError(f"No notebook has a parameter {name!r}.")
        for name, value in values.items():
            default = defaults.get(name)
            if grid and isinstance(value, list):
                pairs = zip(value, texts[name], strict=True)
                values[name] = [coerce(name, one, default, written) for one, written in pairs]
            else:
                values[name] = coerce(name, value, default, texts[name])
    except StageError as error:
        raise StageError(f"{source}: {error}") from None
    return values


def read_profile(path: str | Path) -> dict[str, Any]:
    """The parameters of a YAML file, on top of those of the profile that it `extends`.

    That one is a file beside it, named with or without .yaml. Raises StageError, also if profiles
    extend each other in a circle.
    """
    path = Path(path)
    # from the file itself up to the one that extends no other
    chain: list[dict[str, Any]] = []
    visited: set[Path] = set()
    while True:
        if path.resolve() in visited:
            raise StageError(f"{path}: profiles extend each other in a circle.")
        visited.add(path.resolve())
        values = read_parameters(read_text(path), str(path))
        parent = values.pop("extends", "")
        chain.append(values)
        if not parent:
            break
        path = path.parent / f"{parent.removesuffix('.yaml')}.yaml"
    merged: dict[str, Any] = {}
    # what extends has the last word
    for values in reversed(chain):
        merged |= values
    return merged


def as_yaml(values: dict[str, Any], title: str) -> str:
    """A parameter file.

    Each value is written as JSON, which is YAML, so that it is read back as what it is.
    """
    lines = [f"# {title}"]
    lines += [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return "\n".join([*lines, ""])


# --- names


def check_names(names: Iterable[Any], notebooks: Iterable[str]) -> None:
    """Raise StageError if a name is a parameter of none of the notebooks.

    One line, with a suggestion.
    """
    notebooks = list(notebooks)
    valid: set[str] = set()
    for notebook in notebooks:
        valid.update(PARAMETERS[notebook])
    for name in sorted(set(names) - valid, key=str):
        who = f"{notebooks[0]} has no parameter"
        if len(notebooks) > 1:
            who = "No notebook has a parameter"
        raise StageError(f"{who} {name!r}.{suggestion(name, valid)}")


def injected_names(cells: list[str]) -> set[str]:
    """The names that papermill set in the cell that it puts into a notebook.

    `cells` are the texts of all that ran. Papermill's cell begins with "# Parameters" and holds
    nothing but `name = value` lines. A reader's own cell may begin in the same way: one with
    anything else in it is not papermill's.
    """
    for cell in reversed(cells):
        if cell.startswith("# Parameters\n"):
            return assigned_names(cell)
    return set()


def assigned_names(source: str) -> set[str]:
    """The names of a cell that holds `name = value` lines only; else an empty set."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a line of IPython's own, such as %pip
        return set()
    names = set()
    for statement in statements:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            return set()
        names.add(statement.targets[0].id)
    return names
