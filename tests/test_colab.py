"""What Colab runs: its metadata, the badges, and what the install cell would change on its runtimes."""

import json
import re
import tomllib
from importlib.metadata import requires, version

import nbformat
import pytest
from conftest import ROOT, make
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SERIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["series"]
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
INSTALL = {name: notebook.cells[2].source for name, notebook in NOTEBOOKS.items()}


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
    """requirements.txt has the versions of Colab and of the install cell for all that the notebooks import."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", line)[0] for line in lines if re.match(r"[\w-]+==", line))
    packages, _ = installed(SERIES["colab_runtime"])
    wanted = {name: packages[name] for name in ("transformers", "peft", "datasets", "accelerate", "safetensors")}
    wanted |= {name.replace("_", "-"): packages[name] for name in ("tokenizers", "numpy", "pandas", "matplotlib")}
    wanted |= {"huggingface_hub": packages["huggingface-hub"], "psutil": packages["psutil"]}
    wanted |= dict(re.findall(r"([\w-]+)==([\w.]+)", INSTALL["01_format_dataset"]))
    assert {name: pins[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_colab_metadata_and_badges(name):
    metadata = NOTEBOOKS[name].metadata
    assert metadata.accelerator == "GPU" and metadata.colab.gpuType == "T4"
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
