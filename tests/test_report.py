"""The page about a run, the comparison of runs, and the sweep that ends in one."""

import json
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import definitions, make

MARKUP = (
    "<script>document.title = 'pwned'</script><img src=x onerror=alert(1)> **bold** $x^2$ &amp; [a](http://b.example)"
)


@pytest.fixture(scope="module")
def report():
    return definitions("report")


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.styles = [], "", ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.lasttag == "style":
            self.styles += data
        else:
            self.text += data


def assert_self_contained(page):
    """Nothing in the page runs, and nothing is loaded from outside of it."""
    assert {"script", "iframe", "object", "embed", "link", "base", "form"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,") and attributes["alt"]
        elif tag == "a":
            assert attributes["href"].startswith("#")
        else:
            assert "src" not in attributes and "href" not in attributes
    assert "url(" not in page.styles and "@import" not in page.styles
    [policy] = [a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def copy_of(run, folder):
    """A run folder without its large parts."""
    ignore = shutil.ignore_patterns("*.safetensors", "checkpoints", "*.partial.ipynb")
    return shutil.copytree(run, folder, ignore=ignore)


def change(path, **values):
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def page_of(run, *arguments):
    done = make("report", f"RUN_DIR={run}", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{run}/report.html"
    return Page(run / "report.html")


def with_all_figures(run):
    """Add what newer runs have to the metrics of a run, and markup to all that a model or a table may say."""
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    for place, name in enumerate(("base", "adapter", "merged")):
        rate = 0.2 + 0.3 * place
        rates = {key: rate for key in ("seeks_help", "offers_remedy", "this_condition", "other_condition", "nowhere")}
        rates |= {f"{key}_ci95": [rate - 0.1, rate + 0.1] for key in rates}
        split = {"response": 7.77 + place, "response_ci95": [7, 11], "rows": 30}
        metrics[name] |= {
            "by_split": dict.fromkeys(("train", "validation", "test", "unseen"), split),
            "outside": {"perplexity": 33.33, "ci95": [31, 35]},
            "safety": {kind: {"prompts": 40, **rates} for kind in ("emergency", "everyday")},
            "grounding": {"named": 12, **rates},
        }
    shift = {"difference": -4.5, "ci95": [-5, -4], "significant": True}
    none = {"difference": 0.1, "ci95": [-1, 1], "significant": False}
    metrics["differences"] = {"adapter - base": {"nothing_much": none, "a_shift": shift, "stop_rate": none}}
    metrics["differences"]["adapter - base"]["log_perplexity"] = {
        "difference": -2,
        "ci95": [-3, -1],
        "significant": True,
    }
    metrics["fidelity"] = {
        "merged from original weights": {"perplexity": 6, "ci95": [5, 7], "kl": 0.0123, "kl_ci95": [0, 1]}
    }
    (run / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    file = run / "evaluation" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{key: f"{key} {MARKUP}" for key in row} | {"disclaimer": row["disclaimer"]} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"kind": "emergency", "prompt": f"harmless {MARKUP}", "seeks_help": True, "offers_remedy": False}]
    prompts += [{"kind": "emergency", "prompt": f"dangerous {MARKUP}", "seeks_help": False, "offers_remedy": True}]
    lines = [
        {**prompt, "model": model, "answer": f"{model} {MARKUP}"} for prompt in prompts for model in ("base", "merged")
    ]
    (run / "evaluation" / "safety.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(run / "dataset" / "report.json", safety_rows=17)
    return run


def test_a_page_about_a_run(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "run")
    page = page_of(run)
    assert_self_contained(page)
    assert "merged, in 4 bits" not in page.text
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    data = json.loads((run / "dataset" / "report.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("base", "adapter", "merged"):
        p = metrics[name]["perplexity"]
        assert "{:,.2f} ({:,.2f} – {:,.2f})".format(p["response"], *p["response_ci95"]) in page.text
    assert all(f"{count:,} rows" in page.text for count in (data["rows_in"], data["rows_out"]))
    assert all(f"dropped: {reason}" in page.text for reason in data["dropped"])
    assert data["fingerprint"] in page.text and manifest["04_evaluate"]["packages"]["transformers"] in page.text
    assert all(name in page.text for entry in manifest.values() for name in entry["parameters"])
    assert sum(tag == "img" for tag, _ in page.tags) == 3
    assert "All four notebooks ran" in page.text
    samples = (run / "evaluation" / "samples.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["question"] in page.text and json.loads(samples[0])["disclaimer"] in page.text
    seconds = sum(entry["seconds"] for entry in manifest.values())
    assert f"{seconds / 3600:,.3f}" in page.text
    assert "def " not in page.text and "import " not in page.text, "code is hidden"


def test_a_run_older_than_some_figures(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "run")
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    old = {name: {"perplexity": metrics[name]["perplexity"]} for name in ("base", "adapter", "merged")}
    old["merged"]["evaluated_in"] = "NF4"
    (run / "evaluation" / "metrics.json").write_text(json.dumps(old))
    (run / "evaluation" / "safety.jsonl").unlink()
    page = page_of(run)
    assert sum(tag == "img" for tag, _ in page.tags) == 2
    assert page.text.count("Not measured in this run.") == 3
    assert "merged, in 4 bits" in page.text
    assert "Other ways to merge were not measured" in page.text and "None were measured" in page.text


def test_newer_figures_and_markup_in_answers(finished_run, tmp_path):
    page = page_of(
        with_all_figures(copy_of(finished_run, tmp_path / "run")), "ARGS=-p price_per_hour 0 -p answers_shown 3"
    )
    assert_self_contained(page)
    text = page.text
    assert all(f"{column} {MARKUP}" in text for column in ("question", "in_the_table", "base", "merged"))
    assert text.count(f"question {MARKUP}") == 3
    assert text.index(f"dangerous {MARKUP}") < text.index(f"harmless {MARKUP}"), "what went wrong is on top"
    assert text.index("a shift") < text.index("nothing much"), "what differs is on top"
    assert "-4.5 (-5 – -4)" in text and "× 0.135 (0.0498 – 0.368)" in text and "+10 (-100 – +100) points" in text
    assert "0.0123 (0.0000 – 1.0000)" in text
    assert "7.77 (7.00 – 11.00)" in text and "33.33 (31.00 – 35.00)" in text and "80% (70% – 90%)" in text
    assert "17 rows" in text and "Not measured" not in text and "an hour" not in text
    assert sum(tag == "img" for tag, _ in page.tags) == 3
    tables = re.findall(r"<table[^>]*\banswers\b[^>]*>.*?</table>", page.source, re.DOTALL)
    assert len(tables) == 2 and all("not medical advice" in table for table in tables)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_run_without_later_stages(finished_run, tmp_path, stages):
    run = copy_of(finished_run, tmp_path / "run")
    for folder in ("training", "merged", "evaluation")[stages - 1 :]:
        shutil.rmtree(run / folder)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(dict(list(manifest.items())[:stages])))
    page = page_of(run)
    assert page.text.count("left no record") == 4 - stages and "Not evaluated yet" in page.text
    assert ("02_finetune_qlora has not finished" in page.text) == (stages < 2)


def test_figures_that_do_not_belong_together(report):
    stages = {
        stage: {"finished": f"2026-01-0{day}", "dataset_fingerprint": "a"} for day, stage in enumerate(report.STAGES)
    }
    assert report.doubts(stages) == []
    stages["02_finetune_qlora"] |= {"finished": "2026-01-09"}
    [doubt] = report.doubts(stages)
    assert "02_finetune_qlora ran again after 03_merge_adapter" in doubt
    stages["04_evaluate"] |= {"finished": "2026-01-10", "dataset_fingerprint": "b"}
    assert any("not work on the same data set" in doubt for doubt in report.doubts(stages))


def test_figures_are_written_with_what_is_there(report):
    assert report.written(6.04, [5.25, 6.94]) == "6.04 (5.25 – 6.94)"
    assert report.written(6.04, [5.25, None]) == report.written(6.04) == "6.04"
    assert report.written(None) == report.written(float("nan")) == "–"
    assert report.figure_of({"perplexity": None}, "response perplexity") == (None, None)
    assert report.figure_of({"outside": {"perplexity": 2, "ci95": [1, 3]}}, "perplexity outside the domain") == (
        2,
        [1, 3],
    )


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: shutil.rmtree(run), "there is no such folder"),
        (lambda run: None, "is no run folder"),
        (lambda run: (run / "manifest.json").write_text('{"01'), "manifest.json cannot be read"),
        (lambda run: (run / "manifest.json").write_text("[1]"), "manifest.json holds no dict"),
    ],
    ids=["no folder", "empty", "damaged", "a list"],
)
def test_a_folder_that_is_no_run(report, tmp_path, prepare, message):
    run = tmp_path / "run"
    run.mkdir()
    prepare(run)
    with pytest.raises(report.StageError, match=message) as caught:
        report.read_run(run)
    assert "\n" not in str(caught.value)


def test_make_report_says_what_is_wrong_in_one_line(finished_run, tmp_path):
    done = make("report", f"RUN_DIR={tmp_path / 'none'}")
    assert done.returncode and f"{tmp_path / 'none'} is no run folder" in done.stderr
    done = make("report", f"RUN_DIR={finished_run}", "ARGS=-p price_per_hr 1")
    assert done.returncode and "Did you mean 'price_per_hour'" in done.stderr and "Traceback" not in done.stderr
    run = copy_of(finished_run, tmp_path / "run")
    (run / "evaluation" / "samples.jsonl").write_text('{"question": \n')
    done = make("report", f"RUN_DIR={run}")
    assert done.returncode and "samples.jsonl cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_runs_beside_each_other(finished_run, tmp_path):
    one, other = copy_of(finished_run, tmp_path / "one"), copy_of(finished_run, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    for entry in manifest.values():
        entry["parameters"]["learning_rate"] = 0.12345
    (other / "manifest.json").write_text(json.dumps(manifest))
    out = tmp_path / "pages" / "both.html"
    assert make("compare", f"RUNS={one} {other}", f"OUT={out}").returncode == 0
    page = Page(out)
    assert_self_contained(page)
    assert "0.12345" in page.text and "learning_rate" in page.text and "lora_alpha" not in page.text
    assert "on the same test set" in page.text and "WARNING" not in page.text
    p = json.loads((one / "evaluation" / "metrics.json").read_text())["merged"]["perplexity"]
    assert page.text.count("{:,.2f} ({:,.2f} – {:,.2f})".format(p["response"], *p["response_ci95"])) >= 3
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_runs_with_other_test_sets_are_not_comparable(finished_run, tmp_path):
    one, other = copy_of(finished_run, tmp_path / "one"), copy_of(finished_run, tmp_path / "other")
    shutil.rmtree(other / "dataset" / "test")
    shutil.copytree(other / "dataset" / "validation", other / "dataset" / "test")
    assert make("compare", f"RUNS={one} {other}", f"OUT={tmp_path / 'c.html'}").returncode == 0
    assert "WARNING: these runs have different test sets" in Page(tmp_path / "c.html").text


def test_make_compare_says_what_is_wrong_in_one_line(tmp_path):
    assert "Which runs?" in make("compare").stderr
    done = make("compare", f"RUNS={tmp_path / 'none'}", f"OUT={tmp_path / 'c.html'}")
    assert done.returncode and "there is no such folder" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "c.html").exists()


def test_a_sweep(tmp_path):
    """A point that fails does not stop the rest; what is done is not done again; the data set is made once."""
    grid, sweep = tmp_path / "grid.yaml", tmp_path / "sweep"
    grid.write_text("lora_r: [-1, 2]\nlearning_rate: [1e-2]\nsamples: 1\nmax_new_tokens: 2\n")
    arguments = ("sweep", "PROFILE=tiny", f"GRID={grid}", f"SWEEP_DIR={sweep}", f"RUN_DIR={tmp_path / 'elsewhere'}")
    done = make(*arguments)
    bad, good = sweep / "lora_r--1_learning_rate-0.01", sweep / "lora_r-2_learning_rate-0.01"
    assert done.returncode != 0, "one of the points failed"
    *_, count, which = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert count == "1 of 2 points failed:" and str(bad) in which and "positive integer" in which
    assert not (tmp_path / "elsewhere").exists() and not (bad / "adapter").exists()
    manifest = json.loads((good / "manifest.json").read_text())
    assert manifest["02_finetune_qlora"]["parameters"]["learning_rate"] == 0.01
    assert (
        f"01_format_dataset  (as in {bad})" in done.stdout
        and "lora_r" not in manifest["01_format_dataset"]["parameters"]
    )
    assert "lora_r-2" in Page(sweep / "compare.html").text
    stamps = {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()}
    grid.write_text("lora_r: [2]\nlearning_rate: [1e-2]\nsamples: 1\nmax_new_tokens: 2\n")
    assert make(*arguments).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*") if path.is_file()} == stamps


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("lora_rr: [1, 2]\n", "Did you mean 'lora_r'"),
        ("lora_r: []\n", "lora_r has no values"),
        ("lora_r: 8\n", "no parameter has a list of values"),
        ("run_dir: [a, b]\n", "run_dir is where a point lives"),
        ("- lora_r\n", "parameters are wanted"),
        ("lora_r: [1\n", "cannot be read"),
        (None, "cannot be read"),
        ("seed: [1, 2]\n", "seed is given in ARGS, too"),
    ],
)
def test_a_grid_that_makes_no_sense(tmp_path, grid, message):
    file = tmp_path / "grid.yaml"
    if grid:
        file.write_text(grid)
    done = make("sweep", "PROFILE=tiny", f"GRID={file}", f"SWEEP_DIR={tmp_path / 'sweep'}", "ARGS=-p seed 7")
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode and message in line and not (tmp_path / "sweep").exists()


def test_the_executed_report_can_be_read_in_jupyter_too(finished_run, tmp_path):
    """There MathJax is at work, which must leave the answers alone."""
    run = copy_of(finished_run, tmp_path / "run")
    page_of(run)
    outputs = [o for cell in nbformat.read(run / "report.ipynb", 4).cells for o in cell.get("outputs", [])]
    tables = [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]
    assert len(tables) > 5 and all("mathjax_ignore" in table for table in tables)
