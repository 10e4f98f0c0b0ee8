"""Importing the package mutes nothing; a notebook's start does."""

import os
import subprocess
import sys

import pytest

STATE = """
import logging, sys, warnings
import datasets, transformers
before = (
    logging.getLogger("bitsandbytes").level,
    logging.getLogger("liger_kernel").level,
    transformers.utils.logging.get_verbosity(),
    datasets.is_caching_enabled(),
    datasets.are_progress_bars_disabled(),
    list(warnings.filters),
)
{between}
after = (
    logging.getLogger("bitsandbytes").level,
    logging.getLogger("liger_kernel").level,
    transformers.utils.logging.get_verbosity(),
    datasets.is_caching_enabled(),
    datasets.are_progress_bars_disabled(),
    [line for line in warnings.filters if line in before[-1] or "tabletune" in str(line)],
)
names = ("bitsandbytes", "liger_kernel", "transformers", "caching", "progress bars", "warnings")
print(*[name for name, one, other in zip(names, before, after) if one != other], sep=", ")
"""
IMPORT_ALL = """
import importlib, pkgutil, tabletune
for module in pkgutil.walk_packages(tabletune.__path__, "tabletune."):
    if "__main__" not in module.name and "export" not in module.name:
        importlib.import_module(module.name)
"""


def changed_by(code):
    """What `code` changes of the libraries' settings in a process of its own: a list of names."""
    command = [sys.executable, "-c", STATE.replace("{between}", code)]
    set_by_a_start = ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    env = {name: value for name, value in os.environ.items() if name not in set_by_a_start}
    finished = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return finished.stdout.strip().splitlines()[-1:] or [""]


@pytest.mark.slow
def test_importing_every_module_changes_no_setting_of_a_library():
    assert changed_by(IMPORT_ALL) == [""]


def test_the_start_of_a_notebook_quiets_libraries():
    code = "from tabletune.run.quiet import quiet_libraries\nquiet_libraries()"
    changed = changed_by(code)[0]
    assert changed == "liger_kernel, transformers, caching, progress bars"
