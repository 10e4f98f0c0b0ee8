"""What a finished run found, in a few lines."""

import shlex
from pathlib import Path
from typing import Any

from tabletune.report.text import RUN_HERE
from tabletune.run.files import read_json

ROWS_LEFT_OUT = (
    "Below, the test questions are asked without their rows. A model that has learned to refuse\n"
    "them finds the table's answers improbable, so a high perplexity is no fault there."
)


def print_summary(run_dir: Path) -> None:
    """Print the main figures of a finished run, and where its results are.

    Raises StageError without them.
    """
    metrics = read_json(run_dir / "evaluation" / "metrics.json", "04_evaluate")
    verdict = metrics.get("verdict", [])  # runs of earlier versions have none
    if verdict:
        print("", *verdict, sep="\n")
    if metrics.get("retrieval"):
        print("\n" + ROWS_LEFT_OUT)
    columns = ["", "response perplexity", "95% interval", "stop", "structure"]
    print(f"\n{columns[0]:10}{columns[1]:>20}{columns[2]:>18}{columns[3]:>8}{columns[4]:>12}")
    for name in ("base", "adapter", "merged"):
        perplexity = metrics[name]["perplexity"]
        # None where a model was not asked: then only its perplexity is known
        generation = metrics[name]["generation"] or {}
        interval = " - ".join(f"{end:.1f}" for end in perplexity["response_ci95"] or []) or "-"
        stop = percent(generation.get("stop_rate"))
        structure = percent(generation.get("structure_rate"))
        print(f"{name:10}{perplexity['response']:20.2f}{interval:>18}{stop:>8}{structure:>12}")
    print(
        f"\nmodel {run_dir / 'merged'}, adapter {run_dir / 'adapter'}, "
        f"metrics and samples {run_dir / 'evaluation'}"
    )


def print_recommendation(run_dir: Path) -> None:
    """Print what notebook 5 recommends for a run, how to ship it, and where its figures are.

    Raises StageError without them.
    """
    folder = run_dir / "baselines"
    metrics = read_json(folder / "metrics.json", "05_baselines")
    this_run = f"RUN_DIR={shlex.quote(str(run_dir))}"
    sentences = [line.replace(RUN_HERE, this_run) for line in metrics["verdict"]["sentences"]]
    print("", *sentences, sep="\n")
    print(f"\nfigures, answers and a plot {folder}, the notebook {run_dir / '05_baselines.ipynb'}")


def print_findings(run_dir: Path) -> None:
    """Print what notebook 6 found in a run, in short, and where its figures are.

    Raises StageError without them.
    """
    # imports PyTorch, which takes seconds
    from tabletune.evaluation.trust import in_short

    folder = run_dir / "trust"
    metrics = read_json(folder / "metrics.json", "06_trust")
    print("", *in_short(metrics), sep="\n")
    print(f"\nfigures and answers {folder}, the notebook {run_dir / '06_trust.ipynb'}")


def percent(rate: Any) -> str:
    """A rate in percent; "-" where there is none."""
    return "-" if rate is None else f"{rate:.0%}"
