"""Notebooks that become a page: a report about a run, a comparison of several, and the chat."""

import argparse
import os
import sys
from pathlib import Path

from tabletune.cli.notebooks import run_notebook
from tabletune.cli.options import choose_run_dir
from tabletune.cli.paths import notebook
from tabletune.errors import StageError

TEMPLATES = Path(__file__).parent.parent / "resources" / "templates"


def write_report(options: argparse.Namespace) -> None:
    """Write report.html, a page about a run, into its folder."""
    target = choose_run_dir(options) / "report.ipynb"
    run_notebook(notebook("report"), target, {**options.files, **options.overrides})
    print(write_page(target))


def write_comparison(options: argparse.Namespace) -> None:
    """Write a page with several runs beside each other."""
    if not options.runs:
        raise StageError('Which runs? make compare RUNS="runs/a runs/b"')
    compare_runs([Path(run) for run in options.runs], Path(options.out))


def compare_runs(runs: list[Path], out: Path) -> None:
    """Write a page about several runs to `out`.

    What it finds is printed in words, and where the page is. Raises StageError.
    """
    from tabletune.report.learning_curve import in_words  # pandas and scipy: a second

    target = out.with_suffix(".ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    places = [str(run) for run in runs]
    run_notebook(notebook("compare_runs"), target, {"runs": places})
    page = write_page(target)
    print("", *in_words(places), "", page, sep="\n")


def write_page(executed: Path) -> Path:
    """Write an executed notebook as an HTML page beside it, without its code.

    Returns the page's path.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="report",
        extra_template_basedirs=[str(TEMPLATES)],
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    page = executed.with_suffix(".html")
    body, _ = exporter.from_filename(str(executed))
    page.write_text(body, encoding="utf-8")
    return page


def open_chat(options: argparse.Namespace) -> None:
    """Open a page on which base and fine-tuned model answer side by side."""
    target = choose_run_dir(options) / "chat.ipynb"
    # a plain `ipython` process runs the notebook: the page must stay open until Ctrl-C
    overrides = {"wait": True, **options.files, **options.overrides}
    run_notebook(notebook("chat"), target, overrides, prepare_only=True)
    command = [sys.executable, "-m", "IPython", "--no-banner"]
    command += ["--HistoryManager.enabled=False", str(target)]
    os.execv(sys.executable, command)
