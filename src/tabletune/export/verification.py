"""Verifying exported files against the merged model."""

import gc
import math

import numpy as np
import torch

from tabletune.chat.encoding import encode, encode_prompt
from tabletune.errors import StageError
from tabletune.evaluation.answers import generate
from tabletune.evaluation.scoring import perplexity, score
from tabletune.export.cards import questions
from tabletune.export.llama_cpp import LLAMA_CPP, InLlamaCpp
from tabletune.model.devices import available_memory_gib, compute_dtype
from tabletune.model.loading import load_model
from tabletune.run.files import read_json, set_aside, write_json
from tabletune.stats import mean_difference, perplexity_interval

PROOF = (
    "seed",
    "proof_rows",
    "proof_questions",
    "max_new_tokens",
    "window",
    "stride",
    "bootstrap_samples",
)


def prove_files(found, files):
    """What each of `files`, {kind: path}, lost against the merged model in transformers: {"merged" or kind: entry}.

    It is kept in `export/metrics.json`, and measured once. Raises StageError if a GGUF in 16 bits lost more than
    rounding does.
    """
    told, settings = found.told, {name: getattr(found.told, name) for name in PROOF}
    known = read_json(found.folder / "metrics.json", "07_export")
    if known.get("settings") == settings and files.keys() <= known.keys():
        return {kind: known[kind] for kind in ("merged", *files)}
    test = found.splits["test"].select(range(min(told.proof_rows, len(found.splits["test"]))))
    rows, asked = [encode(row, found.tokenizer, found.stops) for row in test], questions(found)
    longest = max((len(encode_prompt(prompt, found.tokenizer)) for prompt in asked), default=0)
    if longest + told.max_new_tokens > told.window:
        raise StageError(
            f"window={told.window} has no room for the longest question and {told.max_new_tokens} tokens."
        )
    entries, reference = {}, None
    for kind in ("merged", *files):
        model = (
            InLlamaCpp(files[kind], told.window) if kind in files else load_reference(found.merged)
        )
        scores = score(model, rows, found.tokenizer.pad_token_id, 1, told.window, told.stride)
        made, _ = generate(
            model, found.tokenizer, found.stops, asked, 1, told.max_new_tokens, told.seed
        )
        model = gc.collect()
        reference = reference or (scores["response_nll"], made["answer"])
        resampling = (test["group"], told.bootstrap_samples, told.seed)
        ratio = mean_difference(
            scores["response_nll"], reference[0], scores["response_tokens"], *resampling
        )
        paths = [files[kind]] if kind in files else found.merged.glob("*.safetensors")
        entries[kind] = {
            "mib": round(sum(path.stat().st_size for path in paths) / 2**20, 1),
            "perplexity": {
                "response": perplexity(scores, "response"),
                "full_text": perplexity(scores, "full"),
                "response_ci95": perplexity_interval(scores, "response", *resampling),
            },
            "ratio_to_merged": math.exp(ratio["difference"]),
            "ratio_to_merged_ci95": None
            if ratio["ci95"] is None
            else np.exp(ratio["ci95"]).tolist(),
            "same_answers": int((made["answer"] == reference[1]).sum()),
            "questions": len(asked),
        }
    if "F16" in files and not abs(entries["F16"]["ratio_to_merged"] - 1) < 0.005:
        set_aside(found.folder, "gguf")
        raise StageError(
            f"In 16 bits the perplexity is {entries['F16']['ratio_to_merged']:.2%} of the merged model's."
        )
    about = {"rows": len(rows), "llama_cpp": LLAMA_CPP, "settings": settings}
    write_json(found.folder / "metrics.json", found.made_of | about | entries)
    return entries


def load_reference(folder):
    """The merged model in transformers: in 32 bits where there is room, as llama.cpp's sums have 32 bits, too."""
    gib = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**30  # in 16 bits
    dtype = torch.float32 if 2.4 * gib < available_memory_gib() else compute_dtype("auto")
    return load_model(folder, None, dtype)
