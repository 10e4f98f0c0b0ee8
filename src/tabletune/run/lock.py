"""A lock on a run folder: one program at a time works in it."""

import os
import sys
from contextlib import contextmanager


@contextmanager
def alone(run_dir, name):
    """Hold the lock of a run folder: of two runs at the same moment the second ends and says that the first is at work.

    The system lets go of it when the process ends, however it ends.
    """
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            sys.exit(
                f"{run_dir}: {file.read()} is at work here already. Wait for it to end, or take another RUN_DIR."
            )
        except OSError:  # not every file system has locks
            pass
        file.truncate(0)
        print(f"{name} (process {os.getpid()})", end="", file=file, flush=True)
        yield
