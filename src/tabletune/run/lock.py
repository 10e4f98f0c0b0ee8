"""Locks on a run folder: one program at a time works in it, and one at a time changes its manifest.

The system releases a lock when the process ends, however it ends. Where a file system has no locks
(Google Drive, some network disks), or the system has none of this kind (Windows), nothing is
locked.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tabletune.errors import StageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The command line sets it to the folder that it has locked: the kernels that it starts need no lock
# of their own.
HELD_BY_PARENT = "TABLETUNE_LOCKED_FOLDER"
_open_locks: dict[Path, list] = {}  # {folder that this process has locked: [its file, how often]}


class RunLock:
    """This process's lock on a run folder, held until `release`.

    A second one in the same process is no error. Raises StageError, which says who is at work, if
    another process has the lock. `name` is what others are told.
    """

    def __init__(self, folder: Path, name: str) -> None:
        key = folder.resolve()
        self._key: Path | None = None
        # flock is per open file: a second open file of this process would be refused
        if key not in _open_locks:
            if os.environ.get(HELD_BY_PARENT) == str(key):
                return
            _open_locks[key] = [_locked_file(folder), 0]
        file = _open_locks[key][0]
        _open_locks[key][1] += 1
        self._key = key
        # the text tells the next one who is at work
        file.truncate(0)
        file.write(f"{name} (process {os.getpid()})")
        file.flush()

    def release(self) -> None:
        """Let other processes work in the folder, once all locks of this process are released."""
        if self._key is None:
            return
        entry = _open_locks[self._key]
        entry[1] -= 1
        if entry[1] == 0:
            entry[0].close()
            del _open_locks[self._key]
        self._key = None


def _locked_file(folder: Path) -> TextIO:
    """The lock file of a folder, open and locked.

    Raises StageError if another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+", encoding="utf-8")
    if _try_lock(file):
        return file
    file.seek(0)
    holder = file.read()
    file.close()
    raise StageError(
        f"{folder}: {holder} is at work here already. Wait for it to end (a notebook that is open "
        "in Jupyter: shut down its kernel), or take another RUN_DIR."
    )


@contextmanager
def run_lock(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a run folder, for this process and for those that it starts.

    Raises StageError.
    """
    lock = RunLock(folder, name)
    # a lock inside a lock, as a sweep makes it, puts the outer one back
    outer = os.environ.get(HELD_BY_PARENT)
    os.environ[HELD_BY_PARENT] = str(folder.resolve())
    try:
        yield
    finally:
        if outer is None:
            del os.environ[HELD_BY_PARENT]
        else:
            os.environ[HELD_BY_PARENT] = outer
        lock.release()


@contextmanager
def manifest_lock(folder: Path) -> Iterator[None]:
    """Wait for, and hold, the lock under which `manifest.json` is read, changed and written."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".manifest.lock").open("a", encoding="utf-8") as file:
        _try_lock(file, wait=True)
        yield


def _try_lock(file: TextIO, wait: bool = False) -> bool:
    """Whether this process has the lock of an open file now.

    Yes, too, where this file system has no locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True
