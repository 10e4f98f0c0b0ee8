"""What is changed in a text: little by default, more by parameters."""

import re
import unicodedata
from collections.abc import Callable
from typing import Any

# up to the next space, bracket or quote, or to Chinese, Japanese or Korean, which is written
# without spaces
ADDRESS = (
    r"(?:https?:|(?<![^\W\u2e80-\uffef])www\.)"
    r"(?:\([^\s()]*\)|[^\s()<>\"\[\]\u2e80-\u9fff\uac00-\ud7af\uf900-\uffef])+"
)
# with the brackets or quotes around it; of a link in Markdown the text stays
URL = re.compile(
    rf"!?\[([^\[\]\n]*)\]\({ADDRESS}\)|[\[\"(<]{{1,2}}{ADDRESS}[\]\")>]{{1,2}}|{ADDRESS}",
    re.IGNORECASE,
)
# zero-width characters, control characters, and halves of characters; emoji need their joiner
# (U+200D)
INVISIBLE = re.compile(
    r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]"
)
HTML = re.compile(
    r"</?(p|br|div|span|a|img|ul|ol|li|table|tr|td|h[1-6]|b|i|em|strong)\b[^<>]*>"
    r"|&(amp|lt|gt|nbsp|quot|#\d+);"
)
BLOCK_TAGS = ["br", "p", "div", "li", "tr", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6"]
SHOWN_BEFORE, SHOWN_CHARACTERS = 20, 80  # of an example of a change
Rule = Callable[[str], str]


class Dropped(Exception):
    """A row that cannot teach; its text is the reason."""


class Cleaning:
    r"""The rules of cleaning that are on, and what they have changed.

    Each rule has a count of the rows that it has changed, with an example of the first.

    Always: composed Unicode (NFC; NFKC would turn "1½ cups" into "11⁄2 cups"), line ends as \n, no
    white space around the text. By parameters: `html_to_text`, `strip_addresses`, `collapse_spaces`
    (which removes invisible characters too).

    `changed` is {rule: {"rows", "before", "after"}}, `html_texts` counts the texts that look like
    HTML.
    """

    def __init__(
        self,
        html_to_text: bool = False,
        strip_addresses: bool = False,
        collapse_spaces: bool = False,
    ) -> None:
        self.rules: dict[str, Rule] = {"line ends": unix_line_ends}
        if collapse_spaces:
            self.rules["invisible characters"] = without_invisible_characters
        self.rules["composed Unicode (NFC)"] = composed
        if html_to_text:
            self.rules["HTML to text"] = text_of_html
        if strip_addresses:
            self.rules["addresses"] = without_addresses
        if collapse_spaces:
            self.rules["spaces"] = single_spaces
        self.rules["outer white space"] = str.strip
        self.changed: dict[str, dict[str, Any]] = {}
        self.html_texts = 0
        self._counted: set[str] = set()  # the rules that have changed the row at hand

    def start_row(self) -> None:
        """From here on changes count for another row."""
        self._counted.clear()

    def __call__(self, text: str) -> str:
        """The text as the rules make it."""
        if "<" in text and HTML.search(text):
            self.html_texts += 1
        for name, rule in self.rules.items():
            before, text = text, rule(text)
            self.count_change(name, before, text)
        return text

    def count_change(self, name: str, before: str, after: str) -> None:
        """Count a change of the row at hand by the rule `name`, if it is one."""
        if before == after or name in self._counted:
            return
        self._counted.add(name)
        if name not in self.changed:
            start = max(0, first_difference(before, after) - SHOWN_BEFORE)
            end = start + SHOWN_CHARACTERS
            self.changed[name] = {"rows": 0, "before": before[start:end], "after": after[start:end]}
        self.changed[name]["rows"] += 1


def first_difference(one: str, other: str) -> int:
    """The position of the first character in which two texts differ."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return min(len(one), len(other))


def unix_line_ends(text: str) -> str:
    r"""A text with \n at the ends of its lines."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def composed(text: str) -> str:
    """A text in which é is one character, not an e and an accent."""
    return unicodedata.normalize("NFC", text)


def without_invisible_characters(text: str) -> str:
    """A text without zero-width and control characters."""
    return INVISIBLE.sub("", text)


def without_addresses(text: str) -> str:
    """A text without web addresses; of a link in Markdown its text stays."""
    return URL.sub(r"\1", text)


def single_spaces(text: str) -> str:
    """A text with single spaces in its lines, and one empty line at most between two."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip())


def text_of_html(text: str) -> str:
    """What a browser would show of HTML: its text, with a line break where a block ends."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    for tag in soup(["script", "style"]):
        tag.decompose()
    for tag in soup(BLOCK_TAGS):
        tag.append("\n")
    return soup.get_text().replace("\u00a0", " ")
