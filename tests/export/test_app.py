"""The exported app: the lookup and prompts of the series in one file, and its answers from a
server.
"""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pandas as pd
import pytest
from conftest import ROOT
from export_runs import cards_of, read, run_dir, with_rows  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st

from tabletune.data.context import answer_with_context, load_context
from tabletune.errors import StageError
from tabletune.evaluation.ask import answer_questions
from tabletune.export import app as app_module
from tabletune.export import gguf

UNKNOWN = "My table has nothing on that."


@pytest.fixture
def knowledge_run(run_dir):
    """A run whose model answers from rows in its prompt."""
    return with_rows(run_dir)


@pytest.fixture
def exported(knowledge_run):
    """The exported app of that run, as a module, and its folder."""
    folder = app_module.write_app(read(knowledge_run))
    return app_module.load_app(folder), folder


# --- the same rows, the same prompt


def questions_of(run):
    """The table's questions as they stand, and changed in ways in which people write."""
    splits = read(run).splits
    for split in splits.values():
        for prompt in split["prompt"]:
            question = prompt[-1]["content"]
            yield from (
                question,
                question.upper(),
                question[5:],
                question.replace("a", ""),
                question[::-1],
            )


def test_prompts_equal_those_of_the_series(knowledge_run, exported):
    module, folder = exported
    app = module.App(folder)
    context = load_context(knowledge_run, "use")
    questions = sorted(set(questions_of(knowledge_run)))
    assert len(questions) > 300
    for question in questions:
        expected = context.prompt([{"role": "user", "content": question}])
        prompt = app.prompt(question)
        assert prompt.messages == expected.messages, question
        assert prompt.refused == expected.refused, question
        scores = [hit.score for hit in expected.hits]
        assert [row["score"] for row in prompt.rows] == pytest.approx(scores, abs=1e-4), question


def test_the_app_refuses_what_is_out_of_scope(run_dir):
    question = "I am suffering from Gas Trouble after a fall. Please suggest a home remedy."
    folder = app_module.write_app(read(with_rows(run_dir, [question])))
    app = app_module.load_app(folder).App(folder)
    assert (folder / "out_of_scope.txt").read_text(encoding="utf-8") == f"{question}\n"
    assert "out_of_scope.txt" in (folder / "README.md").read_text(encoding="utf-8")
    assert app.prompt(question).refused
    (folder / "out_of_scope.txt").unlink()
    assert not app_module.load_app(folder).App(folder).prompt(question).refused


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1, max_size=40)
WORDS = st.text(st.sampled_from("abcde éßñ東京ไทย?!-{}%"), min_size=1, max_size=30)


@settings(max_examples=80, deadline=None)
@given(
    table=st.lists(
        st.tuples((WORDS | TEXTS).filter(lambda text: len(text.strip()) > 1), TEXTS),
        min_size=1,
        max_size=12,
    ),
    asked=st.lists(WORDS | TEXTS, min_size=1, max_size=5),
    threshold=st.sampled_from([0.0, 0.3, 0.9]),
    out_of_scope=st.lists(WORDS.filter(str.strip), max_size=3),
)
def test_prompts_equal_those_of_the_series_whatever_the_table(
    table, asked, threshold, out_of_scope, tmp_path_factory
):
    from datasets import Dataset, DatasetDict

    run = tmp_path_factory.mktemp("run")
    rows = []
    table = [*table, ("How are you?", "Fine.")]  # an index needs some n-grams
    for number, (question, answer) in enumerate(table):
        prompt = [{"role": "user", "content": question}]
        completion = [{"role": "assistant", "content": answer}]
        rows.append({"prompt": prompt, "completion": completion, "text": "", "group": str(number)})
    splits = DatasetDict({name: Dataset.from_list(rows) for name in ("train", "test")})
    splits.save_to_disk(run / "dataset")
    (run / "dataset" / "report.json").write_text("{}")
    with_rows(run, out_of_scope, unknown_threshold=threshold)
    context = load_context(run, "use")
    folder = run / "app"
    folder.mkdir()
    app = write_by_hand(folder, context)
    for question in [*asked, *out_of_scope, *(question for question, _ in table)]:
        expected = context.prompt([{"role": "user", "content": question}])
        prompt = app.prompt(question)
        assert prompt.messages == expected.messages
        assert prompt.refused == expected.refused
        copied = app.copy(question)
        assert (copied["answer"], copied["unknown"], copied["rows"]) == context.copied(question)


def write_by_hand(folder, context):
    """The app of a context, without the run that it belongs to."""
    from types import SimpleNamespace

    stand_in = SimpleNamespace(
        name="x",
        disclaimer="",
        system_message="",
        parameters={"max_new_tokens": 8, "window": 64},
        context=context,
        folder=folder,
    )
    for name, text in app_module.app_files(stand_in).items():
        (folder / name).write_text(text, encoding="utf-8")
    return app_module.load_app(folder).App(folder)


def test_an_app_with_another_prompt_is_not_accepted(knowledge_run, exported):
    _, folder = exported
    path = folder / "settings.json"
    changed = json.loads(path.read_text())
    changed["context_template"] = changed["context_template"].replace("Rows", "Lines")
    path.write_text(json.dumps(changed))
    with pytest.raises(StageError, match="makes another prompt for"):
        app_module.check_app(read(knowledge_run), folder)


# --- its files


def test_the_app_needs_the_standard_library_only(exported):
    """Without site-packages, and not from its own folder."""
    _, folder = exported
    command = [sys.executable, "-I", "-S", str(folder / "app.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "find the most similar rows" in done.stdout


def test_the_app_is_one_file_without_the_package(exported):
    _, folder = exported
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "README.md",
        "app.py",
        "rows.jsonl",
        "settings.json",
    ]
    source = (folder / "app.py").read_text()
    assert "import tabletune" not in source
    assert "from tabletune" not in source


def test_the_readme_has_the_four_servers(exported):
    text = (exported[1] / "README.md").read_text()
    for command in ("vllm serve ../../merged", "transformers serve ../../merged", "python app.py"):
        assert command in text, command
    assert "llama.cpp and Ollama need a GGUF file" in text, "there is none in this run"
    assert "{{" not in text
    assert str(ROOT) not in text


def test_the_readme_names_the_gguf_file(knowledge_run):
    export_run = read(knowledge_run)
    folder = export_run.folder / "gguf"
    folder.mkdir(parents=True)
    for kind in ("F16", "Q8_0", "Q4_K_M"):
        (folder / f"run-{kind}.gguf").write_text(kind)
    text = (app_module.write_app(export_run) / "README.md").read_text()
    assert "llama-server -m ../gguf/run-Q8_0.gguf -c 1024" in text
    assert "ollama create run -f ../gguf/Modelfile" in text


def test_an_app_that_is_as_it_should_be_stays(knowledge_run, exported):
    folder = exported[1]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    app_module.write_app(read(knowledge_run))
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert after == before


def test_rows_that_somebody_added_are_not_lost(knowledge_run, exported):
    with (exported[1] / "rows.jsonl").open("a") as file:
        file.write('{"question": "Who?", "answer": "Me."}\n')
    app_module.write_app(read(knowledge_run))
    assert "Who?" not in (exported[1] / "rows.jsonl").read_text()
    archived = list(knowledge_run.glob("earlier/*/export/app/rows.jsonl"))
    assert len(archived) == 1
    assert "Who?" in archived[0].read_text()


def test_a_row_that_is_added_is_found(exported):
    module, folder = exported
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"question": "When does the shop open?", "answer": "At nine."}\n')
    prompt = module.App(folder).prompt("when does the shop opn")
    assert prompt.rows[0]["answer"] == "At nine."
    assert "At nine." in prompt.messages[-1]["content"]
    assert not prompt.refused


def test_a_table_of_texts_has_no_app(run_dir, monkeypatch, capsys):
    export_run = read(run_dir)
    monkeypatch.setattr(type(export_run), "has_questions", False)
    assert app_module.write_app(export_run) is None
    assert "No app" in capsys.readouterr().out


def test_without_context_rows_the_question_is_asked_alone(run_dir):
    folder = app_module.write_app(read(run_dir))
    app = app_module.load_app(folder).App(folder)
    prompt = app.prompt("What helps?")
    assert prompt.messages == [{"role": "user", "content": "What helps?"}]
    assert prompt.rows == []
    assert not prompt.refused


def test_a_threshold_of_the_notebook_goes_into_the_app(knowledge_run):
    folder = app_module.write_app(read(knowledge_run, unknown_threshold=0.77))
    assert json.loads((folder / "settings.json").read_text())["unknown_threshold"] == 0.77


def test_the_system_message_and_the_history_come_first(exported):
    module, folder = exported
    app = module.App(folder)
    app.settings["system"] = "Be brief."
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    messages = app.prompt("And a cold?", history).messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1:3] == history


# --- copied answers


def copied_by_ask(run, questions):
    """{question: (answer, unknown)} of `make ask MODEL_PART=copy`."""
    (run / "q.txt").write_text("\n".join(questions))
    answer_questions(run, run / "q.txt", "copy", {})
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len(questions)
    return {line["question"]: (line["answer"], line["unknown"]) for line in lines}


@pytest.mark.parametrize("context_rows", [0, 3])
def test_the_app_copies_what_make_ask_copies(context_rows, run_dir):
    if context_rows:
        with_rows(run_dir)
    folder = app_module.write_app(read(run_dir))
    app = app_module.load_app(folder).App(folder)
    questions = sorted({question.strip() for question in questions_of(run_dir)})[::3]
    questions += ["Zwölf Boxkämpfer jagen Viktor", "???", "東京"]
    expected = copied_by_ask(run_dir, questions)
    answers = {}
    for question in questions:
        result = app.copy(question)
        answers[question] = (result["answer"], result["unknown"])
    assert answers == expected
    assert answers["???"] == ((UNKNOWN if context_rows else ""), True)
    assert len({answer for answer, _ in answers.values()}) > 20


def test_copying_needs_no_server(exported):
    done = run_app(exported[1], "--copy", "--server", "http://127.0.0.1:9/v1", QUESTION)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Here is a suggested remedy:")
    assert f"  It rests on this row:\n  1. {QUESTION[:20]}" in done.stdout
    assert "2. " not in done.stdout


def test_many_questions_are_copied_line_by_line(exported):
    done = run_app(exported[1], "--copy", "--json", given=f"{QUESTION}\n\nZwölf Boxkämpfer\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["unknown"] for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 1, is not JSON"),
        ('{"question": "Who?"}', 'line 1, needs "question" and "answer"'),
        ("[]", 'line 1, needs "question" and "answer"'),
        ("", "has no rows"),
    ],
)
@pytest.mark.parametrize("arguments", [["--copy"], []])
def test_rows_that_cannot_be_read_are_one_line(line, message, arguments, exported):
    (exported[1] / "rows.jsonl").write_text(line)
    done = run_app(exported[1], *arguments, QUESTION)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_that_cannot_be_read_are_one_line(exported):
    (exported[1] / "settings.json").write_text("{oops")
    done = run_app(exported[1], QUESTION)
    assert done.returncode == 1
    assert "settings.json is not JSON" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_readme_says_how_to_copy(exported, run_dir):
    text = (exported[1] / "README.md").read_text()
    assert 'python app.py --copy "A question"' in text
    assert f"that is “{UNKNOWN}”, too" in text


# --- answers from a server


@contextmanager
def server_that_says(answer, status=200):
    """An OpenAI-style server with one answer: its address, and the bodies that it was sent."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()


QUESTION = "I am suffering from Cold. Please suggest a home remedy."


def test_an_answer_comes_with_its_rows(exported):
    module, folder = exported
    with server_that_says(" <think>x</think> Tea. ") as (address, bodies):
        result = module.App(folder, address).ask(QUESTION)
    assert result["answer"] == "Tea."
    assert result["unknown"] is False
    assert [sorted(row) for row in result["rows"]] == [["answer", "question", "score"]] * 3
    assert bodies[0]["temperature"] == 0
    assert bodies[0]["max_tokens"] == 256
    assert bodies[0]["messages"] == module.App(folder).prompt(QUESTION).messages


def test_the_server_is_not_asked_where_no_row_is_similar(exported):
    module, folder = exported
    with server_that_says("Tea.") as (address, bodies):
        result = module.App(folder, address).ask("Zwölf Boxkämpfer jagen Viktor")
    assert result["answer"] == UNKNOWN
    assert result["unknown"] is True
    assert bodies == []


def test_a_model_that_says_nothing_is_understood(exported):
    module, folder = exported
    with server_that_says("my table has nothing on that") as (address, _):
        assert module.App(folder, address).ask(QUESTION)["unknown"] is True


def run_app(folder, *arguments, given=None):
    command = [sys.executable, str(folder / "app.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=given)


def test_the_command_line_shows_what_an_answer_rests_on(exported):
    with server_that_says("Tea.") as (address, _):
        done = run_app(exported[1], "--server", address, QUESTION)
    assert done.returncode == 0
    assert done.stdout.startswith("Tea.\n  It rests on these rows:\n  1. I am suffering from")
    assert "not medical advice" in done.stderr


def test_the_command_line_says_plainly_that_an_answer_rests_on_nothing(exported):
    done = run_app(exported[1], "--server", "http://127.0.0.1:9/v1", "Zwölf Boxkämpfer")
    assert done.stdout.startswith(f"{UNKNOWN}\n  It rests on nothing")


@pytest.mark.parametrize("said", ["Tea.", UNKNOWN, "my table has nothing on that"])
def test_answers_are_settled_as_in_the_series(said, knowledge_run, exported, monkeypatch):
    """Refused by the lookup, unknown to the model, or the best row's where it asks nearly the
    same.
    """
    module, folder = exported
    app = module.App(folder)
    monkeypatch.setattr(app, "complete", lambda messages: said)
    context = load_context(knowledge_run, "use")
    questions = sorted(set(questions_of(knowledge_run)))[::5]

    def generate(prompts):
        lines = [{"answer": said, "stopped": True, "new_tokens": 1} for _ in prompts]
        return pd.DataFrame(lines), 0.0

    prompts = [[{"role": "user", "content": question}] for question in questions]
    expected, _ = answer_with_context(context, prompts, generate)
    answers = [app.ask(question) for question in questions]
    assert [answer["answer"] for answer in answers] == expected["answer"].tolist()
    assert [answer["unknown"] for answer in answers] == expected["unknown"].tolist()
    assert [answer["rows"] for answer in answers] == expected["rows"].tolist()


def test_many_questions_as_lines_of_json(exported):
    with server_that_says("Tea.") as (address, _):
        done = run_app(
            exported[1], "--json", "--server", address, given=f"{QUESTION}\n\n{QUESTION}\n"
        )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["answer"] for line in lines] == ["Tea.", "Tea."]


def test_no_server_is_one_line(exported):
    done = run_app(exported[1], "--server", "http://127.0.0.1:9/v1", QUESTION)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "No answer from http://127.0.0.1:9/v1" in done.stderr
    assert "README.md" in done.stderr


def test_a_server_that_refuses_is_one_line(exported):
    with server_that_says("no such model", status=404) as (address, _):
        done = run_app(exported[1], "--server", address, QUESTION)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "refused" in done.stderr
    assert "no such model" in done.stderr


# --- llama.cpp's server


SERVER = """
import sys

import uvicorn
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings

from tabletune.export.llama_cpp import load_llama_cpp

load_llama_cpp()  # without the layout that crashes on some machines
model = ModelSettings(model=sys.argv[1], n_ctx=1024, verbose=False)
app = create_app(server_settings=ServerSettings(), model_settings=[model])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
"""


@contextmanager
def llama_cpp_server(file):
    """llama.cpp's server with a GGUF file: its address."""
    import time
    from urllib.error import URLError
    from urllib.request import urlopen

    from tabletune.export.chat_page import free_port

    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(file), str(port)])
    address = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(240):
            assert server.poll() is None, "the server ended"
            try:
                urlopen(f"{address}/models").close()
                break
            except URLError:
                time.sleep(0.25)
        yield address
    finally:
        server.kill()
        server.wait()


@pytest.mark.export
@pytest.mark.parametrize("context_rows", [0, 3])
def test_llama_cpps_server_gives_the_answers_of_the_series(context_rows, run_dir):
    """The app with the exported file, and notebook 4's functions with the merged model in
    transformers.
    """
    from tabletune.evaluation.answers import generate
    from tabletune.export.verification import load_reference

    if context_rows:
        with_rows(run_dir, context_rows=context_rows, unknown_threshold=0.3)
    export_run = read(run_dir, gguf_types=["F16"], max_new_tokens=24)
    file = gguf.make_gguf(export_run, "F16")
    folder = app_module.write_app(export_run)
    prompts = [row["prompt"] for row in export_run.splits["test"]][::4]
    prompts.append([{"role": "user", "content": "Zwölf Boxkämpfer jagen Viktor"}])

    def generate_answers(prompts):
        tokenizer, stop_token_ids = export_run.tokenizer, export_run.stop_token_ids
        return generate(
            load_reference(export_run.merged), tokenizer, stop_token_ids, prompts, 1, 24
        )

    expected, _ = answer_with_context(export_run.context, prompts, generate_answers)
    with llama_cpp_server(file) as address:
        app = app_module.load_app(folder).App(folder, address)
        answers = [app.ask(prompt[-1]["content"]) for prompt in prompts]
    assert [answer["answer"] for answer in answers] == expected["answer"].tolist()
    if context_rows:
        assert [answer["unknown"] for answer in answers] == expected["unknown"].tolist()
        assert answers[-1]["unknown"]
