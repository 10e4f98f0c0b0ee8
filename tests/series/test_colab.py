"""What Colab runs: its metadata, the badges, and the install cell, which is tried on a stand-in
of a Colab machine.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import (
    distribution,
    distributions,
    packages_distributions,
    requires,
    version,
)
from pathlib import Path
from typing import ClassVar

import nbformat
import pytest
from conftest import (
    ROOT,
    STAGES,
    TINY,
    but_for_rounding,
    make,
    metrics_without_times,
    profile_parameters,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tabletune.run.parameters import PARAMETERS

SERIES = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["series"]
NOTEBOOKS = {
    path.stem: nbformat.read(path, 4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
}
WITHOUT_MODEL = ("report", "compare_runs")  # these need no GPU
INSTALL = SERIES["install_cell"].strip().format(**SERIES)
LACKING = dict(
    re.findall(r"([\w-]+)==([\w.]+)", INSTALL)
)  # what the cell brings, {package: version}
RUNTIMES = [SERIES["colab_runtime"], "latest"]


def installed(runtime):
    """What a Colab runtime has, {package: version}, and its Python; from the lists of
    googlecolab/backend-info.
    """
    lines = (ROOT / "tests" / "colab" / f"{runtime}.txt").read_text().splitlines()
    packages = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", line)[0] for line in lines if "==" in line)
    return {canonicalize_name(name): number for name, number in packages.items()}, lines[0].split()[
        -1
    ]


def changes(requirements, runtime):
    """What pip would add, and what it would have to change, to install `requirements` on a runtime.

    pip leaves alone what is there and fits. The needs of what it adds are those of the same
    versions here, which requirements.txt pins.
    """
    packages, python = installed(runtime)
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "extra": "",
    }
    environment |= {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    added, changed, todo = {}, {}, [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        if name in packages:
            if not requirement.specifier.contains(packages[name], prereleases=True):
                changed[name] = f"{packages[name]} is there, {requirement} is needed"
        elif name not in added:
            added[name] = version(name)
            assert requirement.specifier.contains(added[name], prereleases=True)
            todo += map(Requirement, requires(name) or [])
    return added, changed


def test_the_install_cell_is_the_same_in_all_notebooks():
    """It is the first code cell, and says what pyproject.toml says."""
    first = {
        name: next(c.source for c in notebook.cells if c.cell_type == "code")
        for name, notebook in NOTEBOOKS.items()
    }
    assert {name for name, source in first.items() if source != INSTALL} == set(), (
        "run `make badges`"
    )
    assert f"git+https://github.com/{SERIES['repository']}@{SERIES['ref']}" in INSTALL


@pytest.mark.pins
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_installing_changes_nothing_that_colab_has(runtime):
    """Else a kernel that had imported it would need a restart.

    What is added needs nothing else: --no-deps is safe.
    """
    added, changed = changes([f"{name}=={number}" for name, number in LACKING.items()], runtime)
    assert changed == {}
    assert added == LACKING
    assert " --no-deps " in INSTALL
    always = [text for text in requires("tabletune") or [] if "extra ==" not in text]
    assert always == []
    assert changes(["trl==0.29.1", "numpy>=3"], runtime)[1].keys() == {"numpy"}, (
        "a change would be seen"
    )


@pytest.mark.pins
def test_the_tests_run_what_colab_runs():
    """requirements.txt has the versions of Colab, torch's build aside, and those of the install
    cell.
    """
    pins = [
        Requirement(line.partition(" #")[0])
        for line in lines_of("requirements.txt")
        if "==" in line
    ]
    pins = [
        pin for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": "3.12"})
    ]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    wanted = installed(SERIES["colab_runtime"])[0] | LACKING
    differ = {
        name: (pin, wanted[name]) for name, pin in pins.items() if wanted.get(name, pin) != pin
    }
    assert differ.keys() <= {"torch", "setuptools"}, (
        differ
    )  # Colab's build of torch, and what that wants
    assert len(pins.keys() & wanted.keys()) > 80


def lines_of(name):
    return [
        line
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]


def imported(source):
    """The modules that a Python text imports, inside functions too; lines of IPython's own are
    left out.
    """
    tree = ast.parse(re.sub(r"(?m)^[%!].*", "pass", source))
    nodes = list(ast.walk(tree))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


def all_imports():
    """{module: where} of all notebooks and the package, but for modules of Python's own and of
    Colab's.
    """
    texts = {
        name: "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
        for name, notebook in NOTEBOOKS.items()
    }
    texts |= {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in (ROOT / "src").rglob("*.py")
    }
    found = {module: where for where, text in texts.items() for module in imported(text)}
    return {
        module: where
        for module, where in found.items()
        if module not in {*sys.stdlib_module_names, "google", "tabletune"}
    }


@pytest.mark.pins
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_colab_has_all_that_is_imported(runtime):
    """Or an install cell brings it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]["export"]  # a cell of notebook 7 brings them
    brought = {canonicalize_name(re.match(r"[\w-]+", text)[0]) for text in extras}
    assert "gguf" in brought
    there = installed(runtime)[0].keys() | LACKING.keys() | brought
    owners = {**packages_distributions(), "llama_cpp": ["llama-cpp-python"]}
    modules = all_imports()
    lacking = {
        m: where
        for m, where in modules.items()
        if not {canonicalize_name(o) for o in owners.get(m, [m])} & there
    }
    assert lacking == {"papermill": "src/tabletune/cli/notebooks.py"}, (
        lacking
    )  # nobody needs the command line there
    assert {"torch", "transformers", "matplotlib"} <= modules.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_colab_metadata_and_badges(name):
    metadata = NOTEBOOKS[name].metadata
    if name in WITHOUT_MODEL:
        assert "accelerator" not in metadata, "it would take a GPU from someone"
    else:
        assert metadata.accelerator == "GPU"
        assert metadata.colab.gpuType == "T4"
    assert metadata.colab.runtime_attributes.runtime_version == SERIES["colab_runtime"]
    place = f"{SERIES['repository']}/blob/{SERIES['ref']}/notebooks"
    assert (
        f"https://colab.research.google.com/github/{place}/{name}.ipynb"
        in NOTEBOOKS[name].cells[0].source
    )
    assert f"https://colab.research.google.com/github/{place}/{name}.ipynb" in all_docs()
    found = re.findall(
        r"colab\.research\.google\.com/github/(\S+?)/\w+\.ipynb",
        str(NOTEBOOKS[name].cells) + all_docs(),
    )
    assert set(found) == {place}


def all_docs():
    return "\n".join(
        path.read_text(encoding="utf-8")
        for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    )


def test_make_badges_rewrites_them_all(tmp_path):
    """The repository that it is given and the ref of pyproject.toml, in badges, links and
    install cells.
    """
    for name in ("notebooks", "notebooks_py", "docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "pyproject.toml", "Makefile", "dev.mk", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    settings = tmp_path / "pyproject.toml"
    settings.write_text(
        settings.read_text(encoding="utf-8").replace('ref = "main"', 'ref = "v1.0"'),
        encoding="utf-8",
    )
    done = make("badges", "REPO=some-one/a.fork", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in [
        tmp_path / "README.md",
        *tmp_path.glob("docs/*.md"),
        *tmp_path.glob("notebooks*/*.*"),
    ]:
        text = path.read_text(encoding="utf-8")
        places = set(re.findall(r"colab\.research\.google\.com/github/(\S+?)/\w+\.ipynb", text))
        assert places <= {"some-one/a.fork/blob/v1.0/notebooks"}, path
        assert set(re.findall(r"git\+https://github.com/([^\s\"\\]+)", text)) <= {
            "some-one/a.fork@v1.0"
        }, path
    assert "some-one/a.fork@v1.0" in (tmp_path / "notebooks" / "chat.ipynb").read_text(
        encoding="utf-8"
    )
    found = tomllib.loads(settings.read_text(encoding="utf-8"))["tool"]["series"]
    assert found == {**SERIES, "repository": "some-one/a.fork", "ref": "v1.0"}
    before = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.rglob("*.*")
        if path.suffix in (".py", ".md", ".json")
    }
    assert make("badges", cwd=tmp_path).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "owner/name" in make("badges", "REPO=nonsense", cwd=tmp_path).stderr


def test_the_install_cell_installs_on_colab_only_and_once(monkeypatch):
    """Run as it stands, with a `pip` that only notes what it was asked for."""
    import importlib.util

    import IPython

    asked = []

    class Shell:
        def run_line_magic(self, name, line):
            asked.append((name, line))

    monkeypatch.setattr(IPython, "get_ipython", Shell)
    exec(INSTALL, {})
    assert asked == [], "not on Colab"
    monkeypatch.setitem(sys.modules, "google.colab", json)
    exec(INSTALL, {})
    assert asked == [], "all is there"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else True)
    exec(INSTALL, {})
    [(name, line)] = asked
    assert name == "pip"
    assert line.startswith("install -qqq --no-deps git+https://")
    assert "trl==" in line


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_that_is_downloaded_is_run(name):
    """No code from a repository of the Hub, no pickled weights, no script; the base model by its
    commit.
    """
    code = "\n".join(cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "code")
    check_downloads(code)
    assert re.search(r'base_model_revision = "[0-9a-f]{40}"', code) or 'base_model = "' not in code


def test_nothing_that_the_package_downloads_is_run():
    app_client = ROOT / "src" / "tabletune" / "export" / "app_client.py"
    for path in (ROOT / "src" / "tabletune").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        if path == app_client:  # it asks the reader's own server, and reads the answer as JSON
            code = code.replace("urllib", "asked")
        check_downloads(code)


def without_prose(code):
    """The code, without its comments and docstrings."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not is_text(line)] or [ast.Pass()]
    return ast.unparse(tree)


def is_text(line):
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def check_downloads(code):
    code = without_prose(code)
    for forbidden in (
        "trust_remote_code",
        "torch.load",
        "pickle",
        "wget",
        "curl",
        "urllib",
        "eval(",
        "exec(",
    ):
        assert not re.search(rf"(?<![\w.]){re.escape(forbidden)}", code), forbidden
    assert loads_of_weights_that_may_be_pickles(code) == []


NO_WEIGHTS = ("Tokenizer", "Config", "Processor")  # what these load holds no weights


def loads_of_weights_that_may_be_pickles(code):
    """Calls of from_pretrained that could load weights from something else than safetensors."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        loader = ast.unparse(node.func.value)
        if node.func.attr != "from_pretrained" or any(word in loader for word in NO_WEIGHTS):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        nothing_to_load = (
            node.args and ast.unparse(node.args[0]) == "None"
        )  # weights are handed over
        if keywords.get("use_safetensors") != "True" and not nothing_to_load:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("kind.from_pretrained(folder, **options)", True),
        ("AutoModelForCausalLM.from_pretrained('a', use_safetensors=False)", True),
        ("PeftModel.from_pretrained(model, folder)", True),
        ("kind.from_pretrained(folder, use_safetensors=True, **options)", False),
        ("kind.from_pretrained(None, state_dict=weights)", False),
        ("AutoTokenizer.from_pretrained(folder)", False),
    ],
)
def test_a_load_of_pickled_weights_would_be_seen(code, refused):
    assert bool(loads_of_weights_that_may_be_pickles(code)) == refused


def test_weights_are_loaded_somewhere():
    code = "".join(path.read_text() for path in (ROOT / "src" / "tabletune" / "model").glob("*.py"))
    assert "from_pretrained(" in code
    assert "use_safetensors=True" in code


STAND_IN = {
    "google/colab/__init__.py": "",
    "google/colab/errors.py": "class Error(Exception): pass\n",
    "google/colab/drive.py": """
import os
from pathlib import Path

def mount(mountpoint):
    Path(mountpoint).mkdir(exist_ok=True)
    if not (Path(mountpoint) / "MyDrive").exists():
        (Path(mountpoint) / "MyDrive").symlink_to(os.environ["STAND_IN_DRIVE"], target_is_directory=True)
""",
    "google/colab/userdata.py": """
import os

class SecretNotFoundError(Exception): pass
class NotebookAccessError(Exception): pass

def get(name):
    try:
        return {"HF_TOKEN": os.environ["STAND_IN_SECRET"]}[name]
    except KeyError:
        raise SecretNotFoundError(name)
""",
    # a kernel of Colab has this module from the start, and the Hub is a folder that wants to see
    # the token
    "sitecustomize.py": """
import os, shutil
from pathlib import Path

import google.colab
import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import _runtime

class Response:
    headers, request = {}, None

_runtime._is_google_colab = True  # as its kernel's class would say

def place(repo_id, repo_type):
    assert huggingface_hub.get_token() == os.environ["STAND_IN_SECRET"], "the Hub wants the token of Colab's secrets"
    return Path(os.environ["STAND_IN_HUB"]) / repo_type / repo_id

def create_repo(repo_id, *, repo_type, private, exist_ok):
    assert private and exist_ok
    place(repo_id, repo_type).mkdir(parents=True, exist_ok=True)

def upload_folder(*, repo_id, repo_type, folder_path):
    shutil.copytree(folder_path, place(repo_id, repo_type), dirs_exist_ok=True)

def snapshot_download(repo_id, *, repo_type, local_dir):
    if not place(repo_id, repo_type).exists():
        raise RepositoryNotFoundError(repo_id, response=Response())
    return shutil.copytree(place(repo_id, repo_type), local_dir, dirs_exist_ok=True)

class HfApi:
    def whoami(self):
        return {"name": "some-one"}

if os.environ.get("STAND_IN_HUB"):
    huggingface_hub.HfApi = HfApi
    huggingface_hub.create_repo = create_repo
    huggingface_hub.upload_folder = upload_folder
    huggingface_hub.snapshot_download = snapshot_download
""",
}
SECRET = "hf_PlantedSecretThatMustNeverBeSeen"


RUNNER = {
    "papermill",
    "nbval",
    "coverage",
    "jedi",
}  # what runs a notebook in a test is not in Colab, but must be here


def wheel_of(name, folder):
    """A wheel made of an installed package, as an index would have it."""
    dist = distribution(name)
    left_out = ("INSTALLER", "REQUESTED", "direct_url.json", "RECORD")
    files = [
        file for file in dist.files if not str(file).startswith("..") and file.name not in left_out
    ]
    stem = f"{dist.metadata['Name'].replace('-', '_')}-{dist.version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in files:
            if "__pycache__" not in file.parts:
                archive.write(file.locate(), str(file))
        info = next(file.parts[0] for file in files if file.name == "METADATA")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """What stands in for the network: wheels for pip, and a repository for git with the package as
    it is here.

    Returns the environment that leads both there.
    """
    wheels, repository = (
        tmp_path_factory.mktemp("wheels"),
        tmp_path_factory.mktemp("git") / "repository",
    )
    for name in [*LACKING, "setuptools"]:
        wheel_of(name, wheels)
    shutil.copytree(
        ROOT / "src", repository / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    shutil.copy(ROOT / "pyproject.toml", repository)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q", "-b", SERIES["ref"]], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    return {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.{repository}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{SERIES['repository']}",
    }


def colab_machine(machine):
    """A Python that has what this one has and Colab's runtime too, and nothing else.

    Returns its site-packages.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", machine / "python"], check=True)
    [site] = (machine / "python").glob("lib/python*/site-packages")
    runner, todo = set(), list(RUNNER)
    while todo:
        name = canonicalize_name(todo.pop())
        if name not in runner:
            runner.add(name)
            needs = [Requirement(text) for text in requires(name) or []]
            todo += [
                need.name
                for need in needs
                if not need.marker or need.marker.evaluate({"extra": ""})
            ]
    there = installed(SERIES["colab_runtime"])[0].keys() | runner | {"pip"}
    hidden = {"__pycache__", "__editable__.tabletune-1.0.0.pth"}
    for dist in distributions():
        if canonicalize_name(dist.metadata["Name"]) not in there:
            hidden |= {file.parts[0] for file in dist.files}
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.name not in hidden:
            (site / path.name).symlink_to(path)
    return site


def on_colab(machine, name, run_dir, index, parameters=None, sitecustomize=None, **environment):
    """Run one notebook alone on a stand-in of a Colab machine.

    Returns the process and the executed notebook's path.

    `parameters` are more than the tiny profile's, `sitecustomize` the text of another stand-in of
    the Hub.

    The machine is a folder with `content/` as working folder, in which there is only the .ipynb, a
    Python that lacks what Colab's lacks, and a `google.colab` that mounts a folder as Drive and
    hands out one secret.
    """
    content, site = machine / "content", colab_machine(machine)
    content.mkdir(parents=True)
    for path, text in {
        **STAND_IN,
        **({"sitecustomize.py": sitecustomize} if sitecustomize else {}),
    }.items():
        (machine / "stand-in" / path).parent.mkdir(parents=True, exist_ok=True)
        (machine / "stand-in" / path).write_text(text)
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    for package, pinned in LACKING.items():  # the index has the versions of this environment
        text = text.replace(f"{package}=={pinned}", f"{package}=={version(package)}")
    (content / f"{name}.ipynb").write_text(text, encoding="utf-8")
    executed = machine / f"{name}.ipynb"
    told = {**profile_parameters("tiny", run_dir), **(parameters or {})}
    told = {key: value for key, value in told.items() if key in PARAMETERS[name]}
    profile = ["-y", json.dumps(told)]
    command = [
        machine / "python" / "bin" / "python",
        "-m",
        "papermill",
        f"{name}.ipynb",
        executed,
        *profile,
    ]
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "VIRTUAL_ENV", "PYTHON"))
    }
    environment = {
        **kept,
        "HOME": str(machine),
        "PYTHONPATH": str(machine / "stand-in"),
        **index,
        **environment,
    }
    environment |= {
        "STAND_IN_SECRET": SECRET,
        "CUDA_VISIBLE_DEVICES": "",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = packages_in(site)
    assert "tabletune" not in before
    assert "trl" not in before
    assert "gguf" not in before
    assert "torch" in before
    done = subprocess.run(
        [*map(str, command), "--log-level", "ERROR"],
        cwd=content,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert packages_in(site).items() >= before.items(), "what Colab has was changed"
    return done, executed


def packages_in(site):
    """The packages that a Python has, {name: version}, and where each is."""
    return {
        canonicalize_name(d.metadata["Name"]): (d.version, str(d._path.resolve()))
        for d in distributions(path=[str(site)])
    }


def errors_of(executed):
    """The errors that an executed notebook shows, as (name, text)."""
    outputs = [
        output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])
    ]
    return [(output.ename, output.evalue) for output in outputs if output.output_type == "error"]


def series_on_colab(folder, run_dir, index, **environment):
    """Run the four notebooks in sequence, each on a machine of its own."""
    for name in STAGES:
        done, _ = on_colab(folder / name, name, run_dir, index, **environment)
        assert done.returncode == 0, done.stderr[-2000:]


def secret_in(*folders):
    """The files under the folders that hold the planted secret."""
    files = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_first_notebook_alone_installs_what_is_lacking_and_runs(tmp_path, index):
    """In one kernel, without a restart; nothing that was there is changed; the folder has only
    the run besides.
    """
    done, executed = on_colab(tmp_path, "01_format_dataset", "runs/mine", index)
    assert done.returncode == 0, done.stderr[-2000:]
    [site] = (tmp_path / "python").glob("lib/python*/site-packages")
    new = {
        name: number
        for name, (number, _) in packages_in(site).items()
        if name in LACKING or name == "tabletune"
    }
    assert new == {name: version(name) for name in [*LACKING, "tabletune"]}
    assert sorted(path.name for path in (tmp_path / "content").iterdir()) == [
        "01_format_dataset.ipynb",
        "runs",
    ]
    first = next(cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code")
    said = "".join(output.get("text", "") for output in first.outputs)
    assert said.count("\n") <= 1, "IPython's own note, and no word of pip's"
    assert "restart the kernel" in said, "IPython's own note, and no word of pip's"


def test_an_address_that_does_not_answer_is_said_in_one_line(tmp_path, index):
    """Instead of pip's traceback; and a folder that was uploaded will do."""
    wrong = {**index, "GIT_CONFIG_KEY_0": f"url.{tmp_path / 'nowhere'}.insteadOf"}
    done, executed = on_colab(tmp_path / "wrong", "01_format_dataset", "runs/mine", wrong)
    [(name, text)] = errors_of(executed)
    assert done.returncode != 0
    assert name == "SystemExit"
    address = f"git+https://github.com/{SERIES['repository']}@{SERIES['ref']}"
    assert text.startswith(f"Nothing came from {address}: set `series`")
    assert "\n" not in text
    assert len(text) < 250
    first = next(cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code")
    said = "".join(output.get("text", "") for output in first.outputs)
    assert "Traceback" not in said, said
    assert "git" not in said.replace(address, ""), said


@pytest.mark.slow
def test_four_machines_that_share_only_drive(finished_run, tmp_path, index):
    drive = tmp_path / "drive"
    drive.mkdir()
    series_on_colab(tmp_path, "drive:remedies", index, STAND_IN_DRIVE=str(drive))
    for name in STAGES:
        assert sorted(path.name for path in (tmp_path / name / "content").iterdir()) == [
            f"{name}.ipynb",
            "drive",
        ]
    assert metrics_without_times(drive / "remedies") == but_for_rounding(
        metrics_without_times(finished_run)
    )
    assert not secret_in(*(tmp_path / name / "content" for name in STAGES), drive)
    for name in ("05_baselines", "06_trust", "07_export", "report", "compare_runs"):
        more = {"runs": ["drive:remedies"]} if name == "compare_runs" else {"gguf_types": []}
        done, _ = on_colab(
            tmp_path / name, name, "drive:remedies", index, more, STAND_IN_DRIVE=str(drive)
        )
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_four_machines_that_share_only_the_hub(finished_run, tmp_path, index):
    """The data set and the adapter go over the Hub; the merged model stays behind and is merged
    again to be scored.
    """
    hub = tmp_path / "hub"
    hub.mkdir()
    series_on_colab(tmp_path, "hub:some-one/remedies", index, STAND_IN_HUB=str(hub))
    assert sorted(path.relative_to(hub).as_posix() for path in hub.glob("*/*/*")) == [
        "dataset/some-one/remedies",
        "model/some-one/remedies",
    ]
    here = metrics_without_times(
        tmp_path / "04_evaluate" / "content" / "runs" / "some-one--remedies"
    )
    there = metrics_without_times(finished_run)
    for name in ("base", "adapter", "merged"):
        assert here[name]["perplexity"]["response"] == pytest.approx(
            there[name]["perplexity"]["response"], rel=1e-4
        )
    assert not secret_in(*(tmp_path / name / "content" for name in STAGES), hub)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("02_finetune_qlora", "Run 01_format"),
        ("03_merge_adapter", "Run 02_fine"),
        ("04_evaluate", "Run 01_format"),
        ("05_baselines", "Run 0"),
        ("06_trust", "Run 0"),
        ("07_export", "Run 0"),
        pytest.param("chat", "Run 0", marks=pytest.mark.export),  # with Gradio, which Colab has
    ],
)
def test_alone_with_nothing_to_go_on(tmp_path, index, name, first):
    done, executed = on_colab(tmp_path, name, "runs/home_remedies", index)
    assert done.returncode != 0
    [(kind, text)] = errors_of(executed)
    assert kind == "StageError"
    assert first in text
    assert 'run_dir = "drive:NAME"' in text
    assert ("set published_dataset" in text) == (name == "02_finetune_qlora")


class GatedHub(BaseHTTPRequestHandler):
    """A Hub whose every repository is gated.

    It remembers with which token each path was asked for first.

    Refused, transformers asks once more without the token that it was given.
    """

    asked_with: ClassVar[dict] = {}

    def do_GET(self):
        if "gated" in self.path:
            self.asked_with.setdefault(self.path, self.headers.get("Authorization"))
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("variable", "login", "secret", "token"),
    [
        pytest.param("variable", "login", "secret", "variable", marks=pytest.mark.slow),
        pytest.param(None, "login", "secret", "login", marks=pytest.mark.slow),
        (None, None, "secret", "secret"),
        pytest.param(None, None, None, None, marks=pytest.mark.slow),
    ],
)
def test_the_token_comes_from_environment_login_or_secrets_in_that_order(
    tmp_path, variable, login, secret, token
):
    """For a gated base model and data set. A model that is a folder here asks for no token."""
    for path, text in STAND_IN.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    if login:
        (tmp_path / "token").write_text(f"hf_{login}")
    GatedHub.asked_with.clear()
    server = HTTPServer(("localhost", 0), GatedHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = f"""if True:
        from tabletune.chat.tokenizer import load_tokenizer
        from tabletune.errors import StageError
        from tabletune.model.loading import download_model
        load_tokenizer({str(TINY)!r})
        attempts = [
            lambda: load_tokenizer("some-one/gated", "main"),
            lambda: download_model("some-one/gated", "main"),
        ]
        for attempt in attempts:
            try:
                attempt()
            except StageError as error:
                assert "gated" in str(error) and "\\n" not in str(error), error
            else:
                raise AssertionError("not gated")
    """
    names = (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "STAND_IN_SECRET",
        "HF_TOKEN_PATH",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path), "NO_PROXY": "localhost"}
    environment["HF_ENDPOINT"] = f"http://localhost:{server.server_port}"
    environment |= {"STAND_IN_SECRET": f"hf_{secret}"} if secret else {}
    environment |= {"HF_TOKEN": f"hf_{variable}"} if variable else {}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(GatedHub.asked_with) >= 2
    assert set(GatedHub.asked_with.values()) == {f"Bearer hf_{token}" if token else None}


def test_the_search_for_the_secret_finds_it(tmp_path):
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "run" / "log" / "events").write_bytes(b"\x00" + SECRET.encode())
    assert len(secret_in(tmp_path)) == 1
