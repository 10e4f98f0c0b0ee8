"""The command line: `tabletune COMMAND`, or `python -m tabletune COMMAND`. Each command has --help.

What a reader can mend ends the process with one line on stderr. Anything else is a mistake of ours,
and shows its traceback.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tabletune.cli.options import (
    USES_GPUS,
    Parser,
    add_parameters,
    add_run_choice,
    choose_run_dir,
    read_run_choice,
    read_run_values,
    read_settings,
    split_args,
    write_settings,
)
from tabletune.cli.paths import notebook
from tabletune.errors import StageError
from tabletune.run.parameters import RUN_STAGES

# Each command imports what it needs when it runs: so all of them start quickly, and so does --help.
Command = Callable[[argparse.Namespace], None]


def run_all(options: argparse.Namespace) -> None:
    """Run notebooks 1 to 4, as far as they are not done: from a table to an evaluated model."""
    from tabletune.cli import series

    series.run_series(options)


def run(options: argparse.Namespace) -> None:
    """Execute one notebook as TARGET, with the settings of the run folder that TARGET is in."""
    from tabletune.cli.notebooks import run_notebook

    overrides = {**options.files, **options.overrides}
    processes = overrides.pop("gpus", None) or options.processes
    run_notebook(
        Path(options.notebook), Path(options.target), overrides, processes, options.prepare_only
    )


def settings(options: argparse.Namespace) -> None:
    """Check parameters, and write them as the settings of a run; run nothing.

    Without --profile, no profile is read.
    """
    from tabletune.run.lock import run_lock

    choice = read_run_choice(options, detect=False)
    with run_lock(choice.run_dir, "settings"):
        write_settings(choice)


def on_finished_run(name: str) -> Command:
    """A command that runs one of the later notebooks on a finished run."""

    def command(options: argparse.Namespace) -> None:
        from tabletune.cli.notebooks import run_notebook

        run_dir = choose_run_dir(options)
        overrides = {**options.files, **options.overrides}
        gpus = options.gpus or overrides.pop("gpus", None) or read_settings(run_dir).get("gpus", 1)
        processes = gpus if name in USES_GPUS else 1
        run_notebook(notebook(name), run_dir / f"{name}.ipynb", overrides, processes)

    return command


def baselines(options: argparse.Namespace) -> None:
    """Run notebook 5 on a finished run, and print what it recommends."""
    from tabletune.cli.summary import print_recommendation

    on_finished_run("05_baselines")(options)
    print_recommendation(choose_run_dir(options))


def trust(options: argparse.Namespace) -> None:
    """Run notebook 6 on a finished run, and print what it found."""
    from tabletune.cli.summary import print_findings

    on_finished_run("06_trust")(options)
    print_findings(choose_run_dir(options))


def export(options: argparse.Namespace) -> None:
    """Run notebook 7 on a finished run, and print where its files are."""
    on_finished_run("07_export")(options)
    run_dir = choose_run_dir(options)
    print(
        f"\ncards, files and app {run_dir / 'export'}, the notebook {run_dir / '07_export.ipynb'}"
    )


def report(options: argparse.Namespace) -> None:
    """Write report.html, a page about a run, into its folder."""
    from tabletune.cli.pages import write_report

    write_report(options)


def compare(options: argparse.Namespace) -> None:
    """Write a page with several runs beside each other."""
    from tabletune.cli.pages import write_comparison

    write_comparison(options)


def chat(options: argparse.Namespace) -> None:
    """Open a page on which base and fine-tuned model answer side by side."""
    from tabletune.cli.pages import open_chat

    open_chat(options)


def sweep(options: argparse.Namespace) -> None:
    """Run every combination of a grid of parameters, and compare the runs."""
    from tabletune.cli.sweep import run_sweep

    run_sweep(options)


def summary(options: argparse.Namespace) -> None:
    """Print what a finished run found."""
    from tabletune.cli.summary import print_summary

    run_dir, _ = read_run_values(options)
    print_summary(run_dir)


def ask(options: argparse.Namespace) -> None:
    """Answer the questions of a file with a finished run: its model, or rows of its table."""
    from tabletune.evaluation.ask import answer_questions

    run_dir, values = read_run_values(options)
    if not options.questions.strip():
        # make hands on an empty text where QUESTIONS is not set
        raise StageError(
            "Which questions? Set QUESTIONS to a text file with one question a line, or a .csv or "
            ".jsonl with a column question."
        )
    answer_questions(run_dir, Path(options.questions), options.part, values)


def index(options: argparse.Namespace) -> None:
    """Renew the index of a run's table, so that it answers from rows that were added later."""
    from tabletune.data.retrieval_folder import renew_from_table

    run_dir, values = read_run_values(options)
    renew_from_table(run_dir, values)


def rate(options: argparse.Namespace) -> None:
    """Let people rate the answers of a finished run, blind, on a page."""
    from tabletune.export.rating_page import rate_command

    run_dir, values = read_run_values(options)
    rate_command(run_dir, values)


def base_models(options: argparse.Namespace) -> None:
    """Make the base models of the cpu and tiny profiles."""
    from tabletune.cli.base_models import make_base_models

    make_base_models(options.kinds)


def sync(options: argparse.Namespace) -> None:
    """For developers: renew parameters.json, badges and install cells."""
    from tabletune.cli.sync import renew_copies

    renew_copies(options.repository)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    description = __doc__.partition("\n")[0] if __doc__ else None
    # allow_abbrev: a shortened option would be taken for another one when a new one comes
    parser = Parser(prog="tabletune", description=description, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Command, help_text: str = "") -> argparse.ArgumentParser:
        text = help_text or (function.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(do=function)
        return command

    def add_for_run(name: str, function: Command, help_text: str = "") -> argparse.ArgumentParser:
        command = add(name, function, help_text)
        add_run_choice(command)
        add_parameters(command)
        return command

    command = add_for_run("run-all", run_all)
    command.add_argument(
        "--until", choices=RUN_STAGES, metavar="STAGE", help="the last stage to run"
    )
    add_for_run(
        "baselines",
        baselines,
        "Notebook 5 on a finished run: was training worth it?",
    )
    add_for_run(
        "trust",
        trust,
        "Notebook 6 on a finished run: safety, grounding, memorization, forgetting.",
    )
    add_for_run(
        "export",
        export,
        "Notebook 7 on a finished run: model card, GGUF and Ollama files, upload.",
    )
    add_for_run("report", report)
    add_for_run("chat", chat)
    add_for_run("rate", rate)
    add_for_run("summary", summary)
    add_for_run("settings", settings)
    add_for_run("index", index)

    command = add_for_run("ask", ask)
    command.add_argument("--questions", required=True, metavar="FILE", help="one question a line")
    command.add_argument(
        "--part",
        default="adapter",
        type=str.lower,
        choices=["copy", "base", "adapter", "merged"],
        help="which model; copy: none, but the answer of the most similar row",
    )

    command = add("compare", compare)
    command.add_argument("runs", nargs="*", help="run folders")
    command.add_argument("--out", default="runs/compare.html", metavar="FILE.html")

    command = add_for_run("sweep", sweep)
    command.add_argument("--grid", default="grids/lora.yaml", metavar="FILE")
    command.add_argument("--folder", metavar="FOLDER", help="where the runs go")

    command = add("run", run)
    command.add_argument("notebook")
    command.add_argument("target")
    add_parameters(command)
    command.add_argument("--processes", type=int, default=1, metavar="N", help="each with a GPU")
    command.add_argument("--prepare-only", action="store_true", help="write it, but run nothing")

    command = add("base-models", base_models)
    command.add_argument("kinds", nargs="*", metavar="tiny|smollm2", help="both without it")
    command = add("sync", sync)
    command.add_argument("--repository", metavar="OWNER/NAME", help="as on GitHub")
    return parser


def main() -> None:
    """Do what the command line says."""
    try:
        options = build_parser().parse_args(split_args(sys.argv[1:]))
        options.do(options)
    except StageError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        # as a shell does for a program that Ctrl-C has ended
        sys.exit(130)
