"""examination: with rows of the table in the prompt, what is asked with which index, and what is
right.
"""

import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import TINY, copy_of, run_tiny

from tabletune.data.context import load_context
from tabletune.evaluation import examination as examination_module
from tabletune.evaluation.examination import Examination, ExaminationSettings
from tabletune.evaluation.trained_run import open_trained_run

NOTHING = "My table has nothing on that."


@pytest.fixture(scope="module")
def run_with_rows(finished_run, tmp_path_factory):
    """A run whose notebook 1 put rows into the prompts.

    Adapter and merged model are those of a run without.
    """
    run_dir = tmp_path_factory.mktemp("rows") / "run"
    settings = {"context_rows": 3, "unknown_answer": NOTHING, "max_length": 1024}
    run_tiny("01_format_dataset", run_dir, **settings)
    copy_of(finished_run, run_dir, "adapter", "merged")
    report = json.loads((run_dir / "dataset" / "report.json").read_text())
    path = run_dir / "adapter" / "provenance.json"
    provenance = json.loads(path.read_text())
    path.write_text(json.dumps(provenance | {"dataset_fingerprint": report["fingerprint"]}))
    return run_dir


def test_both_indexes_are_inputs_of_the_examination(run_with_rows):
    inputs = open_trained_run(run_with_rows, str(run_with_rows), str(TINY)).inputs
    assert inputs.keys() == {"dataset", "adapter", "retrieval", "retrieval_in_use"}


def test_baselines_depend_on_the_index_for_evaluation_alone(run_with_rows):
    place = (run_with_rows, str(run_with_rows), str(TINY))
    inputs = open_trained_run(*place, indexes=["evaluation"]).inputs
    assert inputs.keys() == {"dataset", "adapter", "retrieval"}


class Recorded:
    """Stands in for models: remembers what was scored and asked, and answers everything alike."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []
        self.scored = []

    def generate(self, model, tokenizer, stop_token_ids, prompts, *settings, **sampling):
        self.asked.append(prompts)
        answers = {"answer": [self.answer] * len(prompts), "stopped": True, "new_tokens": 3}
        return pd.DataFrame(answers), 1.0

    def score(self, model, rows, *settings):
        self.scored.append(rows)
        columns = ["response_nll", "response_tokens", "full_nll", "full_tokens"]
        return pd.DataFrame(2.0, index=range(len(rows)), columns=columns)


@pytest.fixture
def examined(run_with_rows, monkeypatch):
    """An examination with all models done, by a model that always gives the same answer, and
    what it was asked.
    """

    def examine(answer, copies=False, **settings):
        recorded = Recorded(answer)
        monkeypatch.setattr(examination_module, "generate", recorded.generate)
        monkeypatch.setattr(examination_module, "score", recorded.score)
        trained = open_trained_run(run_with_rows, str(run_with_rows), str(TINY))
        examination = Examination(trained, ExaminationSettings(samples=5, **settings))
        if not copies:  # of the best row, where the model refuses although that is certain
            for context in (examination.context, examination.context_for_use):
                context.settings = replace(context.settings, certain_threshold=1.01)
        yours = [{"prompt": [{"role": "user", "content": "Mine?"}]}]
        for name in ("base", "adapter", "merged"):
            examination.examine(name, None, yours)
        return examination, recorded

    return examine


def test_prompts_are_those_of_the_one_function(examined, run_with_rows):
    examination, recorded = examined("x", unknown_threshold=0)
    context = load_context(run_with_rows, "evaluation", 0)
    for_use = load_context(run_with_rows, "use", 0)
    parts = [*examination.sets["new"], *examination.sets["table"], *examination.sets["reworded"]]
    expected = [context.prompt(question["prompt"]).messages for question in parts]
    assert recorded.asked[0] == expected
    mine = [{"role": "user", "content": "Mine?"}]
    added = [mine, *(question["prompt"] for question in examination.sets["added"])]
    assert recorded.asked[1] == [for_use.prompt(prompt).messages for prompt in added]


def test_test_rows_are_scored_without_their_own_rows(examined, run_with_rows):
    examination, recorded = examined("x")
    tokenizer = examination.trained.tokenizer
    context = load_context(run_with_rows, "evaluation")
    row = examination.trained.splits["test"][0]
    text = tokenizer.decode(recorded.scored[0][0]["input_ids"])
    rows = context.prompt(row["prompt"]).rows
    assert all(row["question"] in text for row in rows)
    assert row["prompt"][-1]["content"] not in [row["question"] for row in rows]
    with_rows = tokenizer.decode(recorded.scored[1][0]["input_ids"])
    assert with_rows != text


def test_no_test_question_is_in_the_index_for_evaluation(examined):
    examination, _ = examined("x")
    in_index = {row.question_id for row in examination.context.index.rows}
    groups = set(examination.groups)
    assert not groups & in_index
    assert groups <= {row.question_id for row in examination.context_for_use.index.rows}


def test_nothing_is_right_for_new_questions_and_wrong_for_all_others(examined):
    examination, _ = examined(NOTHING, unknown_threshold=0)
    content = examination.metrics()["merged"]["content"]
    assert content["new"]["right"] == 1
    assert content["new"]["unanswerable"]["nothing"] == 1
    for part in ("table", "reworded", "added"):
        assert content[part]["right"] == 0
        assert content[part]["false_nothing"] == 1


def test_copied_answers_are_counted(examined):
    examination, _ = examined(NOTHING, copies=True, unknown_threshold=0)
    content = examination.metrics()["merged"]["content"]
    assert content["table"]["right"] == content["table"]["copied"] == 1
    assert content["new"]["copied"] == 0


def test_without_ask_all_models_only_the_merged_model_answers_everything(examined):
    examination, recorded = examined("x", ask_all_models=False)
    metrics = examination.metrics()
    assert set(metrics["base"]["content"]) == {"new"}
    assert set(metrics["adapter"]["content"]) == {"new"}
    assert set(metrics["merged"]["content"]) == {"new", "table", "reworded", "added"}
    assert set(metrics["content_differences"]["merged - adapter"]) == {"new"}
    assert len(recorded.scored) == 4, "the rows with their own rows only once"


def test_what_is_saved_of_each_answer(examined, tmp_path):
    examination, _ = examined("x", unknown_threshold=0)
    examination.save(tmp_path, "Not advice.", ["Mine?"])
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"new", "table", "reworded", "added"}
    assert {line["model"] for line in lines} == {"base", "adapter", "merged"}
    assert all(line["rows"] and "score" in line["rows"][0] for line in lines)
    yours = json.loads((tmp_path / "your_questions.json").read_text())
    assert yours == {"Mine?": {"base": ["x"], "adapter": ["x"], "merged": ["x"]}}
