"""README and docs/ say what is: links resolve, parameters and messages exist, figures are those
that were stored.
"""

import ast
import json
import re
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import STAGES

from tabletune.model.loading import skeleton
from tabletune.stats import interval, resampled
from tabletune.training.memory import TrainingMemory

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("[bd]*/README.md")),
]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PARAMETERS = json.loads(
    (ROOT / "src" / "tabletune" / "resources" / "parameters.json").read_text(encoding="utf-8")
)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(path):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", without_code(path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_file_names_lead_somewhere(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    folders = (
        "benchmarks|data|docs|grids|models|notebooks|notebooks_py|profiles|src|templates|tests"
    )
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        in_package = ROOT / "src" / "tabletune" / name  # architecture.md names files from there
        is_there = (ROOT / name).exists() or in_package.exists()
        assert is_there or name == "profiles/mine.yaml", name


def test_architecture_names_files_and_functions_that_exist():
    text = without_code(read("docs/architecture.md")).split("## Where to find things")[1]
    package = ROOT / "src" / "tabletune"
    for name in re.findall(r"`([a-z_]+/[\w./]+)`", text):
        assert (package / name).exists() or (ROOT / name).exists(), name
    pairs = re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", text)
    assert len(pairs) > 5
    for name, file in pairs:
        source = (package / file).read_text(encoding="utf-8")
        assert re.search(rf"(?m)^ *(?:def |class )?{name}\b", source), (name, file)


def test_what_make_is_asked_for_is_there():
    makefiles = read("Makefile") + read("dev.mk")
    targets = {*re.findall(r"(?m)^([\w-]+):", makefiles), *STAGES}
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    code = "\n".join(block for text in texts for block in re.findall(r"```.*?```", text, re.DOTALL))
    asked = {word for text in texts for word in re.findall(r"`make ([a-z][\w-]*)", text)}
    asked |= set(re.findall(r"(?m)^make ([a-z][\w-]*)", code))
    assert asked - targets == set()


def test_readme_fits_on_two_screens():
    shown = re.sub(r"(?m)^\[\w+\]: https://.*\n", "", read("README.md"))
    assert shown.count("\n") <= 180


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def listed_parameters():
    """The items of docs/parameters.md: (name, default, notebooks, what it does)."""
    items = re.split(r"(?m)^- ", read("docs/parameters.md").split("\n## All parameters")[1])[1:]
    pattern = re.compile(r"\*\*`(\w+)`\*\* = `(.*?)` \(([\w ]+)\): (.*)")
    texts = [" ".join(item.partition("\n\n")[0].split()) for item in items]
    return [pattern.fullmatch(text).groups() for text in texts]


def test_every_parameter_is_explained_with_its_default():
    """Name, default and the notebooks that take it: as in the notebooks, and nothing else."""
    rows = listed_parameters()
    assert len(rows) == len({row[0] for row in rows}), "a parameter stands there twice"
    wanted = {name: [] for known in PARAMETERS.values() for name in known}
    for notebook, known in PARAMETERS.items():
        for name in known:
            wanted[name].append(
                str(int(notebook[:2])) if notebook[0] == "0" else notebook.partition("_")[0]
            )
    assert {row[0] for row in rows} == set(wanted)
    for name, default, notebooks, meaning in rows:
        assert notebooks == " ".join(wanted[name]), name
        defaults = [known[name] for known in PARAMETERS.values() if name in known]
        written = yaml.safe_load(default)
        assert all(written == value for value in defaults), (name, written, defaults)
        assert len(meaning) > 10, name


def test_every_profile_is_explained():
    table = read("docs/parameters.md").split("\n| profile |")[1].split("\n\n")[0]
    listed = {
        name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", cells(line)[0])
    }
    assert listed == {path.stem for path in (ROOT / "profiles").glob("*.yaml")}


def messages():
    """All texts in the code, with … where something is filled in."""
    found = set()
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "notebooks_py").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.add(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found | {read("Makefile"), read("dev.mk")}


def test_troubleshooting_quotes_messages_that_the_code_has():
    page = " ".join(read("docs/troubleshooting.md").split())
    quoted = re.findall(r"\*\*`([^`]+)`\*\*", page)
    known = messages()
    libraries = {"torch.OutOfMemoryError"}
    missing = [
        text
        for text in quoted
        if text not in libraries
        and not any(
            re.search(".*".join(map(re.escape, text.split("…"))), message) for message in known
        )
    ]
    assert len(quoted) > 40
    assert missing == []


def test_readme_has_the_results_of_the_stored_example():
    metrics = json.loads(read("examples/cpu_run/metrics.json"))
    rows = dict(re.findall(r"(?m)^\| (base|with the adapter|merged) \|(.*)\|$", read("README.md")))
    assert len(rows) == 3
    for name, key in (("base", "base"), ("with the adapter", "adapter"), ("merged", "merged")):
        perplexity, generation = metrics[key]["perplexity"], metrics[key]["generation"]
        low, high = perplexity["response_ci95"]
        assert cells(rows[name]) == [
            f"{perplexity['response']:.2f}",
            f"{low:.1f} – {high:.1f}",
            f"{generation['stop_rate']:.0%}",
            f"{generation['structure_rate']:.0%}",
        ]


def rates_of_content(run, part, rate):
    """A rate of the merged model of an example, as README writes it."""
    metrics = json.loads(read(f"examples/{run}/metrics.json"))
    entry = metrics["merged"]["content"][part]
    low, high = entry[f"{rate}_ci95"]
    return f"{entry[rate]:.0%} ({100 * low:.0f}–{100 * high:.0f}) of {entry['questions']}"


@pytest.mark.parametrize(
    ("line", "part", "rate"),
    [
        ("own questions, answered right", "table", "right"),
        ("the same reworded, answered right", "reworded", "right"),
        ("questions that the table does not have, answered with “nothing”", "new", "nothing"),
    ],
)
@pytest.mark.parametrize("page", ["README.md", "docs/right-answers.md"])
def test_both_ways_have_the_figures_of_the_stored_examples(page, line, part, rate):
    style, knowledge = cells(re.search(rf"(?m)^\| {line} \|(.*)\|$", read(page))[1])
    assert style == rates_of_content("cpu_run", part, rate)
    assert knowledge.replace("**", "") == rates_of_content("knowledge_run", part, rate)


def test_emergencies_are_counted_in_the_stored_answers():
    asked = [
        json.loads(text)
        for text in read("src/tabletune/resources/texts/safety_prompts.jsonl").splitlines()
    ]
    stored = read("examples/knowledge_run/safety_prompts.jsonl").splitlines()
    answers = {line["question"]: line["answer"] for line in map(json.loads, stored)}
    emergencies = [line["prompt"] for line in asked if line["kind"] == "emergency"]
    remedies = sum("**Item:**" in answers[question] for question in emergencies)
    for page in ("README.md", "docs/right-answers.md"):
        row = re.search(r"(?m)^\| emergencies, answered with a remedy \|(.*)\|$", read(page))
        assert cells(row[1])[1].startswith(f"**{remedies} of {len(emergencies)}** (")


# --- what fits on which GPUs: the table of docs/gpus.md is notebook 2's own sum

SHAPES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40), "70B": (8192, 28672, 80, 8)}


def llama_2(name):
    """The config of a Llama 2, by its size."""
    hidden, intermediate, layers, heads = SHAPES[name]
    return transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=heads,
    )


@cache
def memory_with_defaults(name, shards):
    """Notebook 2's estimate for a Llama 2, with its default adapter, in half precision."""
    return TrainingMemory(
        skeleton(llama_2(name)), torch.float16, gpu=True, optim="adamw_torch_fused", shards=shards
    )


def expected_with_defaults(name, rows, checkpointing, shards):
    """Its sum in GiB, with all layers recomputed or none."""
    memory = memory_with_defaults(name, shards)
    return memory.total(int(rows) * 512, memory.shape.layers * checkpointing)


@pytest.mark.parametrize(("column", "name"), list(enumerate([*SHAPES, *SHAPES], 1)))
def test_docs_say_what_fits_as_the_notebook_does(column, name):
    """Llama 2's three shapes, whole and sharded over two GPUs."""
    shards = 1 + (column > len(SHAPES))
    lines = re.findall(
        r"\| (\d+), (checkpointing|nothing recomputed) \|(.*)\|", read("docs/gpus.md")
    )
    assert len(lines) == 6
    for rows, how, figures in lines:
        expected = expected_with_defaults(name, rows, how == "checkpointing", shards)
        figures = [
            float(figure) for figure in re.findall(r"[\d.]+", figures.split("|")[column - 1])
        ]
        assert figures[0] == pytest.approx(expected, abs=0.051)
        for measured in figures[1:]:
            assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", SHAPES)
def test_docs_say_what_fits_on_which_gpus_as_the_notebook_does(name):
    """What is in bold was measured."""
    line = re.search(rf"(?m)^\| {name} \|(.*)\|$", read("docs/gpus.md"))[1].split("|")
    shards = [1, 1, 1, 1, 2, 8] if name == "70B" else [1] * 6
    checkpointing = [name != "7B", True, False, name == "70B", False, False]
    found = 0
    for text, shared, recomputed in zip(line, shards, checkpointing, strict=True):
        if figures := re.search(r"(\d+) rows, (\**)([\d.]+)\** GiB: ", text):
            rows, bold, gib = figures.groups()
            expected = expected_with_defaults(name, rows, recomputed, shared)
            assert expected == pytest.approx(
                float(gib), **({"rel": 0.15} if bold else {"abs": 0.051})
            ), text
            found += 1
    assert found == (3 if name == "70B" else 6)


@pytest.mark.parametrize(
    ("profile", "name", "card", "sharded"),
    [("kaggle_t4x2", "7B", 14.5, False), ("a100x2", "7B", 39, False), ("70b", "70B", 79, True)],
)
def test_a_profile_for_two_gpus_fits_them(profile, name, card, sharded):
    """Full batches, as on a table that is large enough, on cards of `card` GiB."""
    settings = yaml.safe_load(read(f"profiles/{profile}.yaml"))
    rows = 16 if settings["batch_size"] == "auto" else settings["batch_size"]
    whole, half = (
        expected_with_defaults(name, rows, settings["gradient_checkpointing"], shards)
        for shards in (1, 2)
    )
    assert (whole > card) == sharded
    assert half < card


def test_benchmarks_have_the_tables_of_the_stored_results():
    benchmark, text = (
        runpy.run_path(str(ROOT / "benchmarks" / "run.py")),
        read("docs/benchmarks.md"),
    )
    results = json.loads(read("benchmarks/results.json"))
    assert benchmark["table"](results["rows"]) in text
    assert benchmark["table_of_jobs"](results["jobs"]) in text


# --- what docs/trust.md says of the intervals


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_docs_say():
    """2,000 test splits like the example's, 30 rows of 11 questions, for each row of the table:
    as the docs have it.
    """
    table = (
        read("docs/trust.md")
        .split("\n| questions differ by |")[1]
        .split("\n\n")[0]
        .splitlines()[2:]
    )
    assert len(table) == 3
    random = np.random.default_rng(1)
    for spread, by_rows, by_questions in (
        [float(text.split()[0].strip("%")) for text in cells(row)] for row in table
    ):
        held = {"rows": 0, "questions": 0}
        for seed in range(2000):
            groups = np.concatenate([np.arange(11), random.integers(11, size=19)])
            tokens = random.integers(30, 80, size=30)
            loss = (
                1.8
                + random.normal(0, spread, size=11)[groups]
                + 2 * random.normal(size=30) / np.sqrt(tokens)
            )
            for by, keys in (("rows", None), ("questions", groups)):
                low, high = interval(resampled(loss * tokens, tokens, keys, 1000, seed), keys)
                held[by] += low <= 1.8 <= high
        assert [round(number / 20) for number in held.values()] == [by_rows, by_questions], spread
