"""Files that are complete or absent: atomic writes, and moving finished results out of the way."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabletune.errors import StageError

SAME_RUN_DIR = (  # what to do where an earlier notebook has left nothing
    "with the same run_dir. In Colab each notebook has a machine of its own: set "
    'run_dir = "drive:NAME", a folder of your Google Drive, in all of them.'
)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one. Only for what is not finished: see `archive`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def archive(folder: Path, *names: str) -> Path | None:
    """Move what exists of `names` in a run folder to `earlier/`, and print it.

    It goes into a folder named by the time. Returns that folder, or None if there was nothing to
    move.
    """
    existing = [name for name in names if (folder / name).exists()]
    if not existing:
        return None
    # microseconds, because two archives within one second must not meet
    destination = folder / "earlier" / datetime.now(UTC).strftime("%Y-%m-%d_%H-%M-%S.%f")
    for name in existing:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(destination / name)
    print(f"{', '.join(existing)} of other settings or data: kept in {destination}")
    return destination


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block ends.

    After an error it is deleted. A file replaces an earlier one; a folder does not: `archive` that
    first. Raises StageError if the disk is full, or if there is a folder of that name.
    """
    # beside the target, not in /tmp: only within one file system is a rename one step
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)
        yield partial
        if path.is_dir():
            raise StageError(
                f"{path} is there already, and nothing finished is deleted. Move it away and run "
                "again."
            )
        partial.replace(path)
    # BaseException: an interrupt leaves nothing behind either
    except BaseException as error:
        remove(partial)
        if "No space left" in str(error):
            raise StageError(
                f"The disk is full, so {path} was not written. Free some space and run again."
            ) from None
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is complete or absent."""
    with atomic_write(path) as partial:
        text = json.dumps(content, indent=2, ensure_ascii=False)
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path, stage: str, otherwise: str = "") -> Any:
    """What `stage` left in a JSON file. Raises StageError if the file is missing or damaged.

    `otherwise` is added to the error: what else a reader can do.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = f"is damaged ({error})" if path.exists() else "is missing"
        raise StageError(f"{path} {reason}. Run {stage} first, {SAME_RUN_DIR}{otherwise}") from None


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """Write a .jsonl file, one JSON value a line. The file is complete or absent."""
    with atomic_write(path) as partial:
        texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
        partial.write_text("".join(texts), encoding="utf-8")


def write_text_if_changed(path: Path, text: str) -> None:
    """Write a text file that is complete or absent, unless it holds that text already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
