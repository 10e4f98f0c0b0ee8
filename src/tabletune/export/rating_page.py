"""The page of `make rate`: two answers to one question, side by side and without names.

Needs Gradio.
"""

import os
import time
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tabletune.data.example import NEUTRAL_DISCLAIMER, example_settings
from tabletune.errors import StageError
from tabletune.evaluation.rating import Pair, RatingSession
from tabletune.export.chat_page import open_page
from tabletune.run.files import read_json
from tabletune.run.machine import pinned

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page sends nothing anywhere
CHOICES = [("A is better", "left"), ("B is better", "right"), ("No difference", "equal")]
RIGHT = [("correct", True), ("wrong", False)]


def page_texts(session: RatingSession, pair: Pair | None) -> list[Any]:
    """What stands on the page for a pair: progress, question, both answers, the table's answers.

    Or the result.
    """
    done = f"{len(session.ratings)} of {len(session.pairs)} rated"
    if pair is None:
        result = "\n\n".join(["All pairs are rated.", *session.metrics()["sentences"]])
        return [done, result, "", "", ""]
    references = "\n\n".join(dict.fromkeys(pair.references))
    return [done, pair.question, pair.left, pair.right, references]


def rating_page(session: RatingSession, disclaimer: str) -> Any:
    """The page, ready to be launched, under the disclaimer."""
    import gradio as gr

    with gr.Blocks(title="Which answer is better?") as page:
        gr.HTML(f"<strong>{escape(disclaimer)}</strong>", elem_id="disclaimer")
        pair = gr.State(None)
        progress = gr.Textbox(label="Progress", interactive=False)
        question = gr.Textbox(label="Question", interactive=False, lines=2)
        with gr.Column() as form:  # all that is there to rate; gone when everything is rated
            with gr.Row():
                left = gr.Textbox(label="Answer A", interactive=False, lines=8)
                right = gr.Textbox(label="Answer B", interactive=False, lines=8)
            better = gr.Radio(CHOICES, label="Which answer is better?")
            with gr.Row():
                left_is_right = gr.Radio(RIGHT, label="Is A correct? (optional)")
                right_is_right = gr.Radio(RIGHT, label="Is B correct? (optional)")
            save = gr.Button("Save, and show the next", variant="primary")
            with gr.Accordion("What the table says", open=False):
                references = gr.Textbox(show_label=False, interactive=False, lines=4)
        texts = [progress, question, left, right, references]
        answers = [better, left_is_right, right_is_right]

        def next_pair(rated: Pair | None, *said: Any) -> list[Any]:
            """Save what was said of a pair, and show the next one with nothing chosen."""
            if rated is not None and said[0] is None:
                gr.Warning("Please say which one is better.")
                return [rated, *page_texts(session, rated), *said, gr.update(visible=True)]
            if rated is not None:
                session.rate(rated, *said)
            following = session.next_pair()
            shown = gr.update(visible=following is not None)
            return [following, *page_texts(session, following), None, None, None, shown]

        outputs = [pair, *texts, *answers, form]
        save.click(next_pair, [pair, *answers], outputs, concurrency_limit=1)

        def first_pair() -> list[Any]:
            """The first pair that is not rated, also when the page is loaded again."""
            first = session.next_pair()
            shown = gr.update(visible=first is not None)
            return [first, *page_texts(session, first), shown]

        page.load(first_pair, None, [pair, *texts, form])
    return page


def rate_command(run_dir: Path, values: dict[str, Any]) -> None:
    """What `make rate RUN_DIR=…` does: serve the page until Ctrl-C.

    Raises StageError without Gradio, or answers.
    """
    if find_spec("gradio") is None:
        raise StageError(
            "Gradio is missing here, and the page needs it. Run `make rate`, or pip install "
            f"{pinned('gradio')}."
        )
    session = RatingSession(run_dir, values.get("seed", 42))
    report = read_json(run_dir / "dataset" / "report.json", "01_format_dataset")
    disclaimer = values.get("disclaimer") or example_settings(report).get(
        "disclaimer", NEUTRAL_DISCLAIMER
    )
    page = rating_page(session, disclaimer)
    try:
        print(f"{disclaimer}\nThe page is at {open_page(page, inline=False)}; Ctrl-C ends it.")
        # Gradio serves in threads of its own; this one has nothing to do but to wait for Ctrl-C
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        page.close()
        print(*session.metrics()["sentences"], sep="\n")
