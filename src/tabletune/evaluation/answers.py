"""Answers of a model: generated in batches, until a stop token."""

import json
import math
import sys
import time
from contextlib import contextmanager

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig, set_seed

from tabletune.chat.encoding import answer_text, encode_prompt
from tabletune.model.generation import decode, static_cache
from tabletune.model.memory import max_batch_size

# --- answers


@contextmanager
def without_settings(model):
    """Take from a model its own settings of generation, with which `generate` fills all that is left open.

    Many bring a temperature or a penalty on repetition, which is not what "greedy" means.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def generate(model, tokenizer, stops, prompts, batch_size, max_new_tokens, seed=0, **sampling):
    """Answer prompts until one of the ids `stops`, greedily, if `sampling` does not say otherwise.

    A prompt is a list of messages, or a row of the data set, whose `tools` then count, too. They are sorted by length,
    and at most `batch_size` are answered at once, where memory allows. Returns a DataFrame in the order of the prompts,
    `answer`, `stopped`, `new_tokens`, and the seconds that it took.
    """
    model.eval()
    processes, answers, begun = PartialState(), {}, time.perf_counter()
    settings = {
        "do_sample": False,
        **sampling,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": stops,
    }
    settings = GenerationConfig(**settings, pad_token_id=tokenizer.pad_token_id)
    rows = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
    tools = [json.loads(row["tools"]) if row.get("tools") else None for row in rows]
    ids = [
        encode_prompt(row["prompt"], tokenizer, known)
        for row, known in zip(rows, tools, strict=True)
    ]
    most = min(batch_size, math.ceil(len(ids) / processes.num_processes))
    longest = max(map(len, ids), default=1) + max_new_tokens
    batch_size = max_batch_size(model, longest, max(1, most), with_logits=False)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    with without_settings(model):
        mine = batches[processes.process_index :: processes.num_processes]
        for batch in tqdm(mine, "answering", unit="batch", file=sys.stdout):
            set_seed(seed + batch[0])
            # on the left, so that each answer follows its prompt directly
            padded = tokenizer.pad(
                {"input_ids": [ids[i] for i in batch]}, padding_side="left", return_tensors="pt"
            )
            cache = static_cache(model, padded["input_ids"].shape[1] + max_new_tokens)
            loop = {"custom_generate": decode, "past_key_values": cache} if cache else {}
            output = model.generate(**padded.to(model.device), generation_config=settings, **loop)
            for i, new in zip(
                batch, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True
            ):
                answers[i] = answer_text(new, tokenizer, stops)
    answers = {i: answer for part in gather_object([answers]) for i, answer in part.items()}
    table = pd.DataFrame(
        [answers[i] for i in range(len(ids))], columns=["answer", "stopped", "new_tokens"]
    )
    return table, time.perf_counter() - begun
