"""The stopwatch counts what a notebook computes, and not how long it is open."""

import time
from types import SimpleNamespace

import pytest
from IPython.core.interactiveshell import InteractiveShell

from tabletune.run import stopwatch as stopwatch_module
from tabletune.run.stopwatch import Stopwatch


@pytest.fixture
def shell(monkeypatch):
    """An IPython shell that Stopwatch takes for the one that it runs in."""
    shell = InteractiveShell()
    monkeypatch.setattr(stopwatch_module, "_current_shell", lambda: shell)
    return shell


def run_cell(shell, seconds):
    shell.events.trigger("pre_run_cell", SimpleNamespace())
    time.sleep(seconds)
    shell.events.trigger("post_run_cell", SimpleNamespace())


def test_the_time_between_cells_does_not_count(shell):
    stopwatch = Stopwatch()
    shell.events.trigger("post_run_cell", SimpleNamespace())
    time.sleep(0.3)
    run_cell(shell, 0.1)
    assert stopwatch.seconds == pytest.approx(0.1, abs=0.08)


def test_the_cell_that_runs_counts(shell):
    stopwatch = Stopwatch()
    time.sleep(0.1)
    assert stopwatch.seconds >= 0.1


def test_a_stopped_one_counts_no_more(shell):
    stopwatch = Stopwatch()
    stopwatch.stop()
    before = stopwatch.seconds
    run_cell(shell, 0.05)
    assert stopwatch.seconds == before


def test_a_script_counts_all_time(monkeypatch):
    monkeypatch.setattr(stopwatch_module, "_current_shell", lambda: None)
    stopwatch = Stopwatch()
    time.sleep(0.1)
    assert stopwatch.seconds >= 0.1
