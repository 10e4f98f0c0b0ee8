"""The command line as a whole: its commands, their help, and how soon it starts."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from tabletune.cli import main as main_module
from tabletune.cli.main import build_parser
from tabletune.errors import StageError
from tabletune.run.parameters import read_parameters

COMMANDS = [
    "run-all",
    "baselines",
    "trust",
    "export",
    "report",
    "chat",
    "summary",
    "settings",
    "index",
    "ask",
    "rate",
    "compare",
    "sweep",
    "run",
    "base-models",
    "sync",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: tabletune {command}")


def test_the_list_of_commands_is_complete():
    text = build_parser().format_help()
    assert sorted(re.findall(r"^    ([a-z-]+)", text, re.MULTILINE)) == sorted(COMMANDS)


def test_the_command_line_starts_fast():
    """It imports nothing of what trains."""
    program = (
        "import sys, tabletune.cli.main; "
        "slow = {'torch', 'transformers', 'numpy', 'papermill', 'datasets', 'logging', 'tomllib'}; "
        "print(slow & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n"


def peft_imports_bitsandbytes():
    """Whether peft does so by itself, as from 0.21 on: then the compiler is loaded with it."""
    helpers = Path(find_spec("peft").origin).parent / "helpers.py"
    return "import bitsandbytes" in helpers.read_text(encoding="utf-8")


@pytest.mark.skipif(peft_imports_bitsandbytes(), reason="peft imports bitsandbytes by itself")
def test_notebook_2_starts_without_torchs_compiler_and_without_matplotlib():
    """They would take two seconds, and half a second.

    Afterwards `torch.compile` is as a reader has it.
    """
    program = """
import os, sys
from tabletune.chat import encoding, tokenizer
from tabletune.model import inspection, loading, quantization
from tabletune.report import showing
from tabletune.training import planning, trainer
showing.show_table({"this base": "a text"})
heavy = {"torch._inductor.compile_fx", "matplotlib"} & set(sys.modules)
print(heavy, os.environ.get("TORCHDYNAMO_DISABLE"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set() None", done.stderr


def test_bitsandbytes_would_still_load_the_compiler():
    """If not, upstream has mended it, and what src/tabletune/model/compat.py does can go."""
    default = Path(find_spec("bitsandbytes").origin).parent / "backends" / "default" / "ops.py"
    assert "torch.compile(fn, " in default.read_text(encoding="utf-8")


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tabletune", *map(str, arguments)])
    main_module.main()


def test_settings_writes_what_it_was_given_and_no_profile(tmp_path, monkeypatch):
    run_command(monkeypatch, "settings", tmp_path, "-p", "learning_rate", "1e-2", "-y", "seed: 3")
    written = (tmp_path / "settings").read_text(encoding="utf-8")
    assert read_parameters(written, "") == {"learning_rate": 0.01, "seed": 3}


def test_summary_also_where_a_figure_is_missing(tmp_path, capsys, monkeypatch):
    """Two test rows have no interval; labels have no structure; a lone text has no answers at
    all.
    """
    one = {
        "perplexity": {"response": 47.078, "response_ci95": [40.04, 55]},
        "generation": {"stop_rate": 0.5},
    }
    two = {
        "perplexity": {"response": 6, "response_ci95": None},
        "generation": {"stop_rate": 1, "structure_rate": 1},
    }
    three = {"perplexity": {"response": 6, "response_ci95": None}, "generation": None}
    (tmp_path / "evaluation").mkdir()
    metrics = json.dumps({"base": one, "adapter": two, "merged": three})
    (tmp_path / "evaluation" / "metrics.json").write_text(metrics)
    run_command(monkeypatch, "summary", tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["base", "47.08", "40.0", "-", "55.0", "50%", "-"]
    assert lines[3] == ["adapter", "6.00", "-", "100%", "100%"]
    assert lines[4] == ["merged", "6.00", "-", "-", "-"]


def test_summary_says_that_rows_were_left_out(tmp_path, capsys, monkeypatch):
    part = {"perplexity": {"response": 130, "response_ci95": None}, "generation": None}
    metrics = dict.fromkeys(["base", "adapter", "merged"], part)
    (tmp_path / "evaluation").mkdir()
    for retrieval in (False, True):
        text = json.dumps(metrics | {"retrieval": retrieval})
        (tmp_path / "evaluation" / "metrics.json").write_text(text)
        run_command(monkeypatch, "summary", tmp_path)
        assert ("without their rows" in capsys.readouterr().out) == retrieval


def test_summary_says_first_whether_answers_are_right(tmp_path, capsys, monkeypatch):
    part = {"perplexity": {"response": 6, "response_ci95": None}, "generation": None}
    metrics = dict.fromkeys(["base", "adapter", "merged"], part)
    (tmp_path / "evaluation").mkdir()
    text = json.dumps(metrics | {"verdict": ["Right: 20 of 20.", "Says nothing: 9 of 10."]})
    (tmp_path / "evaluation" / "metrics.json").write_text(text)
    run_command(monkeypatch, "summary", tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["Right: 20 of 20.", "Says nothing: 9 of 10."]


def test_summary_of_no_run_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"metrics.json is missing. Run 04_evaluate first"):
        run_command(monkeypatch, "summary", tmp_path)


@pytest.mark.parametrize("command", ["ask --questions q.txt", "index", "rate", "summary"])
def test_a_name_that_no_notebook_has_is_refused(command, tmp_path, monkeypatch):
    words = ["tabletune", *command.split(), str(tmp_path), "-p", "max_new_token", "5"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="has a parameter 'max_new_token'"):
        main_module.main()


@pytest.mark.parametrize("command", ["ask --questions q.txt", "index", "rate", "summary"])
def test_a_run_that_is_not_there_is_said(command, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tabletune", *command.split(), str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"none is no run folder\. Make one with: make run-all"):
        main_module.main()


def test_what_only_a_profile_says_is_refused(tmp_path, monkeypatch):
    words = ["tabletune", "summary", str(tmp_path), "-p", "extends", "tiny"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit, match="No notebook has a parameter 'extends'"):
        main_module.main()


def test_compare_takes_folders_as_arguments():
    options = build_parser().parse_args(["compare", "runs/a", "runs/my run", "--out", "x.html"])
    assert options.runs == ["runs/a", "runs/my run"]


def test_compare_without_runs_says_how(monkeypatch):
    with pytest.raises(SystemExit, match=r'Which runs. make compare RUNS="runs/a runs/b"'):
        run_command(monkeypatch, "compare")


def test_a_stage_error_ends_the_process_with_its_line(monkeypatch, tmp_path):
    def refuse(run_dir):
        raise StageError("nothing here")

    monkeypatch.setattr("tabletune.cli.summary.print_summary", refuse)
    with pytest.raises(SystemExit, match=r"^nothing here$"):
        run_command(monkeypatch, "summary", str(tmp_path))


def test_the_package_is_also_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "tabletune", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.startswith("usage: tabletune")


def test_ask_without_a_file_of_questions_says_what_to_set(tmp_path):
    """As make calls it where QUESTIONS is not set."""
    options = build_parser().parse_args(["ask", str(tmp_path), "--questions", ""])
    with pytest.raises(StageError, match="Set QUESTIONS to a text file"):
        options.do(options)


@pytest.mark.parametrize(("command", "processes"), [("export", 1), ("trust", 2)])
def test_notebook_7_works_in_one_process_whatever_the_run_has(
    command, processes, tmp_path, monkeypatch
):
    (tmp_path / "settings").mkdir()
    calls = []
    monkeypatch.setattr(main_module, "read_settings", lambda folder: {"gpus": 2})
    monkeypatch.setattr(
        "tabletune.cli.notebooks.run_notebook", lambda *values: calls.append(values[3])
    )
    monkeypatch.setattr("tabletune.cli.summary.print_findings", lambda run_dir: None)
    options = build_parser().parse_args([command, str(tmp_path)])
    options.do(options)
    assert calls == [processes]
