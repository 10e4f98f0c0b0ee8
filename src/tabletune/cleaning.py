"""What is changed in a text, if it was asked for; when two rows say the same; which question is in which split."""

import hashlib
import re
import unicodedata

import numpy as np

from .run import StageError

# up to the next space, bracket or quote, or to Chinese, Japanese or Korean, which is written without spaces
ADDRESS = (
    r"(?:https?:|(?<![^\W\u2e80-\uffef])www\.)"
    r"(?:\([^\s()]*\)|[^\s()<>\"\[\]\u2e80-\u9fff\uac00-\ud7af\uf900-\uffef])+"
)
# with the brackets or quotes around it; of a link in Markdown the text stays
URL = re.compile(rf"!?\[([^\[\]\n]*)\]\({ADDRESS}\)|[\[\"(<]{{1,2}}{ADDRESS}[\]\")>]{{1,2}}|{ADDRESS}", re.IGNORECASE)
# zero-width characters, control characters, and halves of characters; emoji need their joiner (U+200D)
INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
HTML = re.compile(
    r"</?(p|br|div|span|a|img|ul|ol|li|table|tr|td|h[1-6]|b|i|em|strong)\b[^<>]*>|&(amp|lt|gt|nbsp|quot|#\d+);"
)
SPACING = str.maketrans(dict.fromkeys("。，、；：！？…「」『』（）《》", " "))  # these need no spaces around them
OPENING, CLOSING = "\"'“”‘’„«»([{*", ".,;:!?\"'“”‘’„«»)]}*"
PUNCTUATION = {i: " " for i in range(0x20000) if unicodedata.category(chr(i)).startswith("P")}


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
            same = max(0, next((i for i, (one, other) in pairs if one != other), min(len(before), len(after))) - 20)
            example = {"before": before[same : same + 80], "after": after[same : same + 80]}
            self.changed.setdefault(name, {"rows": 0, **example})["rows"] += 1


def single_spaces(text):
    """A text with single spaces in its lines, and one empty line at most between two."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in text.splitlines()).strip())


def text_of_html(text):
    """What a browser would show of HTML: its text, with a line break where a block ends."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    for tag in soup(["script", "style"]):
        tag.decompose()
    for tag in soup(["br", "p", "div", "li", "tr", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6"]):
        tag.append("\n")
    return soup.get_text().replace("\u00a0", " ")


def words(text):
    """The words of a text in lower case, without the marks around them: "Tea!" is "tea", but "-5" is not "5"."""
    said = [word.lstrip(OPENING).rstrip(CLOSING) or word for word in text.casefold().translate(SPACING).split()]
    return [word for word in said if word.strip(".,;:!?")] or said


class Copies:
    """What has been there before: the same conversations, and those with the same words in the same order.

    A near copy differs in letter case, white space and the marks around words alone, so never in a number, a name or a
    negation. Measured: of the copies in data/home_remedies.csv this finds all three, as does the rule that two rows are
    the same if they share 90% of their words. Among 1,500 rows of data/terminal.jsonl, each of which says something
    else, that rule finds 37 copies, and this one none.
    """

    def __init__(self, threshold):
        self.near, self.exact, self.said = threshold <= 1, set(), set()

    def check(self, split, messages, tools):
        """Raise Dropped if there was such a conversation in this official split."""
        texts = [turn["content"] for turn in messages]
        exact = hash((split, tools, *texts, *(turn["role"] for turn in messages)))
        said = hash((split, tools, *(tuple(words(text)) for text in texts))) if self.near else exact
        if exact in self.exact or said in self.said:
            raise Dropped("duplicate" if exact in self.exact else "near duplicate")
        self.exact.add(exact)
        self.said.add(said)


def question_key(texts):
    """What makes two rows ask the same: the words of their questions, letter case and all punctuation aside."""
    plain = [" ".join(text.casefold().translate(PUNCTUATION).split()) for text in texts]
    return " ".join(key or text for key, text in zip(plain, texts, strict=True))


def place(key, seed):
    """Where a question stands between 0 and 1, by a hash: rows added, removed or moved elsewhere do not move it."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(places, validation_fraction, test_fraction, official=None):
    """The split of each row, "train", "validation" or "test", from the places of their questions: an array of names.

    `official` has the split that a row must stay in, or ""; of the rows for training, "" or "train", come the held-out
    splits that no row has officially. Where the fractions leave one empty, as in a small table, the questions with the
    lowest places fill it. Raises StageError if there are too few different questions for that.
    """
    places = np.array(places)
    official = np.array(official if official is not None else [""] * len(places), dtype="U10")
    free = np.isin(official, ["", "train"])
    names = [name for name in ("test", "validation") if name not in official] + ["train"]
    fractions = {"test": test_fraction, "validation": validation_fraction}
    bounds, lowest = np.cumsum([fractions[name] for name in names[:-1]]), np.unique(places[free])
    if len(lowest) < len(names):
        raise StageError(
            f"Only {len(lowest)} different questions are left; {', '.join(names)} need at least {len(names)}."
        )
    if len(np.unique(np.digitize(lowest, bounds))) < len(names):
        bounds = lowest[1 : len(names)]
    return np.where(free, np.array(names)[np.digitize(places, bounds)], official)
