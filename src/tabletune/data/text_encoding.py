"""The encoding of a text file."""

import codecs
import re
from contextlib import suppress
from pathlib import Path

from tabletune.errors import StageError

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is the beginning of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DESCRIPTIONS = {
    "utf-8": "UTF-8",
    "utf-8-sig": "UTF-8",
    "cp1252": "Windows-1252 (as it is no UTF-8: if letters look wrong, set `encoding`)",
}
BLOCK_BYTES = 2**20


def choose_encoding(path: Path, name: str, encoding: str) -> tuple[str, str]:
    """The encoding to read a text file in, and what to say about it.

    `encoding` is a setting, or "auto". Raises StageError if there is no such encoding, or if the
    file's cannot be determined.
    """
    if encoding == "auto":
        codec = detect_encoding(path, name)
    else:
        try:
            codec = codecs.lookup(encoding).name
        except LookupError as error:
            raise StageError(
                f"{name} could not be read: {error}. Set `encoding` to utf-8, cp1252, …"
            ) from error
    description = DESCRIPTIONS.get(codec, codec.upper())
    return ("utf-8-sig" if codec == "utf-8" else codec), description


def detect_encoding(path: Path, name: str) -> str:
    """The encoding of a text file. Raises StageError if it cannot be determined.

    UTF-8, UTF-16 and UTF-32 prove themselves. The rest is read as Windows-1252, which contains
    Latin-1, unless it is UTF-8 with a few damaged bytes or, being mostly beyond ASCII, in another
    script.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file, suppress(UnicodeDecodeError):
        head = block = file.read(BLOCK_BYTES)
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if head.startswith(mark):
                return encoding
        # ASCII in UTF-16 without a mark: every other byte is 0
        if b"\0" in head[:2]:
            return "utf-16-be" if head[:1] == b"\0" else "utf-16-le"
        decoder.decode(head)
        while next_block := file.read(BLOCK_BYTES):
            block = next_block  # the last one read is the one that is no UTF-8
            decoder.decode(block)
        decoder.decode(b"", True)
        return "utf-8"
    text = block.decode("utf-8", "replace")
    beyond_ascii = re.findall(r"[^\0-\x7f]", text)
    letters = re.findall(r"[A-Za-z]", text)
    damaged = 2 * beyond_ascii.count("\ufffd") <= len(beyond_ascii)
    unused_in_cp1252 = re.search(rb"[\x81\x8d\x8f\x90\x9d]", block)
    if damaged or 2 * len(beyond_ascii) > len(letters) or unused_in_cp1252:
        problem = "is not UTF-8, and does not look like Windows-1252"
        if damaged:
            problem = "is UTF-8 with damaged bytes"
        raise StageError(
            f"{name} {problem}. Save it as UTF-8, or set `encoding`: cp1251, shift_jis, gb18030, "
            "euc_kr, …"
        )
    return "cp1252"
