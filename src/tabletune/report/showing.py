"""Showing sentences, tables, plots and answers in a notebook.

A text stays a text, whatever stands in it: markup is escaped, and a $ begins no formula.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd
from IPython.display import HTML, display

from tabletune.report.tables import side_by_side

if TYPE_CHECKING:  # matplotlib is slow to import
    from matplotlib.figure import Figure

# the classes of HTML in which a $ is a dollar, in notebooks of today and before
PLAIN = "mathjax_ignore tex2jax_ignore"


def show_table(
    texts: pd.DataFrame | Mapping[str, Any], without: str = "Not measured in this run."
) -> None:
    """Show a frame of texts, or {name: text}, as a table.

    Text stays text, markup and $ included. The longer side goes down the page. An empty frame shows
    as the sentence `without`.
    """
    if isinstance(texts, pd.DataFrame):
        facts, frame = False, texts.fillna("–")
    else:
        facts, frame = True, pd.DataFrame({"": texts})
    if frame.empty:
        say(without)
        return
    numbered = isinstance(frame.index, pd.RangeIndex)
    # a page is read downwards, and a phone has no width
    if not numbered and len(frame) < frame.shape[1]:
        frame = frame.T
    frame = frame.astype(str)
    # not by a Styler, which imports matplotlib, half a second; `str` leaves texts as they are
    options = {
        "header": not facts,
        "index": facts or not numbered,
        "formatters": dict.fromkeys(frame, str),
    }
    with pd.option_context("display.max_colwidth", None):
        html = frame.to_html(classes=PLAIN, border=0, **options)
    for tag in ("<th>", "<td>"):  # notebooks and nbconvert align them to the right, as numbers
        html = html.replace(tag, f'{tag[:-1]} style="text-align:left">')
    display(HTML(html))


def say(*sentences: str, kind: str = "") -> None:
    """Show sentences as they are, but for `code`, a paragraph each.

    Those of the kind "headline" in bold. The page about a run has styles for the kinds "headline"
    and "doubt".
    """
    if not sentences:
        return
    texts = [re.sub("`([^`]+)`", r"<code>\1</code>", escape(sentence)) for sentence in sentences]
    if kind == "headline":
        texts = [f"<b>{text}</b>" for text in texts]
    paragraphs = [f'<p class="{kind} {PLAIN}">{text}</p>' for text in texts]
    display(HTML("".join(paragraphs)))


def say_verdict(sentences: Sequence[str]) -> None:
    """Show the sentences of a verdict, the first of them, the most important one, in bold."""
    if not sentences:
        return
    say(sentences[0], kind="headline")
    say(*sentences[1:])


def show_answers(columns: Mapping[str, Sequence[str]], rows: int, disclaimer: str) -> None:
    """Show `side_by_side`.

    On a phone a row's texts stand below each other, and a printed page has the disclaimer.
    """
    headings = "; ".join(f"--heading-{place}: '{name}'" for place, name in enumerate(columns, 1))
    # as CSS wants it, and no markup
    escaped = "".join(c if c.isalnum() else f"\\{ord(c):x} " for c in disclaimer)
    style = f'<style>@page {{ @bottom-center {{ content: "{escaped}" }} }}</style>'
    table = side_by_side(columns, rows, disclaimer).data
    display(HTML(f'<div class="answers {PLAIN}" style="{headings}">{style}{table}</div>'))


def show(figure: "Figure", alt: str) -> None:
    """Show a figure in print quality, with a text for those who cannot see it."""
    import matplotlib.pyplot as plt  # half a second

    width = round(figure.get_figwidth() * 100)
    display(figure, metadata={"image/png": {"alt": alt, "width": width}})
    plt.close(figure)
