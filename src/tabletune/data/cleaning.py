"""What is changed in a text, if it was asked for."""

import re
import unicodedata

# up to the next space, bracket or quote, or to Chinese, Japanese or Korean, which is written without spaces
ADDRESS = (
    r"(?:https?:|(?<![^\W\u2e80-\uffef])www\.)"
    r"(?:\([^\s()]*\)|[^\s()<>\"\[\]\u2e80-\u9fff\uac00-\ud7af\uf900-\uffef])+"
)
# with the brackets or quotes around it; of a link in Markdown the text stays
URL = re.compile(
    rf"!?\[([^\[\]\n]*)\]\({ADDRESS}\)|[\[\"(<]{{1,2}}{ADDRESS}[\]\")>]{{1,2}}|{ADDRESS}",
    re.IGNORECASE,
)
# zero-width characters, control characters, and halves of characters; emoji need their joiner (U+200D)
INVISIBLE = re.compile(
    r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]"
)
HTML = re.compile(
    r"</?(p|br|div|span|a|img|ul|ol|li|table|tr|td|h[1-6]|b|i|em|strong)\b[^<>]*>|&(amp|lt|gt|nbsp|quot|#\d+);"
)


class Dropped(Exception):
    """A row that cannot teach; its text is the reason."""


class Cleaning:
    """The rules that are on, and a count of the rows that each has changed, with an example of the first.

    Always: composed Unicode (NFC; NFKC would turn "1½ cups" into "11⁄2 cups"), line ends as \\n, no white space around
    the text. By parameters: `html_to_text`, `strip_addresses`, `collapse_spaces` (and no invisible characters).
    """

    def __init__(self, html_to_text=False, strip_addresses=False, collapse_spaces=False):
        self.rules = {
            "line ends": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
            "invisible characters": collapse_spaces and (lambda text: INVISIBLE.sub("", text)),
            "composed Unicode (NFC)": lambda text: unicodedata.normalize("NFC", text),
            "HTML to text": html_to_text and text_of_html,
            "addresses": strip_addresses and (lambda text: URL.sub(r"\1", text)),
            "spaces": collapse_spaces and single_spaces,
            "outer white space": str.strip,
        }
        self.changed, self.hit, self.html = {}, set(), 0

    def __call__(self, text):
        """The text as the rules make it."""
        self.html += "<" in text and HTML.search(text) is not None
        for name, rule in self.rules.items():
            if rule:
                before, text = text, rule(text)
                self.note(name, before, text)
        return text

    def note(self, name, before, after):
        """Count a change of the row at hand by the rule `name`, if it is one."""
        if before != after and name not in self.hit:
            self.hit.add(name)
            pairs = enumerate(zip(before, after, strict=False))
            same = max(
                0,
                next((i for i, (one, other) in pairs if one != other), min(len(before), len(after)))
                - 20,
            )
            example = {"before": before[same : same + 80], "after": after[same : same + 80]}
            self.changed.setdefault(name, {"rows": 0, **example})["rows"] += 1


def single_spaces(text):
    """A text with single spaces in its lines, and one empty line at most between two."""
    return re.sub(
        r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()
    )


def text_of_html(text):
    """What a browser would show of HTML: its text, with a line break where a block ends."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    for tag in soup(["script", "style"]):
        tag.decompose()
    for tag in soup(
        ["br", "p", "div", "li", "tr", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6"]
    ):
        tag.append("\n")
    return soup.get_text().replace("\u00a0", " ")
