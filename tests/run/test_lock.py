"""Locks: one program at a time works in a run folder, and no entry of a manifest is lost."""

import json
import subprocess
import sys

import pytest

from tabletune.errors import StageError
from tabletune.run.lock import RunLock, run_lock
from tabletune.run.parameters import PARAMETERS
from tabletune.run.stage import start_stage

HOLD = """
import sys, time
from pathlib import Path
from tabletune.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "02_finetune_qlora")
print("at work", flush=True)
time.sleep(60)
"""

RECORD = """
import sys
from pathlib import Path
from tabletune.run.stage import Stage
for number in range(20):
    Stage(f"{sys.argv[2]}_{number}", Path(sys.argv[1]), {}).record("fingerprint")
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that has the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_is_at_work(tmp_path, other_process):
    with pytest.raises(StageError) as caught:
        RunLock(tmp_path, "04_evaluate")
    holder = f"02_finetune_qlora (process {other_process.pid})"
    assert str(caught.value).startswith(f"{tmp_path}: {holder} is at work here already. Wait")
    assert "\n" not in str(caught.value)


def test_a_notebook_is_told_who_is_at_work(tmp_path, other_process):
    """Two notebooks that are open in Jupyter, too: the lock is the notebook's own."""
    variables = {**PARAMETERS["03_merge_adapter"], "run_dir": str(tmp_path)}
    with pytest.raises(StageError, match=r"02_finetune_qlora .* is at work here already"):
        start_stage("03_merge_adapter", variables)


def test_a_killed_process_has_no_lock(tmp_path, other_process):
    other_process.kill()
    other_process.wait()
    with run_lock(tmp_path, "04_evaluate"):
        assert (tmp_path / ".lock").read_text().startswith("04_evaluate (process ")


def test_one_process_may_lock_twice(tmp_path):
    with run_lock(tmp_path, "outer"), run_lock(tmp_path, "inner"):
        assert (tmp_path / ".lock").read_text().startswith("inner (process ")


def is_free(folder):
    """Whether another process can have the lock of a folder."""
    program = "import sys, pathlib; from tabletune.run.lock import RunLock; RunLock(pathlib.Path(sys.argv[1]), 'x')"
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True)
    return done.returncode == 0


def test_a_lock_is_held_until_the_last_of_a_process_is_released(tmp_path):
    first, second = RunLock(tmp_path, "first"), RunLock(tmp_path, "second")
    first.release()
    first.release()  # a second time does nothing
    assert not is_free(tmp_path)
    second.release()
    assert is_free(tmp_path)


def test_what_a_locked_process_starts_needs_no_lock(tmp_path):
    with run_lock(tmp_path, "make"):
        assert is_free(tmp_path)  # the process inherits TABLETUNE_LOCKED_FOLDER
    assert is_free(tmp_path)


def test_a_notebook_that_has_recorded_its_result_lets_others_work(tmp_path):
    stage = start_stage(
        "03_merge_adapter", {**PARAMETERS["03_merge_adapter"], "run_dir": str(tmp_path)}
    )
    assert not is_free(tmp_path)
    stage.record("fingerprint", {"adapter": "a"})
    assert is_free(tmp_path)


def test_a_stage_that_is_started_again_in_one_kernel_keeps_the_lock(tmp_path):
    variables = {**PARAMETERS["03_merge_adapter"], "run_dir": str(tmp_path)}
    stage = start_stage("03_merge_adapter", variables)
    stage = start_stage("03_merge_adapter", variables)
    assert not is_free(tmp_path)
    del stage
    assert is_free(tmp_path)


def test_two_processes_that_record_at_the_same_time_lose_no_entry(tmp_path):
    command = [sys.executable, "-c", RECORD, tmp_path]
    processes = [subprocess.Popen([*command, name]) for name in ("one", "other")]
    assert [process.wait() for process in processes] == [0, 0]
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert len(manifest) == 40
