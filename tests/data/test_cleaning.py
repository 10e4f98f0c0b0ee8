"""data.cleaning."""

import re
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_helpers import ODD_TEXT, examples

from tabletune.data.cleaning import Cleaning


def clean_as_the_example(text):
    """A cell as the worked example's rules make it."""
    return Cleaning(strip_addresses=True, collapse_spaces=True)(text)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  warm \t water\u00a0and  salt ", "warm water and salt"),
        ("1½ cups", "1½ cups"),  # NFKC would make it 11⁄2
        ("cafe\u0301", "café"),
        ("a\u200bb\ufeff\x07", "ab"),
        ("https://example.org/pose.jpg?size=640", ""),
        ("www.example.org/pose.png", ""),
        ("HTTP://EXAMPLE.ORG", ""),
        ("Rest. See https://example.org for more.", "Rest. See for more."),
        ("one\r\ntwo  \n\n\n\nthree", "one\ntwo\n\nthree"),
        ("请看https://example.org/a?b=1。多喝水", "请看。多喝水"),
        ("看www.example.org，休息", "看，休息"),
        ("お茶（https://example.org/お茶）", "お茶（お茶）"),
        ("Siehe https://example.org/käse für mehr", "Siehe für mehr"),
        ("Awww.so cute", "Awww.so cute"),
        (
            "See [the picture](https://example.org/a_(b).jpg) and <www.example.org> too",
            "See the picture and too",
        ),
        ("Rest (see https://example.org/a).", "Rest (see )."),
        ('f() [x](y) <> [] ""', 'f() [x](y) <> [] ""'),
    ],
)
def test_rules_of_the_example(raw, cleaned):
    assert clean_as_the_example(raw) == cleaned == clean_as_the_example(cleaned)


@pytest.mark.parametrize(
    "piece", ["(", "[a](", "(https:", "[x](https:a", "www.", '["(', "(a)", "<http:(("]
)
def test_many_brackets_are_cleaned_quickly(piece):
    begun = time.process_time()
    clean_as_the_example("https:" + piece * (100_000 // len(piece)))
    assert time.process_time() - begun < 1


@examples(300)
@given(st.lists(st.sampled_from(ODD_TEXT) | st.text(max_size=5), max_size=6).map("".join))
def test_defaults_change_nothing_else(text):
    cleaning = Cleaning()
    assert (
        cleaning(text)
        == unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    )
    assert set(cleaning.changed) <= {"line ends", "composed Unicode (NFC)", "outer white space"}
    everything = Cleaning(True, True, True)
    assert everything(everything(text)) == everything(text) or "<" in text or "&" in text


def test_changes_are_counted_by_row_with_an_example():
    cleaning = Cleaning(strip_addresses=True)
    for text in (
        "cafe\u0301 x",
        "plain",
        "x" * 500 + " https://example.org now",
        "see www.example.org",
    ):
        cleaning.start_row()
        cleaning(text), cleaning(text)
    assert {rule: change["rows"] for rule, change in cleaning.changed.items()} == {
        "composed Unicode (NFC)": 1,
        "addresses": 2,
        "outer white space": 1,
    }
    assert "https://example.org" in cleaning.changed["addresses"]["before"]
    assert cleaning.changed["addresses"]["after"].endswith("x  now")


def test_html_becomes_what_a_browser_shows():
    html = "<p>Hold <b>both</b> buttons, see <a href='https://example.org'>the manual</a>.</p>"
    html += "<ul><li>One</li><li>Two</li></ul>"
    text = Cleaning(html_to_text=True)(
        html + "<script>x()</script>Fish &amp; chips &lt; 5&nbsp;kg."
    )
    assert (
        re.sub(r"\n+", "\n", text)
        == "Hold both buttons, see the manual.\nOne\nTwo\nFish & chips < 5 kg."
    )
