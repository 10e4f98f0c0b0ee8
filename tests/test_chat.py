"""The chat page, in Gradio, on the tiny model: `make test-export`."""

import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import ModuleType
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import make, run_of_make, run_tiny

pytestmark = pytest.mark.export
QUESTION = "I am suffering from Cold. Please suggest a home remedy."


@pytest.fixture(scope="module")
def chat(finished_run):
    """The notebook up to its page, on a free port. Closed at the end."""
    chat = run_tiny("chat", finished_run, max_new_tokens=48, window=160)
    yield chat
    chat.page.close()


@pytest.fixture
def client(chat):
    from gradio_client import Client

    return Client(chat.address, verbose=False)


def text(message):
    return message["content"][0]["text"]


def test_one_model_gives_the_answers_of_two(chat):
    """Token by token those of the base model, and of the base model with the adapter, as `generate` gives them."""
    ids = torch.tensor([chat.encode_prompt([{"role": "user", "content": QUESTION}], chat.tokenizer)])
    greedy = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": chat.tokenizer.eos_token_id}
    *_, answers = chat.two_answers(QUESTION)
    with chat.adapted.disable_adapter():
        base = chat.adapted.generate(input_ids=ids, **greedy)
    tuned = chat.adapted.generate(input_ids=ids, **greedy)
    expected = [chat.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True) for new in (base, tuned)]
    assert answers == expected and expected[0] != expected[1]


def test_an_answer_that_stops_waits_for_the_other(chat, monkeypatch):
    shown = list(chat.two_answers(QUESTION))
    first = chat.tokenizer.convert_ids_to_tokens(chat.tokenizer(shown[3][0], add_special_tokens=False)["input_ids"][-1])
    monkeypatch.setattr(chat.tokenizer, "eos_token", first)
    again = list(chat.two_answers(QUESTION))
    assert len(again[-1][0]) < len(shown[-1][0]) and again[-1][1] == shown[len(again) - 1][1]


def test_answers_stream_side_by_side(client):
    job = client.submit(QUESTION, [], [], api_name="/ask")
    box, base, tuned = job.result()
    assert len(job.outputs()) > 10, "one for each token"
    assert box == "" and text(base[0]) == text(tuned[0]) == QUESTION and text(base[1]) != text(tuned[1])
    _, base, _ = client.predict("Another one?", base, tuned, api_name="/ask")
    assert [message["role"] for message in base] == ["user", "assistant"] * 2


@pytest.mark.parametrize("question", ["", "  \n ", "cold " * 500], ids=["empty", "blank", "too long"])
def test_what_cannot_be_asked_changes_nothing(client, question):
    assert client.predict(question, [], [], api_name="/ask") == (question.strip(), [], [])


def test_two_at_once_wait_for_each_other(chat, client):
    from gradio_client import Client

    other = Client(chat.address, verbose=False)
    jobs = [client.submit("First?", [], [], api_name="/ask"), other.submit("Second?", [], [], api_name="/ask")]
    alone = [list(chat.two_answers(question))[-1] for question in ("First?", "Second?")]
    for job, question, answers in zip(jobs, ("First?", "Second?"), alone, strict=True):
        _, base, tuned = job.result()
        assert text(base[0]) == question and [text(base[1]), text(tuned[1])] == answers


def test_stop(client):
    job = client.submit(QUESTION, [], [], api_name="/ask")
    while not job.outputs():
        time.sleep(0.01)
    assert job.cancel() and len(job.outputs()) < 48
    assert text(client.predict("Next?", [], [], api_name="/ask")[1][0]) == "Next?"


@pytest.fixture
def browser():
    """Chromium, without a window. Needs its driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options)
    yield browser
    browser.quit()


def ask_in(browser, address):
    """Open the page, ask, and wait for an answer."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.get(address)
    browser.implicitly_wait(30)
    browser.find_element(By.CSS_SELECTOR, "textarea").send_keys(QUESTION, Keys.ENTER)
    return browser.find_element(By.CSS_SELECTOR, ".bot.message").text


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)], ids=["desktop", "phone"])
def test_the_disclaimer_is_always_in_view(chat, browser, width, height):
    """Before and after an answer, wherever one scrolls to."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    ask_in(browser, chat.address)
    for place in ("0", "document.body.scrollHeight"):
        browser.execute_script(f"window.scrollTo(0, {place})")
        time.sleep(0.5)
        seen = browser.execute_script(
            "const box = document.querySelector('#disclaimer').getBoundingClientRect();"
            "const top = document.elementFromPoint(innerWidth / 2, (box.top + box.bottom) / 2);"
            "const fits = document.body.scrollWidth <= innerWidth;"
            "return [box.top >= 0 && box.bottom < innerHeight, top.innerText, fits]"
        )
        assert seen[0] and "not medical advice" in seen[1] and seen[2], seen


@pytest.fixture
def colab_proxy(monkeypatch):
    """A stand-in of `google.colab` and its proxy, which tells a server its address inside and not the one outside."""

    class Proxy(BaseHTTPRequestHandler):
        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {**self.headers, "Host": "m-1.user-runtimes.internal:80"}
            inside = Request(f"http://127.0.0.1:{self.port}{self.path}", body or None, headers, method=self.command)
            with urlopen(inside) as answer:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                while chunk := answer.read1():
                    self.wfile.write(chunk)
                    self.wfile.flush()

        def log_message(self, *_):
            pass

        do_GET = do_POST = forward

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    output = ModuleType("google.colab.output")

    def eval_js(code):
        Proxy.port = int(code.removeprefix("google.colab.kernel.proxyPort(").removesuffix(")"))
        return f"http://127.0.0.1:{server.server_port}/"

    output.eval_js = eval_js
    for name, module in (("google.colab", ModuleType("google.colab")), ("google.colab.output", output)):
        monkeypatch.setitem(sys.modules, name, module)
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_in_colab_it_works_behind_the_proxy(chat, browser, colab_proxy, monkeypatch):
    """And opens no tunnel to the world, which is what Gradio does in Colab if nobody says otherwise."""
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **_: pytest.fail("a tunnel was opened"))
    monkeypatch.setattr("gradio.utils.colab_check", lambda: True)
    page = chat.chat_page()
    try:
        assert chat.open_page(page) == colab_proxy
        assert ask_in(browser, colab_proxy)
    finally:
        page.close()


def test_make_chat_serves_and_ctrl_c_ends_it(finished_run):
    """Started as a person would, it says where the page is, and ends without a traceback."""
    server = subprocess.Popen(
        **run_of_make("chat", f"RUN_DIR={finished_run}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    try:
        printed = []
        for line in server.stdout:
            printed.append(line)
            if "The page is at http://127.0.0.1:" in line:
                break
        assert any("not medical advice" in line for line in printed), printed
        os.killpg(server.pid, signal.SIGINT)
        rest, _ = server.communicate(timeout=60)
        assert "Traceback" not in rest
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def test_a_run_that_is_not_there(tmp_path):
    done = make("chat", "PROFILE=tiny", f"RUN_DIR={tmp_path / 'none'}")
    assert "is missing. Run 01_format_dataset first" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
