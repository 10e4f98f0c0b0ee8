"""The exported app: the table's rows, and one Python file that looks them up and asks a server.

`app.py` is `data/lookup.py` and `app_client.py` in one file, so it looks up rows and builds prompts
with the very code of the series.
"""

import importlib.util
import json
import re
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

from tabletune.data.retrieval import TableRow, all_rows, analyzer_for, function_words_for
from tabletune.errors import StageError
from tabletune.export.finished_run import ExportRun
from tabletune.run.files import archive, atomic_write

SERVER = "http://localhost:8080/v1"  # where llama.cpp's server listens
CLIENT = "export/app_client.py"
LOOKUP = "data/lookup.py"
README = "resources/templates/app_readme.md.j2"
CHECKED_QUESTIONS = 200
NEVER_CERTAIN = 1.01  # no similarity is above 1


def write_app(export_run: ExportRun) -> Path | None:
    """Write `export/app/`, and check that it asks as the series does. Returns the folder.

    Returns None, and says so, for a table of texts, which has no questions. An app of other rows or
    settings moves to `earlier/`.
    """
    if not export_run.has_questions:
        print("No app: the rows of this table have no questions.")
        return None
    folder = export_run.folder / "app"
    files = app_files(export_run)
    if folder.exists() and read_files(folder) != files:
        archive(export_run.folder.parent, str(folder.relative_to(export_run.folder.parent)))
    if not folder.exists():
        with atomic_write(folder) as unfinished:
            unfinished.mkdir()
            for name, text in files.items():
                (unfinished / name).write_text(text, encoding="utf-8")
    number = check_app(export_run, folder)
    # without context_rows nothing is looked up for a prompt
    same = "the same prompt" if export_run.context is None else "the same rows and the same prompt"
    print(f"{folder}: {same} as in this run for {number:,} questions.")
    return folder


def app_files(export_run: ExportRun) -> dict[str, str]:
    """The files of the app, {name: text}."""
    settings = app_settings(export_run)
    template = (resources.files("tabletune") / README).read_text(encoding="utf-8")
    files = {
        "app.py": app_source(),
        "settings.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "README.md": jinja2.Template(template, keep_trailing_newline=True).render(
            run=export_run,
            settings=settings,
            gguf=gguf_name(export_run),
            out_of_scope=questions_out_of_scope(export_run),
        ),
    }
    lines = []
    for row in rows_in_use(export_run):
        entry = {"question": row.question, "answer": row.answer}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    files["rows.jsonl"] = "".join(lines)
    if questions := questions_out_of_scope(export_run):
        files["out_of_scope.txt"] = "\n".join(questions) + "\n"
    return files


def questions_out_of_scope(export_run: ExportRun) -> list[str]:
    """The questions that the table is not to answer, each on one line; [] if there are none."""
    if export_run.context is None:
        return []
    return [" ".join(text.split()) for text in export_run.context.index.out_of_scope]


def rows_in_use(export_run: ExportRun) -> list[TableRow]:
    """The rows of all splits: those of the index for use, where the run has one."""
    if export_run.context is not None:
        return export_run.context.index.rows
    return all_rows(export_run.splits)


def gguf_name(export_run: ExportRun) -> str | None:
    """The name of the GGUF file to serve: 8 bits if there is one, else the smallest.

    None if there is none.
    """
    files = list((export_run.folder / "gguf").glob(f"{export_run.name}-*.gguf"))
    for file in files:
        if file.name == f"{export_run.name}-Q8_0.gguf":
            return file.name
    smallest = min(files, key=lambda file: file.stat().st_size, default=None)
    return smallest.name if smallest else None


def read_files(folder: Path) -> dict[str, str]:
    """The files in a folder, {name: text}, without what Python leaves there."""
    paths = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def app_settings(export_run: ExportRun) -> dict[str, Any]:
    """What the app's settings.json says."""
    settings: dict[str, Any] = {
        "model": export_run.name,
        "server": SERVER,
        "disclaimer": export_run.disclaimer,
        "system": export_run.system_message,
        "max_new_tokens": export_run.parameters["max_new_tokens"],
        "context_rows": 0,
        "unknown_answer": "",
        "unknown_threshold": 0.0,
        "certain_threshold": NEVER_CERTAIN,
    }
    questions = [row.question for row in rows_in_use(export_run)]
    analyzer = analyzer_for(questions)
    if export_run.context is not None:
        settings |= asdict(export_run.context.settings)
        analyzer = export_run.context.index.analyzer
    words = function_words_for(analyzer, questions)
    settings["analyzer"] = analyzer
    settings["function_words"] = sorted(words) if words is not None else None
    return settings


def app_source() -> str:
    """The text of app.py: the client, with the lookup's code in place of its import."""
    package = resources.files("tabletune")
    client = (package / CLIENT).read_text(encoding="utf-8")
    lookup = (package / LOOKUP).read_text(encoding="utf-8")
    # without its docstring: app.py begins with the client's
    lookup = re.sub(r'^""".*?"""\n+', "", lookup, count=1, flags=re.DOTALL)
    header = "# --- looking up rows, and the prompt: tabletune's data/lookup.py\n\n"
    footer = "\n\n# --- asking\n"
    source, replaced = re.subn(
        r"^from tabletune\.data\.lookup import \([^)]*\)$",
        lambda _: header + lookup.rstrip() + footer,
        client,
        flags=re.MULTILINE,
    )
    if replaced != 1 or "tabletune.data" in source:
        raise AssertionError(
            "app_client.py imports names of data/lookup.py in brackets, and nothing else of "
            "the package"
        )
    return source


def load_app(folder: Path) -> ModuleType:
    """The exported app.py as a module."""
    spec = importlib.util.spec_from_file_location("exported_app", folder / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_app(export_run: ExportRun, folder: Path) -> int:
    """Check that the app finds the rows and builds the prompts of the series.

    Returns the number of questions compared.

    Raises StageError if one differs.
    """
    app = load_app(folder).App(folder)
    number = 0
    # some hundred questions: a difference of code would show in the first ones
    for row in export_run.conversations():
        if number == CHECKED_QUESTIONS or not row["prompt"]:
            break
        *history, question = row["prompt"]
        expected = export_run.ask(row["prompt"])
        prompt = app.prompt(question["content"], history)
        if (prompt.messages, prompt.refused) != (expected.messages, expected.refused):
            raise StageError(
                f"The app in {folder} makes another prompt for {question['content']!r} than this "
                "run. Run 07_export again."
            )
        number += 1
    return number
