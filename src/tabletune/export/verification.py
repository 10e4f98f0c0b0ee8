"""Verifying exported files against the merged model: perplexity, and greedy answers."""

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tabletune.chat.encoding import encode
from tabletune.data.context import INPUT_NAMES
from tabletune.errors import StageError
from tabletune.evaluation.answers import generate, prompt_ids
from tabletune.evaluation.scoring import perplexity, score
from tabletune.export.finished_run import ExportRun
from tabletune.export.gguf import archive_refused
from tabletune.export.llama_cpp import PACKAGE, InLlamaCpp
from tabletune.model.devices import available_memory_gib, compute_dtype
from tabletune.model.loading import load_model
from tabletune.report.text import with_interval
from tabletune.run.files import read_json, write_json
from tabletune.run.machine import installed
from tabletune.stats import mean_difference, perplexity_interval

SETTINGS = (  # the parameters of notebook 7 that the figures depend on
    "seed",
    "proof_rows",
    "proof_questions",
    "max_new_tokens",
    "window",
    "stride",
    "bootstrap_samples",
)
LARGEST_DEVIATION = 0.005  # of the merged model's perplexity, in 16 bits


@dataclass
class Measurement:
    """What one model made of the test rows and questions."""

    scores: pd.DataFrame  # of scoring.score, a line for each row
    answers: list[str]  # to each question


def verify_files(export_run: ExportRun, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What each of `files`, {kind: path}, lost against the merged model in transformers.

    Returns {"merged" or kind: entry}; an entry has `mib`, `perplexity`, `ratio_to_merged`, its
    interval, `same_answers` and `questions`. The entries are kept in `export/metrics.json` and
    measured once. If a file in 16 bits loses more than rounding does, it and what was made from it
    move to `earlier/`, and StageError is raised.
    """
    settings = {name: export_run.parameters[name] for name in SETTINGS}
    if export_run.context is not None:
        # rows of the table stand in the prompts, and other rows after `make index`
        settings[INPUT_NAMES["use"]] = export_run.context.fingerprint
    earlier = read_json(export_run.folder / "metrics.json", "07_export")
    # measuring takes minutes, and files of the same name and settings are the same
    if earlier.get("settings") == settings and files.keys() <= earlier.keys():
        return {kind: earlier[kind] for kind in ("merged", *files)}
    check_room_for_questions(export_run)

    reference = measure(load_reference(export_run.merged), export_run)
    weights = export_run.merged.glob("*.safetensors")
    entries = {"merged": entry_of(reference, reference, export_run, list(weights))}
    for kind, file in files.items():
        model = InLlamaCpp(file, export_run.parameters["window"])
        entries[kind] = entry_of(measure(model, export_run), reference, export_run, [file])
        ratio = entries[kind]["ratio_to_merged"]
        # written so that NaN fails, too
        if kind == "F16" and not abs(ratio - 1) < LARGEST_DEVIATION:
            archive_refused(export_run, *files.values())
            raise StageError(
                f"In 16 bits the perplexity is {ratio:.2%} of the merged model's, so {file.name} "
                "is not the same model. It is not used."
            )

    about = {
        "rows": len(export_run.test_rows()),
        "llama_cpp": f"{PACKAGE}=={installed(PACKAGE)}",
        "settings": settings,
    }
    write_json(export_run.folder / "metrics.json", export_run.sources | about | entries)
    return entries


def check_room_for_questions(export_run: ExportRun) -> None:
    """Raise StageError if `window` has no room for the longest question and its answer."""
    window = export_run.parameters["window"]
    max_new_tokens = export_run.parameters["max_new_tokens"]
    lengths = [
        len(prompt_ids(question, export_run.tokenizer))
        for question in export_run.questions_with_tools()
    ]
    # a table of texts has no questions
    if lengths and max(lengths) + max_new_tokens > window:
        raise StageError(
            f"window={window} has no room for the longest question ({max(lengths)} tokens) and an "
            f"answer of max_new_tokens={max_new_tokens}. Raise window."
        )


def measure(model: torch.nn.Module, export_run: ExportRun) -> Measurement:
    """Score the test rows with a model, and let it answer the questions, greedily."""
    parameters = export_run.parameters
    tokenizer = export_run.tokenizer
    stop_token_ids = export_run.stop_token_ids
    rows = [encode(row, tokenizer, stop_token_ids) for row in export_run.test_rows()]
    scores = score(
        model, rows, tokenizer.pad_token_id, 1, parameters["window"], parameters["stride"]
    )
    answers, _ = generate(
        model,
        tokenizer,
        stop_token_ids,
        export_run.questions_with_tools(),
        1,
        parameters["max_new_tokens"],
        parameters["seed"],
    )
    # before the next file is loaded
    del model
    gc.collect()
    return Measurement(scores, answers["answer"].tolist())


def entry_of(
    measured: Measurement, reference: Measurement, export_run: ExportRun, files: list[Path]
) -> dict[str, Any]:
    """The figures of a model beside those of the merged model.

    `files` are those that hold its weights.
    """
    parameters = export_run.parameters
    groups = [row["group"] for row in export_run.test_rows()]
    resampling = (groups, parameters["bootstrap_samples"], parameters["seed"])
    scores = measured.scores
    log_ratio = mean_difference(
        scores["response_nll"],
        reference.scores["response_nll"],
        scores["response_tokens"],
        *resampling,
    )
    ratio_interval = None
    if log_ratio["ci95"] is not None:
        ratio_interval = np.exp(log_ratio["ci95"]).tolist()
    # to the letter: one other token changes all that follow it
    same = [a == b for a, b in zip(measured.answers, reference.answers, strict=True)]
    return {
        "mib": round(sum(file.stat().st_size for file in files) / 2**20, 1),
        "perplexity": {
            "response": perplexity(scores, "response"),
            "full_text": perplexity(scores, "full"),
            "response_ci95": perplexity_interval(scores, "response", *resampling),
        },
        "ratio_to_merged": math.exp(log_ratio["difference"]),
        "ratio_to_merged_ci95": ratio_interval,
        "same_answers": sum(same),
        "questions": len(same),
    }


def loss_table(losses: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The figures of `verify_files` as texts, {kind: {column: text}}."""
    table = {}
    for kind, entry in losses.items():
        perplexity_entry = entry["perplexity"]
        table[kind] = {
            "MiB": f"{entry['mib']:,.1f}",
            "response perplexity": with_interval(
                perplexity_entry["response"], perplexity_entry["response_ci95"], ",.3f"
            ),
            "of the merged model's": with_interval(
                entry["ratio_to_merged"], entry["ratio_to_merged_ci95"], ".2%"
            ),
            "same greedy answers": f"{entry['same_answers']} of {entry['questions']}",
        }
    return table


def load_reference(folder: Path) -> torch.nn.Module:
    """The merged model in transformers.

    In 32 bits where memory allows, since llama.cpp sums in 32 bits.
    """
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30
    dtype = compute_dtype("auto")
    # the files have 16 bits for a weight; 0.4 of their size is left for activations
    if 2.4 * size < available_memory_gib():
        dtype = torch.float32
    return load_model(folder, None, dtype)
