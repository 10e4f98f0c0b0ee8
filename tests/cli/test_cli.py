"""The command line: values of YAML's types from every entrance, misspelt names, locks, sweeps, and what make calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
from conftest import ROOT

from tabletune.cli import main as main_module
from tabletune.errors import StageError
from tabletune.run.parameters import DEFAULTS, PARAMETERS, fit, from_yaml, read_parameters
from tabletune.run.stage import begin

STAGE = "02_finetune_qlora"
TABLETUNE = [sys.executable, "-m", "tabletune"]


def tabletune(*arguments, **options):
    """Run the command line in a process of its own. Returns the finished process, its output as text."""
    options = {
        "cwd": ROOT,
        "env": {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},
        **options,
    }  # as make does
    return subprocess.run(
        [*TABLETUNE, *map(str, arguments)], capture_output=True, text=True, **options
    )


def settings(*arguments):
    """`tabletune settings` in this process. Returns what it said when it failed, else None."""
    with patch("sys.argv", ["tabletune", "settings", *map(str, arguments)]), chdir(ROOT):
        try:
            main_module.main()
        except SystemExit as error:
            return error.code


def told(run_dir):
    """The settings that the command line wrote into a run folder, as its stages read them."""
    return read_parameters((run_dir / "settings").read_text(encoding="utf-8"), "settings")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x1f", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("[1e-3, 2]", [0.001, 2]),
        ("{a: b}", {"a": "b"}),
        ("no", "no"),
        ("yes", "yes"),
        ("007", "007"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("351844e75ed0bcbbe3f10671b3c808d2b83894ee", "351844e75ed0bcbbe3f10671b3c808d2b83894ee"),
    ],
)
def test_yaml_as_people_read_it(text, value):
    found = from_yaml(text)
    assert found == value and type(found) is type(value)


ENTRANCES = {
    "profile": lambda name, text, file: (file.write_text(f"{name}: {text}"), ["-f", file])[1],
    "-y": lambda name, text, file: ["-y", f"{name}: {text}"],
    "-p": lambda name, text, file: ["-p", name, text],
    "-r": lambda name, text, file: ["-r", name, text],
}


@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-2", 0.01),
        ("learning_rate", "2", 2),
        ("max_length", "1e3", 1000),
        ("lora_target_modules", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("columns", "{question: q, answer: a}", {"question": "q", "answer": "a"}),
        ("gradient_checkpointing", "false", False),
        ("published_dataset", "2026", "2026"),
        ("published_dataset", "1e3", "1e3"),
        ("published_dataset", "true", "true"),
        ("base_model_revision", "0012345", "0012345"),
    ],
)
def test_every_entrance_has_yamls_types(tmp_path, entrance, name, text, value):
    """A value takes the type of its parameter's default, so 2026 is a name where a name is wanted."""
    arguments = ENTRANCES[entrance](name, text, tmp_path / "profile.yaml")
    assert settings(tmp_path / "run", *arguments) is None
    found = told(tmp_path / "run")[name]
    assert found == value and type(found) is type(value)


def test_later_words_go_before_earlier_ones_and_all_before_files(tmp_path):
    for name, rate in (("profile", 1), ("model", 2)):
        (tmp_path / f"{name}.yaml").write_text(f"learning_rate: {rate}\nseed: {rate}")
    files = [word for name in ("profile", "model") for word in ("-f", tmp_path / f"{name}.yaml")]
    words = ["-p", "learning_rate", "3", "-y", "{learning_rate: 4, epochs: 2}"]
    assert settings(tmp_path / "run", *words, *files) is None
    assert told(tmp_path / "run") == {"learning_rate": 4, "seed": 2, "epochs": 2}


def test_settings_are_written_only_when_they_change(tmp_path):
    for rate, changed in ((1, True), (1, False), (2, True)):
        before = (
            (tmp_path / "settings").stat().st_mtime_ns if (tmp_path / "settings").exists() else 0
        )
        assert settings(tmp_path, "-p", "learning_rate", rate) is None
        assert ((tmp_path / "settings").stat().st_mtime_ns != before) == changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-p", "max_lenght", "30"],
            "No notebook has a parameter 'max_lenght'. Did you mean 'max_length'?",
        ),
        (
            ["-r", "max_lenght", "30"],
            "No notebook has a parameter 'max_lenght'. Did you mean 'max_length'?",
        ),
        (
            ["-y", "max_lenght: 30"],
            "No notebook has a parameter 'max_lenght'. Did you mean 'max_length'?",
        ),
        (["-p", "zzz", "30"], "No notebook has a parameter 'zzz'."),
        (["-p", "packing", "no"], "packing='no': true or false is wanted."),
        (
            ["-p", "columns", "*.csv"],
            "columns='*.csv': names and their values are wanted, {name: value}.",
        ),
        (["-p", "epochs", "0"], "epochs=0: a number above 0 is wanted."),
        (["-p", "learning_rate", "fast"], "learning_rate='fast': a number above 0 is wanted."),
        (["-p", "window", "1"], "window=1: a whole number of 2 or more is wanted."),
        (["-p", "samples", "2.5"], "samples=2.5: a whole number of 0 or more is wanted."),
        (["-p", "stride", ".inf"], "stride=inf: a whole number of 1 or more is wanted."),
        (["-p", "max_length", "0"], "max_length=0: a whole number from 1 to 1000000000 is wanted."),
        (
            ["-p", "max_length", "10000000000"],
            "max_length=10000000000: a whole number from 1 to 1000000000 is wanted.",
        ),
        (["-p", "max_dropped", "2"], "max_dropped=2: a number from 0 to 1 is wanted."),
        (
            ["-p", "validation_fraction", "-0.1"],
            "validation_fraction=-0.1: a number from 0 to 0.5 is wanted.",
        ),
        (["-p", "max_grad_norm", ".nan"], "max_grad_norm=nan: a number of 0 or more is wanted."),
        (["-p", "test_fraction", "0.95"], "test_fraction=0.95: a number from 0 to 0.5 is wanted."),
        (
            ["-y", "seed: -1"],
            "-y 'seed: -1': seed=-1: a whole number from 0 to 4294967295 is wanted.",
        ),
        (["-y", "packing: on"], "-y 'packing: on': packing='on': true or false is wanted."),
        (["-y", "- a"], "-y '- a': parameters are wanted, each as name: value."),
        (
            ["-f", "profiles/t5.yaml"],
            "profiles/t5.yaml cannot be read: No such file or directory; there are 70b, a100,",
        ),
        (["-f", "data"], "data cannot be read: Is a directory"),
        (["-y", "{a: ]"], "-y '{a: ]': while parsing a flow node"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, arguments, message):
    said = settings(tmp_path / "run", *arguments)
    assert said.startswith(message) and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_misspelt_name_in_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("learning_rte: 1")
    said = settings(tmp_path / "run", "-f", tmp_path / "mine.yaml")
    assert said == "No notebook has a parameter 'learning_rte'. Did you mean 'learning_rate'?"


def test_a_latin_1_file_is_said(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("disclaimer: Café".encode("latin-1"))
    assert "it is not UTF-8" in settings(tmp_path, "-f", tmp_path / "mine.yaml")


def begun(tmp_path, injected="", **values):
    """Begin a stage in a kernel in which papermill has set the injected parameters. Returns what the kernel holds."""
    variables = {
        **PARAMETERS[STAGE],
        "run_dir": str(tmp_path),
        "In": ["", f"# Parameters\n{injected}", "begin()"],
    }
    variables |= values
    stage = begin(STAGE, variables)
    assert stage.parameters == {name: variables[name] for name in PARAMETERS[STAGE]}
    return variables


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "1e-2", 0.01),
        ("max_length", "30", 30),
        ("max_length", 30.0, 30),
        ("gradient_checkpointing", "false", False),
        ("lora_target_modules", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("published_dataset", 2026, "2026"),
    ],
)
def test_a_notebook_that_papermill_runs_itself_has_yamls_types(tmp_path, name, value, expected):
    """Its own -p knows numbers and True, its -r and -y only texts where YAML's version 1.1 sees none."""
    found = begun(tmp_path, **{name: value})[name]
    assert found == expected and type(found) is type(expected)


def test_a_notebook_that_papermill_runs_itself_knows_its_parameters(tmp_path):
    begun(
        tmp_path, "safety_prompts = 'bundled'\nmax_length = 30"
    )  # a profile names those of all notebooks
    with pytest.raises(StageError, match=r"'max_lenght'\. Did you mean 'max_length'\?"):
        begun(tmp_path, "max_lenght = 30", max_lenght=30)
    with pytest.raises(StageError, match=r"true or false is wanted"):
        begun(tmp_path, packing="yes")


def test_a_default_with_an_equals_sign_is_no_trap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("notebooks_py", "src/tabletune/resources", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    cells = "# %% [markdown]\n# Title\n\n# %%\n# rarely changed\nb = 1\n\n"
    cells += '# %% tags=["parameters"]\na = "x = 1"  # f = 2\nc = {"d": [1, 2]}\n\n# %%\ne = 3\n'
    (tmp_path / "notebooks_py" / "01_x.py").write_text(cells)
    (tmp_path / "README.md").write_text("")
    assert tabletune("sync", cwd=tmp_path).returncode == 0
    written = json.loads(
        (tmp_path / "src" / "tabletune" / "resources" / "parameters.json").read_text()
    )
    assert written == {"01_x": {"b": 1, "a": "x = 1", "c": {"d": [1, 2]}}}


def test_parameters_that_stages_share_have_one_default():
    for notebook, known in PARAMETERS.items():
        for name, default in known.items():
            assert DEFAULTS[name] == default, f"{name} differs in {notebook}"
    assert {"run_dir", "base_model", "seed"} <= set(DEFAULTS)


def write_notebook(path, source):
    """A notebook with all parameters of its name, and one more cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {default!r}" for name, default in PARAMETERS[path.stem].items()]
    known = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=[known, nbformat.v4.new_code_cell(source)], metadata=kernel),
        path,
    )
    return path


STAGE_ERROR = "class StageError(Exception): pass\nraise StageError('the table is empty')"


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        (STAGE_ERROR, ["", f"{STAGE}: the table is empty"]),
        (
            "1 / 0",
            ["", f"{STAGE}: ZeroDivisionError: division by zero", "See the end of {partial}."],
        ),
    ],
)
def test_a_stage_that_stops_says_why_and_leaves_what_it_wrote(tmp_path, source, lines):
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", source)
    done = tabletune("run", notebook, tmp_path / "run" / notebook.name)
    partial = tmp_path / "run" / f"{STAGE}.partial.ipynb"
    said = [line for line in done.stderr.split("\n") if "Executing" not in line]
    assert (
        done.returncode == 1
        and "\n".join(said).strip() == "\n".join(lines).format(partial=partial).strip()
    )
    assert partial.exists() and not partial.with_name(notebook.name).exists()
    write_notebook(notebook, "print('mended')")
    assert tabletune("run", notebook, tmp_path / "run" / notebook.name).returncode == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("*.ipynb")) == [notebook.name]


def test_a_stage_gets_its_own_parameters_as_values(tmp_path):
    """From the settings of its run folder, and the folder itself as run_dir, whatever it is named."""
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", "")
    run_dir = tmp_path / "2026"
    arguments = [
        "-f",
        ROOT / "profiles" / "tiny.yaml",
        "-p",
        "lora_target_modules",
        "[q_proj, v_proj]",
    ]
    assert settings(run_dir, *arguments) is None
    target = run_dir / notebook.name
    assert (
        tabletune(
            "run", notebook, target, "-p", "learning_rate", "1e-2", "--prepare-only"
        ).returncode
        == 0
    )
    [_, injected, _] = nbformat.read(target, 4).cells
    found = {}
    exec(injected.source, found)
    found = {name: value for name, value in found.items() if name in DEFAULTS}
    assert found["lora_target_modules"] == ["q_proj", "v_proj"] and found["learning_rate"] == 0.01
    assert found["run_dir"] == str(run_dir) and found["gradient_checkpointing"] is False
    assert set(found) <= set(PARAMETERS[STAGE])


def test_a_port_that_two_kernels_picked_is_tried_again(tmp_path, monkeypatch):
    attempts = []

    def execute(source, target, values, **how):
        attempts.append(values)
        if len(attempts) == 1:
            raise RuntimeError("Kernel died before replying to kernel_info")
        shutil.copy(source, target)

    monkeypatch.setattr("papermill.execute_notebook", execute)
    notebook = write_notebook(tmp_path / f"{STAGE}.ipynb", "")
    monkeypatch.setattr(
        sys, "argv", ["tabletune", "run", str(notebook), str(tmp_path / "run" / notebook.name)]
    )
    main_module.main()
    assert len(attempts) == 2 and (tmp_path / "run" / notebook.name).exists()


def test_a_parameter_that_few_change_is_not_called_unknown(tmp_path):
    """Papermill says so of what stands in another cell than the tagged one."""
    done = tabletune(
        "run",
        f"notebooks/{STAGE}.ipynb",
        tmp_path / f"{STAGE}.ipynb",
        "--prepare-only",
        "-p",
        "report_to",
        "none",
    )
    assert done.returncode == 0 and "report_to = " in (tmp_path / f"{STAGE}.ipynb").read_text()
    assert "unknown" not in done.stderr


@pytest.mark.parametrize("notebook", ["06_trust", "07_export", "report", "chat"])
def test_what_needs_a_finished_run_says_so(tmp_path, notebook):
    done = tabletune("run", f"notebooks/{notebook}.ipynb", tmp_path / "none" / f"{notebook}.ipynb")
    assert (
        f"{tmp_path / 'none'} is no run folder. Make one with: make run-all RUN_DIR=" in done.stderr
    )
    assert done.stderr.count("\n") == 1 and not (tmp_path / "none").exists()


HOLD = """
import sys, time
from pathlib import Path
from tabletune.run.lock import alone
with alone(Path(sys.argv[1]), "02_finetune_qlora"):
    print("at work", flush=True)
    time.sleep(60)
"""


def test_of_two_runs_in_one_folder_the_second_says_that_the_first_is_at_work(tmp_path):
    """Also when the settings are to be written, and no longer once the first was killed."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "at work\n"
    notebook = write_notebook(tmp_path / "source" / f"{STAGE}.ipynb", "")
    line = f"{tmp_path}: 02_finetune_qlora (process {first.pid}) is at work here already. Wait for it to end"
    for second in (
        ["run", notebook, tmp_path / f"{STAGE}.ipynb"],
        ["settings", tmp_path, "-p", "seed", "1"],
    ):
        done = tabletune(*second)
        assert (
            done.returncode == 1 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
        )
    assert not (tmp_path / f"{STAGE}.ipynb").exists() and not (tmp_path / "settings").exists()
    first.kill()
    first.wait()
    assert settings(tmp_path, "-p", "seed", "1") is None


MAKE = """#!/bin/sh
echo "$*" >> {calls}
for word; do case $word in RUN_DIR=*) run=${{word#RUN_DIR=}};; esac; done
case "$*" in *0.002*)
    printf '{{"cells": [{{"outputs": [{{"evalue": "no \\\\"room\\\\""}}]}}]}}' > $run/02_finetune_qlora.partial.ipynb
    exit 1;;
esac
"""


def swept(tmp_path, grid, *arguments):
    """Run a sweep with a make that only notes what it was told, and fails where the learning rate is 0.002."""
    (tmp_path / "grid.yaml").write_text(grid)
    make = tmp_path / "make"
    make.write_text(
        MAKE.format(calls=tmp_path / "calls")
        .replace('{"evalue"', '\n{"evalue"')
        .replace('"}]', '"\n}]')
    )
    make.chmod(0o755)
    environment = {**os.environ, "MAKE": str(make)}
    done = tabletune(
        "sweep", tmp_path / "grid.yaml", tmp_path / "sweep", *arguments, env=environment
    )
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    return done, calls


def test_a_sweep_makes_every_point_and_says_which_failed(tmp_path):
    grid = "learning_rate: [1e-3, 2e-3]\nlora_target_modules: [all-linear, [q_proj, v_proj]]\nepochs: 2\n"
    done, calls = swept(tmp_path, grid, "-f", ROOT / "profiles" / "tiny.yaml", "-p", "seed", "7")
    assert done.returncode == 1 and len(calls) == 5, done.stderr
    points = [
        dict(word.partition("=")[::2] for word in call.split() if "=" in word) for call in calls[:4]
    ]
    assert all(call.startswith("--no-print-directory 04_evaluate ") for call in calls[:4])
    assert all(point["MODEL"] == point["ARGS"] == "" for point in points)
    values = [read_parameters(Path(point["PROFILE_FILE"]).read_text(), "") for point in points]
    assert [value["learning_rate"] for value in values] == [0.001, 0.001, 0.002, 0.002]
    assert [value["lora_target_modules"] for value in values] == [
        "all-linear",
        ["q_proj", "v_proj"],
    ] * 2
    assert all(
        value["epochs"] == 2 and value["seed"] == 7 and value["lora_r"] == 8 for value in values
    )
    assert len({point["RUN_DIR"] for point in points}) == 4
    failed = [point["RUN_DIR"] for point in points if "0.002" in point["RUN_DIR"]]
    said = done.stderr.strip().splitlines()
    assert said == ["2 of 4 points failed:", *[f'{run_dir}: no "room"' for run_dir in failed]]
    finished = [point["RUN_DIR"] for point in points if "0.002" not in point["RUN_DIR"]]
    assert (
        calls[4]
        == f"--no-print-directory compare RUNS={' '.join(finished)} OUT={tmp_path}/sweep/compare.html"
    )


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("learning_rate: []", "learning_rate has no values."),
        ("seed: [1, 2]", "seed is given in ARGS, too."),
        ("learning_rate: 1", "no parameter has a list of values."),
        ("learning_rate: [1]\nrun_dir: a", "make sets run_dir."),
        (
            "learning_rte: [1, 2]",
            "No notebook has a parameter 'learning_rte'. Did you mean 'learning_rate'?",
        ),
        ("packing: [true, maybe]", "packing='maybe': true or false is wanted."),
    ],
)
def test_a_grid_that_cannot_be_run(tmp_path, grid, message):
    done, calls = swept(tmp_path, grid, "-p", "seed", "7")
    assert (
        done.returncode == 1
        and done.stderr.endswith(message + "\n")
        and done.stderr.count("\n") == 1
    ), done.stderr
    assert not calls


def test_a_sweep_that_is_ended_ends_make(tmp_path):
    (tmp_path / "grid.yaml").write_text("learning_rate: [1, 2]")
    make = tmp_path / "make"
    make.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    make.chmod(0o755)
    command = [*TABLETUNE, "sweep", str(tmp_path / "grid.yaml"), str(tmp_path / "sweep")]
    sweep = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "MAKE": str(make)}, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.02)
    time.sleep(0.5)  # until the sweep waits for it
    sweep.send_signal(signal.SIGTERM)
    assert sweep.wait(10) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_points_whose_values_look_alike_have_folders_of_their_own():
    assert main_module.short("lora_r", 16) == "lora_r-16"
    texts = ["a b", "a-b", "a/b", "x" * 60, "x" * 61]
    names = [main_module.short("question_template", text) for text in texts]
    assert len(set(names)) == len(texts) and all(
        len(name) < 60 and "/" not in name and " " not in name for name in names
    )


@pytest.mark.parametrize("command", ["run", "settings", "sweep", "summary", "sync"])
def test_each_command_has_help(command):
    done = tabletune(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m tabletune {command}")
    assert f"\n    {command}" in tabletune("--help").stdout


def test_the_command_line_starts_fast():
    """It imports nothing of what trains: make calls it for each stage."""
    program = "import sys, tabletune.cli; print({'torch', 'transformers', 'numpy', 'papermill'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout
        == "set()\n"
    )


def test_notebook_2_starts_without_torchs_compiler_and_without_matplotlib():
    """They would take two seconds, and half a second. Afterwards `torch.compile` is as a reader has it."""
    program = """
import os, sys
from tabletune.report.pages import show_table
import tabletune.chat.tokenizer, tabletune.model.quantization
import tabletune.training.planning, tabletune.training.trainer, tabletune.training.results

show_table({"this base": "a text"})
print({"torch._inductor.compile_fx", "matplotlib"} & set(sys.modules), os.environ.get("TORCHDYNAMO_DISABLE"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set() None", done.stderr


def test_bitsandbytes_would_still_load_the_compiler():
    """If not, upstream has mended it, and what src/tabletune/model/compat.py does can go."""
    default = Path(find_spec("bitsandbytes").origin).parent / "backends" / "default" / "ops.py"
    assert "torch.compile(fn, " in default.read_text(encoding="utf-8")


def test_fit_makes_a_list_of_one_value_and_something_empty_of_nothing():
    """`-p drop_values N/A` emptied cells of "N", "/" and "A"."""
    assert fit("drop_values", "N/A", []) == ["N/A"] and fit("drop_values", "[a, b]", []) == [
        "a",
        "b",
    ]
    assert (
        fit("drop_values", {"note": "N/A"}, []) == {"note": "N/A"}
        and fit("gguf_types", "", ["F16"]) == []
    )
    assert [fit("any", None, default) for default in ("", "some text", [], {"a": 1})] == [
        "",
        "",
        [],
        {},
    ]
    assert all(fit(name, default, default) == default for name, default in DEFAULTS.items())


def test_fit_leaves_free_text_alone():
    """What is no YAML, or would be something else, is what the reader wrote."""
    for text in (
        "What: this?",
        "- a dash",
        "*.csv",
        "[INST] {question} [/INST]",
        "a = b",
        "yes",
        "#5",
    ):
        assert fit("question_template", text, "") == text
    assert (
        fit("attn_implementation", "sdpa", "auto") == "sdpa" and fit("batch_size", "8", "auto") == 8
    )


def test_the_summary_of_a_run_also_where_a_figure_is_missing(tmp_path, capsys, monkeypatch):
    """A table of two test rows has no interval; one of labels has no structure; a lone text has no answers at all."""
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
    monkeypatch.setattr(sys, "argv", ["tabletune", "summary", str(tmp_path)])
    main_module.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2] == ["base", "47.08", "40.0", "-", "55.0", "50%", "-"]
    assert lines[3] == ["adapter", "6.00", "-", "100%", "100%"] and lines[4] == [
        "merged",
        "6.00",
        "-",
        "-",
        "-",
    ]


def test_the_summary_of_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tabletune", "summary", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"metrics.json cannot be read: No such file or directory$"
    ):
        main_module.main()
