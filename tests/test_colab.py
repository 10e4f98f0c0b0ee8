"""What Colab runs: its metadata, the badges, and what the install cell would change on its runtimes."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import packages_distributions, requires, version
from typing import ClassVar

import nbformat
import pytest
from conftest import ROOT, STAGES, TABLE, TINY, but_for_rounding, make, metrics_without_times
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SERIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["series"]
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
WITH_MODEL = [name for name in NOTEBOOKS if name not in ("report", "compare_runs")]  # those need no GPU, no package
INSTALL = {name: NOTEBOOKS[name].cells[2].source for name in WITH_MODEL}


def installed(runtime):
    """What a Colab runtime has, {package: version}, and its Python; from the lists of googlecolab/backend-info."""
    lines = (ROOT / "tests" / "colab" / f"{runtime}.txt").read_text().splitlines()
    packages = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", line)[0] for line in lines if "==" in line)
    return {canonicalize_name(name): number for name, number in packages.items()}, lines[0].split()[-1]


def changes(requirements, runtime):
    """What pip would add, and what it would have to change, to install `requirements` on a runtime.

    pip leaves alone what is there and fits. The needs of what it adds are those of the same versions here, which
    requirements.txt pins.
    """
    packages, python = installed(runtime)
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python, "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
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
    assert len(set(INSTALL.values())) == 1


@pytest.mark.parametrize("runtime", [SERIES["colab_runtime"], "latest"])
def test_installing_changes_nothing_that_colab_has(runtime):
    """Else a kernel that had imported it would need a restart. What is added is written down here."""
    command = re.search(r'"install -q (.*?)"', INSTALL["01_format_dataset"])[1].split()
    added, changed = changes(command, runtime)
    assert changed == {}
    assert added == {"trl": "0.29.1", "bitsandbytes": "0.50.2", "liger-kernel": "0.8.5"}
    assert changes(["trl==0.29.1", "numpy>=3"], runtime)[1].keys() == {"numpy"}, "a change would be seen"


def test_the_tests_run_what_colab_runs():
    """requirements.txt has the versions of Colab, torch's build aside, and those of the install cell."""
    pins = dict(re.findall(r"(?m)^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text()))
    pins = {canonicalize_name(name): number for name, number in pins.items()}
    wanted = installed(SERIES["colab_runtime"])[0] | dict(re.findall(r"([\w-]+)==([\w.]+)", INSTALL["chat"]))
    differ = {name: (pin, wanted[name]) for name, pin in pins.items() if wanted.get(name, pin) != pin}
    assert differ.keys() == {"torch"}, differ
    assert len(pins.keys() & wanted.keys()) > 80


@pytest.mark.parametrize("runtime", [SERIES["colab_runtime"], "latest"])
def test_colab_has_all_that_the_notebooks_import(runtime):
    """Or the install cell brings it. Python's own modules are those of this Python; none of them has left since."""
    code = "\n".join(cell.source for name in STAGES for cell in NOTEBOOKS[name].cells if cell.cell_type == "code")
    imported = set(re.findall(r"(?m)^\s*(?:import|from) ([\w]+)", code.replace("import gradio", "")))
    third = imported - sys.stdlib_module_names - {"google"}
    there = installed(runtime)[0].keys() | {"trl", "bitsandbytes", "liger-kernel"}
    owners = packages_distributions()
    assert {name for name in third if not {canonicalize_name(o) for o in owners[name]} & there} == set()
    assert {"torch", "pyarrow", "psutil", "transformers"} <= third
    gone = (
        "aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis nntplib"
    )
    gone += " ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib"
    assert not imported & set(gone.split()), "not in Python 3.13"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_colab_metadata_and_badges(name):
    metadata = NOTEBOOKS[name].metadata
    if name in WITH_MODEL:
        assert metadata.accelerator == "GPU" and metadata.colab.gpuType == "T4"
    else:
        assert "accelerator" not in metadata, "it would take a GPU from someone"
    assert metadata.colab.runtime_attributes.runtime_version == SERIES["colab_runtime"]
    link = f"https://colab.research.google.com/github/{SERIES['repository']}/blob/main/notebooks/{name}.ipynb"
    assert link in NOTEBOOKS[name].cells[0].source
    assert link in (ROOT / "README.md").read_text()
    everywhere = [*NOTEBOOKS[name].cells, {"source": (ROOT / "README.md").read_text()}]
    owners = {
        owner
        for cell in everywhere
        for owner in re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", cell["source"])
    }
    assert owners == {SERIES["repository"]}


def test_make_badges_rewrites_them_all(tmp_path, monkeypatch):
    for folder in ("notebooks", "notebooks_py"):
        (tmp_path / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    for name in ("README.md", "pyproject.toml", "Makefile", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = make("badges", "REPO=some-one/a.fork", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for path in [tmp_path / "README.md", *tmp_path.glob("notebooks*/*")]:
        found = set(re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", path.read_text()))
        assert found == {"some-one/a.fork"}, path
    assert tomllib.loads((tmp_path / "pyproject.toml").read_text())["tool"]["series"] == {
        **SERIES,
        "repository": "some-one/a.fork",
    }
    assert "owner/name" in make("badges", "REPO=nonsense", cwd=tmp_path).stderr


def test_the_install_cell_installs_on_colab_only_and_once(monkeypatch):
    """Run as it stands, with a `pip` that only notes what it was asked for."""
    import importlib.util
    import sys

    import IPython

    asked = []

    class Shell:
        def run_line_magic(self, name, line):
            asked.append((name, line))

    monkeypatch.setattr(IPython, "get_ipython", Shell)
    exec(INSTALL["02_finetune_qlora"], {})
    assert asked == [], "not on Colab"
    monkeypatch.setitem(sys.modules, "google.colab", json)
    exec(INSTALL["02_finetune_qlora"], {})
    assert asked == [], "all is there"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else True)
    exec(INSTALL["02_finetune_qlora"], {})
    assert [name for name, _ in asked] == ["pip"] and "trl==" in asked[0][1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_nothing_that_is_downloaded_is_run(name):
    """No code from a repository of the Hub, no pickled weights, no script; the base model by its commit."""
    code = "\n".join(cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "code")
    for forbidden in (
        "trust_remote_code",
        "torch.load",
        "pickle",
        "wget",
        "curl",
        "urllib",
        "requests",
        "eval(",
        "exec(",
    ):
        assert not re.search(rf"(?<![\w.]){re.escape(forbidden)}", code), forbidden
    for call in re.findall(r"AutoModelForCausalLM\.from_pretrained\([^)]*\)", code):
        assert "use_safetensors=True" in call
    assert re.search(r'base_model_revision = "[0-9a-f]{40}"', code) or 'base_model = "' not in code


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
    # a kernel of Colab has this module from the start, and the Hub is a folder that wants to see the token
    "sitecustomize.py": """
import os, shutil
from pathlib import Path

import google.colab
import huggingface_hub
from huggingface_hub.errors import RepositoryNotFoundError

class Response:
    headers, request = {}, None

def place(repo_id, repo_type, token):
    assert token == os.environ["STAND_IN_SECRET"], "the Hub wants the token of Colab's secrets"
    return Path(os.environ["STAND_IN_HUB"]) / repo_type / repo_id

def create_repo(repo_id, *, repo_type, private, exist_ok, token):
    assert private and exist_ok
    place(repo_id, repo_type, token).mkdir(parents=True, exist_ok=True)

def upload_folder(*, repo_id, repo_type, folder_path, token):
    shutil.copytree(folder_path, place(repo_id, repo_type, token), dirs_exist_ok=True)

def snapshot_download(repo_id, *, repo_type, local_dir, token):
    if not place(repo_id, repo_type, token).exists():
        raise RepositoryNotFoundError(repo_id, response=Response())
    return shutil.copytree(place(repo_id, repo_type, token), local_dir, dirs_exist_ok=True)

if os.environ.get("STAND_IN_HUB"):
    huggingface_hub.create_repo = create_repo
    huggingface_hub.upload_folder = upload_folder
    huggingface_hub.snapshot_download = snapshot_download
""",
}
SECRET = "hf_PlantedSecretThatMustNeverBeSeen"


def on_colab(machine, name, run_dir, parameters=None, sitecustomize=None, **environment):
    """Run one notebook alone on a stand-in of a Colab machine. Returns the process and the executed notebook's path.

    `parameters` are more than the tiny profile's, `sitecustomize` the text of another stand-in of the Hub.

    The machine is a folder with `content/` as working folder, in which there is only the .ipynb, and a `google.colab`
    that mounts a folder as Drive and hands out one secret.
    """
    content = machine / "content"
    content.mkdir(parents=True)
    for path, text in {**STAND_IN, **({"sitecustomize.py": sitecustomize} if sitecustomize else {})}.items():
        (machine / "stand-in" / path).parent.mkdir(parents=True, exist_ok=True)
        (machine / "stand-in" / path).write_text(text)
    shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", content)
    executed = machine / f"{name}.ipynb"
    profile = ["-f", ROOT / "profiles" / "tiny.yaml"]
    known = {"base_model": str(TINY), "dataset": str(TABLE), "run_dir": run_dir, **(parameters or {})}
    profile += ["-y", json.dumps(known)]
    command = [sys.executable, "-m", "papermill", f"{name}.ipynb", executed, *profile, "--log-level", "ERROR"]
    environment = {**os.environ, "HOME": str(machine), "PYTHONPATH": str(machine / "stand-in"), **environment}
    environment |= {"STAND_IN_SECRET": SECRET, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), cwd=content, env=environment, capture_output=True, text=True)
    return done, executed


def series_on_colab(folder, run_dir, **environment):
    """Run the four notebooks in sequence, each on a machine of its own."""
    for name in STAGES:
        done, _ = on_colab(folder / name, name, run_dir, **environment)
        assert done.returncode == 0, done.stderr[-2000:]


def secret_in(*folders):
    """The files under the folders that hold the planted secret."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if SECRET.encode() in path.read_bytes()]


def test_four_machines_that_share_only_drive(finished_run, tmp_path):
    drive = tmp_path / "drive"
    drive.mkdir()
    series_on_colab(tmp_path, "drive:remedies", STAND_IN_DRIVE=str(drive))
    for name in STAGES:
        assert sorted(path.name for path in (tmp_path / name / "content").iterdir()) == [f"{name}.ipynb", "drive"]
    assert metrics_without_times(drive / "remedies") == but_for_rounding(metrics_without_times(finished_run))
    assert not secret_in(tmp_path)


def test_four_machines_that_share_only_the_hub(finished_run, tmp_path):
    """The data set and the adapter go over the Hub; the merged model stays behind and is merged again to be scored."""
    hub = tmp_path / "hub"
    hub.mkdir()
    series_on_colab(tmp_path, "hub:some-one/remedies", STAND_IN_HUB=str(hub))
    assert sorted(path.relative_to(hub).as_posix() for path in hub.glob("*/*/*")) == [
        "dataset/some-one/remedies",
        "model/some-one/remedies",
    ]
    here = metrics_without_times(tmp_path / "04_evaluate" / "content" / "runs" / "some-one--remedies")
    there = metrics_without_times(finished_run)
    for name in ("base", "adapter", "merged"):
        assert here[name]["perplexity"]["response"] == pytest.approx(there[name]["perplexity"]["response"], rel=1e-4)
    assert not secret_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "first"),
    [("02_finetune_qlora", "Run 01_format"), ("03_merge_adapter", "Run 02_fine"), ("04_evaluate", "Run 01_format")],
)
def test_alone_with_nothing_to_go_on(tmp_path, name, first):
    done, executed = on_colab(tmp_path, name, "runs/home_remedies")
    assert done.returncode != 0
    [error] = [
        output
        for cell in nbformat.read(executed, 4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert error.ename == "StageError" and first in error.evalue and "in Colab one in Drive" in error.evalue
    assert ("set published_dataset" in error.evalue) == (name == "02_finetune_qlora")


class GatedHub(BaseHTTPRequestHandler):
    """A Hub whose every repository is gated. It remembers with which token each path was asked for first.

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
    ("secret", "variable", "login", "token"),
    [
        ("secret", "variable", "login", "secret"),
        (None, "variable", "login", "variable"),
        (None, None, "login", "login"),
        (None, None, None, None),
    ],
)
def test_the_token_comes_from_secrets_environment_or_login_in_that_order(tmp_path, secret, variable, login, token):
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
        import sys
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from conftest import definitions
        ours = definitions("01_format_dataset")
        assert ours.hub_token({str(TINY)!r}) is None
        attempts = [
            lambda: ours.load_tokenizer("some-one/gated", "main"),
            lambda: list(ours.read_hub("some-one/gated", "main", [], [])),
            lambda: definitions("03_merge_adapter").fetch("some-one/gated", "main"),
        ]
        for attempt in attempts:
            try:
                attempt()
            except Exception as error:
                assert type(error).__name__ == "StageError", error
            else:
                raise AssertionError("not gated")
        assert ours.commit_of("some-one/gated", "main") == "main"
    """
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "STAND_IN_SECRET", "HF_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(tmp_path), "HF_HOME": str(tmp_path), "NO_PROXY": "localhost"}
    environment["HF_ENDPOINT"] = f"http://localhost:{server.server_port}"
    environment |= {"STAND_IN_SECRET": f"hf_{secret}"} if secret else {}
    environment |= {"HF_TOKEN": f"hf_{variable}"} if variable else {}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(GatedHub.asked_with) >= 4
    assert set(GatedHub.asked_with.values()) == {f"Bearer hf_{token}" if token else None}


def test_drive_is_in_colab_only(evaluation):
    with pytest.raises(evaluation.StageError, match="only Colab can mount Google Drive"):
        evaluation.open_run("drive:remedies")
    assert evaluation.hub_token() is None


def test_the_search_for_the_secret_finds_it(tmp_path):
    (tmp_path / "run" / "log").mkdir(parents=True)
    (tmp_path / "run" / "log" / "events").write_bytes(b"\x00" + SECRET.encode())
    assert len(secret_in(tmp_path)) == 1
