"""Special markers that must not occur in a reader's text."""

import re

from transformers import PreTrainedTokenizerBase

from tabletune.chat.caching import cached_per_template
from tabletune.chat.tokenizer import special_ids


@cached_per_template
def special_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a text must not contain, the longest first.

    These are the special tokens, and the markers that the template writes as plain text.
    """
    markers = set(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))
    template = tokenizer.chat_template or ""
    written = set(re.findall(r"\[/?[A-Z_]{2,}\]|<<?/?SYS>>|<\|[^|>\s]+\|>", template))
    markers |= written
    if "[INST]" in written:
        markers |= {"<<SYS>>", "<</SYS>>"}
    return sorted(markers, key=len, reverse=True)


def break_markers(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put a space into every marker in `text`, so that the tokenizer reads it as plain text."""
    for marker in special_markers(tokenizer):
        if marker in text:
            text = text.replace(marker, marker[0] + " " + marker[1:])
    return text
