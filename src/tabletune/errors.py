"""Errors that a reader can mend, and how the errors of libraries become one line."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class StageError(Exception):
    """A problem that the reader can mend. It shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"StageError: {self}"]


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def hub_error(what: str, error: BaseException) -> StageError:
    """A StageError of one line from whatever went wrong with the Hub.

    `what` says what was to be fetched, such as "base_model=OWNER/NAME". What does not exist, what
    may not be read and what cannot be reached have lines of their own.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # Libraries wrap the Hub's errors in an OSError of their own, so all causes are looked at.
    causes = list(chain_of(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return StageError(
            f"{what} is gated: accept its terms on its page, and set HF_TOKEN or run "
            "`hf auth login`."
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return StageError(
            f"{what}: the Hub has no such repository, or a private one that this token may not "
            "read. Check the name; for a private one set HF_TOKEN (in Colab a secret) or run "
            "`hf auth login`."
        )
    # These are not kinds of errors but texts: transformers and huggingface_hub raise a plain
    # ValueError or OSError for them.
    reason = first_line(error)
    if "custom code" in reason:
        return StageError(
            f"{what} needs to run code of its own, which is not allowed here. Take another model."
        )
    if "Repo id must" in reason:
        return StageError(
            f"{what}: there is no such folder here, and on the Hub names are OWNER/NAME."
        )
    if any(is_unreachable(cause) for cause in causes):
        return StageError(
            f"{what}: not on this machine, and the Hub cannot be reached. Is there a network?"
        )
    hint = ""
    if "model_type" in reason or "file named config" in reason:
        hint = " Perhaps it is an adapter, or GGUF files."
    is_local = Path(what.rpartition("=")[2]).exists()
    where = "" if is_local else " cannot be loaded from the Hub:"
    return StageError(f"{what}:{where} {reason}{hint}")


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_unreachable(error: BaseException) -> bool:
    """Whether an error says that the Hub could not be asked: no network, or offline mode."""
    # HTTPError is httpx's in huggingface_hub 1, and httpx2's in 2; an answer of the Hub is one, too
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, ConnectionError):
        return True
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return True
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return True
    # transformers says the first; the second is what huggingface_hub raises after it has tried to
    # connect again
    return "couldn't connect to" in str(error) or "the client has been closed" in str(error)


def suggestion(name: Any, names: Iterable[Any]) -> str:
    """A text such as " Did you mean 'x'?" with the nearest of the `names`; "" if none is near."""
    # a wrong capital is the most frequent slip, and must not count as a difference
    by_lower_case = {str(valid).lower(): valid for valid in names}
    nearest = get_close_matches(str(name).lower(), by_lower_case, n=1, cutoff=0.4)
    return f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""
