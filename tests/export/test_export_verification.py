"""What exported files lost against the merged model (marked `export`), and `make export` as a
whole.
"""

import json

import pandas as pd
import pytest
from conftest import copy_of, make
from datasets import Dataset
from export_runs import read, run_dir, with_rows  # noqa: F401

from tabletune.data.retrieval import RowIndex, TableRow
from tabletune.errors import StageError
from tabletune.export import gguf, verification


@pytest.mark.export
def test_the_same_model_in_llama_cpp(finished_run, tmp_path):
    """`make export` on the tiny model, whose tokenizer is of Llama 2's kind: tokens, answers,
    perplexity, files.
    """
    run_dir = copy_of(finished_run, tmp_path / "run")
    options = "ARGS=-p proof_rows 8 -p proof_questions 2 -p max_new_tokens 24"
    done = make("export", f"RUN_DIR={run_dir}", options)
    assert done.returncode == 0, done.stderr[-2000:]
    exported = json.loads((run_dir / "export" / "metrics.json").read_text())
    assert exported["F16"]["same_answers"] == exported["F16"]["questions"] == 2
    assert exported["F16"]["ratio_to_merged"] == pytest.approx(1, abs=2e-4)
    sizes = [exported[name]["mib"] for name in ("merged", "F16", "Q8_0", "Q4_K_M")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    half = exported["F16"]["perplexity"]["response"]
    for kind in ("Q8_0", "Q4_K_M"):
        assert exported[kind]["perplexity"]["response"] == pytest.approx(half, rel=0.02)
        assert exported[kind]["perplexity"]["response"] != half
    modelfile = (run_dir / "export" / "gguf" / "Modelfile").read_text()
    assert "FROM ./run-Q4_K_M.gguf" in modelfile
    assert 'PARAMETER stop "</s>"' in modelfile
    assert modelfile.count("not medical advice") == 2
    files = {path: path.stat().st_mtime_ns for path in (run_dir / "export").rglob("*.*")}
    assert make("export", f"RUN_DIR={run_dir}", options).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "export").rglob("*.*")} == files


@pytest.mark.export
def test_answers_in_transformers_are_greedy_whatever_the_base_prefers(run_dir):
    """A generation config that samples and punishes repetition, as many bases bring one, changes
    nothing.
    """
    options = {"proof_rows": 6, "proof_questions": 2, "max_new_tokens": 12}
    path = run_dir / "merged" / "generation_config.json"
    own = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 2.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    export_run = read(run_dir, gguf_types=["F16"], **options)
    files = {"F16": gguf.make_gguf(export_run, "F16")}
    assert verification.verify_files(export_run, files)["F16"]["same_answers"] == 2


@pytest.mark.parametrize("target", ["export", "chat"])
def test_a_misspelt_parameter_of_make(target, tmp_path):
    done = make(target, f"RUN_DIR={tmp_path}", "ARGS=-p max_new_token 8")
    assert done.returncode != 0
    assert "parameter 'max_new_token'. Did you mean 'max_new_tokens'?" in done.stderr


class Worse:
    """A stand-in for a GGUF file in llama.cpp."""

    def __init__(self, file, window):
        self.file = file


def test_a_16_bit_file_that_lost_something_moves_away_with_those_made_from_it(run_dir, monkeypatch):
    """And nothing else in the folder."""
    export_run = read(run_dir)
    folder = export_run.folder / "gguf"
    folder.mkdir(parents=True)
    for name in ("run-F16.gguf", "run-Q8_0.gguf", "run-Q4_K_M.gguf", "Modelfile"):
        (folder / name).write_text(name)

    def measure(model, export_run):
        rows = len(export_run.test_rows())
        nll = 2.0 if isinstance(model, Worse) else 1.0
        columns = ("response_nll", "response_tokens", "full_nll", "full_tokens")
        scores = pd.DataFrame(
            {column: [nll if "nll" in column else 1] * rows for column in columns}
        )
        return verification.Measurement(scores, ["a"])

    monkeypatch.setattr(verification, "InLlamaCpp", Worse)
    monkeypatch.setattr(verification, "load_reference", lambda folder: None)
    monkeypatch.setattr(verification, "measure", measure)
    files = {kind: folder / f"run-{kind}.gguf" for kind in ("F16", "Q8_0")}
    with pytest.raises(StageError, match=r"In 16 bits the perplexity is 271\.83%"):
        verification.verify_files(export_run, files)
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "run-Q4_K_M.gguf"]
    archived = run_dir.glob("earlier/*/export/gguf/*")
    assert sorted(path.name for path in archived) == ["run-F16.gguf", "run-Q8_0.gguf"]


def test_figures_are_measured_again_with_other_rows_in_the_prompts(run_dir, monkeypatch):
    with_rows(run_dir)
    measured = []

    def measure(model, export_run):
        measured.append(export_run)
        columns = ["response_nll", "response_tokens", "full_nll", "full_tokens"]
        rows = len(export_run.test_rows())
        return verification.Measurement(pd.DataFrame(1.0, range(rows), columns), ["a"])

    monkeypatch.setattr(verification, "load_reference", lambda folder: None)
    monkeypatch.setattr(verification, "measure", measure)
    verification.verify_files(read(run_dir, window=4096), {})
    verification.verify_files(read(run_dir, window=4096), {})
    assert len(measured) == 1
    rows = [TableRow("Cold?", "Ginger.", "a"), TableRow("Gas?", "Fennel.", "b")]
    RowIndex.build(rows).save(run_dir / "retrieval" / "use")
    verification.verify_files(read(run_dir, window=4096), {})
    assert len(measured) == 2


def test_a_window_that_is_too_small_for_a_question(run_dir):
    with pytest.raises(StageError, match="window=64 has no room for the longest question"):
        verification.check_room_for_questions(read(run_dir, window=64, max_new_tokens=60))


def test_a_table_of_texts_needs_no_room_for_questions(run_dir):
    export_run = read(run_dir, window=256, max_new_tokens=300)
    row = {"prompt": [], "completion": [{"role": "assistant", "content": "A text."}], "group": "a"}
    export_run.splits["test"] = Dataset.from_list([row])
    verification.check_room_for_questions(export_run)


def test_questions_of_the_proof_are_asked_with_their_tools(run_dir, monkeypatch):
    export_run = read(run_dir, window=4096)
    prompt = [{"role": "user", "content": "Which remedy?"}]
    rows = [{"prompt": prompt, "tools": tools, "group": "a"} for tools in ('["a"]', '["b"]')]
    export_run.splits["test"] = Dataset.from_list(rows)
    asked = []

    def generate(model, tokenizer, stop_token_ids, prompts, *settings):
        asked.extend(prompts)
        return pd.DataFrame({"answer": ["x"] * len(prompts)}), 0.0

    monkeypatch.setattr(verification, "generate", generate)
    monkeypatch.setattr(verification, "score", lambda *arguments: pd.DataFrame())
    monkeypatch.setattr(verification, "encode", lambda *arguments: {})
    verification.measure(None, export_run)
    assert asked == [{"prompt": prompt, "tools": tools} for tools in ('["a"]', '["b"]')]
