"""The chat page: two answers of one model, and (`make test-export`) the page itself, in Gradio
and a browser.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import ModuleType, SimpleNamespace
from urllib.request import Request, urlopen

import base_models
import pytest
import torch
from conftest import TINY, make, run_of_make, run_tiny
from export_runs import run_dir, with_rows  # noqa: F401
from peft import LoraConfig, get_peft_model

from tabletune.chat.encoding import answer_text, encode_prompt
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.data.context import load_context
from tabletune.export import chat_page
from tabletune.model.loading import load_model
from tabletune.training import lora_targets

QUESTION = "I am suffering from Cold. Please suggest a home remedy."
ASKED = [{"role": "user", "content": QUESTION}]


def adapted(folder, **options):
    """A base model with an adapter that changes it, its tokenizer and stops."""
    torch.manual_seed(0)
    base = load_model(str(folder), None, torch.float32)
    targets = lora_targets.lora_targets(base, "auto")
    config = LoraConfig(
        r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    tokenizer, stop_token_ids = load_tokenizer(str(folder))
    return SimpleNamespace(
        model=get_peft_model(base, config).eval(),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
    )


@pytest.fixture(scope="module")
def tiny():
    return adapted(TINY)


def answers(there, most=24):
    """All that `two_answers` yields."""
    return list(
        chat_page.two_answers(there.model, there.tokenizer, there.stop_token_ids, ASKED, most)
    )


def generated(there, most=24):
    """The two answers as `generate` alone gives them."""
    ids = torch.tensor([encode_prompt(ASKED, there.tokenizer)])
    greedy = {"max_new_tokens": most, "do_sample": False, "eos_token_id": there.stop_token_ids}
    with there.model.disable_adapter():
        base = there.model.generate(input_ids=ids, **greedy)
    tuned = there.model.generate(input_ids=ids, **greedy)
    return [
        answer_text(new[0, ids.shape[1] :].tolist(), there.tokenizer, there.stop_token_ids)[0]
        for new in (base, tuned)
    ]


def test_one_model_gives_the_answers_of_two(tiny):
    """Token by token those of the base model, and of the base model with the adapter, as
    `generate` gives them.
    """
    shown = answers(tiny)
    assert shown[-1] == generated(tiny)
    assert shown[-1][0] != shown[-1][1]
    assert len(shown) == 24, "one for each token"
    assert all(len(now) <= len(then) for now, then in zip(shown[0], shown[-1], strict=True))


@pytest.mark.parametrize("name", ["granite_hybrid", "lfm2", "mamba2", "qwen3_moe"])
def test_whatever_a_model_keeps_of_what_it_read(name):
    """Hybrids and recurrent models have caches of their own kinds."""
    there = adapted(base_models.cached(name))
    assert answers(there, 8)[-1] == generated(there, 8)


def test_adapters_that_cannot_share_a_batch_answer_one_after_the_other():
    there = adapted(TINY, use_dora=True)
    shown = answers(there)
    assert len(shown) == 48
    assert shown[-1] == generated(there)
    assert shown[23][1] == ""


def test_greedy_whatever_the_base_prefers(tiny, monkeypatch):
    expected = answers(tiny)[-1]
    own = tiny.model.generation_config
    monkeypatch.setattr(own, "repetition_penalty", 3.0)
    monkeypatch.setattr(own, "do_sample", True)
    assert answers(tiny)[-1] == expected


def test_an_answer_that_stops_waits_for_the_other(tiny):
    """What ends it is not shown."""
    ids = encode_prompt(ASKED, tiny.tokenizer)
    with tiny.model.disable_adapter():
        new = tiny.model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False
        )[0, len(ids) :]
    place = next(k for k in range(3, 24) if new[k] not in new[:k])
    there = SimpleNamespace(
        **{**vars(tiny), "stop_token_ids": [*tiny.stop_token_ids, int(new[place])]}
    )
    shown, before = answers(there), answers(tiny)
    assert len(shown[-1][0]) < len(before[-1][0])
    assert shown[-1][0] == shown[place][0]
    assert shown[-1] == generated(there)


def test_nothing_goes_on_when_nobody_listens(tiny):
    threads, steps = threading.active_count(), []
    hook = tiny.model.get_base_model().register_forward_hook(lambda *_: steps.append(1))
    answer = chat_page.two_answers(tiny.model, tiny.tokenizer, tiny.stop_token_ids, ASKED, 400)
    next(answer)
    answer.close()
    hook.remove()
    assert threading.active_count() == threads
    assert len(steps) < 100
    assert answers(tiny)[-1] == generated(tiny)


# --- what an answer rests on


def chat_of(there, window, max_new_tokens, context=None):
    """A chat with a model, without a run."""
    return chat_page.Chat(
        there.model,
        there.tokenizer,
        there.stop_token_ids,
        'Do not "trust" <it>.',
        window,
        max_new_tokens,
        context,
    )


@pytest.fixture
def context(run_dir):
    return load_context(with_rows(run_dir), "use")


def last_turn(chat, question):
    """What the page shows in the end: the base model's turn, and the fine-tuned model's."""
    *_, turns = chat_page.answer_turns(chat, question)
    return turns


def says(monkeypatch, base, tuned):
    """Let the models give these answers. Returns the prompts that they get."""
    prompts = []

    def two_answers(model, tokenizer, stop_token_ids, messages, max_new_tokens):
        prompts.append(messages)
        yield [base, tuned]

    monkeypatch.setattr(chat_page, "two_answers", two_answers)
    return prompts


def test_the_rows_stand_under_the_answer(tiny, context, monkeypatch):
    says(monkeypatch, "I do not know.", "Ginger tea.")
    best = context.index.rows[0]
    base, tuned = last_turn(chat_of(tiny, 400, 8, context), best.question)
    assert [message["content"] for message in base] == [best.question, "I do not know."]
    assert tuned[1]["content"] == "Ginger tea."
    assert tuned[2]["metadata"]["title"] == "Rests on 3 rows of the table"
    assert tuned[2]["content"].startswith(f"1. **{best.question}** (similarity 1.00)")
    assert all(line in tuned[2]["content"] for line in best.answer.splitlines())


def test_both_models_are_asked_with_the_rows_in_the_words_of_the_series(tiny, context, monkeypatch):
    prompts = says(monkeypatch, "a", "b")
    last_turn(chat_of(tiny, 400, 8, context), QUESTION)
    assert prompts == [context.prompt(ASKED).messages]


def test_nothing_is_said_plainly_where_the_model_finds_nothing(tiny, context, monkeypatch):
    says(monkeypatch, "a", "My table has nothing on that.")
    _, tuned = last_turn(chat_of(tiny, 400, 8, context), "I suffer from a cold, or so it seems")
    assert tuned[2]["metadata"]["title"].startswith("Rests on nothing: the model found no answer")


def test_nothing_is_said_plainly_where_no_row_is_similar(tiny, context, monkeypatch):
    """And the model's own answer is not shown."""
    says(monkeypatch, "a", "Ginger tea.")
    _, tuned = last_turn(chat_of(tiny, 400, 8, context), "Zwölf Boxkämpfer jagen Viktor")
    assert tuned[1]["content"] == "My table has nothing on that."
    assert tuned[2]["metadata"]["title"].startswith("Rests on nothing: no row is similar enough")


def test_a_row_that_asks_the_same_counts_more_than_a_model_that_finds_nothing(
    tiny, context, monkeypatch
):
    says(monkeypatch, "a", "My table has nothing on that.")
    row = context.index.rows[0]
    _, tuned = last_turn(chat_of(tiny, 400, 8, context), row.question)
    assert tuned[1]["content"] == row.answer
    assert "which asks nearly the same" in tuned[2]["metadata"]["title"]


def test_without_context_rows_nothing_stands_under_an_answer(tiny, monkeypatch):
    prompts = says(monkeypatch, "a", "b")
    _, tuned = last_turn(chat_of(tiny, 400, 8), QUESTION)
    assert len(tuned) == 2
    assert prompts == [ASKED]


@pytest.mark.parametrize(
    ("question", "problem"),
    [("", "type a question"), (QUESTION, None), ("cold " * 1500, "with its rows is too long")],
    ids=["empty", "a question", "too long"],
)
def test_what_cannot_be_asked(tiny, context, question, problem):
    found = chat_page.problem_with(chat_of(tiny, 1024, 8, context), question)
    assert (problem or "") in (found or "")
    assert (found is None) == (problem is None)


# --- the page


@pytest.fixture(scope="module")
def chat(finished_run):
    """The notebook, its page on a free port. Closed at the end."""
    chat = run_tiny("chat", finished_run, max_new_tokens=48, window=160)
    yield chat
    chat.page.close()


@pytest.fixture
def client(chat):
    from gradio_client import Client

    return Client(chat.page.local_url, verbose=False)


def text(message):
    return message["content"][0]["text"]


@pytest.mark.export
def test_answers_stream_side_by_side(client):
    job = client.submit(QUESTION, [], [], api_name="/ask")
    box, base, tuned = job.result()
    assert len(job.outputs()) > 10, "one for each token"
    assert box == ""
    assert text(base[0]) == text(tuned[0]) == QUESTION
    assert text(base[1]) != text(tuned[1])
    _, base, _ = client.predict("Another one?", base, tuned, api_name="/ask")
    assert [message["role"] for message in base] == ["user", "assistant"] * 2


@pytest.mark.export
@pytest.mark.parametrize(
    "question", ["", "  \n ", "cold " * 500], ids=["empty", "blank", "too long"]
)
def test_what_cannot_be_asked_changes_nothing(client, question):
    assert client.predict(question, [], [], api_name="/ask") == (question.strip(), [], [])


@pytest.mark.export
def test_two_at_once_wait_for_each_other(chat, client):
    from gradio_client import Client

    other = Client(chat.page.local_url, verbose=False)
    jobs = [
        client.submit("First?", [], [], api_name="/ask"),
        other.submit("Second?", [], [], api_name="/ask"),
    ]
    for job, question in zip(jobs, ("First?", "Second?"), strict=True):
        _, base, tuned = job.result()
        asked = [{"role": "user", "content": question}]
        *_, alone = chat_page.two_answers(
            chat.chat.model, chat.chat.tokenizer, chat.chat.stop_token_ids, asked, 48
        )
        assert text(base[0]) == question
        assert [text(base[1]), text(tuned[1])] == [answer or "…" for answer in alone]


@pytest.mark.export
def test_stop(client):
    job = client.submit(QUESTION, [], [], api_name="/ask")
    while not job.outputs():
        time.sleep(0.01)
    assert job.cancel()
    assert len(job.outputs()) < 48
    assert text(client.predict("Next?", [], [], api_name="/ask")[1][0]) == "Next?"


@pytest.mark.export
def test_a_tables_system_message_goes_before_each_question(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(
        chat_page,
        "two_answers",
        lambda *arguments: asked.append(arguments[3]) or iter([("a", "b")]),
    )
    system = {"role": "system", "content": "You are brief."}
    rows = [{"prompt": [system, *ASKED]}, {"prompt": []}]
    chat = chat_of(tiny, 400, 8)
    chat_page.add_examples(chat, [row["prompt"] for row in rows])
    page = chat_page.chat_page(chat)
    list(next(f.fn for f in page.fns.values() if f.name == "ask")("Why?", [], []))
    assert asked == [[system, {"role": "user", "content": "Why?"}]]
    chat_page.chat_page(chat_of(tiny, 400, 8))


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


@pytest.mark.export
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)], ids=["desktop", "phone"])
def test_the_disclaimer_is_always_in_view(chat, browser, width, height):
    """Before and after an answer, wherever one scrolls to."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    ask_in(browser, chat.page.local_url)
    for place in ("0", "document.body.scrollHeight"):
        browser.execute_script(f"window.scrollTo(0, {place})")
        time.sleep(0.5)
        seen = browser.execute_script(
            "const box = document.querySelector('#disclaimer').getBoundingClientRect();"
            "const top = document.elementFromPoint(innerWidth / 2, (box.top + box.bottom) / 2);"
            "const fits = document.body.scrollWidth <= innerWidth;"
            "return [box.top >= 0 && box.bottom < innerHeight, top.innerText, fits]"
        )
        assert seen[0], seen
        assert "not medical advice" in seen[1], seen
        assert seen[2], seen


@pytest.fixture
def colab_proxy(monkeypatch):
    """A stand-in of `google.colab` and its proxy, which tells a server its address inside and
    not the one outside.
    """

    class Proxy(BaseHTTPRequestHandler):
        def forward(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {**self.headers, "Host": "m-1.user-runtimes.internal:80"}
            inside = Request(
                f"http://127.0.0.1:{self.port}{self.path}",
                body or None,
                headers,
                method=self.command,
            )
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
    for name, module in (
        ("google.colab", ModuleType("google.colab")),
        ("google.colab.output", output),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.export
def test_in_colab_it_works_behind_the_proxy(tiny, browser, colab_proxy, monkeypatch):
    """And opens no tunnel to the world, which is what Gradio does in Colab if nobody says
    otherwise.
    """
    monkeypatch.setattr(
        "gradio.networking.setup_tunnel", lambda **_: pytest.fail("a tunnel was opened")
    )
    monkeypatch.setattr("gradio.utils.colab_check", lambda: True)
    chat = chat_of(tiny, 160, 48)
    chat_page.add_examples(chat, [ASKED])
    page = chat_page.chat_page(chat)
    try:
        assert chat_page.open_page(page) == colab_proxy
        assert ask_in(browser, colab_proxy)
    finally:
        page.close()


@pytest.mark.export
def test_make_chat_serves_and_ctrl_c_ends_it(finished_run):
    """Started as a person would, it says where the page is, and ends without a traceback."""
    server = subprocess.Popen(
        **run_of_make("chat", f"RUN_DIR={finished_run}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a job in the background ignores it
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


def test_without_gradio_it_says_what_to_do(finished_run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"Gradio is missing here.*make chat") as caught:
        run_tiny("chat", finished_run)
    assert type(caught.value).__name__ == "StageError"


def test_a_run_that_is_not_there(tmp_path):
    done = make("chat", f"RUN_DIR={tmp_path / 'none'}")
    assert f"{tmp_path / 'none'} is no run folder" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
