"""compare: which runs can be compared, and which differ by more than chance."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from tabletune.errors import StageError
from tabletune.report.compare import (
    BITS,
    NO_DIFFERENCE,
    RIGHT,
    RIGHT_UNKNOWN,
    comparable_runs,
    compared_part,
    doubts_of,
    headline,
    name_of_seeds,
    open_runs,
    pair_difference,
    pairs_table,
    ranked,
    result_of_pair,
    settings_of,
    settings_table,
)
from tabletune.report.learning_curve import in_words
from tabletune.run.files import write_json

PARAMETERS = {"base_model": "a/base", "learning_rate": 0.01, "seed": 1}
QUESTIONS = 40


def a_run(folder, nats=2.0, right=0.5, noise=0.02, test="one", seed=0, **parameters):
    """Write what a comparison reads of a run: its answers cost about `nats` a token, and a share
    of them is right.
    """
    generator = np.random.default_rng(seed)
    hard = np.random.default_rng(99).normal(0, 0.5, QUESTIONS)  # rows differ alike in all runs
    tokens = np.full(QUESTIONS, 20)
    nll = tokens * (nats + hard + generator.normal(0, noise, QUESTIONS))
    sizes = np.full(QUESTIONS, 60)
    table = pd.DataFrame({"response_nll": nll, "response_tokens": tokens, "response_bytes": sizes})
    folder.mkdir(parents=True)
    (folder / "evaluation").mkdir()
    table = table.assign(model="merged", group=[f"q{i}" for i in range(QUESTIONS)])
    table.to_parquet(folder / "evaluation" / "scores.parquet")
    hits = [i < right * QUESTIONS for i in range(QUESTIONS)]
    lines = [
        {"part": "reworded", "model": "merged", "asked": f"q{i}?", "right": hit}
        for i, hit in enumerate(hits)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "evaluation" / "answers.jsonl").write_text(text)
    bits = nll.sum() / math.log(2) / sizes.sum()
    rate = float(np.mean(hits))
    perplexity = {"response": math.exp(nll.sum() / tokens.sum()), "bits_per_byte": bits}
    content = {"reworded": {"questions": QUESTIONS, "right": rate, "right_ci95": [0.1, 0.9]}}
    write_json(
        folder / "evaluation" / "metrics.json",
        {"merged": {"perplexity": perplexity, "content": content}},
    )
    entry = {"parameters": {**PARAMETERS, **parameters, "run_dir": str(folder)}}
    write_json(folder / "manifest.json", {"01_format_dataset": entry})
    rows = {
        "prompt": [[{"role": "user", "content": test}]],
        "completion": [[{"role": "assistant", "content": "a"}]],
    }
    Dataset.from_dict(rows).save_to_disk(folder / "dataset" / "test")
    return folder


def compared(*folders):
    runs, sentences = comparable_runs(open_runs([str(folder) for folder in folders]))
    part = compared_part(runs)
    return ranked(settings_of(runs), part), part, sentences


def test_runs_are_given_as_a_text_or_as_a_list(tmp_path):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "with space")
    assert [run.name for run in open_runs([str(one), str(other)])] == ["one", "with space"]
    third = a_run(tmp_path / "third")
    assert [run.name for run in open_runs(f"{one} {third} {one}")] == ["one", "third"]
    assert [run.name for run in open_runs([f"{one} {third}"])] == ["one", "third"]
    assert [run.name for run in open_runs(f"'{other}' {third}")] == ["with space", "third"]
    assert [run.name for run in open_runs(str(other))] == ["with space"]


def test_a_folder_of_a_list_that_is_not_there_is_named_as_it_stands(tmp_path):
    with pytest.raises(StageError, match="not there at all"):
        open_runs([str(a_run(tmp_path / "one")), str(tmp_path / "not there at all")])


def test_another_test_set_cannot_be_compared(tmp_path):
    folders = [a_run(tmp_path / name) for name in ("a", "b")]
    other = a_run(tmp_path / "c", nats=0.1, test="two")
    settings, _, sentences = compared(other, *folders)
    names = [run.name for setting in settings for run in setting.runs]
    assert sorted(names) == ["a", "b"]
    assert "c CANNOT BE COMPARED with a" in sentences[0]


def test_a_table_in_another_order_is_the_same_test_set(tmp_path):
    """Rows are compared with themselves, wherever they stand."""
    runs = [a_run(tmp_path / name, noise=0) for name in ("a", "b")]
    order = np.random.default_rng(5).permutation(QUESTIONS)
    for run, places in zip(runs, (range(QUESTIONS), order), strict=True):
        prompts = [[{"role": "user", "content": f"q{i}"}] for i in places]
        rows = {
            "prompt": prompts,
            "completion": [[{"role": "assistant", "content": "a"}]] * QUESTIONS,
        }
        Dataset.from_dict(rows).save_to_disk(run / "dataset" / "test")
    path = runs[1] / "evaluation" / "scores.parquet"
    pd.read_parquet(path).iloc[order].reset_index(drop=True).to_parquet(path)
    one, other = comparable_runs(open_runs([str(run) for run in runs]))[0]
    assert list(one.scores["group"]) == list(other.scores["group"])
    assert np.array_equal(one.scores["response_nll"], other.scores["response_nll"])


def test_a_run_without_evaluation_is_named(tmp_path):
    one, other = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    (other / "evaluation" / "metrics.json").unlink()
    _, _, sentences = compared(one, other)
    assert sentences == ["b was not evaluated: it is left out of the comparison."]


def test_an_older_evaluation_is_named(tmp_path):
    one, other = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    path = other / "evaluation" / "scores.parquet"
    pd.read_parquet(path).drop(columns="response_bytes").to_parquet(path)
    _, _, sentences = compared(one, other)
    assert "b was evaluated by an older notebook 4" in sentences[0]


def test_other_base_models_are_compared_by_bits_per_byte(tmp_path):
    _, _, sentences = compared(
        a_run(tmp_path / "a"), a_run(tmp_path / "b", base_model="b/base", max_new_tokens=4)
    )
    assert "compare bits per byte" in sentences[0]
    assert "different max_new_tokens" in sentences[1]


def test_three_seeds_of_one_setting_are_not_told_apart(tmp_path):
    folders = [a_run(tmp_path / f"seed{k}", nats=2 + k / 20, seed=k) for k in range(3)]
    for k, folder in enumerate(folders):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["01_format_dataset"]["parameters"]["seed"] = k
        write_json(folder / "manifest.json", manifest)
    settings, part, _ = compared(*folders)
    assert len(settings) == 1
    assert settings[0].name == "seed0 (3 seeds)"
    text = settings_table(settings, part).loc["seed0 (3 seeds)", "bits per byte"]
    assert "[" in text
    assert "to" in text


def test_a_worse_setting_is_told_apart_by_more_than_the_seeds_do(tmp_path):
    seeds = [a_run(tmp_path / f"seed{k}", nats=2 + k / 20, seed=k) for k in range(3)]
    near = a_run(tmp_path / "near", nats=2.06, learning_rate=0.02)
    worse = a_run(tmp_path / "worse", nats=3.0, right=0.1, learning_rate=0.03)
    settings, part, _ = compared(*seeds, near, worse)
    table = pairs_table(settings, part)
    assert table.loc["near", "result"] == "no difference shown"
    assert table.loc["worse", "result"] == "worse"
    [same] = [line for line in headline(settings, part) if line.startswith("No difference from it")]
    assert "near" in same
    assert "worse" not in same


def test_pairs_are_sharper_than_two_intervals(tmp_path):
    """The rows differ by 0.5 nats a token, the runs by 0.1: only in pairs can that be seen."""
    settings, part, _ = compared(
        a_run(tmp_path / "a", nats=2.0), a_run(tmp_path / "b", nats=2.1, learning_rate=1)
    )
    entry = pair_difference(settings[1], settings[0], BITS, part)
    assert entry["significant"]
    assert entry["difference"] == pytest.approx(0.1 * 20 / 60 / math.log(2), rel=0.2)


def test_a_difference_that_nobody_would_notice_is_none(tmp_path):
    settings, part, _ = compared(
        a_run(tmp_path / "a", nats=2.0, noise=0),
        a_run(tmp_path / "b", nats=2.005, noise=0, learning_rate=1),
    )
    assert pairs_table(settings, part).loc["b", "result"] == "no difference shown"


def test_right_answers_decide_before_bits(tmp_path):
    settings, part, _ = compared(
        a_run(tmp_path / "form", nats=1.0, right=0.1),
        a_run(tmp_path / "content", nats=2.0, right=0.9, learning_rate=1),
    )
    assert [setting.name for setting in settings] == ["content", "form"]
    assert headline(settings, part)[0].startswith("Most right answers: content, 90% of 40 reworded")
    assert pair_difference(settings[1], settings[0], RIGHT, part)["significant"]


@pytest.mark.parametrize(
    ("right", "bits", "result"),
    [
        (0.2, 0.5, "better"),
        (-0.2, -0.5, "worse"),
        (None, -0.5, "better"),
        (None, 0.5, "worse"),
        (None, None, "not compared"),
    ],
)
def test_right_answers_decide_which_setting_is_better(right, bits, result):
    entries = [
        None if value is None else {"difference": value, "significant": True}
        for value in (right, bits)
    ]
    assert result_of_pair(*entries) == result


def test_runs_with_and_without_rows_are_compared_by_right_answers(tmp_path):
    one, other = a_run(tmp_path / "a"), a_run(tmp_path / "b", learning_rate=1)
    path = other / "evaluation" / "metrics.json"
    write_json(path, {**json.loads(path.read_text()), "retrieval": True})
    settings, part, sentences = compared(one, other)
    assert "Compare their right answers" in sentences[0]
    assert pair_difference(settings[1], settings[0], BITS, part) is None
    assert not any("bits per byte" in line for line in headline(settings, part))
    assert headline(settings, None) == [RIGHT_UNKNOWN]


def test_questions_that_differ_are_not_compared_for_right_answers(tmp_path):
    one, other = a_run(tmp_path / "a"), a_run(tmp_path / "b", learning_rate=1)
    path = other / "evaluation" / "answers.jsonl"
    path.write_text(path.read_text().replace("q0?", "something else?"))
    settings, part, _ = compared(one, other)
    assert part is None
    first, second, *_ = headline(settings, part)
    assert "were not asked the same questions" in first
    assert second.startswith("Fewest bits per byte")


def test_one_seed_each_is_said(tmp_path):
    settings, part, _ = compared(a_run(tmp_path / "a"), a_run(tmp_path / "b", learning_rate=1))
    assert "with one seed" in headline(settings, part)[-1]


def test_seeds_that_are_taken_for_settings_are_not_told_apart(tmp_path):
    """As measured: seeds of one setting differ by up to 0.014 bits per byte, on the same rows."""
    folders = [a_run(tmp_path / "a", nats=2.0), a_run(tmp_path / "b", nats=2.028, max_length=9)]
    settings, part, _ = compared(*folders)
    assert pairs_table(settings, part).iloc[0]["result"] == NO_DIFFERENCE


def test_where_no_setting_has_right_answers_the_headline_is_about_likelihood(tmp_path):
    folders = [a_run(tmp_path / "a", right=0), a_run(tmp_path / "b", nats=3, right=0, epochs=2)]
    settings, part, _ = compared(*folders)
    first, second, *_ = headline(settings, part)
    assert first == "No setting answers any of the reworded questions right."
    assert second.startswith("Fewest bits per byte: a,")


def test_several_seeds_are_named_without_a_seed(tmp_path):
    folders = [a_run(tmp_path / f"train_rows-0.5_seed-{seed}", seed=seed) for seed in (1, 2)]
    settings, _, _ = compared(*folders)
    assert [setting.name for setting in settings] == ["train_rows-0.5 (2 seeds)"]


@pytest.mark.parametrize(
    ("name", "without_seed"),
    [
        ("lora_r-8_seed-1_epochs-2", "lora_r-8_epochs-2"),
        ("lora_r-8_seed-1", "lora_r-8"),
        ("seed-1_lora_r-8", "lora_r-8"),
        ("split_seed-1_seed-2", "split_seed-1"),
    ],
)
def test_the_seed_is_left_out_wherever_it_stands_in_a_name(name, without_seed):
    assert name_of_seeds(name, 3) == f"{without_seed} (3 seeds)"


def test_rows_that_were_left_out_on_purpose_are_no_doubt(tmp_path):
    run = a_run(tmp_path / "a")
    notes = ["train_rows: 9 of 73 training questions are used.", "Something else."]
    write_json(run / "dataset" / "report.json", {"notes": notes})
    (sentence,) = doubts_of(open_runs([str(run)]))
    assert sentence.startswith("a: ")
    assert "Something else." in sentence
    assert "train_rows" not in sentence


def test_a_comparison_is_summed_up_in_words(tmp_path):
    folders = []
    for size, right in ((0.5, 0.3), (1.0, 0.8)):
        run = a_run(tmp_path / f"rows {size}", right=right, train_rows=size, epochs=2)
        report = {"questions": {"train": round(100 * size)}, "notes": []}
        write_json(run / "dataset" / "report.json", report)
        folders.append(str(run))
    first, *_, last = in_words(folders)
    assert first == "Most right answers: rows 1.0, 80% of 40 reworded questions."
    assert last.startswith("The last doubling gained nothing")


def record(run, stage, **parameters):
    """Leave the entry of one more notebook in the manifest of a run."""
    path = run / "manifest.json"
    entry = {"parameters": {**PARAMETERS, **parameters}}
    write_json(path, {**json.loads(path.read_text()), stage: entry})


def test_a_notebook_that_only_measures_makes_no_other_setting(tmp_path):
    folders = [a_run(tmp_path / f"seed-{seed}", seed=seed) for seed in (1, 2)]
    record(folders[0], "06_trust", split_rows=50)
    settings, _, _ = compared(*folders)
    assert len(settings) == 1


def test_only_what_notebook_4_was_run_with_is_a_caution(tmp_path):
    folders = [a_run(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        record(folder, "04_evaluate", window=1024)
    record(folders[0], "07_export", window=2048)
    assert compared(*folders)[2] == []


def test_two_conversations_that_end_in_the_same_question_are_two_questions(tmp_path):
    run = a_run(tmp_path / "a")
    line = {"part": "new", "model": "merged", "asked": "And for children?"}
    lines = [{**line, "group": "cold", "right": True}, {**line, "group": "cough", "right": False}]
    text = "\n".join(json.dumps(line) for line in lines)
    (run / "evaluation" / "answers.jsonl").write_text(text)
    [opened_run] = open_runs([str(run)])
    assert sorted(opened_run.answers["new"].values()) == [False, True]


def test_where_nothing_tells_which_is_best_no_other_is_measured_against_it(tmp_path):
    """Nobody is right, and bits per byte do not compare runs with rows to those without."""
    one, other = a_run(tmp_path / "a", right=0), a_run(tmp_path / "b", right=0, learning_rate=1)
    path = other / "evaluation" / "metrics.json"
    write_json(path, {**json.loads(path.read_text()), "retrieval": True})
    settings, part, _ = compared(one, other)
    expected = ["No setting answers any of the reworded questions right."]
    assert headline(settings, part) == expected
