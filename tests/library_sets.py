"""The packages of an environment with other versions than requirements.txt has: what `make
test-newest` and `make test-colab` install.

    python tests/library_sets.py newest    the newest releases that go together
    python tests/library_sets.py colab     the versions of Colab's newest runtime
    python tests/library_sets.py           what this environment has, in one line

The first two print one requirement a line. PyTorch stays as it is pinned: Colab has builds of its
own. It needs nothing but Python.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINE = re.compile(r"([\w.-]+)==([^\s;#]+)\s*(?:;\s*([^#]+))?")
# torch, and what it wants; and tools, whose own format or choice of cases other tests rely on
PINNED = {"torch", "setuptools", "pytest", "hypothesis", "jupytext", "ruff", "mypy"}
# the libraries that move, which docs/compatibility.md names
MOVING = (
    "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers",
    "huggingface_hub", "numpy", "pandas", "torch",
)  # fmt: skip
TRANSITIVE = "# what these bring in"  # the heading in requirements.txt


def same_name(name: str) -> str:
    """The name of a package, as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(text: str, python: tuple[int, ...]) -> list[tuple[str, str, str]]:
    """(name, version, marker) of the lines of requirements.txt that count for a Python.

    The marker has what is left beside the version of Python: a system.
    """
    lines = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        name, version, marker = match[1], match[2], (match[3] or "").strip()
        limit = re.fullmatch(r'python_version (<|==|>) "3\.(\d+)"', marker)
        if limit:
            minor = int(limit[2])
            holds = {"<": python[1] < minor, "==": python[1] == minor, ">": python[1] > minor}
            if not holds[limit[1]]:
                continue
            marker = ""
        lines.append((name, version, marker))
    return lines


def newest(text: str, python: tuple[int, ...]) -> list[str]:
    """The packages that requirements.txt asks for itself, of any version; what they bring in is
    left to pip.
    """
    lines = []
    for name, version, marker in requirements(text.partition(TRANSITIVE)[0], python):
        pin = f"=={version}" if same_name(name) in PINNED else ""
        lines.append(f"{name}{pin}; {marker}" if marker else f"{name}{pin}")
    return lines


def colab(text: str, runtime: str, python: tuple[int, ...]) -> list[str]:
    """All packages of requirements.txt, in the versions that the runtime has, where it has them."""
    versions = {same_name(name): version for name, version, _ in requirements(runtime, python)}
    lines = []
    for name, version, marker in requirements(text, python):
        if same_name(name) not in PINNED:
            version = versions.get(same_name(name), version)
        lines.append(f"{name}=={version}; {marker}" if marker else f"{name}=={version}")
    return lines


def installed_versions() -> str:
    """The versions of the libraries that move, in this environment, as one line."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in MOVING)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(installed_versions())
        sys.exit()
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    if sys.argv[1] == "newest":
        lines = newest(pins, sys.version_info)
    else:
        runtime = (ROOT / "tests" / "colab" / "latest.txt").read_text(encoding="utf-8")
        lines = colab(pins, runtime, sys.version_info)
    print("\n".join(lines))
