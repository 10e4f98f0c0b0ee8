"""The command line, `python -m tabletune COMMAND`: what `make` calls. Each command has --help.

Whatever a reader can mend ends the process with one line on stderr.
"""

import argparse
import ast
import hashlib
import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

from tabletune.run.lock import alone
from tabletune.run.parameters import (
    DEFAULTS,
    PARAMETERS,
    as_yaml,
    check_names,
    fit,
    read,
    read_parameters,
)

NUMBERED = [
    name for name in PARAMETERS if name[0] == "0"
]  # a run's settings may name what any of these takes


class Given(argparse.Action):
    """Collects the parameters of files in `files`, all others in `words`, {name: value}."""

    def __call__(self, parser, namespace, values, option=None):
        if option == "-f":
            new = read_parameters(read(values), values)
        elif option == "-y":
            new = read_parameters(values, f"-y {values!r}")
        else:
            new = {values[0]: fit(*values, DEFAULTS.get(values[0]))}
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **new})


def given(options):
    """The parameters of a command: those of files, and on top of them what is said in words."""
    return {**options.files, **options.words}


def run(options):
    """Execute a notebook with the settings of the run folder that it is to stand in, and what else it is told.

    What it wrote so far keeps the name .partial.ipynb until it has ended without an error.
    """
    source, target = Path(options.notebook), Path(options.target)
    name, folder, told = source.stem, target.parent, target.with_name("settings")
    if name not in PARAMETERS:
        raise ValueError(f"{source} is none of the notebooks: {', '.join(PARAMETERS)}")
    if "run_dir" in PARAMETERS[name] and name not in NUMBERED[:4] and not folder.is_dir():
        raise ValueError(f"{folder} is no run folder. Make one with: make run-all RUN_DIR={folder}")
    before = read_parameters(read(told), told) if told.exists() else {}
    values = {**before, "run_dir": str(folder), **given(options)}
    check_names(values, {*NUMBERED, name})
    values = {key: value for key, value in values.items() if key in PARAMETERS[name]}
    if "RANK" in os.environ or options.prepare_only or name not in NUMBERED:
        return execute(source, target, values, options)
    with alone(Path(values["run_dir"]), name):
        return (
            launch(options.processes)
            if options.processes > 1
            else execute(source, target, values, options)
        )


def execute(source, target, values, options):
    """Papermill, and one line for what goes wrong. Of several processes the first one's notebook is kept."""
    quiet = {"PYTHONWARNINGS": "ignore", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    os.environ.update(quiet, PYTHONUTF8="1", JUPYTER_PREFER_ENV_PATH="1")  # the kernel's
    from papermill import execute_notebook

    logging.getLogger("papermill").setLevel(
        logging.ERROR
    )  # to it, parameters of other cells are unknown
    rank = int(os.environ.get("RANK", 0))
    mark = f".process{rank}" if rank else ""
    partial = target.with_suffix(f"{mark}.partial.ipynb")
    how = {
        "prepare_only": options.prepare_only,
        "progress_bar": source.stem in NUMBERED and not rank,
    }
    try:
        try:
            execute_notebook(source, partial, values, **how)
        except (
            RuntimeError
        ) as error:  # of kernels that start at the same moment, two can pick the same port
            if "died before replying" not in str(error):
                raise
            execute_notebook(source, partial, values, **how)
    except BaseException as error:
        kind, text = (
            getattr(error, "ename", type(error).__name__),
            str(getattr(error, "evalue", error)).strip(),
        )
        line = f"\n{source.stem}{mark}: " + ("" if kind == "StageError" else f"{kind}: ") + text
        sys.exit(line if kind == "StageError" else f"{line}\nSee the end of {partial}.")
    partial.unlink() if rank else partial.replace(target)


def launch(processes):
    """Run this very command in several processes, each with a GPU if there are any; one that fails stops all."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True"
    )  # what shards leave free is used again
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # a checkpoint is no good on cpu:0
    elif torch.cuda.device_count() < processes:
        sys.exit(f"GPUS={processes}, but there are {torch.cuda.device_count()} here.")
    how = [
        "--config_file",
        "profiles/accelerate/gpus.yaml",
        "--num_processes",
        str(processes),
        "--module",
    ]
    try:
        launch_command(launch_command_parser().parse_args([*how, "tabletune", *sys.argv[1:]]))
    except ChildFailedError as error:
        process, failure = error.get_first_failure()
        sys.exit(
            f"Process {process} failed first (exit code {failure.exitcode}); the others were stopped."
        )


def write_if_changed(path, text):
    """Write a file, but not what is there already: make goes by the time."""
    if not path.exists() or read(path) != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def settings(options):
    """Check parameters and write them as the settings of a run, which its stages read."""
    check_names(given(options), NUMBERED)
    text = as_yaml(given(options), "what this run was told")
    with alone(Path(options.run_dir), "make"):
        write_if_changed(Path(options.run_dir) / "settings", text)


def short(name, value):
    """A parameter and its value as a part of a folder's name; with some of its hash, if it had to be changed."""
    text = f"{name}-{value if isinstance(value, str) else json.dumps(value)}"
    plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)[:50]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def reason(run_dir):
    """The error of the stage that stopped."""
    texts = [read(partial) for partial in run_dir.glob("*.partial.ipynb")]
    errors = re.findall(r'"evalue": (".*")', "".join(texts))
    return json.loads(errors[0]) if errors else "see above"


def sweep(options):
    """Run every combination of the values that stand in lists in a grid, on top of a profile, and compare them.

    Each is a run like any other, so make knows what is done. Those that fail do not stop the rest.
    """
    grid = read_parameters(read(options.grid), options.grid, grid=True)
    check_names({**grid, **given(options)}, NUMBERED)
    axes = {name: values for name, values in grid.items() if isinstance(values, list)}
    for name, values in axes.items():
        if not values or name in options.words:
            sys.exit(
                f"{options.grid}: {name} {'is given in ARGS, too.' if values else 'has no values.'}"
            )
    if not axes or "run_dir" in grid:
        sys.exit(
            f"{options.grid}: {'make sets run_dir.' if axes else 'no parameter has a list of values.'}"
        )
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda sent, _: sys.exit(128 + sent))
    points, finished, failed = list(itertools.product(*axes.values())), [], {}
    for number, values in enumerate(points, 1):
        point = dict(zip(axes, values, strict=True))
        run_dir = Path(options.folder) / "_".join(itertools.starmap(short, point.items()))[:200]
        print(f"{number} of {len(points)}: {run_dir}", flush=True)
        profile = run_dir / "profile.yaml"
        write_if_changed(
            profile, as_yaml({**given(options), **grid, **point}, "a point of a sweep")
        )
        if make("04_evaluate", f"RUN_DIR={run_dir}", f"PROFILE_FILE={profile}", "MODEL=", "ARGS="):
            finished.append(str(run_dir))
        else:
            failed[run_dir] = reason(run_dir)
    compared = not finished or make(
        "compare", f"RUNS={' '.join(finished)}", f"OUT={options.folder}/compare.html"
    )
    if failed:
        lines = [f"{run_dir}: {why}" for run_dir, why in failed.items()]
        sys.exit("\n".join([f"\n{len(failed)} of {len(points)} points failed:", *lines]))
    sys.exit(not compared)


def make(*words):
    """Run make, and end it with this process. Returns whether it succeeded."""
    process = subprocess.Popen([os.environ.get("MAKE", "make"), "--no-print-directory", *words])
    try:
        return process.wait() == 0
    finally:
        process.terminate()
        process.wait()


def summary(options):
    """Print what a finished run found, and where it is."""
    run_dir = Path(options.run_dir)
    metrics = json.loads(read(run_dir / "evaluation" / "metrics.json"))
    print(f"\n{'':10}{'response perplexity':>20}{'95% interval':>18}{'stop':>8}{'structure':>12}")
    for name in ("base", "adapter", "merged"):
        perplexity, generation = metrics[name]["perplexity"], metrics[name]["generation"] or {}
        interval = " - ".join(f"{end:.1f}" for end in perplexity["response_ci95"] or []) or "-"
        rates = [generation.get(rate) for rate in ("stop_rate", "structure_rate")]
        stop, structure = ("-" if rate is None else f"{rate:.0%}" for rate in rates)
        print(f"{name:10}{perplexity['response']:20.2f}{interval:>18}{stop:>8}{structure:>12}")
    print(
        f"\nmodel {run_dir / 'merged'}, adapter {run_dir / 'adapter'}, metrics and samples {run_dir / 'evaluation'}"
    )


def sync(options):
    """Write parameters.json from the notebooks' parameters, and into README, docs and notebooks what is kept once.

    That is in pyproject.toml: repository, ref and runtime for Colab, and the text of the notebooks' first code cell.
    """
    path, found = Path("pyproject.toml"), {}
    series = tomllib.loads(read(path))["tool"]["series"]
    if options.repository:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repository):
            raise ValueError(f"{options.repository!r}: use owner/name, as on GitHub.")
        write_if_changed(
            path, read(path).replace(f'"{series["repository"]}"', f'"{options.repository}"')
        )
        series["repository"] = options.repository
    kept = {
        r"(?<=colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+/blob/[\w.-]+": "{repository}/blob/{ref}",
        r"(?<=\n#       runtime_version: ).*": "'{colab_runtime}'",
        r"(?s)(?<=\n# %%\n)(?:import os\n)?import sys\nfrom importlib.util.*?(?=\n\n# %%)": series[
            "install_cell"
        ],
    }
    for path in [
        Path("README.md"),
        *Path("docs").glob("*.md"),
        *sorted(Path("notebooks_py").glob("*.py")),
    ]:
        text = read(path)
        for form, new in kept.items():
            text = re.sub(form, lambda _, new=new: new.strip().format(**series), text)
        write_if_changed(path, text)
        cells = [cell.partition("\n") for cell in re.split(r"(?m)^# %%", text)]
        known = [
            body
            for head, _, body in cells
            if "parameters" in head or body.startswith("# rarely changed")
        ]
        if path.suffix == ".py":
            lines = [
                line for line in ast.parse("".join(known)).body if isinstance(line, ast.Assign)
            ]
            found[path.stem] = {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    write_if_changed(
        Path("src/tabletune/resources/parameters.json"),
        json.dumps(found, indent=1, ensure_ascii=False) + "\n",
    )


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m tabletune", description=__doc__.partition("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    places = {
        run: "notebook target",
        settings: "run_dir",
        sweep: "grid folder",
        summary: "run_dir",
        sync: "",
    }
    for function, names in places.items():
        head = function.__doc__.partition("\n")[0]
        command = commands.add_parser(function.__name__, help=head, description=function.__doc__)
        command.set_defaults(do=function, files={}, words={})
        for name in names.split():
            command.add_argument(name)
        if function in (run, settings, sweep):
            command.add_argument(
                "-f", action=Given, dest="files", metavar="FILE", help="a YAML file of parameters"
            )
            command.add_argument(
                "-y", action=Given, dest="words", metavar="YAML", help="parameters as a YAML text"
            )
            pair = {"action": Given, "dest": "words", "nargs": 2, "metavar": ("NAME", "VALUE")}
            command.add_argument(
                "-p", "-r", **pair, help="a parameter; its default says of what type VALUE is"
            )
        if function is run:
            command.add_argument(
                "--processes", type=int, default=1, metavar="N", help="so many, each with a GPU"
            )
            command.add_argument(
                "--prepare-only", action="store_true", help="write it, but run nothing"
            )
        if function is sync:
            command.add_argument("--repository", help="owner/name, as on GitHub")
    try:
        options = parser.parse_args()
        options.do(options)
    except ValueError as error:  # a parameter that is none, a file that cannot be read
        sys.exit(str(error))
