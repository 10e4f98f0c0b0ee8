"""The page of `make rate`, used through Gradio's own client: what it shows, and what it saves."""

import json
import shutil
import time

import pytest

from tabletune.errors import StageError
from tabletune.evaluation.rating import RatingSession
from tabletune.export import rating_page


@pytest.fixture
def run(tmp_path):
    """A run folder with the answers of two models to three questions."""
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "report.json").write_text('{"example": null}')
    lines = [
        {
            "part": "new",
            "asked": f"question {number} <b>?",
            "model": model,
            "answer": f"{word} **{number}**",
            "references": [f"answer {number}"],
            "chrf": 10.0,
            "right": False,
        }
        for number in range(3)
        for model, word in (("base", "one"), ("merged", "other"))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "evaluation" / "answers.jsonl").write_text(text)
    return tmp_path


def test_a_pair_is_shown_without_names(run):
    session = RatingSession(run)
    texts = rating_page.page_texts(session, session.next_pair())
    assert texts[0] == "0 of 3 rated"
    assert not any("base" in text or "merged" in text or "tuned" in text for text in texts)


def test_when_all_are_rated_the_result_is_shown(run):
    session = RatingSession(run)
    for _ in range(3):
        session.rate(session.next_pair(), "left")
    texts = rating_page.page_texts(session, session.next_pair())
    assert texts[0] == "3 of 3 rated"
    assert "A reader rated 3 of 3 pairs" in texts[1]


def test_without_gradio_it_says_what_to_do(run, monkeypatch):
    monkeypatch.setattr(rating_page, "find_spec", lambda name: None)
    with pytest.raises(StageError, match="Gradio is missing here"):
        rating_page.rate_command(run, {})


@pytest.mark.export
def test_a_reader_presses_the_page_through_in_a_browser(run):
    """Without a choice nothing is saved; in the end the result stands there, and the form is
    gone.
    """
    pytest.importorskip("gradio")
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromedriver") is None:
        pytest.skip("no chromedriver")
    session = RatingSession(run)
    page = rating_page.rating_page(session, "Educational.")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(
        options=options,
        service=webdriver.chrome.service.Service(shutil.which("chromedriver")),
    )
    try:
        browser.get(address)
        for number in range(len(session.pairs)):
            wait_for(lambda n=number: progress_of(browser) == f"{n} of 3 rated")
            if number == 0:
                press(browser, "Save, and show the next")
                wait_for(lambda: "Please say which one is better." in browser.page_source)
                assert not session.ratings
            press(browser, "A is better")
            press(browser, "correct")
            press(browser, "Save, and show the next")
        wait_for(lambda: progress_of(browser) == "3 of 3 rated")
        assert len(session.ratings) == 3
        assert all(rating.better in ("base", "tuned") for rating in session.ratings.values())
        assert not visible(browser, "Save, and show the next")
    finally:
        browser.quit()
        page.close()


def progress_of(browser):
    """What stands in the box of progress; "" while the page loads."""
    boxes = browser.find_elements("css selector", "textarea")
    return boxes[0].get_property("value") if boxes else ""


def visible(browser, text):
    """The first label or button with this text that can be seen, or None."""
    for element in browser.find_elements("css selector", "label, button"):
        if element.text.strip() == text and element.is_displayed():
            return element
    return None


def press(browser, text):
    """Press what has this text."""
    wait_for(lambda: visible(browser, text) is not None)
    visible(browser, text).click()


def wait_for(condition, seconds=30):
    """Wait until `condition` returns something true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


@pytest.mark.export
def test_the_page_saves_each_rating_and_goes_on(run):
    pytest.importorskip("gradio")
    from gradio_client import Client

    session = RatingSession(run)
    page = rating_page.rating_page(session, "Educational.")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    try:
        client = Client(address, verbose=False)
        shown = client.predict(api_name="/first_pair")
        assert shown[0] == "0 of 3 rated"
        client.predict(None, None, None, api_name="/next_pair")
        assert not session.ratings
        client.predict("left", True, None, api_name="/next_pair")
        assert len(session.ratings) == 1
        assert client.predict(api_name="/first_pair")[0] == "1 of 3 rated"
    finally:
        page.close()
