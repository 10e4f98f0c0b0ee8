"""Errors that a reader can mend, and how the errors of libraries become one line."""

from difflib import get_close_matches
from pathlib import Path


class StageError(Exception):
    """A problem that the reader can mend. It shows as one line, without a traceback."""

    def _render_traceback_(self):
        return [f"StageError: {self}"]


def hub_error(what, error):
    """A StageError of one line from whatever went wrong with the Hub; a repository without access says so."""
    from httpx import TransportError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return StageError(
            f"{what} is gated: accept its terms on its page, and set HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return StageError(
            f"{what}: the Hub has no such repository, or a private one that this token may not read. "
            "Check the name; for a private one set HF_TOKEN (in Colab a secret) or run `hf auth login`."
        )
    if isinstance(error, (TransportError, LocalEntryNotFoundError)):
        return StageError(
            f"{what}: not on this machine, and the Hub cannot be reached. Is there a network?"
        )
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if "custom code" in said:
        return StageError(
            f"{what} wants to run code of its own, which is not done here. Take another model."
        )
    if "Repo id must" in said:
        return StageError(
            f"{what}: there is no such folder here, and on the Hub names are OWNER/NAME."
        )
    other = (
        " Perhaps it is an adapter, or GGUF files."
        if "model_type" in said or "file named config" in said
        else ""
    )
    where = "" if Path(what.rpartition("=")[2]).exists() else " not to be had from the Hub:"
    return StageError(f"{what}:{where} {said}{other}")


def suggestion(name, names):
    """ " Did you mean 'x'?" with the nearest of the `names`; "" if none is near."""
    lower = {str(known).lower(): known for known in names}
    near = get_close_matches(str(name).lower(), lower, n=1, cutoff=0.4)
    return f" Did you mean {lower[near[0]]!r}?" if near else ""
