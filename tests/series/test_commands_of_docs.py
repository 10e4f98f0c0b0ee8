"""Every command that README, docs and notebooks tell people to run is one that runs.

Commands of make are put through `make --dry-run`, and what make would start is parsed by the real
command line: targets, settings, options, profiles, models, grids and names of parameters exist.
"""

import ast
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

from tabletune.cli.main import build_parser
from tabletune.cli.options import read_run_choice, split_args
from tabletune.errors import StageError
from tabletune.export import app_client
from tabletune.run.parameters import NUMBERED, check_names

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("[bdegm]*/README.md")),
]
NOTEBOOKS = sorted((ROOT / "notebooks_py").glob("*.py"))
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PYTHON = r"(?:\S*/)?python3?"
# how a command begins, after settings of the environment such as KILLS=5
PROGRAM = (
    rf"(?:[A-Z_]+=\S* )*(?:make\b|{PYTHON} (?:-m|\S+\.py)\b|\S*pip install\b|tabletune(?= \w))"
)
# notebooks that are started by a command of another name, and read parameters of their own
NOTEBOOK_OF = {"baselines": "05_baselines", "trust": "06_trust", "export": "07_export"}
NOTEBOOK_OF |= {"report": "report", "chat": "chat"}
MINE = "mine"  # files that readers make are called so, as in profiles/mine.yaml


@dataclass(frozen=True)
class Command:
    """A command as a page has it, in one line."""

    page: str
    text: str

    def __str__(self):
        return f"{self.page}: {self.text}"


def code_of(text):
    """The lines of a Markdown text's code blocks, and its inline code, each in one line."""
    fenced = re.findall(r"(?ms)^ *```[^\n]*\n(.*?)^ *```", text)
    rest = re.sub(r"(?ms)^ *```[^\n]*\n.*?^ *```", "", text)
    indented = re.findall(r"(?m)^ {4,}(\S.*)$", rest)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [*lines, *inline]


def commands_in(text):
    """The commands among the code of a Markdown text, without comments."""
    commands = []
    for line in code_of(text):
        # in a drawing, or in two columns, a command stands after two spaces or more
        for column in re.split(r"\s{2,}", re.sub(r"(^|\s)#\s.*", "", line)):
            for part in column.split("&&"):
                if re.match(PROGRAM, part.strip()):
                    commands.append(part.strip())
    return commands


def markdown_of(notebook):
    """The Markdown of a notebook in jupytext's format."""
    cells = re.split(r"(?m)^# %%", notebook.read_text(encoding="utf-8"))
    cells = [cell for cell in cells if cell.startswith(" [markdown]")]
    return "\n".join(re.sub(r"(?m)^# ?", "", cell) for cell in cells)


def messages_of(source):
    """The texts of a module with commands in backquotes, with NAME where something is filled in."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else "NAME" for p in node.values]
            yield "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def all_commands():
    """The commands of all pages, notebooks and messages, each once for a page."""
    texts = {}
    for page in PAGES:
        texts[page] = page.read_text(encoding="utf-8")
    for notebook in NOTEBOOKS:
        texts[notebook] = markdown_of(notebook)
    for source in SOURCES:
        texts[source] = "\n".join(re.findall(r"`[^`]+`", "\n".join(messages_of(source))))
    commands = []
    for path, text in texts.items():
        for command in commands_in(text):
            commands.append(Command(str(path.relative_to(ROOT)), command))
    return list(dict.fromkeys(commands))


COMMANDS = all_commands()
OF_MAKE = [c for c in COMMANDS if re.match(r"(?:[A-Z_]+=\S* )*make\b", c.text)]
OF_PACKAGE = [c for c in COMMANDS if re.match(rf"(?:{PYTHON} -m )?tabletune\b", c.text)]
OF_PIP = [c for c in COMMANDS if "pip install" in c.text and c not in OF_MAKE]
OF_SCRIPTS = [c for c in COMMANDS if re.match(rf"{PYTHON} \S+\.py\b", c.text)]
# of other packages: llama.cpp's server, and pip
OTHER_MODULES = {"llama_cpp.server", "pip", "venv"}


def started_by(command):
    """What a command of make starts: the words of each call of the package."""
    words = [word for word in shlex.split(command) if "…" not in word]
    words = words[words.index("make") + 1 :]
    # the value of ARGS comes back as one word, as make hands it over by the environment
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "VENV=", "PYTHON=python", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    args = next((word for word in words if word.startswith("ARGS=")), "ARGS=")
    calls = []
    for line in done.stdout.splitlines():
        _, is_ours, rest = line.partition(" -m tabletune ")
        if is_ours and "base_models" not in line:
            calls.append(
                [w.replace("$ARGS", args.removeprefix("ARGS=")) for w in shlex.split(rest)]
            )
    return calls


def check_call(words):
    """Parse the words of a call of the package as the command line does, names of files included.

    Raises StageError or SystemExit for what it does not take.
    """
    options = build_parser().parse_args(split_args(words))
    name = words[0]
    if not hasattr(options, "overrides"):
        return
    profile = getattr(options, "profile", None)
    if profile and Path(profile).stem == MINE:
        options.profile = None
    notebook = NOTEBOOK_OF.get(name)
    values = {**options.files, **options.overrides}
    if notebook is None and name not in ("run", "index", "ask", "rate", "summary"):
        read_run_choice(options)
    else:
        check_names(values.keys() - {"gpus"}, {*NUMBERED, notebook or NUMBERED[0]})
    grid = getattr(options, "grid", None)
    assert grid is None or (ROOT / grid).exists(), grid


def test_the_pages_have_commands():
    """The search is one for commands that are there: an empty list would pass all that follows."""
    assert len(OF_MAKE) > 80
    assert len(OF_PACKAGE) >= 2
    assert len(OF_PIP) >= 3
    assert len(OF_SCRIPTS) >= 3


@pytest.mark.parametrize("command", OF_MAKE, ids=str)
def test_a_command_of_make_is_one_that_the_package_takes(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in started_by(command.text):
        check_call(words)


@pytest.mark.parametrize("command", OF_PACKAGE, ids=str)
def test_a_command_of_the_package_is_parsed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.text)
    words = words[words.index("tabletune") + 1 :]
    if words in ([], ["--help"], ["…"], ["COMMAND"]):
        return
    if len(words) == 1:  # only its name, in a sentence
        words += ["--help"]
    code = 0
    try:
        check_call([word for word in words if word != "…"])
    except SystemExit as ended:
        code = ended.code
    assert code == 0


@pytest.mark.parametrize("command", OF_PIP, ids=str)
def test_pip_is_asked_for_extras_that_exist(command):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\.\[([\w,-]+)\]", command.text):
        assert set(extra.split(",")) <= set(project["optional-dependencies"])
    for file in re.findall(r"-[rc] (\S+)", command.text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("command", OF_SCRIPTS, ids=str)
def test_a_script_exists_and_has_the_options(command):
    words = shlex.split(command.text)
    script = next(word for word in words if word.endswith(".py"))
    path = ROOT / script
    if Path(script).name == "app.py":  # of the exported app
        path = Path(app_client.__file__)
    assert path.exists(), script
    text = path.read_text(encoding="utf-8")
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in text, word


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_module_is_one_that_python_has(command):
    module = re.match(rf"{PYTHON} -m (\S+)", command.text)
    if module and module[1] not in {"tabletune", "pytest", *OTHER_MODULES}:
        pytest.fail(f"no module {module[1]}")


FOLDERS = "benchmarks|data|docs|examples|grids|models|notebooks|notebooks_py|profiles|src|tests"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_files_of_the_repository_exist(command):
    for name in re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w./-]+", command.text):
        assert (ROOT / name).exists() or Path(name).stem == MINE, name


# --- the checks themselves can fail


@pytest.mark.parametrize(
    "command",
    [
        "make run-al",
        "make run-all epochs=3",
        "make run-all PROFILE=t5",
        "make run-all MODEL=qwen99",
        'make run-all ARGS="-p epoch 3"',
        'make run-all ARGS="--epochs 3"',
        "make sweep GRID=grids/none.yaml",
        'make report ARGS="-p no_such_name 1"',
        "make ask RUN_DIR=runs/a QUESTIONS=q.txt MODEL_PART=all",
    ],
)
def test_a_command_that_is_none_fails(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, StageError, SystemExit)):
        for words in started_by(command):
            check_call(words)
