"""make: what it passes on, what it refuses, and what it leaves alone."""

import re
import shutil
import subprocess

import pytest
from conftest import ROOT, make

TARGETS = re.findall(r"(?m)^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"))
DEVELOPERS = re.findall(r"(?m)^([a-z][a-z-]*):.*## ", (ROOT / "dev.mk").read_text(encoding="utf-8"))


def dry_run(*arguments):
    """What make would run."""
    command = ["make", "--dry-run", "--no-print-directory", "VENV=", "PYTHON=python", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_front_door_has_some_forty_short_lines():
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_one_command(target):
    """Of the package, but for help, clean and the set-up."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(rf"(?m)^{target}:.*\n((?:\t.*\n)*)", text)[1]
    assert recipe.count("\n") <= 1
    if target not in ("help", "clean", "setup"):
        assert recipe.startswith("\t@$(TABLETUNE) ")


@pytest.mark.parametrize("target", TARGETS)
def test_help_has_every_target(target):
    assert f"\n  make {target} " in f"\n{make('help').stdout}"


@pytest.mark.parametrize("target", DEVELOPERS)
def test_help_dev_has_every_developers_target(target):
    assert f"\n  make {target} " in f"\n{make('help-dev').stdout}"


def test_a_run_is_passed_on_in_quotes():
    words = ["PROFILE=tiny", "MODEL=qwen3-4b", "RUN_DIR=runs/my run", "GPUS=2", "ARGS=-p epochs 3"]
    done = dry_run("run-all", *words)
    command = done.stdout.splitlines()[-1]
    assert command == (
        '"python" -m tabletune run-all --profile "tiny" --model qwen3-4b --gpus 2 "runs/my run" '
        '--args="$ARGS"'
    )


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["compare", "RUNS=runs/a runs/b", "OUT=x.html"], 'compare runs/a runs/b --out "x.html"'),
        (
            ["compare", "RUNS='runs/a b' runs/c", "OUT=my page.html"],
            "compare 'runs/a b' runs/c --out \"my page.html\"",
        ),
        (
            ["sweep", "GRID=my grid.yaml", "SWEEP_DIR=my runs"],
            'sweep --grid "my grid.yaml" --folder "my runs"',
        ),
        (["trust", "RUN_DIR=runs/a"], 'trust "runs/a"'),
        (
            ["ask", "RUN_DIR=r", "QUESTIONS=q.txt", "MODEL_PART=merged"],
            '--questions "q.txt" --part merged',
        ),
        (["03_merge_adapter", "PROFILE=tiny"], 'run-all --until 03_merge_adapter --profile "tiny"'),
    ],
)
def test_what_make_is_asked_for_becomes_one_command(words, command):
    assert re.sub(" +", " ", command) in re.sub(" +", " ", dry_run(*words).stdout)


@pytest.mark.parametrize("word", ["run-al", "notebooks", "tests", "runs/mine"])
def test_a_command_that_make_does_not_have_is_refused(word):
    """Also the name of a folder, of which make itself says that nothing is to be done."""
    done = make(word)
    assert done.returncode != 0
    assert f'{word} is no command of make. "make help" lists them' in done.stderr


@pytest.mark.parametrize("target", [*TARGETS, *DEVELOPERS])
def test_every_target_is_among_the_commands(target):
    assert dry_run(target).returncode == 0


@pytest.mark.parametrize("word", ["epochs=3", "Profile=tiny", "LEARNING_RATE=1"])
def test_a_setting_that_make_does_not_have_is_refused(word):
    name, _, value = word.partition("=")
    done = make("run-all", word)
    assert done.returncode != 0
    assert f"{name} is no setting of make" in done.stderr
    assert f'ARGS="-p {name} {value}"' in done.stderr


@pytest.mark.parametrize("word", ["PIP_EXTRA_INDEX_URL=x", "HF_HUB_OFFLINE=1", "KILLS=5"])
def test_what_programs_read_from_the_environment_is_let_through(word):
    assert dry_run("help", word).returncode == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["PROFILE=t5"], ["profiles/t5.yaml cannot be read", "a100", "cpu", "t4", "tiny"]),
        (["PROFILE=tiny", "MODEL=gpt5"], ["models/gpt5.yaml cannot be read", "there are"]),
        (["PROFILE=tiny", "ARGS=-p learning_rte 1"], ["'learning_rte'", "Did you mean"]),
        (["PROFILE=tiny", "ARGS=-y 'max_lenght: 30'"], ["'max_lenght'", "Did you mean"]),
        (
            ["PROFILE=tiny", "ARGS=-p system_prompt be kind"],
            ["unrecognized arguments: kind", "ARGS="],
        ),
        (["PROFILE=tiny", "ARGS=-p system_prompt 'be kind"], ["No closing quotation", "ARGS="]),
    ],
)
def test_a_mistake_ends_in_one_line_and_begins_nothing(tmp_path, words, parts):
    done = make("run-all", f"RUN_DIR={tmp_path / 'run'}", *words)
    lines = [line for line in done.stderr.splitlines() if parts[0] in line]
    assert done.returncode != 0
    assert len(lines) == 1, done.stderr
    assert all(part in lines[0] for part in parts), lines
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_said():
    done = make("run-all", "PROFILE=tiny", "PYTHON=/usr/bin/false")
    assert done.returncode != 0
    assert "lacks a package" in done.stderr


def test_no_program_is_started_for_help():
    """Hardware is looked at only where a run needs it."""
    assert "nvidia-smi" not in (ROOT / "Makefile").read_text() + (ROOT / "dev.mk").read_text()


def test_clean_never_deletes_a_run(tmp_path):
    for name in ("Makefile", "dev.mk"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("runs/mine/merged", ".cache/tiny-llama", "export/gguf"):
        (tmp_path / name).mkdir(parents=True)
    assert make("clean", cwd=tmp_path).returncode == 0
    assert (tmp_path / "runs" / "mine" / "merged").exists()
    assert not (tmp_path / ".cache").exists()


def test_each_tool_has_its_version_in_one_place():
    """In requirements.txt or in the extras of pyproject.toml."""
    texts = [
        (ROOT / name).read_text() for name in ("Makefile", "dev.mk", ".pre-commit-config.yaml")
    ]
    assert not re.search(r"[\w-]+==\d", "".join(texts))
