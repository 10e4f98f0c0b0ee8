"""What pip installs: the whole package, its texts and templates, and no dependencies."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the package, made from a copy, as building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    source = ROOT / "src"
    files = [path for path in (source / "tabletune").rglob("*") if path.is_file()]
    expected = {
        path.relative_to(source).as_posix() for path in files if "__pycache__" not in path.parts
    }
    assert expected - set(wheel.namelist()) == set()


@pytest.mark.slow
def test_the_wheel_has_the_console_script(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "tabletune = tabletune.cli.main:main" in wheel.read(name).decode()


@pytest.mark.slow
def test_the_wheel_needs_nothing_but_for_its_extras(wheel):
    name = next(name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(name).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist:")]
    assert needed
    assert all("extra ==" in line for line in needed)
