"""The progress line: which cell, and how far the bar inside it is."""

import io

import pytest

from tabletune.cli.progress import ProgressLine, progress_inside, running_cell


def cell(status, *outputs):
    return {"metadata": {"papermill": {"status": status}}, "outputs": list(outputs)}


def printed(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def shown(html):
    return {"output_type": "display_data", "data": {"text/html": html, "text/plain": "<HTML>"}}


TRAINING = (
    "<div><progress value='11'></progress>\n [ 11/46 00:12 < 00:40, 0.9 it/s, Epoch 0.2/1]</div>"
)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (
            printed("two rows\nscoring:   0%|     | 0/4\rscoring:  25%|█  | 1/4 [00:01<00:03]"),
            "scoring:  25% 1/4 [00:01<00:03]",
        ),
        (printed("answering: 100%|████| 4/4 [00:04<00:00]\n"), "answering: 100% 4/4 [00:04<00:00]"),
        (printed("\rscoring:  60% 24/40 [00:03<00:02]"), "scoring:  60% 24/40 [00:03<00:02]"),
        (shown(TRAINING), "step 11/46 00:12 < 00:40"),
        (shown(TRAINING.replace("00:12 < 00:40, 0.9 it/s", ": < :")), "step 11/46"),
        (printed("no bar, but 25% of it | and a table |"), ""),
        (shown("<p>[1/2 00:01]</p>"), ""),
    ],
)
def test_progress_inside_is_the_newest_bar(output, text):
    assert progress_inside(cell("running", output)) == text


def test_progress_inside_looks_at_the_last_output_with_a_bar():
    one, two = printed("merging:  50%|█ | 1/2 [00:01]"), printed("a line without a bar")
    assert progress_inside(cell("running", one, two)) == "merging:  50% 1/2 [00:01]"


def test_running_cell_is_the_one_that_papermill_runs():
    cells = [cell("completed"), cell("running"), cell("pending")]
    assert running_cell(cells) == (2, cells[1])
    assert running_cell(cells[2:]) == (0, None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_in_a_terminal_the_line_is_replaced():
    stream = Terminal()
    line = ProgressLine("06_trust", [cell("running"), cell("pending")], stream)
    line.show(line.text())
    line.show("06_trust: cell 2 of 2")
    line.close()
    assert stream.getvalue() == (
        "\r\x1b[K06_trust: cell 1 of 2\r\x1b[K06_trust: cell 2 of 2\r\x1b[K"
    )


def test_in_a_file_there_is_a_line_a_minute():
    stream = io.StringIO()
    line = ProgressLine("06_trust", [], stream)
    line.show("soon")
    line._last_time -= 61
    line.show("a minute later")
    line.show("at once")
    line.close()
    assert stream.getvalue() == "a minute later\n"
