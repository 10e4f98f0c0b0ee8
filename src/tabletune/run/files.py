"""Files that are complete or absent: atomic writes, and moving finished results out of the way."""

import json
import shutil
from contextlib import contextmanager
from datetime import UTC, datetime

from tabletune.errors import StageError


def remove(path):
    """Delete a file or a folder, if it is there. For what is not finished only: see `set_aside`."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def set_aside(run, *names):
    """Move what there is of `names` in the folder `run` to `earlier/`, into a folder named by the time, and say so.

    Returns that folder, or None if there was nothing to move.
    """
    there = [name for name in names if (run / name).exists()]
    if not there:
        return None
    aside = run / "earlier" / datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S.%f")
    for name in there:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).rename(aside / name)
    print(f"{', '.join(there)} of other settings or data: kept in {aside}")
    return aside


@contextmanager
def whole(path):
    """Yield a temporary path that becomes `path` when the block ends without an error, and is deleted otherwise.

    A file takes the place of an earlier one; a folder does only after `set_aside`. Raises StageError if the disk is
    full, or if there is a folder of that name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        yield partial
        if path.is_dir():
            raise StageError(
                f"{path} is there already, and nothing finished is deleted. Move it away and run again."
            )
        partial.replace(path)
    except BaseException as error:
        remove(partial)
        if "No space left" in str(error):
            raise StageError(
                f"The disk is full, so {path} was not written. Free some space and run again."
            ) from None
        raise


def write_json(path, content):
    """Write a JSON file that is whole or absent."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def read_json(path, stage, otherwise=""):
    """What `stage` left in a JSON file. Raises StageError if it is not there or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if not path.exists() else f"is damaged ({error})"
        raise StageError(
            f"{path} {reason}. Run {stage} first, with the same run_dir, in Colab one in Drive.{otherwise}"
        ) from None
