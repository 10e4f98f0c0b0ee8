"""The cells of a table as texts, each as it was written in its source."""

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any


class WrittenNumber(str):
    """A number of a JSON file as the text that stands there, so that 1.50 does not become 1.5."""

    __slots__ = ()


def cell_text(value: Any) -> str:
    """A cell as text: "" for a missing value, JSON for a list, an object or a truth value.

    Halves of characters (lone surrogates) are removed.
    """
    if value is None or value != value:  # only NaN differs from itself
        return ""
    if isinstance(value, (list, dict, bool)):
        value = json_text(value)
    if isinstance(value, timedelta):
        return duration_text(value)
    text = str(value)
    # half of a character cannot be written as UTF-8
    return text if text.isascii() else text.encode("utf-8", "ignore").decode()


def json_text(value: Any) -> str:
    """A value as JSON on one line, its numbers as they were written."""
    if isinstance(value, WrittenNumber):
        return str(value)
    if isinstance(value, dict):
        pairs = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {json_text(item)}"
            for key, item in value.items()
        ]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(json_text(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def duration_text(duration: timedelta) -> str:
    """A duration as hours, minutes and seconds: 30:00:00, not "1 day, 6:00:00"."""
    # divmod of a negative number would count down from the next whole hour
    sign = "-" if duration < timedelta(0) else ""
    minutes, seconds = divmod(int(abs(duration).total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{sign}{hours}:{minutes:02d}:{seconds:02d}"
    if duration.microseconds:
        text += f"{abs(duration).microseconds / 1e6:.6f}"[1:].rstrip("0")
    return text


def map_numbers(value: Any, convert: Callable[[WrittenNumber], Any]) -> Any:
    """A nested value with what `convert` makes of each of its written numbers."""
    if isinstance(value, WrittenNumber):
        return convert(value)
    if isinstance(value, dict):
        return {key: map_numbers(item, convert) for key, item in value.items()}
    if isinstance(value, list):
        return [map_numbers(item, convert) for item in value]
    return value


def is_empty(value: Any) -> bool:
    """Whether a cell or a field of an object says nothing.

    Null, NaN, or an empty text, list or object.
    """
    return value is None or value != value or value in ("", [], {})
