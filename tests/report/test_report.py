"""The page about a run, and the comparison of runs, on run folders that are written here by
hand.
"""

import json
import re
import shutil
from html.parser import HTMLParser

import jupytext
import pytest
from conftest import ROOT
from datasets import Dataset
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell
from test_compare import a_run as compared_run

from tabletune.errors import StageError
from tabletune.report import reading as reading_module
from tabletune.run.files import write_json

MARKUP = "<script>document.title = 'pwned'</script><img src=x onerror=alert(1)> **bold** $x^2$ &amp; [a](http://b.example)"
HEALTH = (
    "Educational example, not medical advice. In an emergency call your local emergency number."
)
SHOWN = MARKUP.replace("**bold**", "bold")  # in answers, bold text of Markdown is bold
PARAMETERS = {"base_model": "a/base", "dataset": "table.csv", "learning_rate": 0.01}


# --- run folders


def model(perplexity, rate):
    """What 04_evaluate says of a model."""
    around = {
        "response_ci95": [perplexity - 1, perplexity + 1],
        "full_text_ci95": [perplexity, perplexity + 3],
    }
    rates = {name: rate for name in ("stop_rate", "structure_rate")} | {"exact_match_rate": None}
    rates |= {f"{name}_ci95": [rate - 0.1, rate + 0.1] for name in ("stop_rate", "structure_rate")}
    generation = {
        **rates,
        "mean_new_tokens": 33.0,
        "mean_new_tokens_ci95": [30.0, 36.0],
        "tokens_per_second": 60.5,
    }
    return {
        "perplexity": {"response": perplexity, "full_text": perplexity + 2, **around},
        "tokens": 1644,
        "generation": generation,
    }


def trusted(perplexity, rate):
    """What 06_trust says of a model."""
    rates = ("seeks_help", "offers_remedy"), ("this_condition", "other_condition", "nowhere")
    judged, found = (
        {key: rate for key in keys} | {f"{key}_ci95": [0.1, 0.9] for key in keys} for keys in rates
    )
    return {
        "by_split": {
            part: {"response": perplexity, "response_ci95": [7, 11], "rows": 30}
            for part in ("train", "validation", "test")
        },
        "outside": {"perplexity": 33.33, "ci95": [31, 35]},
        "safety": {kind: {"prompts": 2, **judged} for kind in ("emergency", "everyday")},
        "grounding": {"named": 12, "answers": 11, **found},
    }


def write_lines(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def a_run(folder, stages=6, parameters=PARAMETERS):
    """Write what the first so many stages leave, as far as the page reads it."""
    names = reading_module.STAGES[:stages]
    write_json(
        folder / "manifest.json",
        {
            stage: {
                "finished": f"2026-11-0{day}T10:00:00+00:00",
                "seconds": 100.0 * day,
                "peak_memory_gib": {"host": 1.5},
                "dataset_fingerprint": "abc123",
                "parameters": {**parameters, "run_dir": str(folder)},
                "packages": {"torch": "9.8.7"},
                "python": "3.11.7",
                "platform": "Linux",
                "gpu": None,
                "git_commit": "c0ffee",
            }
            for day, stage in enumerate(names, 1)
        },
    )
    splits = {"train": 213, "validation": 30, "test": 30}
    dropped = {"no answer": 3, "too long": 8}
    data = {
        "rows_in": 1284,
        "rows_out": 1273,
        "dropped": dropped,
        "changed": {"spaces": {"rows": 77}},
    }
    data |= {
        "splits": splits,
        "fingerprint": "abc123",
        "example": None,
        "notes": [],
        "safety_rows": 17,
    }
    write_json(folder / "dataset" / "report.json", data)
    turns = {
        "prompt": [[{"role": "user", "content": "q"}]],
        "completion": [[{"role": "assistant", "content": "a"}]],
    }
    Dataset.from_dict(turns).save_to_disk(folder / "dataset" / "test")
    if stages > 1:
        told = {"steps": 54, "seconds": 316.4, "eval_loss_before": 3.956, "eval_loss_after": 1.848}
        write_json(folder / "training" / "metrics.json", told)
        history = [
            {"step": 5, "loss": 3.1},
            {"step": 10, "loss": 2.2},
            {"step": 10, "eval_loss": 2.5},
        ]
        write_json(folder / "training" / "log_history.json", history)
    if stages > 2:
        write_json(
            folder / "merged" / "merge_report.json",
            {"base_weights": "original", "same_next_token": 0.987},
        )
    if stages > 3:
        more = {"difference": -2.0, "ci95": [-3.0, -1.0], "significant": True}
        none = {"difference": 0.1, "ci95": [-1.0, 1.0], "significant": False}
        few = {"difference": 3.0, "ci95": None, "significant": False}
        metrics = {
            "base": model(47.08, 0.2),
            "adapter": model(6.0, 0.5),
            "merged": model(6.04, 0.5),
        }
        differences = {"mean_new_tokens": few, "stop_rate": none, "log_perplexity": more}
        metrics |= {
            "differences": {"adapter - base": differences},
            "ten_joined_training_texts": 3.2,
        }
        write_json(folder / "evaluation" / "metrics.json", metrics)
        keys = ("question", "in_the_table", "base", "adapter", "merged")
        rows = [
            {key: f"{key} {number} {MARKUP}" for key in keys} | {"disclaimer": HEALTH}
            for number in range(7)
        ]
        write_lines(folder / "evaluation" / "samples.jsonl", rows)
    if stages > 4:
        metrics = {name: trusted(7.77, 0.8) for name in ("base", "adapter", "merged")}
        metrics["differences"] = {"adapter - base": {"emergency_seeks_help": none}}
        metrics["fidelity"] = {
            "merged, original": {"perplexity": 6.5, "ci95": [5, 7], "kl": 0.0123, "kl_ci95": [0, 1]}
        }
        metrics |= {
            "memorization": ["It memorizes: so it does."],
            "shipping": ["Ship the merged one."],
        }
        write_json(folder / "trust" / "metrics.json", metrics)
        asked = [("harmless", True, False), ("dangerous", False, True)]
        lines = [
            {
                "kind": "emergency",
                "prompt": f"{prompt} {MARKUP}",
                "model": name,
                "answer": f"{name} says {MARKUP}",
            }
            | {"seeks_help": helps, "offers_remedy": offers}
            for prompt, helps, offers in asked
            for name in ("base", "merged")
        ]
        write_lines(folder / "trust" / "safety.jsonl", lines)
    return folder


def change(path, **values):
    """Set keys of a JSON file."""
    write_json(path, json.loads(path.read_text()) | values)


# --- pages


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and its styles."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.styles, self.source = [], "", "", source
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.lasttag == "style":
            self.styles += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def render():
    """Run a notebook with parameters in a kernel that serves all of them, and make its page, as
    make does.
    """
    kernel = KernelManager()
    kernel.start_kernel()

    def page_of(name, **parameters):
        notebook = jupytext.read(ROOT / "notebooks_py" / f"{name}.py")
        [place] = [
            i
            for i, cell in enumerate(notebook.cells)
            if "parameters" in cell.metadata.get("tags", [])
        ]
        given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, new_code_cell(given))
        notebook.metadata["papermill"] = {"parameters": parameters}
        NotebookClient(notebook, km=kernel).execute()
        templates = [str(ROOT / "src/tabletune/resources/templates")]
        exporter = HTMLExporter(
            extra_template_basedirs=templates, template_name="report", exclude_input=True
        )
        page = Page(exporter.from_notebook_node(notebook, {"metadata": {"name": name}})[0])
        page.outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert_self_contained(page)
        assert "def " not in page.text, "code is hidden"
        assert "import " not in page.text, "code is hidden"
        return page

    yield page_of
    kernel.shutdown_kernel(now=True)


def assert_self_contained(page):
    """Nothing in the page runs, and nothing is loaded from outside of it."""
    assert {"script", "iframe", "object", "embed", "link", "base", "form"}.isdisjoint(
        tag for tag, _ in page.tags
    )
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert attributes["alt"]
        elif tag == "a":
            assert attributes["href"].startswith("#")
        else:
            assert "src" not in attributes
            assert "href" not in attributes
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    [policy] = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def pictures(page):
    return sum(tag == "img" for tag, _ in page.tags)


def test_a_page_about_a_run(render, tmp_path):
    run = a_run(tmp_path / "run")
    page = render("report", run_dir=str(run), answers_shown=3)
    text = page.text
    assert "a/base, fine-tuned on 213 rows of table.csv." in text
    assert "Whether its answers are right was not measured: run 04_evaluate again." in text
    assert "Response perplexity 47.08 before fine-tuning, 6.04 after (lower is better)." in text
    assert "47.1 (46.1 – 48.1)" in text, "the headline table"
    assert "20% (10% – 30%)" in text, "the headline table"
    assert "In emergencies 80% of the fine-tuned model's answers offer a remedy." in text
    assert "left no record" not in text
    assert "no fault" not in text
    assert "1,284 rows" in text
    assert "dropped: no answer" in text
    assert "−8 rows" in text
    assert "17 rows" in text
    assert "changed: spaces" in text
    assert "77 rows" in text
    assert pictures(page) == 2
    assert "3.956" in text
    assert "It memorizes: so it does." in text
    assert "Ship the merged one." in text
    assert "7.77 (7.00 – 11.00)" in text
    assert "33.33 (31.00 – 35.00)" in text
    assert "80% (10% – 90%)" in text
    assert "98.7%" in text
    assert "0.0123 (0 – 1)" in text
    assert "2,100 seconds. At a price of 1 an hour, this costs 0.583 in your currency." in text
    assert all(name in text for name in (*PARAMETERS, "abc123", "9.8.7", "c0ffee")), (
        "parameters and provenance"
    )
    assert text.count("Not measured") == 1, "the baselines"
    rows = re.findall(r"<tr>.*?</tr>", page.source.replace("\n", " "))
    told = [row for row in rows if "adapter - base" in row]
    assert "0.1353 (0.0498 – 0.3679)" in told[0], "what differs is on top"
    assert "better" in told[0], "what differs is on top"
    assert len(told) == 4, "those of both notebooks"
    assert sum("no difference shown" in row for row in told) == 3, "those of both notebooks"


def test_a_perplexity_that_rises_because_rows_are_left_out_is_explained(render, tmp_path):
    run = a_run(tmp_path / "run")
    change(run / "evaluation" / "metrics.json", retrieval=True)
    text = render("report", run_dir=str(run)).text
    assert text.count("so its perplexity of the table's answers may well rise") == 2


def test_answers_stay_text_under_the_disclaimer(render, tmp_path):
    """Markup in answers and prompts neither runs nor changes the page, in Jupyter with its
    MathJax either.
    """
    run = a_run(tmp_path / "run", parameters={**PARAMETERS, f"name {MARKUP}": f"value {MARKUP}"})
    page = render("report", run_dir=str(run), answers_shown=3, price_per_hour=0)
    text = page.text
    assert f"name {MARKUP}" in text, "in tables of facts, too"
    assert f"value {MARKUP}" in text, "in tables of facts, too"
    assert all(
        f"{column} 2 {SHOWN}" in text for column in ("question", "in_the_table", "base", "merged")
    )
    assert "3 of 7 questions" in text
    assert f"question 3 {SHOWN}" not in text
    assert "an hour" not in text
    assert text.index(f"dangerous {SHOWN}") < text.index(f"harmless {SHOWN}"), (
        "what went wrong is on top"
    )
    tables = re.findall(r'<div class="answers .*?</table>', page.source, re.DOTALL)
    assert len(tables) == 2
    assert all(HEALTH in table for table in tables)
    assert "--heading-4: 'fine-tuned'" in tables[0], "on a phone"
    assert "--heading-3: 'fine-tuned'" in tables[1], "on a phone"
    printed = re.sub(r"\\([0-9a-f]+) ", lambda match: chr(int(match[1], 16)), page.styles)
    assert f'@bottom-center {{ content: "{HEALTH}" }}' in printed, "on each page of paper"
    shown = [
        output.data["text/html"] for output in page.outputs if "text/html" in output.get("data", {})
    ]
    assert len(shown) > 10
    assert all("mathjax_ignore" in html for html in shown)


def test_the_verdict_on_content_comes_first(render, tmp_path):
    run = a_run(tmp_path / "run", 4)
    verdict = [
        "It gives the right answer to 1 of 40 reworded questions of your table (0–5).",
        "More.",
    ]
    merged = model(6.0, 0.5) | {
        "content": {"reworded": {"questions": 40, "right": 0.025, "right_ci95": [0.0, 0.13]}}
    }
    change(run / "evaluation" / "metrics.json", verdict=verdict, merged=merged)
    content = {"new": {"questions": 9, "right": 0.5, "right_ci95": [0.2, 0.8]}}
    baselines = {
        "verdict": {"sentences": ["Copy the row."]},
        "ways": {"base": {"model": "base", "content": content}},
    }
    write_json(run / "baselines" / "metrics.json", baselines)
    write_json(run / "rating" / "metrics.json", {"sentences": ["A reader preferred the base."]})
    line = {
        "part": "reworded",
        "group": "q",
        "asked": "A cold, any idea?",
        "references": ["**Item:** Ginger"],
        "answer": "**Item:** Mint",
        "outcome": "wrong",
        "stopped": False,
    }
    lines = [{**line, "model": name} for name in ("base", "adapter", "merged")]
    write_lines(run / "evaluation" / "answers.jsonl", lines)
    page = render("report", run_dir=str(run))
    assert page.text.index(verdict[0]) < page.text.index("Response perplexity".lower())
    headline = f'<p class="headline mathjax_ignore tex2jax_ignore"><b>{verdict[0]}</b></p>'
    assert headline in page.source
    assert "2% (0% – 13%)" in page.text
    assert "1 of 1 questions" in page.text
    assert "<b>Item:</b> Mint … [cut after max_new_tokens]" in page.source
    assert "✗ wrong" in page.text
    assert "Copy the row." in page.text
    assert 'alt="Dot chart of the right answers of each way to answer"' in page.source
    assert "A reader preferred the base." in page.text


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_run_without_later_stages(render, tmp_path, stages):
    page = render("report", run_dir=str(a_run(tmp_path / "run", stages)))
    assert page.text.count("left no record") == 4 - stages
    assert ("Not evaluated yet: whether its answers are right is not known." in page.text) == (
        stages < 4
    )
    assert ("Not trained yet." in page.text) == (stages < 2)
    assert pictures(page) == {1: 0, 2: 1, 4: 2}[stages]
    assert "emergenc" not in page.text.replace(HEALTH, "").lower(), (
        "what was not asked for is not spoken of"
    )


def test_a_run_of_before_and_a_run_of_few_rows(render, tmp_path):
    """Runs that have all figures in evaluation/, and metrics without intervals and without
    answers.
    """
    run = a_run(tmp_path / "before")
    trust = json.loads((run / "trust" / "metrics.json").read_text())
    old = reading_module.joined(
        json.loads((run / "evaluation" / "metrics.json").read_text()), trust
    )
    old["merged"] |= {"evaluated_in": "NF4"}
    write_json(run / "evaluation" / "metrics.json", old)
    shutil.move(run / "trust" / "safety.jsonl", run / "evaluation" / "safety.jsonl")
    shutil.rmtree(run / "trust")
    page = render("report", run_dir=str(run))
    assert "merged, in 4 bits" in page.text
    assert "7.77 (7.00 – 11.00)" in page.text
    assert "80% (10%" in page.text
    assert f"dangerous {SHOWN}" in page.text

    run = a_run(tmp_path / "few", stages=4)
    few = {
        "perplexity": {"response": 5.5, "response_ci95": None, "too_small": True},
        "generation": None,
    }
    change(run / "evaluation" / "metrics.json", base=few, adapter=few, merged=few, differences={})
    write_lines(run / "evaluation" / "samples.jsonl", [])
    change(run / "dataset" / "report.json", dropped={"too long": 500}, notes=[f"A note {MARKUP}"])
    page = render("report", run_dir=str(run))
    assert "too few questions for intervals" in page.text
    assert "0 of 0 questions" in page.text
    assert "500 of 1,284 rows of the table were dropped, which is 39%" in page.text
    assert f"A note {MARKUP}" in page.text


def test_runs_beside_each_other(render, tmp_path):
    best = compared_run(tmp_path / "best", right=0.9)
    worse = compared_run(tmp_path / "worse", right=0.1, learning_rate=0.12345)
    other = compared_run(tmp_path / "other", test="two")
    unfinished = a_run(tmp_path / "unfinished", 2)
    page = render("compare_runs", runs=f"{worse} {best} {other} {unfinished} {best}")
    text = page.text
    assert "Most right answers: best, 90% of 40 reworded questions." in text
    assert "All others differ from it by more than chance." in text
    assert text.index("CANNOT BE COMPARED") < text.index("Most right answers")
    assert "unfinished was not evaluated" in text
    assert "unfinished: 03_merge_adapter left no record" in text
    differ = text.partition("What differs")[2].partition("Training")[0]
    assert "0.12345" in differ
    assert "base_model" not in differ.partition("Nothing")[0].replace("a/base", "")
    assert "run_dir" not in differ
    assert "lower is better" in text
    assert pictures(page) == 2


def test_what_is_wrong_with_a_run_is_one_line(render, tmp_path):
    with pytest.raises(CellExecutionError) as caught:
        render("report", run_dir=str(tmp_path / "none"))
    assert caught.value.ename == "StageError"
    assert "is no run folder" in caught.value.evalue
    run = a_run(tmp_path / "run")
    (run / "evaluation" / "samples.jsonl").write_text('{"question": \n')
    with pytest.raises(StageError, match=r"samples\.jsonl cannot be read") as error:
        reading_module.read_lines(run / "evaluation" / "samples.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: run.rmdir(), "is no run folder"),
        (lambda run: None, "is no run folder"),
        (lambda run: (run / "manifest.json").write_text('{"01'), "manifest.json is damaged"),
        (
            lambda run: (run / "manifest.json").write_text("[1]"),
            "manifest.json is damaged: it is not a JSON dict",
        ),
    ],
    ids=["no folder", "empty", "damaged", "a list"],
)
def test_a_folder_that_is_no_run(tmp_path, prepare, message):
    run = tmp_path / "run"
    run.mkdir()
    prepare(run)
    with pytest.raises(StageError, match=message) as caught:
        reading_module.read_run(run)
    assert "\n" not in str(caught.value)


# --- what the pages say


def test_figures_that_do_not_belong_together(tmp_path):
    run = a_run(tmp_path / "run")
    change(run / "trust" / "metrics.json", merged={}, base={}, adapter={})
    assert reading_module.doubts(reading_module.read_run(run)) == []
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["04_evaluate"]["finished"] = "2026-11-08"  # 05 and 06 do not depend on it
    write_json(run / "manifest.json", manifest)
    assert reading_module.doubts(reading_module.read_run(run)) == []
    manifest["02_finetune_qlora"]["finished"] = "2026-11-09"
    manifest["04_evaluate"]["dataset_fingerprint"] = "other"
    write_json(run / "manifest.json", manifest)
    again, other = reading_module.doubts(reading_module.read_run(run))
    assert (
        "02_finetune_qlora ran again after 03_merge_adapter, 04_evaluate, 05_baselines, 06_trust"
        in again
    )
    assert "did not work on the same data set" in other


def test_figures_are_read_with_what_is_there():
    figure = reading_module.figure_of
    assert figure(
        {"perplexity": {"response": 6, "response_ci95": [5, 7]}}, "response perplexity"
    ) == (6, [5, 7])
    assert figure(
        {"perplexity": {"response": 6, "response_ci95": None}}, "response perplexity"
    ) == (6, None)
    assert figure(
        {"perplexity": {"response": 6, "response_ci95": [5, None]}}, "response perplexity"
    ) == (6, None)
    assert figure({"perplexity": {"response": float("nan")}}, "response perplexity") == (None, None)
    assert (
        figure({"perplexity": None}, "response perplexity")
        == figure(None, "response perplexity")
        == (None, None)
    )
    assert figure({"outside": {"perplexity": 2, "ci95": [1, 3]}}, "perplexity, other texts") == (
        2,
        [1, 3],
    )
    assert reading_module.figures_table({"one": None, "other": {}}).empty


def test_values_that_differ_between_stages_are_all_told():
    texts = reading_module.as_texts(
        [{"a": 1, "b": "", "c": "text"}, {"a": 1, "b": "x", "d": None}, {"a": 0.5}]
    )
    assert texts == {"a": "1 | 0.5", "b": '"" | x', "c": "text", "d": "null"}


def test_the_losses_begin_before_the_training(tmp_path):
    losses = reading_module.losses(reading_module.read_run(a_run(tmp_path / "run", 2)))
    assert losses["eval_loss"].dropna().to_dict() == {0: 3.956, 10: 2.5}
    assert losses["loss"].dropna().to_dict() == {5: 3.1, 10: 2.2}


def test_the_disclaimer_is_that_of_the_answers_of_the_example_or_neutral():
    own, example = {"data": {"example": None}}, {"data": {"example": "home_remedies"}}
    assert reading_module.disclaimer_of_run(own, [{"disclaimer": "Stored."}]) == "Stored."
    assert "medical" not in reading_module.disclaimer_of_run(own, [{}])
    assert "wrong" in reading_module.disclaimer_of_run(own, [])
    assert "not medical advice" in reading_module.disclaimer_of_run(example, [])
