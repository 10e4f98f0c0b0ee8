"""Errors: one line each, and the right one."""

import importlib

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from tabletune.errors import StageError, first_line, hub_error, suggestion

# httpx in huggingface_hub 1, httpx2 in 2
httpx = importlib.import_module(HTTPError.__module__.partition(".")[0])


class Response:
    headers, request, status_code = {}, None, 404


def raised_from(error, cause):
    """`error` as it is after `raise error from cause`."""
    error.__cause__ = cause
    return error


UNREACHABLE = (
    "base_model=a/b: not on this machine, and the Hub cannot be reached. Is there a network?"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("a", response=Response()), "is gated: accept its terms"),
        (
            RepositoryNotFoundError("a", response=Response()),
            "or a private one that this token may not read",
        ),
        (OSError("first line\nsecond line"), "cannot be loaded from the Hub: first line"),
        (ValueError(""), "cannot be loaded from the Hub: ValueError"),
        (
            ValueError("Repo id must be in the form"),
            "there is no such folder here, and on the Hub names are OWNER/NAME",
        ),
        (
            OSError("a/b does not appear to have a file named config.json."),
            "Perhaps it is an adapter, or GGUF files.",
        ),
    ],
)
def test_hub_error_is_one_line(error, message):
    line = str(hub_error("base_model=a/b", error))
    assert line.startswith("base_model=a/b")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("a"),
        httpx.ConnectError("Name or service not known"),
        OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck"),
        raised_from(
            OSError("Can't load the configuration of 'a/b'."),
            RuntimeError("Cannot send a request, as the client has been closed."),
        ),
        raised_from(OSError("Can't load it."), OfflineModeIsEnabled("offline")),
    ],
)
def test_hub_error_says_that_the_hub_cannot_be_reached(error):
    """As transformers and huggingface_hub say it without a network, and in offline mode."""
    assert str(hub_error("base_model=a/b", error)) == UNREACHABLE


def test_hub_error_of_transformers_for_a_model_that_does_not_exist():
    """transformers makes an OSError of it; what it was raised from says why."""
    missing = raised_from(
        OSError("a/b is not a local folder and is not a valid model identifier"),
        RepositoryNotFoundError("404", response=Response()),
    )
    line = str(hub_error("base_model=a/b", missing))
    assert line.startswith("base_model=a/b: the Hub has no such repository")


@pytest.mark.parametrize(
    ("error", "line"),
    [(OSError("one\ntwo"), "one"), (ValueError(""), "ValueError"), (OSError("\n \n"), "OSError")],
)
def test_first_line_is_never_empty(error, line):
    assert first_line(error) == line


def test_a_stage_error_shows_in_a_notebook_as_one_line():
    assert StageError("no room")._render_traceback_() == ["StageError: no room"]


def test_suggestion_is_empty_where_nothing_is_near():
    assert suggestion("questoin", ["question", "answer"]) == " Did you mean 'question'?"
    assert suggestion("zzz", ["question"]) == ""
