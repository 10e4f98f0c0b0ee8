"""Kernels that import a notebook's libraries while the notebook before it still runs.

Each notebook runs in a process of its own, and each imports PyTorch, transformers and more: 7 to 15
seconds, four times in `make run-all`. Imports keep one core busy, and there are at least two. So
the kernel of the next notebook starts early, imports what that notebook imports, and waits. This
module, started with the path of a notebook, is such a kernel.
"""

import ast
import atexit
import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

LAUNCHER = "ipykernel_launcher"  # what the module replaces in the command of Python's kernel
FREE_GIB = 3.0  # of RAM, to hold a second process with all libraries: it takes up to 0.8
# a newer ipykernel warns that others on this machine could listen
QUIET_KERNEL = "--log-level=ERROR"
SETS_ENVIRONMENT = "os.environ.setdefault"


def code_of(notebook: Path) -> list[str]:
    """The code cells of a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def import_names(statement: ast.ImportFrom) -> None:
    """Import a module and take names from it, as `from module import names` does.

    transformers and others import a part only when one of its names is asked for.
    """
    module = importlib.import_module(statement.module or "")
    for alias in statement.names:
        getattr(module, alias.name, None)


def run_import(statement: ast.stmt) -> None:
    """Import what a statement imports. Set an environment variable for which it has a default.

    Libraries read some variables when they are imported. Any other statement does nothing here.
    """
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            importlib.import_module(alias.name)
    elif isinstance(statement, ast.ImportFrom):
        import_names(statement)
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        call = statement.value
        constant = all(isinstance(argument, ast.Constant) for argument in call.args)
        if ast.unparse(call.func) == SETS_ENVIRONMENT and constant:
            os.environ.setdefault(*map(ast.literal_eval, call.args))


def warm_up(notebook: Path) -> None:
    """Import what the cells of a notebook import, in their order; what fails is left to the cell.

    Only statements at the top level of a cell count, so nothing else of the notebook runs.
    """
    for code in code_of(notebook):
        with contextlib.suppress(SyntaxError):  # a cell with a magic command
            for statement in ast.parse(code).body:
                with contextlib.suppress(Exception):  # whatever a library raises
                    run_import(statement)


class WarmKernel:
    """The kernel of the next notebook. As a context manager it ends one that nobody has taken."""

    def __init__(self) -> None:
        """No kernel has started."""
        self.notebook: Path | None = None
        self.manager: Any = None  # a jupyter_client.KernelManager

    def start(self, notebook: Path) -> None:
        """Start a kernel for a notebook, if a second process would not be in the way."""
        self.stop()
        if not has_room():
            return
        # slow to import, so only here
        from jupyter_client import KernelManager

        manager = KernelManager(kernel_name="python3")
        command = manager.kernel_spec.argv
        if LAUNCHER not in command:  # a kernel of the reader's own, started in another way
            return
        place = command.index(LAUNCHER)
        command[place : place + 1] = ["tabletune.cli.warm_kernel", str(notebook)]
        manager.client_class = "jupyter_client.asynchronous.AsyncKernelClient"  # as nbclient wants
        options = [QUIET_KERNEL, "--HistoryManager.hist_file=:memory:"]
        manager.start_kernel(extra_arguments=options)
        self.notebook = notebook
        self.manager = manager

    def take(self, notebook: Path) -> Any:
        """The manager of the kernel that was started for a notebook; None if there is none.

        From now on the caller has to end it.
        """
        if self.manager is None or self.notebook != notebook or not self.manager.is_alive():
            self.stop()
            return None
        manager = self.manager
        self.manager = None
        return manager

    def stop(self) -> None:
        """End a kernel that was not taken."""
        if self.manager is not None:
            self.manager.shutdown_kernel(now=True)
        self.manager = None

    def __enter__(self) -> "WarmKernel":
        """Nothing is started yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End a kernel that was not taken."""
        self.stop()


def has_room() -> bool:
    """Whether there are a core and memory for a second process that imports everything."""
    import psutil

    free_gib = psutil.virtual_memory().available / 2**30
    return (os.cpu_count() or 1) > 1 and free_gib >= FREE_GIB


def be_kernel() -> None:
    """Be a kernel that imports before it answers. The first argument is the notebook.

    The kernel stands when the imports begin: transformers and tqdm look then whether they are in a
    notebook. As in `ipykernel_launcher`, the current folder is first no place to look for modules.
    """
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    # Registered first, so it comes last: after all that libraries want to do at the end, Python
    # would take PyTorch and transformers apart, piece by piece, for more than two seconds.
    atexit.register(os._exit, 0)
    from ipykernel.kernelapp import IPKernelApp

    notebook = Path(sys.argv.pop(1))
    app = IPKernelApp.instance()
    app.initialize()
    # as in a cell: libraries such as pandas ask `get_ipython` whether they are in a notebook
    with app.shell.builtin_trap:
        warm_up(notebook)
    app.start()


if __name__ == "__main__":
    be_kernel()
