"""The plugin deprecations.py notices what our own code causes, and blames it for nothing else."""

import logging
import sys
import types
import warnings

import pytest
from conftest import ROOT
from deprecations import own_deprecations

pytest_plugins = ["pytester"]
LIBRARY = """
import functools
import logging
import warnings

@functools.lru_cache
def log_once(text):
    logging.getLogger("transformers").warning(text)

class Arguments:
    def __init__(self, old=None):
        if old is not None:
            warnings.warn("`old` is deprecated", FutureWarning)

def warn():
    warnings.warn("`warn` is deprecated", DeprecationWarning, stacklevel=2)

def log():
    log_once("`log` is deprecated")

def log_removal():
    log_once("`log_removal` will be removed in version 6")

def call_another():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`warn` is")
        warn()

def other():
    warnings.warn("this number is odd", UserWarning)
"""
BETWEEN = """
import library

class More(library.Arguments):
    def __init__(self, old=None):
        super().__init__(old)

def outdated():
    library.warn()
"""


@pytest.fixture
def module(monkeypatch):
    """A function that makes a module of a name and a source."""

    def make(name, source):
        made = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(source, f"{name}.py", "exec"), vars(made))
        return made

    make("library", LIBRARY)
    make("trl", BETWEEN)
    return make


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("library.warn()", "`warn` is deprecated"),
        ("library.log()", "`log` is deprecated"),
        ("library.log_removal()", "`log_removal` will be removed in version 6"),
        ("library.Arguments(old=1)", "`old` is deprecated"),
        ("trl.More(old=1)", "`old` is deprecated"),
    ],
)
@pytest.mark.parametrize("name", ["tabletune.some.module", "02_finetune_qlora"])
@pytest.mark.filterwarnings("ignore")
def test_what_our_code_causes_is_noticed(module, name, source, expected):
    with own_deprecations() as reports:
        module(name, f"import library, trl\n{source}")
    assert reports == [f"{name}.py:2: {expected}"]


@pytest.mark.parametrize(
    "source",
    [
        "trl.outdated()",
        "library.other()",
        "library.call_another()",
        "library.Arguments()",
        "trl.More()",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_library_causes_is_not_ours(module, source):
    with own_deprecations() as reports:
        module("tabletune.some.module", f"import library, trl\n{source}")
    assert reports == []


def test_a_warning_names_the_same_line_while_it_is_watched():
    def outdated():
        warnings.warn("old", DeprecationWarning, stacklevel=2)

    with own_deprecations(), pytest.warns(DeprecationWarning, match="old") as caught:
        outdated()
    assert caught[0].filename == __file__


def test_a_log_entry_names_the_same_line_while_it_is_watched(caplog):
    with own_deprecations():
        logging.getLogger("some").warning("deprecated")
    assert caplog.records[0].pathname == __file__


def test_a_test_in_which_our_code_causes_one_fails(pytester):
    pytester.makeconftest(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        'pytest_plugins = ["deprecations"]'
    )
    pytester.makepyfile(
        """
        def test_own():
            source = "import warnings\\nwarnings.warn('old', FutureWarning)"
            exec(source, {"__name__": "tabletune.module"})
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1, errors=1)


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_warning_at_a_line_of_ours_is_an_error(category):
    """By the filters of pyproject.toml; those of libraries are not."""
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "some.py", 1, module="tabletune.model.loading")
    warnings.warn_explicit("old", category, "some.py", 1, module="transformers.trainer")


@pytest.mark.parametrize("folder", ["src", "notebooks_py", "tests", "benchmarks"])
@pytest.mark.filterwarnings("error")
def test_sources_compile_without_a_warning(folder):
    """Python warns of invalid escapes and the like only where it compiles a file anew."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        compile(path.read_text(encoding="utf-8"), str(path), "exec")
