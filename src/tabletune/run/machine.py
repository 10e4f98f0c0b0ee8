"""What the machine is: memory that was used, versions of packages."""

import sys
from importlib.metadata import PackageNotFoundError, version


def peak_memory_gib():
    """Peak memory of this process in GiB: {"host": resident, "gpu": reserved, if there is one}."""
    import resource

    import torch

    unit = (
        2**30 if sys.platform == "darwin" else 2**20
    )  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return peak


def installed(package):
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
