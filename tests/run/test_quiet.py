"""Importing the package mutes nothing; a notebook's start does."""

import json
import os
import subprocess
import sys

import pytest

# Libraries change settings when they are imported, so all are imported first. Then each setting
# gets a value that nobody would choose, and the package is imported anew.
PROGRAM = """
import importlib, json, logging, os, pkgutil, sys, warnings

def import_package():
    import tabletune
    for module in pkgutil.walk_packages(tabletune.__path__, "tabletune."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)

import_package()
import datasets, transformers
ODD = 7

def settings():
    loggers = {name: logging.getLogger(name).level for name in sorted(logging.root.manager.loggerDict)}
    return {
        "loggers": {**loggers, "root": logging.root.level},
        "transformers": transformers.utils.logging.get_verbosity(),
        "caching": datasets.is_caching_enabled(),
        "progress bars": datasets.are_progress_bars_disabled(),
        "warnings": [str(line) for line in warnings.filters],
        "environment": dict(os.environ),
    }

for name in logging.root.manager.loggerDict:
    logging.getLogger(name).setLevel(ODD)
logging.root.setLevel(ODD)
transformers.utils.logging.set_verbosity(ODD)
datasets.enable_caching()
datasets.enable_progress_bars()
warnings.resetwarnings()
warnings.filterwarnings("always", message="odd")
for name in set(os.environ) - set(json.loads(sys.argv[1])):
    del os.environ[name]
before = settings()
if sys.argv[2]:
    exec(sys.argv[2])
else:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tabletune"]:
        del sys.modules[name]
    import_package()
after = settings()
changed = [name for name in before if before[name] != after[name]]
added = {name: value for name, value in after["environment"].items() if name not in before["environment"]}
print(json.dumps([changed, added]))
"""
START = "from tabletune.run.quiet import quiet_libraries\nquiet_libraries()"


def changed_by(code=""):
    """What `code`, or the import of every module, changes in a process of its own: the names of
    settings, and environment variables with their values.
    """
    set_by_a_start = ("TRANSFORMERS_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "MKL_CBWR")
    env = {name: value for name, value in os.environ.items() if name not in set_by_a_start}
    command = [sys.executable, "-c", PROGRAM, json.dumps(sorted(env)), code]
    finished = subprocess.run(command, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.strip().splitlines()[-1])


def test_importing_every_module_changes_no_setting_of_a_library():
    changed, added = changed_by()
    assert changed == ["environment"]
    # the same bits from the same sums; and Gradio, where it is installed, reports to nobody
    assert added.pop("GRADIO_ANALYTICS_ENABLED", "False") == "False"
    assert added == {"MKL_CBWR": "AUTO,STRICT"}


@pytest.mark.parametrize(
    ("code", "setting"),
    [
        (START, "loggers"),
        (START, "transformers"),
        (START, "caching"),
        (START, "progress bars"),
        ("warnings.filterwarnings('ignore', category=FutureWarning)", "warnings"),
    ],
)
def test_the_test_above_notices_what_a_start_changes(changes, code, setting):
    assert setting in changes(code)


@pytest.fixture(scope="module")
def changes():
    """The names of the settings that a piece of code changes; each is run once."""
    known = {}

    def run(code):
        if code not in known:
            known[code] = changed_by(code)[0]
        return known[code]

    return run


def test_the_start_of_a_notebook_quiets_libraries(changes):
    assert changes(START) == [
        "loggers",
        "transformers",
        "caching",
        "progress bars",
        "warnings",
        "environment",
    ]
