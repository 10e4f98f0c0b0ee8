"""Answers of a model: generated in batches, until a stop token."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tabletune.chat.encoding import answer_text, encode_prompt
from tabletune.model.batch_size import max_batch_size
from tabletune.model.compat import CACHE
from tabletune.model.generation import decode_loop, static_cache

# the settings of sampling, in the order in which transformers applies them
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
}


@contextmanager
def without_settings(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Take a model's own generation settings away for a while.

    `generate` fills in from them what is left open. Many models bring a temperature or a penalty on
    repetition, which is not what "greedy" means.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    own_settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own_settings


class SeededSampling(LogitsProcessor):
    """Sampling with a random generator for each row.

    So an answer does not depend on what else is in its batch. Gumbel noise is added to the logits:
    the largest sum is then a draw from the softmax (Gumbel-max, Maddison et al., 2014,
    https://arxiv.org/abs/1411.0030). So `generate` takes the most likely token, as in greedy
    decoding.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits of the next token with noise, both [rows, vocabulary]."""
        noise = torch.empty_like(scores, dtype=torch.float32)  # [rows, vocabulary]
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()  # -log of an exponential variable is a Gumbel one


def seed_of(ids: list[int], seed: int) -> int:
    """The seed for the answer to a prompt of these token ids."""
    # not hash(): Python salts it, so it differs from process to process
    digest = hashlib.sha256(f"{seed}:{ids}".encode()).digest()
    # 56 bits, well within what a generator takes as its seed
    return int.from_bytes(digest[:7], "big")


def sampling_processors(
    batch_ids: list[list[int]], seed: int, device: torch.device, sampling: dict
) -> LogitsProcessorList:
    """What `generate` does to the logits of a batch.

    Nothing where `sampling` does not set `do_sample`. Raises ValueError for a setting of sampling
    that is not in WARPERS.
    """
    processors = LogitsProcessorList()
    if not sampling.get("do_sample"):
        return processors
    unknown = set(sampling) - {"do_sample", *WARPERS}
    if unknown:
        raise ValueError(f"Sampling here supports {', '.join(WARPERS)}, not {', '.join(unknown)}.")
    for name, warper in WARPERS.items():
        if name in sampling:
            processors.append(warper(sampling[name]))
    processors.append(SeededSampling([seed_of(ids, seed) for ids in batch_ids], device))
    return processors


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: list[int],
    prompts: list,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    **sampling: float,
) -> tuple[pd.DataFrame, float]:
    """Answer prompts until one of `stop_token_ids`, greedily, unless `sampling` says otherwise.

    A prompt is a list of messages, or a row of the data set, whose `tools` then count, too. Prompts
    are sorted by length, and at most `batch_size` are answered at once, where memory allows. With
    `do_sample=True` the seed of an answer comes from `seed` and its prompt, so an answer does not
    depend on how many are made at once.

    Returns a DataFrame in the order of the prompts, with `answer`, `stopped` and `new_tokens`, and
    the seconds that it took.
    """
    model.eval()
    processes = PartialState()
    started = time.perf_counter()
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = [prompt_ids(prompt, tokenizer) for prompt in prompts]
    # as many as one process gets: batches must not leave another process idle
    most = min(batch_size, math.ceil(len(ids) / processes.num_processes))
    longest = max(map(len, ids), default=1)
    batch_size = max_batch_size(model, longest + max_new_tokens, max(1, most), longest)
    # prompts of like length together, so that little of a batch is padding
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches = [order[k : k + batch_size] for k in range(0, len(order), batch_size)]
    batches_here = batches[processes.process_index :: processes.num_processes]
    # a bar for one batch would only say that it has ended
    one_batch = len(batches_here) < 2
    answers = {}  # {number of the prompt: its answer}
    with without_settings(model):
        for batch in tqdm(
            batches_here, "answering", unit="batch", file=sys.stdout, disable=one_batch
        ):
            batch_ids = [ids[i] for i in batch]
            processors = sampling_processors(batch_ids, seed, model.device, sampling)
            new_ids = new_ids_of_batch(model, tokenizer, batch_ids, settings, processors)
            for i, new in zip(batch, new_ids, strict=True):
                answers[i] = answer_text(new, tokenizer, stop_token_ids)
    gathered: dict[int, tuple[str, bool, int]] = {}
    for of_process in gather_object([answers]):
        gathered |= of_process
    table = pd.DataFrame(
        [gathered[i] for i in range(len(ids))], columns=["answer", "stopped", "new_tokens"]
    )
    return table, time.perf_counter() - started


def prompt_ids(prompt: dict | list, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a prompt: a list of messages, or a row of the data set with its tools."""
    if not isinstance(prompt, dict):
        return encode_prompt(prompt, tokenizer, None)
    tools = json.loads(prompt["tools"]) if prompt.get("tools") else None
    return encode_prompt(prompt["prompt"], tokenizer, tools)


def new_ids_of_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_ids: list[list[int]],
    settings: GenerationConfig,
    processors: LogitsProcessorList,
) -> list[list[int]]:
    """The ids that `model` writes after each prompt of a batch, with padding after a stop token."""
    # padded on the left, so that each answer follows its prompt directly
    padded = tokenizer.pad({"input_ids": batch_ids}, padding_side="left", return_tensors="pt")
    padded = padded.to(model.device)
    prompt_tokens = padded["input_ids"].shape[1]
    # None on a CPU, where `generate` keeps its own cache
    cache = static_cache(model, prompt_tokens + settings.max_new_tokens)
    loop = {"custom_generate": decode_loop, CACHE: cache} if cache else {}
    # [rows, prompt and new tokens]
    output = model.generate(
        **padded, generation_config=settings, logits_processor=processors, **loop
    )
    return output[:, prompt_tokens:].tolist()
