"""Provenance: the commit of this package's code, and never that of another repository."""

import json
import subprocess
from types import SimpleNamespace

from conftest import ROOT

from tabletune.run.provenance import commit_noted_by_pip, commit_of_clone


def make_repository(folder):
    """A git repository with one commit. Returns the commit."""
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
    (folder / "theirs.txt").write_text("theirs")
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    subprocess.run([*git, "add", "theirs.txt"], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "theirs"], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_file_of_a_repository_has_its_commit(tmp_path):
    commit = make_repository(tmp_path)
    assert commit_of_clone(tmp_path / "theirs.txt") == commit


def test_a_package_installed_inside_another_repository_has_not_its_commit(tmp_path):
    make_repository(tmp_path)
    installed = tmp_path / ".venv" / "site-packages" / "tabletune" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert commit_of_clone(installed) is None


def test_a_machine_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of_clone(ROOT / "src" / "tabletune" / "__init__.py") is None


def note(monkeypatch, text):
    """Let pip have noted `text` as the origin of this package."""
    distribution = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: distribution)


def test_pips_note_has_the_commit_of_an_installation_from_a_repository(monkeypatch):
    """As in Colab, where `pip install git+https://…` leaves no clone."""
    origin = {"url": "https://github.com/a/b", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
    note(monkeypatch, json.dumps(origin))
    assert commit_noted_by_pip() == "abc123"


def test_pips_note_of_a_folder_has_no_commit(monkeypatch):
    note(monkeypatch, json.dumps({"url": "file:///a", "dir_info": {"editable": True}}))
    assert commit_noted_by_pip() is None


def test_an_installation_from_an_index_has_no_note(monkeypatch):
    note(monkeypatch, None)
    assert commit_noted_by_pip() is None
