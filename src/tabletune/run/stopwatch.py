"""How long a notebook computed: not how long it was open."""

import sys
import time
from typing import Any


class Stopwatch:
    """Counts the seconds in which cells run, from the moment it is made.

    In a notebook, the time between cells does not count: a notebook that is open over night has
    computed for minutes. Elsewhere, as in a script, all time counts.
    """

    def __init__(self) -> None:
        self._finished_seconds = 0.0
        self._cell_started: float | None = time.perf_counter()
        # IPython compares callbacks by identity, and each access to a method makes a new object.
        self._callbacks = {"pre_run_cell": self._start_cell, "post_run_cell": self._end_cell}
        self._shell = _current_shell()
        if self._shell is not None:
            for event, callback in self._callbacks.items():
                self._shell.events.register(event, callback)

    @property
    def seconds(self) -> float:
        """The seconds so far, those of the cell that is running included."""
        if self._cell_started is None:
            return self._finished_seconds
        return self._finished_seconds + time.perf_counter() - self._cell_started

    def stop(self) -> None:
        """Count no more."""
        self._end_cell()
        if self._shell is not None:
            for event, callback in self._callbacks.items():
                self._shell.events.unregister(event, callback)
            self._shell = None

    def _start_cell(self, event: Any = None) -> None:
        self._cell_started = time.perf_counter()

    def _end_cell(self, event: Any = None) -> None:
        if self._cell_started is not None:
            self._finished_seconds += time.perf_counter() - self._cell_started
        self._cell_started = None


def _current_shell() -> Any:
    """The IPython shell in which this runs; None in a plain Python process."""
    # IPython is slow to import, and where nobody has imported it there is no shell
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return get_ipython()
