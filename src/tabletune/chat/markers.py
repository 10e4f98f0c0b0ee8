"""Special markers that must not occur in a reader's text."""

import re
from functools import lru_cache

from tabletune.chat.tokenizer import special_ids


@lru_cache(maxsize=8)
def special_markers(tokenizer):
    """What a text must not contain: the special tokens, and the markers that the template writes as plain text."""
    special = set(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))
    written = set(
        re.findall(r"\[/?[A-Z_]{2,}\]|<<?/?SYS>>|<\|[^|>\s]+\|>", tokenizer.chat_template or "")
    )
    return sorted(
        special | written | ({"<<SYS>>", "<</SYS>>"} if "[INST]" in written else set()),
        key=len,
        reverse=True,
    )


def break_markers(text, tokenizer):
    """Put a space into every marker that occurs in `text`, so that the tokenizer reads it as plain text."""
    for marker in special_markers(tokenizer):
        if marker in text:
            text = text.replace(marker, marker[0] + " " + marker[1:])
    return text
