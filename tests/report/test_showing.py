"""What is shown in a notebook: texts stay texts."""

import pandas as pd
import pytest

from tabletune.report import showing


@pytest.fixture
def shown(monkeypatch):
    """What is displayed."""
    displayed = []
    monkeypatch.setattr(showing, "display", displayed.append)
    return displayed


def test_a_disclaimer_with_markup_stays_text(shown):
    showing.show_answers({"question": ["one"]}, 1, '"}</style><script>alert(1)</script>')
    assert shown[0].data.count("</style>") == 1
    assert "<script" not in shown[0].data


def test_the_longer_side_of_a_table_goes_down_the_page(shown):
    showing.show_table(
        pd.DataFrame({f"run {number}": ["x"] for number in range(9)}, index=["figure"])
    )
    showing.show_table(pd.DataFrame([["x"] * 9]))
    assert [table.data.count("<tr") for table in shown] == [10, 2], (
        "but rows that have no names stay rows"
    )


def test_a_table_shows_texts_whole_and_as_they_are(shown):
    long = "word " * 30 + "<b>&$1$\nnext"
    showing.show_table({"a name": long})
    showing.show_table(pd.DataFrame({"<i>": [long, None]}))
    facts, rows = (" ".join(table.data.split()) for table in shown)
    cell, heading = (f'<{tag} style="text-align:left">' for tag in ("td", "th"))
    whole = f"{cell}{'word ' * 30}&lt;b&gt;&amp;$1$ next</td>"
    assert f"{heading}a name</th> {whole}" in facts
    assert "<thead>" not in facts
    assert f"<tr> {whole} </tr> <tr> {cell}–</td> </tr>" in rows
    assert f"{heading}&lt;i&gt;</th>" in rows
    assert all(f'class="dataframe {showing.PLAIN}"' in table for table in (facts, rows))
