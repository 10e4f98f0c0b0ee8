"""What a command is to do.

The run folder, the profile, the model, and parameters from files and from the command itself.
"""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tabletune.cli.paths import find_choice, folder_title, repository
from tabletune.errors import StageError
from tabletune.run.files import write_text_if_changed
from tabletune.run.parameters import (
    DEFAULTS,
    LAUNCH_DEFAULTS,
    NUMBERED,
    as_yaml,
    check_names,
    coerce,
    read_parameters,
    read_profile,
    read_text,
)

# these work in as many processes as there are GPUs; the others write their results once
USES_GPUS = ("02_finetune_qlora", "04_evaluate", "05_baselines", "06_trust")
SETTINGS = "settings"  # the file in a run folder that holds what the run was started with
QUOTES = "ARGS=\"-p system_prompt 'You are kind.'\""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with what to do about the usual ones."""

    def error(self, message: str) -> NoReturn:
        """End the process with a line on stderr."""
        hint = ""
        if "expected 2 arguments" in message:
            hint = ". A name and a value are needed, with a space between: -p epochs 3"
        elif "unrecognized arguments" in message:
            hint = (
                ". A parameter is set with -p NAME VALUE, and a value with spaces needs quotes of "
                f"its own: {QUOTES}"
            )
        self.exit(2, f"{self.prog}: {message}{hint}\n")


class CollectParameters(argparse.Action):
    """Collects the parameters of files in `files`, all others in `overrides`, {name: value}.

    Types and ranges are checked here, names where the notebook is known (`check_names`), and
    choices such as "nf4" or "8bit" in the stage that has them.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add what one option says to what earlier ones said."""
        if option_string == "-f":
            new = in_repository(read_profile(values), Path(values))
        elif option_string == "-y":
            new = read_parameters(values, f"-y {values!r}")
        else:
            name, text = values
            # a name that is none is refused later, when the notebook is known (`check_names`)
            new = {name: coerce(name, text, (DEFAULTS | LAUNCH_DEFAULTS).get(name))}
        # a new dictionary: the default is shared by all parsers
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **new})


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that set parameters."""
    parser.set_defaults(files={}, overrides={})
    parser.add_argument(
        "-f",
        action=CollectParameters,
        dest="files",
        metavar="FILE",
        help="a YAML file of parameters",
    )
    parser.add_argument(
        "-y",
        action=CollectParameters,
        dest="overrides",
        metavar="YAML",
        help="parameters as a YAML text",
    )
    parser.add_argument(
        "-p",
        "-r",
        action=CollectParameters,
        dest="overrides",
        nargs=2,
        metavar=("NAME", "VALUE"),
        help="one parameter; the type of its default decides what VALUE means; -r is the same",
    )
    parser.add_argument(
        "--args", metavar="TEXT", help="more options in one text, as a shell would read it"
    )


def add_run_choice(parser: argparse.ArgumentParser) -> None:
    """Give a command the options that choose a run."""
    parser.add_argument(
        "run_dir", nargs="?", help="the run folder; runs/PROFILE or runs/PROFILE_MODEL without it"
    )
    parser.add_argument(
        "--profile", help="a file in profiles/; the one for this hardware without it"
    )
    parser.add_argument("--model", help="a file in models/, on top of the profile")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes, each with a GPU")


def split_args(arguments: list[str]) -> list[str]:
    """A command line in which each --args=TEXT or --args TEXT is replaced by the options in it.

    Raises StageError.
    """
    result = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--args":
            text = next(rest, None)
            if text is None:
                result.append(argument)  # argparse says what is missing
                continue
        elif argument.startswith("--args="):
            text = argument.removeprefix("--args=")
        else:
            result.append(argument)
            continue
        # make passes ARGS on as one text, which no shell has split
        try:
            result += split_args(shlex.split(text))
        except ValueError as error:
            raise StageError(
                f"ARGS={text}: {error}. A value with spaces or quotes goes into quotes: {QUOTES}"
            ) from None
    return result


# --- which profile, which folder


@dataclass
class RunChoice:
    """A run that is to be made.

    Its folder, its parameters, how many processes it is to use, and the profile's name.
    """

    run_dir: Path
    values: dict[str, Any]
    gpus: int
    profile: str


def detect_profile() -> str:
    """The profile for the hardware of this machine: "a100" from 40 GB on, "t4", or else "cpu"."""
    import subprocess  # 5 ms, and only a new run needs it

    # asked of the driver, since importing torch for it takes seconds
    query = ["nvidia-smi", "--query-gpu=compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except OSError:  # there is no such program
        return "cpu"
    for line in lines:
        capability, _, memory_mib = line.partition(",")
        try:
            # from 8 on (Ampere) a GPU computes in bf16; 40 GB cards report less than 40,960 MiB
            is_large = float(capability) >= 8 and float(memory_mib) > 35_000
        except ValueError:  # "No devices were found"
            continue
        return "a100" if is_large else "t4"
    return "cpu"


def choose_profile(options: argparse.Namespace) -> str:
    """The profile's name: the one that was asked for, or the one for this machine."""
    if options.profile is None:
        options.profile = detect_profile()
    return options.profile


def choose_run_dir(options: argparse.Namespace) -> Path:
    """The folder of the run: RUN_DIR, the parameter `run_dir`, or one named after the profile.

    Raises StageError if both are given and differ, and for a place that only notebooks in Colab
    can open.
    """
    set_here = {**getattr(options, "files", {}), **getattr(options, "overrides", {})}
    as_parameter = set_here.get("run_dir")
    if as_parameter and options.run_dir is None:
        options.run_dir = str(as_parameter)
    if as_parameter and Path(as_parameter) != Path(options.run_dir):
        raise StageError(
            f"The run folder is named twice: RUN_DIR={options.run_dir} and run_dir={as_parameter}. "
            "Leave one of them out."
        )
    if options.run_dir is None:
        names = [folder_title(choose_profile(options))]
        if options.model:
            names.append(folder_title(options.model))
        return Path("runs") / "_".join(names)
    if options.run_dir.startswith(("drive:", "hub:")):
        raise StageError(
            f"RUN_DIR={options.run_dir}: the command line needs a folder. Notebooks take drive: "
            "and hub: as their run_dir (docs/colab.md)."
        )
    return Path(options.run_dir).expanduser()


def read_run_choice(options: argparse.Namespace, detect: bool = True) -> RunChoice:
    """The run that is to be made, its parameters checked.

    Without a profile, the one for this machine is read if `detect`, else none. Raises StageError.
    """
    values: dict[str, Any] = {}
    profile = choose_profile(options) if detect else options.profile
    if profile:
        values |= read_choice_file("profiles", profile)
    if options.model:
        values |= read_choice_file("models", options.model)
    values |= {**options.files, **options.overrides}
    gpus = values.pop("gpus", LAUNCH_DEFAULTS["gpus"])
    if options.gpus is not None:
        gpus = coerce("gpus", options.gpus, LAUNCH_DEFAULTS["gpus"])
    check_names(values, NUMBERED)
    return RunChoice(choose_run_dir(options), values, gpus, profile or "")


def read_choice_file(kind: str, name: str) -> dict[str, Any]:
    """The parameters of a profile or a model."""
    path = find_choice(kind, name)
    return in_repository(read_profile(path), path)


def in_repository(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The parameters of a file; where it is one of the repository's, from any working directory.

    Such a file names tables and base models by their path in the repository. It stays as it is
    where we stand there.
    """
    home = repository()
    if Path.cwd() == home or not path.resolve().is_relative_to(home):
        return values
    moved = dict(values)
    for name in ("dataset", "base_model"):
        value = values.get(name)
        if not isinstance(value, str) or Path(value).exists():
            continue
        # the base models in .cache are made when they are first needed
        if (home / value).exists() or value.startswith(".cache/"):
            moved[name] = str(home / value)
    return moved


# --- what a run was started with


def read_run_values(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The folder of a finished run, and its settings with what the command line says on top.

    Raises StageError if there is no such folder, and for a name that no notebook of the series has.
    """
    run_dir = choose_run_dir(options)
    if not run_dir.is_dir():
        raise StageError(
            f"{run_dir} is no run folder. Make one with: make run-all RUN_DIR={run_dir}"
        )
    set_here = {**options.files, **options.overrides}
    # how many processes is no notebook's parameter, but a profile may say it
    check_names(set_here.keys() - {"gpus"}, NUMBERED)
    return run_dir, read_settings(run_dir) | set_here


def read_settings(run_dir: Path) -> dict[str, Any]:
    """The parameters that a run was started with; {} if the command line has not started it."""
    path = run_dir / SETTINGS
    return read_parameters(read_text(path), str(path)) if path.exists() else {}


def write_settings(choice: RunChoice) -> None:
    """Write what a run is started with into its folder, for its later stages."""
    values = dict(choice.values)
    if choice.gpus > 1:
        values["gpus"] = choice.gpus
    write_text_if_changed(
        choice.run_dir / SETTINGS, as_yaml(values, "what this run was started with")
    )
