"""Model cards and their upload."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from export_runs import cards_of, read, run_dir, with_rows  # noqa: F401
from huggingface_hub import ModelCard

from tabletune.chat.encoding import encode_prompt
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.data.context import load_context
from tabletune.errors import StageError
from tabletune.export import cards as cards_module


def test_the_cards_say_what_the_run_says(run_dir):
    cards = cards_of(
        run_dir, license="apache-2.0", base_model_on_hub="some-one/tiny", tags="herbs, tea"
    )
    report = json.loads((run_dir / "dataset" / "report.json").read_text())
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    value, (low, high) = (
        metrics["merged"]["perplexity"][name] for name in ("response", "response_ci95")
    )
    for part, card in cards.items():
        known = card.data.to_dict()
        assert known["license"] == "apache-2.0"
        assert known["language"] == ["en"]
        assert known["base_model"] == "some-one/tiny"
        assert known["pipeline_tag"] == "text-generation"
        assert {"herbs", "tea", part} <= set(known["tags"])
        assert known["library_name"] == ("peft" if part == "adapter" else "transformers")
        assert "datasets" not in known, "the table is a file here"
        for text in (
            f"{value:,.1f} ({low:,.1f} – {high:,.1f})",
            f"{report['rows_in']} rows came in and {report['rows_out']} stayed",
            *(f"| {reason} | {rows} |" for reason, rows in report["dropped"].items()),
            report["fingerprint"],
            "| lora_r | 8 |",
        ):
            assert text in card.text, text
        assert card.text.count("not medical advice") >= 2
        assert str(ROOT) not in card.content
        assert "{{" not in card.text
        assert "None" not in card.text
    named = json.loads((run_dir / "export" / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == "some-one/tiny"
    assert "07_export" in json.loads((run_dir / "manifest.json").read_text())


def test_a_card_runs_as_it_says(run_dir):
    """The code in it, with the folder for the repository's name, answers a question of the test
    split.
    """
    card = cards_of(run_dir, max_new_tokens=3)["merged"]
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1].replace(
        '"run"', repr(str(run_dir / "merged"))
    )
    scope = {}
    exec(compile(code, "card", "exec"), scope)
    asked = encode_prompt(scope["messages"], scope["tokenizer"])
    assert scope["answer"].shape == (1, len(asked) + 3)
    assert scope["answer"][0, : len(asked)].tolist() == asked


def test_the_card_takes_all_figures_of_notebook_6(run_dir):
    both = {"prompts": 40, "seeks_help": 0.25, "seeks_help_ci95": [0.1, 0.4], "offers_remedy": 0.9}
    trust = {
        "by_split": {"train": {"response": 3.21, "response_ci95": [3.1, 3.3], "rows": 9}},
        "outside": {"perplexity": 12.34, "ci95": [11, 13]},
        "safety": {"emergency": {**both, "offers_remedy_ci95": [0.8, 0.95]}, "everyday": both},
        "grounding": {
            "named": 17,
            "this_condition": 0.5,
            "this_condition_ci95": [0.3, 0.7],
            "nowhere": 0.25,
        },
    }
    assert "Safety" not in cards_of(run_dir)["merged"].text
    (run_dir / "trust").mkdir()
    metrics = {
        **dict.fromkeys(("base", "adapter", "merged"), trust),
        "fidelity": {},
        "differences": {},
    }
    (run_dir / "trust" / "metrics.json").write_text(json.dumps(metrics))
    text = cards_of(run_dir)["merged"].text
    for figure in (
        "3.21 (3.10 – 3.30)",
        "12.34 (11.00 – 13.00)",
        "90% (80% – 95%)",
        "| 17 | 50% (30% – 70%) | – | 25% |",
    ):
        assert figure in text, figure
    assert "Of its answers to 40 emergencies, 90% (80% – 95%) offered a remedy" in text


def test_a_table_of_ones_own_gets_no_word_about_health(run_dir):
    """Nor one whose rows were too few for intervals, or that asks nothing."""
    path = run_dir / "dataset" / "report.json"
    report = json.loads(path.read_text())
    report |= {
        "example": None,
        "templates": {"question": None, "answer": None, "answer_column": None},
    }
    path.write_text(json.dumps(report))
    path = run_dir / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    for name in ("base", "adapter", "merged"):
        metrics[name]["perplexity"] |= {"response_ci95": None, "full_text_ci95": None}
        metrics[name]["generation"] = None
    path.write_text(json.dumps(metrics))
    text = cards_of(run_dir)["adapter"].text
    assert text.count("Answers may be wrong.") == 2
    assert "too few to say" in text
    assert not re.search("medical|health|emergency", text)


def test_a_data_set_on_the_hub_is_named_with_its_figure(run_dir):
    path = run_dir / "dataset" / "report.json"
    report = json.loads(path.read_text())
    report |= {
        "source": {**report["source"], "dataset": "some-one/remedies"},
        "dataset_commit": "a" * 40,
    }
    path.write_text(json.dumps(report))
    card = cards_of(run_dir)["merged"]
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    expected = metrics["merged"]["perplexity"]["response"]
    assert card.data.datasets == ["some-one/remedies"]
    assert card.data.eval_results[0].metric_value == pytest.approx(expected, abs=1e-4)


class Hub:
    """The Hub as a folder that is told what to leave out, and may refuse."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        if repo_id.startswith("refused"):
            raise ValueError("403 Forbidden: you may not write here\nand more")
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        (self.folder / repo_id / "private").write_text(str(private))

    def upload_folder(self, *, repo_id, repo_type, folder_path, ignore_patterns):
        for path in Path(folder_path).iterdir():
            if path.name not in (ignore_patterns or []):
                assert not (self.folder / repo_id / path.name).exists(), (
                    "seen by others as it should not be"
                )
                shutil.copy(path, self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        monkeypatch.setattr(cards_module, name, getattr(hub, name))
    return hub.folder


def test_both_models_go_to_the_hub(run_dir, hub):
    cards_of(run_dir, base_model_on_hub="some-one/tiny", push_to_hub="me/herbs")
    weights = next((run_dir / "merged").glob("*.safetensors")).name
    for name, file in (("herbs", weights), ("herbs-adapter", "adapter_model.safetensors")):
        assert (hub / "me" / name / "private").read_text() == "True"
        assert (hub / "me" / name / file).exists()
        assert (hub / "me" / name / "tokenizer.json").exists()
        assert ModelCard.load(hub / "me" / name / "README.md").data.base_model == "some-one/tiny"
        assert load_tokenizer(str(run_dir / "merged"))[0].chat_template
        assert f'from_pretrained("me/{name}"' in (hub / "me" / name / "README.md").read_text()
    config = json.loads((hub / "me" / "herbs-adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some-one/tiny"


def test_a_hub_that_refuses(run_dir, hub):
    with pytest.raises(
        Exception, match="could not go to the Hub as refused/herbs: 403 Forbidden"
    ) as caught:
        cards_of(run_dir, base_model_on_hub="some-one/tiny", push_to_hub="refused/herbs")
    assert type(caught.value).__name__ == "StageError"
    assert "\n" not in str(caught.value)
    assert (run_dir / "export" / "merged" / "README.md").exists()


def test_nothing_is_uploaded_unasked(run_dir, hub):
    cards_of(run_dir)
    assert not hub.exists()


def test_a_hub_that_refuses_without_a_word(run_dir, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("")

    monkeypatch.setattr(cards_module, "create_repo", refuse)
    export_run = read(run_dir)
    for part in ("adapter", "merged"):
        (export_run.folder / part).mkdir(parents=True)
    with pytest.raises(StageError, match="could not go to the Hub as me/x: ValueError"):
        cards_module.upload(export_run, "merged", "me/x")


def test_a_card_says_how_a_table_is_used_as_style(run_dir):
    text = cards_of(run_dir)["merged"].text
    assert "It learned the form of the table's answers." in text
    assert "It answers from rows" not in text


def test_a_card_says_how_a_table_is_used_as_knowledge(run_dir):
    """The example code asks with the rows, in the words of the one function."""
    with_rows(run_dir)
    text = cards_of(run_dir)["merged"].text
    assert "It answers from rows of its table that stand in its prompt" in text
    assert "“My table has nothing on that.”" in text
    assert "{rows}\n\nQuestion: {question}" in text
    code = re.search("```python\n(.*?)```", text, re.DOTALL)[1]
    messages = re.search(r"^messages = (.*)$", code, re.MULTILINE)[1]
    export_run = read(run_dir)
    prompt = export_run.splits["test"][0]["prompt"]
    assert json.loads(messages) == load_context(run_dir, "use").prompt(prompt).messages
    assert json.loads(messages) != prompt
    assert "Without them the model learned to refuse" in text


@pytest.mark.parametrize(("quantization", "method"), [("nf4", "QLoRA"), ("none", "LoRA")])
def test_a_card_calls_qlora_only_what_is(run_dir, quantization, method):
    path = run_dir / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["02_finetune_qlora"]["parameters"]["quantization"] = quantization
    path.write_text(json.dumps(manifest))
    for card in cards_of(run_dir).values():
        assert f"trained with {method} on" in card.text


def test_a_card_shows_how_many_answers_are_right(run_dir):
    path = run_dir / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    figures = {
        "questions": 40,
        "right": 0.975,
        "right_ci95": [0.87, 1.0],
        "wrong": 0.025,
        "nothing": 0.0,
    }
    for model in ("base", "adapter", "merged"):
        metrics[model]["content"] = {"reworded": figures}
    sentence = "It gives the right answer to 39 of 40 reworded questions of your table (35–40)."
    metrics["verdict"] = [sentence]
    path.write_text(json.dumps(metrics))
    text = cards_of(run_dir)["adapter"].text
    assert "39 of 40 reworded questions of the table (35–40)." in text, "it is not the reader's"
    assert "| of the table, reworded | 40 | 98% (87% – 100%) | 2% | 0% |" in text
    assert text.index("right?") < text.index("perplexity"), "content comes first"


def test_a_card_of_a_run_without_that_figure_says_so(run_dir):
    path = run_dir / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics.pop("verdict", None)
    for model in ("base", "adapter", "merged"):
        metrics[model].pop("content", None)
    path.write_text(json.dumps(metrics))
    assert "## Are the answers right?\n\nThat was not measured." in cards_of(run_dir)["merged"].text
