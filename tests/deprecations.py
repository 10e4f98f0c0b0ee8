"""A plugin of pytest: a test fails in which our own code uses what a library has deprecated.

A filter of pytest goes by the line that warns, and that is a line of the library: a warning of
transformers about an argument of ours counts as transformers' own. transformers also logs some
deprecations, and a notebook mutes its log. So what is watched here is the calls of
`warnings.warn` and of `Logger.warning`. The code that caused one is the nearest on the stack that
is neither the library itself nor one that only passes calls on.
"""

import logging
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

LOGGED = re.compile(r"deprecat|will be removed", re.IGNORECASE)  # of what is only logged
ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem for path in (ROOT / "notebooks_py").glob("*.py")}
CATEGORIES = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
# they only hand the arguments of a call of ours to another library
PASS_ON = {"torch", "accelerate", "functools", "contextlib", "typing_extensions", "logging"}
# and so do these functions of others
PASSING_FUNCTIONS = {
    "peft": {"forward", "generate"},
    "trl": {"__init__", "__post_init__"},  # of its arguments, to transformers' arguments
}


def is_ours(frame):
    """Whether a frame runs code of the package or of a notebook."""
    module = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "tabletune" or module in NOTEBOOKS


def cause(frame):
    """The place in our own code that a warning raised in `frame` is due to; None if it is due to a
    library.
    """
    warning_library = frame.f_globals.get("__name__", "").partition(".")[0]
    while frame is not None:
        if is_ours(frame):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        library = frame.f_globals.get("__name__", "").partition(".")[0]
        passes_on = frame.f_code.co_name in PASSING_FUNCTIONS.get(library, ())
        if library != warning_library and library not in PASS_ON and not passes_on:
            return None
        frame = frame.f_back
    return None


def is_muted(text, kind):
    """Whether somebody ignores this very text.

    pandas does while one of its functions calls another.
    """
    for action, message, category, *_ in warnings.filters:
        if action == "ignore" and message is not None and issubclass(kind, category):
            pattern = re.compile(message, re.IGNORECASE) if isinstance(message, str) else message
            if pattern.match(text):
                return True
    return False


@contextmanager
def own_deprecations():
    """A list that fills, while the block runs, with the deprecations that our own code causes."""
    reports = []
    warn = warnings.warn
    log_warning = logging.Logger.warning

    def note(text, frame):
        if frame.f_globals.get("__name__") == __name__:  # it was noted there already
            return
        place = cause(frame)
        if place is not None:
            reports.append(f"{place}: {text}")

    def watched_warn(message, category=None, stacklevel=1, *args, **kwargs):
        kind = type(message) if isinstance(message, Warning) else category
        is_deprecation = isinstance(kind, type) and issubclass(kind, CATEGORIES)
        if is_deprecation and not is_muted(str(message), kind):
            note(message, sys._getframe(1))
        # one more frame lies between the caller and the warning
        return warn(message, category, stacklevel + 1, *args, **kwargs)

    def watched_log(self, message, *args, **kwargs):
        if LOGGED.search(str(message)):
            note(message, sys._getframe(1))
        # the log says where it was called from
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        return log_warning(self, message, *args, **kwargs)

    warnings.warn = watched_warn
    logging.Logger.warning = watched_log
    try:
        yield reports
    finally:
        warnings.warn = warn
        logging.Logger.warning = log_warning


REPORTS = pytest.StashKey()


def pytest_configure(config):
    """Watch from before the tests are imported until the end."""
    watch = own_deprecations()
    config.stash[REPORTS] = watch.__enter__()
    config.add_cleanup(lambda: watch.__exit__(None, None, None))


@pytest.fixture(autouse=True)
def no_own_deprecations(request):
    """Fail a test in which our own code uses what a library has deprecated."""
    yield
    reports = list(request.config.stash[REPORTS])
    request.config.stash[REPORTS].clear()
    transformers_log = sys.modules.get("transformers.utils.logging")
    if transformers_log is not None:
        transformers_log.warning_once.cache_clear()  # for the next test, it has said nothing yet
    assert reports == [], "our own code uses what is deprecated"
