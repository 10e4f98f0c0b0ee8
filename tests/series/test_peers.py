"""Perplexity beside an independent implementation, EleutherAI's lm-evaluation-harness: for `make
test-peers`.
"""

import csv
import math

import pytest
import torch
from conftest import ROOT, TABLE, TINY
from transformers import AutoModelForCausalLM

from tabletune.chat.encoding import encode
from tabletune.chat.tokenizer import load_tokenizer
from tabletune.evaluation.generalization import outside_rows
from tabletune.evaluation.scoring import perplexity, score

pytestmark = pytest.mark.peers
CLOSE = 3e-5  # 0.1% is asked for; in fp32 the two are closer, and a sum that is taken less exactly shows
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module", params=[TINY, SMOLLM2], ids=lambda folder: folder.name)
def model(request):
    if not request.param.exists():
        pytest.skip(f"make base-models makes {request.param.name}")
    return AutoModelForCausalLM.from_pretrained(request.param, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loaded(model):
    """The tokenizer and its stops."""
    return load_tokenizer(model.name_or_path)


def ask(harness, kind, requests):
    """The log-likelihoods that the harness gives for tuples of texts."""
    from lm_eval.api.instance import Instance

    instances = [Instance(kind, {}, arguments, k) for k, arguments in enumerate(requests)]
    return getattr(harness, kind)(instances, disable_tqdm=True)


def conversations(count):
    with TABLE.open(encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if row["Home Remedy"] and row["Health Issue"]][
            :count
        ]
    for row in table:
        answer = f"Here is a suggested remedy:\n\n**Item:** {row['Name of Item']}\n**Remedy:** {row['Home Remedy']}"
        yield {
            "prompt": [
                {"role": "user", "content": f"I am suffering from {row['Health Issue'].strip()}."}
            ],
            "completion": [{"role": "assistant", "content": answer}],
        }


def test_response_perplexity_agrees_to_a_tenth_of_a_percent(model, loaded):
    """The harness gets texts, the prompt as context and the answer up to its EOS to continue
    with.
    """
    tokenizer, stops = loaded
    rows, texts = [], []
    for row in conversations(20):
        rows.append(encode(row, tokenizer, stops))
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=False
        )
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        texts.append(
            (
                prompt,
                text[len(prompt) : text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)],
            )
        )
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=False)
    encoded = [
        [*context, *answer] for context, answer in (harness._encode_pair(*pair) for pair in texts)
    ]
    assert encoded == [row["input_ids"] for row in rows], "the same tokens, one BOS and one EOS"
    theirs = -sum(likelihood for likelihood, _ in ask(harness, "loglikelihood", texts))
    scores = score(model, rows, tokenizer.pad_token_id, 7, 512, 256)
    theirs = math.exp(theirs / scores["response_tokens"].sum())
    ours = perplexity(scores, "response")
    print(f"\nresponse perplexity: ours {ours:.6f}, the harness's {theirs:.6f}")
    assert ours == pytest.approx(theirs, rel=CLOSE)


@pytest.mark.parametrize("window", [1024, 40])
def test_full_text_perplexity_agrees_to_a_tenth_of_a_percent(model, loaded, window):
    """Whole paragraphs, in one piece and in windows: the harness's see `window` tokens and
    predict one more.
    """
    tokenizer, _ = loaded
    rows = outside_rows("bundled", tokenizer)
    window = min(window, model.config.max_position_embeddings)
    texts = [
        (tokenizer.decode(row["input_ids"][tokenizer.bos_token_id is not None :]),) for row in rows
    ]
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=False, max_length=window
    )
    assert harness.prefix_token_id == tokenizer.bos_token_id == rows[0]["input_ids"][0]
    theirs = -sum(ask(harness, "loglikelihood_rolling", texts))
    scores = score(model, rows, tokenizer.pad_token_id, 7, window + 1, window)
    theirs = math.exp(theirs / scores["full_tokens"].sum())
    ours = perplexity(scores, "full")
    print(f"\nfull-text perplexity, window {window}: ours {ours:.6f}, the harness's {theirs:.6f}")
    assert ours == pytest.approx(theirs, rel=CLOSE)
