"""One line in the terminal that says how far a notebook is.

The cell, and the progress bar inside a long cell.
"""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# tqdm: "scoring:  35%|███   | 12/34 [01:12<02:10]"; in a narrow terminal there is no bar between
BAR = re.compile(r"([^\r\n|]*?\d+%)(?:\|[^|\r\n]*\|)?\s*(\S+/\S+ \[[^\r\n]*)")
# transformers in HTML: "[ 11/46 00:12 < 00:40, 0.9 it/s, Epoch 0.2/1]", or "[ 2/46 : < :, Epoch …]"
# while it does not know the times
TRAINING = re.compile(r"\[\s*(\d+/\d+)( \d[\d:]* < [\d:]+| \d[\d:]*| : < :)[^\]]*\]")
REFRESH_SECONDS = 0.5
LOG_SECONDS = 60  # between lines, where the output is no terminal
WARM_UP_TIMEOUT = 600  # seconds until a kernel that imports first must answer


class ProgressLine:
    """Watches a notebook while it runs, and shows how far it is."""

    def __init__(self, name: str, cells: list[dict[str, Any]], stream: TextIO) -> None:
        self.name = name
        self.cells = cells
        self.stream = stream
        self.in_terminal = stream.isatty()
        self.started = time.monotonic()
        self._last_text = ""
        self._last_time = self.started
        self._ended = threading.Event()

    def text(self) -> str:
        """How far the notebook is now; "" before its first cell has begun."""
        number, cell = running_cell(self.cells)
        if cell is None:
            return ""
        text = f"{self.name}: cell {number} of {len(self.cells)}"
        inside = progress_inside(cell)
        return f"{text}, {inside}" if inside else text

    def watch(self) -> None:
        """Show the line again and again, until `end`."""
        while not self._ended.wait(REFRESH_SECONDS):
            self.show(self.text())

    def show(self, text: str) -> None:
        """Show a line if it is new.

        In a terminal in place of the last one, elsewhere once a minute.
        """
        if not text or text == self._last_text:
            return
        now = time.monotonic()
        if self.in_terminal:
            self.stream.write(f"\r\x1b[K{text[:118]}")
        # a log file keeps every line, so there are few of them
        elif now - self._last_time >= LOG_SECONDS:
            self.stream.write(f"{text}\n")
        else:
            return
        self.stream.flush()
        self._last_text = text
        self._last_time = now

    def end(self) -> None:
        """Show no more."""
        self._ended.set()

    def close(self) -> None:
        """Clear the line."""
        if self.in_terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def running_cell(cells: list[dict[str, Any]]) -> tuple[int, dict[str, Any] | None]:
    """The number, from 1, and the cell that papermill is running; (0, None) if there is none."""
    for number, cell in enumerate(cells, 1):
        if cell["metadata"].get("papermill", {}).get("status") == "running":
            return number, cell
    return 0, None


def progress_inside(cell: dict[str, Any]) -> str:
    """What the newest progress bar in a cell's output says; "" without one."""
    for output in reversed(cell.get("outputs", [])):
        # a bar overwrites itself, so the text holds all its states: the last one counts
        if output["output_type"] == "stream":
            bars = BAR.findall(output["text"][-2000:])
            if bars:
                head, tail = bars[-1]
                return f"{head.strip()} {tail.strip()}"
        html = output.get("data", {}).get("text/html", "")
        match = TRAINING.search(html)
        if "<progress" in html and match:
            times = match[2].replace(" : < :", "")
            return f"step {match[1]}{times}"
    return ""


@contextmanager
def shown_progress(name: str, cells: list[dict[str, Any]]) -> Iterator[None]:
    """Show the progress of a notebook's cells on stderr while the block runs."""
    line = ProgressLine(name, cells, sys.stderr)
    # a daemon: an interrupt must not wait for it
    thread = threading.Thread(target=line.watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        line.end()
        thread.join()
        line.close()


def register_engine() -> str:
    """Make papermill's usual engine show its progress in this way. Returns the engine's name.

    The engine has two options more: `stage_name`, and `kernel`, the manager of a kernel that has
    started already, or None.
    """
    # slow to import, so only here
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class EngineWithProgress(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            kernel = options.pop("kernel")
            # of a progress bar only the last state stays in the notebook, as one line
            options["coalesce_streams"] = True
            with shown_progress(options.pop("stage_name"), nb_man.nb.cells):
                if kernel is None:
                    return super().execute_managed_notebook(nb_man, kernel_name, **options)
                client = PapermillNotebookClient(
                    nb_man,
                    km=kernel,
                    timeout=None,
                    startup_timeout=WARM_UP_TIMEOUT,
                    coalesce_streams=True,
                )
                client.owns_km = True  # so it ends the kernel, as it does with one of its own
                return client.execute()

    papermill_engines.register("with_progress", EngineWithProgress)
    return "with_progress"
