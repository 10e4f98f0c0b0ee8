"""What the tests of the export share: runs, and conversations."""

import json

import pytest
from conftest import copy_of, run_script
from datasets import Dataset, DatasetDict, load_from_disk
from huggingface_hub import ModelCard

from tabletune.data.retrieval import RowIndex, table_rows
from tabletune.export.finished_run import ExportRun, open_finished_run
from tabletune.run.parameters import PARAMETERS
from tabletune.run.stage import Stage

SYSTEM = {"role": "system", "content": 'Be "brief" & {{ kind }}.\nTwo lines.'}
ASKED = {"role": "user", "content": "What helps with a cold?"}
ANSWERED = {"role": "assistant", "content": "**Tea** <hot>, 'sweet'.\n\n- ümlaut 🍵"}
CONVERSATIONS = [
    [ASKED],
    [ASKED, ANSWERED, ASKED],
    [SYSTEM, ASKED],
    [SYSTEM, ASKED, ANSWERED, ASKED, ANSWERED, ASKED],
]


@pytest.fixture
def run_dir(finished_run, tmp_path):
    return copy_of(
        finished_run,
        tmp_path / "run",
        "dataset",
        "adapter",
        "merged",
        "training",
        "evaluation",
        "manifest.json",
    )


def read(run_dir, **parameters) -> ExportRun:
    """The run of a folder, with some parameters of the notebook."""
    defaults = {**PARAMETERS["07_export"], "run_dir": str(run_dir), "gguf_types": []}
    return open_finished_run(Stage("07_export", run_dir, {**defaults, **parameters}))


def bare_run(folder, merged, rows, tokenizer, stop_token_ids) -> ExportRun:
    """A run of nothing but a model and rows to train on, which exports into `folder`."""
    return ExportRun(
        run=folder / "x",
        merged=merged,
        folder=folder,
        parameters={"push_to_hub": ""},
        sources={},
        splits=DatasetDict({"train": Dataset.from_list(rows)}),
        report={},
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        base_model="x",
    )


def with_rows(run_dir, out_of_scope=(), **settings):
    """Give a run folder an index over the rows of its table, as notebook 1 with `context_rows`
    leaves it.
    """
    splits = load_from_disk(run_dir / "dataset")
    rows = table_rows(row for split in splits.values() for row in split)
    index = RowIndex.build(rows, out_of_scope=list(out_of_scope))
    for which in ("evaluation", "use"):
        index.save(run_dir / "retrieval" / which)
    defaults = {
        "context_rows": 3,
        "context_template": "Rows:\n\n{rows}\n\nQuestion: {question}",
        "unknown_answer": "My table has nothing on that.",
        "unknown_threshold": 0.4,
        "certain_threshold": 0.98,
        "context_characters": 0,
        "analyzer": index.analyzer,
        "calibration": {},
        "rows": {"evaluation": len(rows), "use": len(rows)},
        "fingerprint": "0123456789abcdef",
    }
    path = run_dir / "retrieval" / "settings.json"
    path.write_text(json.dumps({**defaults, **settings}), encoding="utf-8")
    report_path = run_dir / "dataset" / "report.json"
    report = json.loads(report_path.read_text(encoding="utf-8"))
    report["context_rows"] = {**defaults, **settings}["context_rows"]
    report_path.write_text(json.dumps(report), encoding="utf-8")
    return run_dir


def cards_of(run_dir, **parameters):
    """Run the notebook without llama.cpp. Returns the cards as the Hub reads them."""
    run_script("07_export", run_dir=str(run_dir), gguf_types=[], **parameters)
    parts = ("adapter", "merged")
    return {
        p: ModelCard.load(run_dir / "export" / p / "README.md", ignore_metadata_errors=False)
        for p in parts
    }
