"""What the machine is: memory that was used, versions of packages."""

import re
import sys
from itertools import chain
from pathlib import Path


def peak_memory_gib() -> dict[str, float]:
    """Peak memory of this process in GiB: {"host": resident, "gpu": reserved, if there is one}."""
    # not on Windows, and only asked for here
    import resource

    import torch

    # ru_maxrss is in bytes on macOS, in KiB on Linux
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        # reserved, not allocated: that is what has to fit on the card
        peak["gpu"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return peak


def installed(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    from importlib import metadata  # slow to import, and `tabletune --help` imports this module

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pinned(package: str) -> str:
    """What to tell pip to get a package of the extras: its name and version.

    The versions stand in pyproject.toml alone, under `[project.optional-dependencies]`.
    """
    for requirement in extra_requirements():
        text = requirement.partition(";")[0].strip()
        name = re.match(r"[\w.-]+", text)
        if name and name[0].lower() == package.lower():
            return text
    return package


def extra_requirements() -> list[str]:
    """What the extras of this package need: by the clone that we run in, or as it was installed."""
    import tomllib
    from importlib import metadata

    # an installed copy's metadata may be older than the clone's file
    project = Path(__file__).parents[3] / "pyproject.toml"
    if project.exists():
        extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        groups = extras.get("optional-dependencies", {}).values()
        return list(chain.from_iterable(groups))
    try:
        return metadata.requires("tabletune") or []
    except metadata.PackageNotFoundError:
        return []
