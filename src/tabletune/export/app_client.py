"""Ask questions about a table: find the most similar rows, and let a model answer from them.

    python app.py "When are you open?"          answers one question
    python app.py                               answers questions until you end it with Ctrl-D
    python app.py --copy "When are you open?"   the answer of the most similar row, without a model

It needs Python and nothing else. The model answers behind a server that speaks OpenAI's protocol:
llama.cpp, Ollama, vLLM or `transformers serve`; README.md beside this file has the commands.
With --copy no server is needed.
settings.json says how rows are found and what the model is told; rows.jsonl is the table, a row a
line, with a question and an answer: add lines, and they are found. What is more similar to a line
of out_of_scope.txt, if there is one, than to any row counts as hardly similar to the rows.
"""

import argparse
import json
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tabletune.data.lookup import (
    MOST_CONTEXT_ROWS,
    PlainIndex,
    answer_without_thoughts,
    choose_rows,
    context_message,
    copied_answer,
    final_answer,
    is_refused,
)

TIMEOUT = 600  # seconds; a large model on a small machine takes its time


@dataclass
class Prompt:
    """What the model is asked, and what was found for it."""

    messages: list[dict]  # of "role" and "content"
    rows: list[dict]  # of "question", "answer" and "score", the most similar first
    refused: bool  # no row is similar enough: the model is not asked


class App:
    """The rows and settings of a folder, and the server that has the model."""

    def __init__(self, folder: Path, server: str = "", model: str = ""):
        """Read the folder.

        `server` is the address up to "/v1"; without one the settings have it, as for `model`.
        """
        path = folder / "settings.json"
        try:
            self.settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        self.server = (server or self.settings["server"]).rstrip("/")
        self.model = model or self.settings["model"]
        self.rows_file = folder / "rows.jsonl"
        self.out_of_scope_file = folder / "out_of_scope.txt"
        self.index: PlainIndex | None = None
        if self.settings["context_rows"]:
            self.row_index()

    def row_index(self) -> PlainIndex:
        """The index over the rows; made when it is first needed, as a large table takes time."""
        if self.index is None:
            self.index = PlainIndex(
                rows_of_file(self.rows_file),
                self.settings["analyzer"],
                self.settings["function_words"],
                questions_in(self.out_of_scope_file),
            )
        return self.index

    def prompt(self, question: str, history: list[dict] | None = None) -> Prompt:
        """The prompt of a question, after the messages of `history`."""
        messages = list(history or [])
        if self.settings["system"] and (not messages or messages[0]["role"] != "system"):
            # as in training, where every conversation began with it
            messages.insert(0, {"role": "system", "content": self.settings["system"]})
        if not self.settings["context_rows"]:
            # this model was trained without rows in its prompt
            return Prompt([*messages, {"role": "user", "content": question}], [], False)
        hits = self.find(question)
        content = context_message(
            self.settings["context_template"], [row for row, _ in hits], question
        )
        refused = is_refused(
            [score for _, score in hits],
            self.settings["unknown_answer"],
            self.settings["unknown_threshold"],
        )
        rows = []
        for row, score in hits:
            rows.append(
                {"question": row["question"], "answer": row["answer"], "score": round(score, 4)}
            )
        return Prompt([*messages, {"role": "user", "content": content}], rows, refused)

    def find(self, question: str) -> list[tuple[dict, float]]:
        """The rows for a question's prompt, each with its similarity, the most similar first."""
        hits = self.row_index().search(question, MOST_CONTEXT_ROWS)
        # the same choice as in training: no answer twice, and not too many characters
        places = choose_rows(
            [row for row, _ in hits],
            self.settings["context_rows"],
            self.settings["context_characters"],
        )
        return [hits[place] for place in places]

    def ask(self, question: str, history: list[dict] | None = None) -> dict:
        """The answer to a question, as a dict.

        It has `question`, `answer`, `unknown` (the table has nothing on it) and `rows`.
        """
        prompt = self.prompt(question, history)
        unknown_answer = self.settings["unknown_answer"]
        if prompt.refused:
            # no row is similar enough, so the model has nothing to answer from
            answer, unknown = unknown_answer, True
        else:
            answer = self.complete(prompt.messages)
            answer, unknown = final_answer(
                answer,
                prompt.rows,
                unknown_answer,
                self.settings["unknown_threshold"],
                self.settings["certain_threshold"],
            )
        return {"question": question, "answer": answer, "unknown": unknown, "rows": prompt.rows}

    def copy(self, question: str) -> dict:
        """The answer of the row whose question is most similar, as a dict like that of `ask`.

        No model is asked.
        """
        row, score = self.row_index().search(question, 1)[0]
        answer, unknown, rows = copied_answer(
            row, score, self.settings["unknown_answer"], self.settings["unknown_threshold"]
        )
        return {"question": question, "answer": answer, "unknown": unknown, "rows": rows}

    def complete(self, messages: list[dict]) -> str:
        """The model's answer to messages, from the server.

        Greedy: the same question gets the same answer.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.settings["max_new_tokens"],
        }
        request = urllib.request.Request(
            f"{self.server}/chat/completions",
            json.dumps(body).encode("utf-8"),
            {"Content-Type": "application/json", "Authorization": "Bearer none"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            completion = json.load(response)
        text = completion["choices"][0]["message"]["content"] or ""
        return answer_without_thoughts(text)


def rows_of_file(path: Path) -> list[dict]:
    """The rows of rows.jsonl. Raises ValueError naming a line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(row, dict) or not all(
            isinstance(row.get(name), str) for name in ("question", "answer")
        ):
            raise ValueError(f'{path}, line {number}, needs "question" and "answer", both texts.')
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def questions_in(path: Path) -> list[str]:
    """The lines of out_of_scope.txt; [] without the file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line for line in lines if line.strip()]


def answer_as_text(result: dict) -> str:
    """An answer as text, with the rows that it rests on."""
    lines = [result["answer"]]
    if result["unknown"]:
        lines.append("  It rests on nothing: the table has no row for this question.")
    elif len(result["rows"]) == 1:
        lines.append("  It rests on this row:")
    elif result["rows"]:
        lines.append("  It rests on these rows:")
    for number, row in enumerate(result["rows"], 1):
        if not result["unknown"]:
            lines.append(f"  {number}. {row['question']} (similarity {row['score']:.2f})")
    return "\n".join(lines)


def error_text(app: App, error: Exception) -> str:
    """One line about what went wrong with the server."""
    if isinstance(error, urllib.error.HTTPError):
        reason = error.read().decode("utf-8", "replace").strip() or error.reason
        return f"The server at {app.server} refused: {reason[:300]}"
    return (
        f"No answer from {app.server} ({error}). Start a server first: README.md has the commands."
    )


def run_app(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", nargs="*", help="without one, questions are read line by line")
    parser.add_argument(
        "--copy", action="store_true", help="copy the most similar row's answer; asks no server"
    )
    parser.add_argument("--server", default="", help="for example http://localhost:11434/v1")
    parser.add_argument("--model", default="", help="the model's name on the server")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
    options = parser.parse_args(arguments)

    try:
        app = App(Path(__file__).resolve().parent, options.server, options.model)
        if options.copy:
            app.row_index()  # now: later, an error would be taken for one of the server
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    questions = [" ".join(options.question)] if options.question else sys.stdin
    print(app.settings["disclaimer"], file=sys.stderr)
    for line in questions:
        question = line.strip()
        if not question:
            continue
        try:
            result = app.copy(question) if options.copy else app.ask(question)
        except (OSError, ValueError, KeyError) as error:
            print(error_text(app, error), file=sys.stderr)
            return 1
        text = json.dumps(result, ensure_ascii=False) if options.json else answer_as_text(result)
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_app())
