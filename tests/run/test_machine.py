"""What the machine is."""

import tomllib

from conftest import ROOT

from tabletune.run import machine
from tabletune.run.machine import installed, pinned


def test_installed_is_none_for_what_is_not():
    assert installed("a-package-that-is-not-there") is None
    assert installed("pytest")


def test_pinned_has_the_version_of_the_clone():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pinned("gradio") in project["optional-dependencies"]["chat"]
    assert pinned("Gradio") == pinned("gradio")


def test_pinned_has_the_version_of_an_installation(monkeypatch):
    requirements = ['gradio==6.20.0; extra == "chat"', 'lm_eval==0.4.13; extra == "peers"']
    monkeypatch.setattr(machine, "__file__", "/a/site-packages/tabletune/run/machine.py")
    monkeypatch.setattr("importlib.metadata.requires", lambda package: requirements)
    assert pinned("gradio") == "gradio==6.20.0"
    assert pinned("lm_eval") == "lm_eval==0.4.13"


def test_pinned_is_the_name_alone_where_no_version_is_known(monkeypatch):
    monkeypatch.setattr(machine, "extra_requirements", lambda: [])
    assert pinned("gradio") == "gradio"


def test_versions_of_extras_stand_in_pyproject_alone():
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "notebooks_py").glob("*.py")]
    files += [ROOT / "Makefile", ROOT / "dev.mk"]
    for file in files:
        text = file.read_text(encoding="utf-8")
        for package in ("gradio==", "llama-cpp-python==", "sentencepiece==", "selenium=="):
            assert f"{package}6" not in text, (file, package)
            assert f"{package}0" not in text, (file, package)
