"""Notebook 4: perplexity by its definition, greedy answers that stop where they should,
structure, exact match.
"""

import json
import math
import re

import bitsandbytes as bnb
import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, copy_of, run_tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import Cache, StaticLayer

from tabletune.chat.encoding import encode_prompt
from tabletune.errors import StageError
from tabletune.evaluation.answers import SeededSampling, generate
from tabletune.evaluation.perplexity_and_form import (
    answer_bytes,
    check_answers,
    joined_perplexity,
    summarize,
    summarize_all,
)
from tabletune.evaluation.questions import own_question, questions_of
from tabletune.evaluation.scoring import divergence, perplexity, response_logits, score, spans
from tabletune.evaluation.structure import has_structure
from tabletune.model import batch_size as batch_size_module
from tabletune.model import dequantize, run_models
from tabletune.model.batch_size import bytes_per_token, max_batch_size, working_bytes_per_token
from tabletune.model.compat import CACHE
from tabletune.model.cuda_graphs import cuda_graph
from tabletune.model.dequantize import dequantize_layers
from tabletune.model.generation import decode_loop, static_cache
from tabletune.model.quantization import load_base
from tabletune.model.run_models import find_merged
from tabletune.report import plots as plots_module
from tabletune.report import tables as tables_module
from tabletune.report import text as text_module

ANSWER = "Here is a suggested remedy:\n\n**Item:** {item}\n**Remedy:** {remedy}\n**Recommended Yoga:** {yoga}"
TEMPLATES = {"templates": {"answer": ANSWER, "answer_column": "remedy"}}
NO_SETTINGS = {"samples": 2, "max_new_tokens": 4, "bootstrap_samples": 50}


def plain_base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model():
    return plain_base()


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    lengths = [5, 40, 17, 200, 3, 64, 90]
    return [
        {
            "input_ids": [1, *generator.integers(3, 2000, size=n - 2).tolist(), 2],
            "completion_mask": [0] * (n // 2) + [1] * (n - n // 2),
        }
        for n in lengths
    ]


# --- perplexity


def by_hand(model, row):
    """The definition: minus the log of the probability of each token, given all before it."""
    ids = torch.tensor(row["input_ids"])
    with torch.no_grad():
        probabilities = model(ids[None]).logits[0].double().softmax(-1)
    return np.array([-math.log(probabilities[i - 1, ids[i]]) for i in range(1, len(ids))])


def test_perplexity_is_its_definition(model, rows):
    scores = score(model, rows, 0, batch_size=3, window=512, stride=256)
    nll = [by_hand(model, row) for row in rows]
    response = [
        n[np.array(row["completion_mask"][1:]) == 1] for n, row in zip(nll, rows, strict=True)
    ]
    assert scores["full_tokens"].tolist() == [len(n) for n in nll]
    assert scores["response_tokens"].tolist() == [len(n) for n in response]
    assert perplexity(scores, "full") == pytest.approx(
        math.exp(np.concatenate(nll).mean()), rel=1e-5
    )
    assert perplexity(scores, "response") == pytest.approx(
        math.exp(np.concatenate(response).mean()), rel=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_perplexity_does_not_depend_on_the_batch(model, rows, batch_size):
    one = score(model, rows, 0, batch_size, 512, 256)
    other = score(model, rows, 5, 4, 512, 256)
    assert np.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(10, 512, 256), (200, 64, 32), (200, 64, 64), (65, 64, 1), (1, 8, 4)],
)
def test_windows_score_every_token_once(length, window, stride):
    scored = []
    for start, end, first in spans(length, window, stride):
        assert 0 <= start < first <= end <= length
        assert end - start <= window
        assert start == 0 or first - start >= max(window - stride, 1)
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_a_long_text_is_not_cut(model, rows):
    scores = score(model, rows, 0, batch_size=3, window=64, stride=16)
    whole = score(model, rows, 0, batch_size=3, window=512, stride=16)
    assert scores["full_tokens"].tolist() == whole["full_tokens"].tolist()
    short = [i for i, row in enumerate(rows) if len(row["input_ids"]) <= 64]
    assert np.allclose(scores.loc[short], whole.loc[short], rtol=1e-5)


def test_the_joined_texts_are_one_sequence(model, tokenizer):
    texts = ["[INST] Cold? [/INST] Ginger.", "[INST] Cough? [/INST] Honey."]
    ids = tokenizer[0]("\n".join(texts))["input_ids"]
    expected = math.exp(by_hand(model, {"input_ids": ids}).mean())
    assert joined_perplexity(model, tokenizer[0], texts) == pytest.approx(expected, rel=1e-4)
    many = joined_perplexity(model, tokenizer[0], texts * 200)
    assert many > 1, "no further than the context of 512"


def test_divergence_is_its_definition(model, rows):
    """By hand, for one row: sums over the response of p log(p / q) and of -log q."""
    row = rows[1]
    other = plain_base()
    other.lm_head.weight.data *= 5  # so far off that KL in the other direction is another number
    p, q = (
        m(torch.tensor([row["input_ids"]])).logits[0].double().softmax(-1).detach()
        for m in (model, other)
    )
    at = [i for i, scored in enumerate(row["completion_mask"]) if scored]
    kl = sum((p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum().item() for i in at)
    nll = sum(-math.log(q[i - 1, row["input_ids"][i]]) for i in at)
    logits = [response_logits(m, [row], 0, 1) for m in (model, other)]
    line = divergence(*logits, [row]).loc[0]
    assert line["response_kl"] == pytest.approx(kl, rel=1e-3)
    assert line["response_nll"] == pytest.approx(nll, rel=1e-4)
    assert line["response_tokens"] == len(at)
    expected = divergence(logits[0], logits[0], [row])["response_nll"][0]
    assert score(model, [row], 0, 1, 512, 256)["response_nll"][0] == pytest.approx(
        expected, rel=1e-5
    )
    text = {"input_ids": row["input_ids"], "completion_mask": [1] * len(row["input_ids"])}
    [logits] = response_logits(model, [text], 0, 1)
    line = divergence([logits], [logits], [text]).loc[0]
    assert line["response_tokens"] == len(text["input_ids"]) - 1, "all but the first"
    assert line["response_nll"] == pytest.approx(by_hand(model, text).sum(), rel=1e-4)


# --- models at work


def test_weights_unpacked_once_give_the_same_logits(rows, monkeypatch):
    """Bit for bit, with an adapter and without; and not where there is no room."""
    adapted = get_peft_model(
        load_base(str(TINY), None, torch.float32), LoraConfig(r=4, init_lora_weights=False)
    ).eval()
    ids = torch.tensor([rows[1]["input_ids"]])

    def logits():
        with torch.no_grad():
            with adapted.disable_adapter():
                base = adapted(ids).logits
            return base, adapted(ids).logits

    before = logits()
    assert not torch.equal(*before)
    monkeypatch.setattr(dequantize, "available_memory_gib", lambda: 0.001)
    assert not dequantize_layers(adapted)
    monkeypatch.undo()
    assert dequantize_layers(adapted)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in adapted.modules())
    assert all(map(torch.equal, before, logits()))
    assert not dequantize_layers(adapted), "once is enough"
    half = load_base(str(TINY), None, torch.bfloat16)
    dequantize_layers(half)
    assert half.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_how_many_rows_fit_is_measured(model, monkeypatch):
    config = model.config
    keys_and_values = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    )
    token = keys_and_values + config.vocab_size * 12
    assert bytes_per_token(model) == token
    monkeypatch.setattr(
        batch_size_module, "available_memory_gib", lambda: 10.2 * 100 * token / 0.8 / 2**30
    )
    assert [max_batch_size(model, 100, most) for most in (4, 16)] == [4, 10]
    # for answers: keys and values of 100 tokens, and what a layer holds of the 60 that it reads
    layer = (3 * config.intermediate_size + 4 * config.hidden_size) * 4
    assert working_bytes_per_token(model) == layer
    rows = int(10.2 * 100 * token / (100 * keys_and_values + 60 * layer))
    assert max_batch_size(model, 100, 9999, prompt_tokens=60) == rows
    assert max_batch_size(model, 100, 9999, prompt_tokens=0) > rows
    assert max_batch_size(model, 10_000_000, 16) == 1
    assert max_batch_size(object(), 100, 1) == 1, "where one is asked for, nothing is measured"


@pytest.mark.parametrize(
    "sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}]
)
@pytest.mark.parametrize("stops", [[2], [2, *range(100, 1000)]])
def test_answers_of_the_own_loop_are_those_of_generate(model, sampling, stops):
    """Where a GPU records the steps; here they are only made.

    Rows of unlike length, some of which stop early.
    """
    ids = torch.randint(3, 2000, (4, 12), generator=torch.Generator().manual_seed(0))
    seen = (torch.arange(12) >= torch.tensor([5, 0, 3, 0])[:, None]).long()
    settings = GenerationConfig(**sampling, max_new_tokens=20, eos_token_id=stops, pad_token_id=0)
    cache = Cache(layers=[StaticLayer(32) for _ in model.model.layers])
    made = []
    for loop in ({}, {"custom_generate": decode_loop, CACHE: cache}):
        torch.manual_seed(0)
        made.append(
            model.generate(input_ids=ids, attention_mask=seen, generation_config=settings, **loop)
        )
    assert torch.equal(*made)


def test_without_a_gpu_nothing_is_recorded(model):
    def step():
        return 1

    assert cuda_graph(step) is step
    assert static_cache(model, 10) is None


def test_where_the_merged_model_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "drive" / "mine"
    assert find_merged(run, "runs/mine") == run / "merged", (
        "it is missing there, which is then said"
    )
    assert find_merged(run, "drive:mine") is None, "another machine may have it"
    (tmp_path / "runs" / "mine" / "merged").mkdir(parents=True)
    assert find_merged(run, "drive:mine").resolve() == tmp_path / "runs" / "mine" / "merged"
    (run / "merged").mkdir(parents=True)
    assert find_merged(run, "drive:mine") == run / "merged"


# --- answers


def prompts_of(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_do_not_depend_on_the_batch_and_keep_their_order(model, tokenizer):
    prompts = prompts_of(
        "A long question about a very sore throat", "Cold", "What helps?", "Hi", "A fever at night"
    )
    one, _ = generate(model, *tokenizer, prompts, 1, 12)
    two, seconds = generate(model, *tokenizer, prompts, 2, 12)
    assert one.to_dict() == two.to_dict()
    assert seconds > 0
    assert (one["new_tokens"] <= 12).all()
    alone = [generate(model, *tokenizer, [prompt], 1, 12)[0]["answer"][0] for prompt in prompts]
    assert one["answer"].tolist() == alone
    assert len(generate(model, *tokenizer, [], 2, 12)[0]) == 0


def greedy(model, prompt, tokenizer, steps):
    """The most likely next token, step by step."""
    ids = encode_prompt(prompt, tokenizer)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-steps:]


def test_greedy_is_greedy_whatever_the_base_model_samples_with(tokenizer):
    model = plain_base()
    own = {
        "do_sample": True,
        "temperature": 2.0,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "top_k": 5,
    }
    model.generation_config = settings = GenerationConfig(**own, suppress_tokens=[4, 5])
    prompts = prompts_of("Cold", "Hi")
    adapted = (
        get_peft_model(model, LoraConfig(r=2, task_type=kind)) for kind in (None, "CAUSAL_LM")
    )
    for asked in (model, *adapted):
        made, _ = generate(asked, *tokenizer, prompts, 2, 10)
        expected = [
            tokenizer[0].decode(greedy(model, prompt, tokenizer[0], 10)).strip()
            for prompt in prompts
        ]
        assert made["answer"].tolist() == expected
        assert asked.generation_config is settings, "it has its own again"


def test_sampled_answers_repeat_with_their_seed(model, tokenizer):
    sampling = {"do_sample": True, "temperature": 1.5}
    prompts = prompts_of("Cold", "A sore throat", "Hi")
    once, again, other = (
        generate(model, *tokenizer, prompts, 2, 6, seed, **sampling)[0] for seed in (1, 1, 2)
    )
    assert once.equals(again)
    assert not once.equals(other)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_sampled_answers_do_not_depend_on_their_batch(model, tokenizer, batch_size):
    """Nor on the free memory, which decides how many are made at once; a question has one
    answer.
    """
    sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.9}
    prompts = prompts_of("Cold", "A sore throat", "Hi", "A fever at night", "Cold")
    expected, _ = generate(model, *tokenizer, prompts, 3, 8, 1, **sampling)
    answers, _ = generate(model, *tokenizer, prompts, batch_size, 8, 1, **sampling)
    assert answers["answer"].tolist() == expected["answer"].tolist()
    reordered, _ = generate(model, *tokenizer, prompts[::-1], batch_size, 8, 1, **sampling)
    assert reordered["answer"].tolist() == expected["answer"].tolist()[::-1]


def test_sampling_draws_from_the_distribution():
    """Of many draws from logits, each token comes as often as the softmax says, within four
    standard errors.
    """
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = SeededSampling(list(range(4000)), torch.device("cpu"))
    drawn = sampling(None, logits.repeat(4000, 1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    expected = logits.softmax(-1)
    limits = 4 * (expected * (1 - expected) / 4000).sqrt()
    assert ((shares - expected).abs() < limits).all()


def test_other_settings_of_sampling_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="typical_p"):
        generate(model, *tokenizer, prompts_of("Cold"), 1, 2, do_sample=True, typical_p=0.5)


def test_bytes_of_the_answers():
    user = {"role": "user", "content": "Hello?"}
    turns = [user, {"role": "assistant", "content": "Grüße"}, user]
    row = {"prompt": turns, "completion": [{"role": "assistant", "content": "abc"}]}
    assert answer_bytes(row) == 7 + 3
    assert answer_bytes({**row, "learned": "0"}) == 3


def test_bits_per_byte_are_the_nats_per_byte_over_ln_2():
    scores, groups = scores_of(12)
    made = pd.DataFrame(columns=["answer", "stopped", "new_tokens"])
    entry = summarize(scores.assign(response_bytes=200), made, groups, 100, 0)["perplexity"]
    expected = scores["response_nll"].sum() / math.log(2) / (200 * len(scores))
    assert entry["bits_per_byte"] == pytest.approx(expected)
    low, high = entry["bits_per_byte_ci95"]
    assert low < expected < high


def test_an_answer_ends_at_the_first_of_all_stops(model, tokenizer):
    """Also at one that is not the tokenizer's EOS; what comes after it, while others go on, is
    not in the answer.
    """
    tokenizer, _ = tokenizer
    prompts = prompts_of("Cold", "Hi there")
    ids = [greedy(model, prompt, tokenizer, 8) for prompt in prompts]
    assert not generate(model, tokenizer, [tokenizer.eos_token_id], prompts, 2, 8)[0][
        "stopped"
    ].any()
    stop = next(token for token in ids[0] if token not in ids[1])
    made, _ = generate(model, tokenizer, [tokenizer.eos_token_id, stop], prompts, 2, 8)
    assert made["stopped"].tolist() == [True, False]
    assert made["new_tokens"].tolist() == [ids[0].index(stop) + 1, 8]
    steps = []
    counting = model.register_forward_hook(lambda *_: steps.append(1))
    generate(model, tokenizer, [tokenizer.eos_token_id, stop], prompts[:1], 1, 8)
    counting.remove()
    assert len(steps) == ids[0].index(stop) + 1, "nobody waits for what is not shown"


def test_tools_of_a_row_reach_the_prompt(model, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tabletune.evaluation.answers.encode_prompt",
        lambda messages, _, tools: seen.append(tools) or [1, 5],
    )
    [prompt] = prompts_of("Cold")
    generate(model, *tokenizer, [prompt, {"prompt": prompt, "tools": '[{"name": "clock"}]'}], 2, 2)
    assert seen == [None, [{"name": "clock"}]]


def row_of(question, answer, group, *before):
    prompt = [*before, {"role": "user", "content": question}]
    return {
        "prompt": prompt,
        "completion": [{"role": "assistant", "content": answer}],
        "group": group,
    }


def test_each_question_is_asked_once_after_all_that_was_said_before():
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    split = [
        row_of("Cold?", "Ginger", "a"),
        row_of("Cold?", "<think>\nHm.\n</think>\n\nHoney", "a"),
        row_of("And then?", "Rest", "b", *earlier),
        row_of("Gas?", "Mint", "c"),
    ]
    questions = questions_of(datasets.Dataset.from_list(split), 2)
    assert [question["references"] for question in questions] == [["Ginger", "Honey"], ["Rest"]]
    assert questions[1]["prompt"][-1]["content"] == "And then?"
    assert len(questions[1]["prompt"]) == 3
    text = [{**row, "prompt": []} for row in split]
    assert questions_of(datasets.Dataset.from_list(text), 5) == []


def test_a_question_of_ones_own_is_asked_as_the_others():
    system = {"role": "system", "content": "Be brief."}
    questions = questions_of([row_of("Cold?", "Ginger", "a", system)], 5)
    prompts, texts = own_question("Cough?", questions)
    assert prompts == [{"prompt": [system, {"role": "user", "content": "Cough?"}]}]
    assert texts == ["Cough?"]
    assert own_question(None, questions)[1] == ["Cold?"], "the first of the test split"
    assert own_question("Cough?", []) == ([], []), "a table of texts has no questions"


# --- checks and figures


@pytest.mark.parametrize(
    ("answer", "structured"),
    [
        (
            "Here is a suggested remedy:\n\n**Item:** Ginger\n**Remedy:** Sip tea.\n**Recommended Yoga:** Balasana",
            True,
        ),
        ("Here is a suggested remedy:\n\n**Remedy:** Sip tea.", True),
        (
            "Here is a suggested remedy:\n\n**Remedy:** Sip tea.\n\nThen rest.\n**Recommended Yoga:** Balasana",
            True,
        ),
        ("Here is a suggested remedy:\n\n**Item:** Ginger\n**Recommended Yoga:** Balasana", False),
        ("Here is a suggested remedy:\n\n**Item:** Ginger\n**Remedy:**", False),
        ("Here is a suggested remedy:\n\n**Remedy:** Sip tea.\n**Item:** Ginger", False),
        ("Here is a suggested remedy:\n\n**Remedy:** Sip.\n**Remedy:** Rest.", False),
        ("**Item:** Ginger\n**Remedy:** Sip tea.", False),
        ("I suggest honey.", False),
        ("", False),
    ],
)
def test_structure(answer, structured):
    assert has_structure(answer, ANSWER, "remedy") is structured


def test_structure_of_other_templates():
    assert has_structure("Any text.\nOf two lines.", "{a}", "a")
    assert not has_structure("", "{a}", "a")
    assert has_structure(
        "Group: adults\nDose: one", "Group: {Age Group}\nDose: {Dose (mg)}", "Dose (mg)"
    )
    assert not has_structure("Group: adults", "Group: {Age Group}\nDose: {Dose (mg)}", "Dose (mg)")


def checked(answers, references, report):
    made = pd.DataFrame({"answer": answers, "stopped": True, "new_tokens": 5})
    return check_answers(made, [{"references": some} for some in references], report)


def test_the_structure_is_checked_where_all_references_have_it():
    good = "Here is a suggested remedy:\n\n**Remedy:** Sip tea."
    made = checked([good, "Tea.", "yours"], [[good, good], [good]], TEMPLATES)
    assert made["structured"].tolist() == [True, False], (
        "and not of what is asked beside the questions"
    )
    assert "exact_match" not in made, "the references are long"
    for report in (
        {"templates": {"answer": "{a}", "answer_column": "a"}},  # all texts have it
        {"templates": {"answer": None, "answer_column": None}},
        {"templates": None},
        {},
    ):
        assert "structured" not in checked([good], [[good]], report)
    assert "structured" not in checked(
        [good], [[good, "Call for help, at once, please."]], TEMPLATES
    )


def test_short_answers_are_compared_word_for_word():
    references = [
        ["positive"],
        ["negative"],
        ["positive", "mixed"],
        ["a longer answer than all of the others"],
    ]
    made = checked(["positive", "Negative", "mixed", "positive"], references, {})
    assert made["exact_match"].tolist() == [True, False, True, False]
    assert "exact_match" not in checked(["a"], [["one two three four five six"]], {})


def scores_of(questions, each=1, nll=2.0):
    generator = np.random.default_rng(0)
    rows, tokens = questions * each, np.full(questions * each, 50)
    part = {"response_nll": tokens * generator.normal(nll, 0.3, rows), "response_tokens": tokens}
    return pd.DataFrame(part).assign(full_nll=part["response_nll"], full_tokens=tokens), np.repeat(
        [f"{k:02}" for k in range(questions)], each
    )


def test_the_entry_of_a_model():
    scores, groups = scores_of(12, 3)
    made = pd.DataFrame(
        {
            "answer": "a",
            "stopped": [True] * 12,
            "new_tokens": range(12),
            "exact_match": [True, False] * 6,
        }
    )
    entry = summarize(scores, made, groups, 500, 0)
    assert entry["tokens"] == 36 * 50
    assert entry["questions"] == 12
    assert not entry["too_small"]
    low, high = entry["perplexity"]["response_ci95"]
    assert low < entry["perplexity"]["response"] < high
    figures = entry["generation"]
    assert figures["exact_match_rate"] == 0.5
    assert figures["exact_match_rate_ci95"] == pytest.approx([0.254, 0.746], abs=1e-3)
    assert figures["structure_rate"] is None
    assert figures["structure_rate_ci95"] is None
    assert figures["stop_rate_ci95"] == pytest.approx([0.757, 1.0], abs=1e-3)


@pytest.mark.parametrize(("questions", "each"), [(1, 2), (2, 1), (5, 30)])
def test_a_test_split_that_is_too_small_has_no_interval(questions, each):
    """And everything that shows figures copes with that."""
    scores, groups = scores_of(questions, each)
    made = pd.DataFrame({"answer": ["a"] * questions, "stopped": True, "new_tokens": 5})
    asked = [{"prompt": [], "references": ["a"]}] * questions
    results = {name: (scores, made) for name in ("base", "adapter", "merged")}
    metrics = summarize_all(results, asked, groups, {}, 100, 0)
    entry = json.loads(json.dumps(metrics))["adapter"]
    assert entry["too_small"] is True
    assert entry["perplexity"]["response_ci95"] is None
    assert entry["generation"]["mean_new_tokens_ci95"] is None
    assert not any(
        line["significant"] for line in metrics["differences"]["adapter - base"].values()
    )
    table = tables_module.results_table(metrics)
    assert "(" not in table.loc["base", "response perplexity"]
    assert set(tables_module.differences_table(metrics["differences"])["result"]) == {
        "no difference shown"
    }
    assert len(plots_module.plot_results(metrics).axes) >= 3


def test_texts_without_questions_have_perplexity_alone():
    scores, groups = scores_of(12)
    nothing = pd.DataFrame(columns=["answer", "stopped", "new_tokens"])
    metrics = summarize_all(
        {name: (scores, nothing) for name in ("base", "adapter", "merged")},
        [],
        groups,
        {},
        100,
        0,
    )
    assert metrics["merged"]["generation"] is None
    assert set(metrics["differences"]["merged - adapter"]) == {"log_perplexity"}
    assert list(tables_module.results_table(metrics).columns) == [
        "response perplexity",
        "full-text perplexity",
    ]
    assert len(plots_module.plot_results(metrics).axes) == 1


def test_figures_as_text():
    assert text_module.with_interval(6.0, [5.2, 6.9], ".1f") == "6.0 (5.2 – 6.9)"
    assert text_module.with_interval(6.0, None, ".1f") == "6.0"
    assert text_module.with_interval(None, None, ".1f") == "–"
    line = tables_module.difference_line(
        "log_perplexity", {"difference": 0.0, "ci95": [-0.1, 0.1], "significant": False}
    )
    assert line == {
        "figure": "perplexity ratio",
        "difference": "1.0000 (0.9048 – 1.1052)",
        "result": "no difference shown",
    }
    line = tables_module.difference_line(
        "stop_rate", {"difference": 0.5, "ci95": [0.25, 0.75], "significant": True}
    )
    assert line == {
        "figure": "answers that stop",
        "difference": "+50 (+25 – +75) points",
        "result": "better",
    }
    for name in ("stop_rate", "log_perplexity"):
        line = tables_module.difference_line(
            name, {"difference": 0.5, "ci95": None, "significant": False}
        )
        assert "–" not in line["difference"]
        assert line["result"] == "no difference shown"
    shown = tables_module.side_by_side({"<b>": ["a & b", "c"]}, 1, "Not <advice>.").data
    assert "Not &lt;advice&gt;." in shown
    assert "a &amp; b" in shown
    assert "<b></th>" not in shown
    assert "c</td>" not in shown


# --- the notebook


def test_the_metrics_of_a_run(finished_run):
    metrics = json.loads((finished_run / "evaluation" / "metrics.json").read_text())
    old_keys = {"base", "adapter", "merged", "differences", "ten_joined_training_texts"}
    assert old_keys <= set(metrics)
    scores = pd.read_parquet(finished_run / "evaluation" / "scores.parquet")
    for name in ("base", "adapter", "merged"):
        entry = metrics[name]
        low, high = entry["perplexity"]["response_ci95"]
        assert low < entry["perplexity"]["response"] < high
        generation = entry["generation"]
        assert generation["tokens_per_second"] > 0
        assert generation["exact_match_rate"] is None
        for figure in ("stop_rate", "structure_rate", "mean_new_tokens"):
            low, high = generation[f"{figure}_ci95"]
            assert low <= generation[figure] <= high
        assert entry["tokens"] == metrics["base"]["tokens"] > 0
        mine = scores[scores["model"] == name]
        assert perplexity(mine, "response") == pytest.approx(
            entry["perplexity"]["response"], rel=1e-12
        )
        assert mine["group"].nunique() == entry["questions"] >= 6
        assert not entry["too_small"]
    assert (
        metrics["adapter"]["perplexity"]["response"]
        < 0.9 * metrics["base"]["perplexity"]["response"]
    )
    assert set(metrics["differences"]) == {"adapter - base", "merged - adapter"}
    for entries in metrics["differences"].values():
        assert set(entries) == {"log_perplexity", "stop_rate", "structure_rate", "mean_new_tokens"}
        for entry in entries.values():
            low, high = entry["ci95"]
            assert entry["significant"] is (low > 0 or high < 0)
    better = metrics["differences"]["adapter - base"]["log_perplexity"]
    ratio = metrics["adapter"]["perplexity"]["response"] / metrics["base"]["perplexity"]["response"]
    assert better["significant"]
    assert better["difference"] == pytest.approx(math.log(ratio))
    samples = [
        json.loads(line)
        for line in (finished_run / "evaluation" / "samples.jsonl").read_text().splitlines()
    ]
    assert {"question", "in_the_table", "base", "adapter", "merged", "disclaimer"} == set(
        samples[0]
    )
    assert all("not medical advice" in sample["disclaimer"] for sample in samples)
    assert (
        len({sample["question"] for sample in samples})
        == len(samples)
        == min(20, metrics["base"]["questions"])
    )
    answers = json.loads((finished_run / "evaluation" / "your_questions.json").read_text())
    assert list(answers) == ["I am suffering from a sore throat. Please suggest a home remedy."]
    assert (finished_run / "evaluation" / "results.png").read_bytes().startswith(b"\x89PNG")


def files_of(run_dir):
    return {
        path.relative_to(run_dir): path.stat().st_mtime_ns
        for path in run_dir.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_second_run_changes_nothing_and_answers_another_question(
    finished_run, tmp_path, capsys, monkeypatch
):
    run_dir = copy_of(
        finished_run,
        tmp_path / "run",
        "dataset",
        "adapter",
        "merged",
        "evaluation",
        "manifest.json",
    )
    before = files_of(run_dir)
    loaded = []
    load = run_models.load_adapted
    monkeypatch.setattr(
        run_models, "load_adapted", lambda *source: loaded.append(source) or load(*source)
    )
    monkeypatch.setattr(run_models, "load_merged", None)  # it is not needed again
    run_tiny("04_evaluate", run_dir)
    assert "All is done already" in capsys.readouterr().out
    assert files_of(run_dir) == before
    assert not loaded
    run_tiny("04_evaluate", run_dir, your_question="What helps against a cough?")
    answers = json.loads((run_dir / "evaluation" / "your_questions.json").read_text())
    assert list(answers["What helps against a cough?"]) == ["base", "adapter"]
    assert len(answers) == 2
    assert len(loaded) == 1
    assert {path for path, time in files_of(run_dir).items() if before.get(path) != time} == {
        (run_dir / "evaluation" / "your_questions.json").relative_to(run_dir)
    }


def test_other_settings_keep_the_earlier_evaluation(finished_run, tmp_path):
    run_dir = copy_of(
        finished_run,
        tmp_path / "run",
        "dataset",
        "adapter",
        "merged",
        "evaluation",
        "manifest.json",
    )
    run_tiny("04_evaluate", run_dir, **NO_SETTINGS)
    [earlier] = (run_dir / "earlier").iterdir()
    assert (earlier / "evaluation" / "metrics.json").read_text() == (
        finished_run / "evaluation" / "metrics.json"
    ).read_text()
    assert len((run_dir / "evaluation" / "samples.jsonl").read_text().splitlines()) == 2


def test_a_table_of_two_texts(finished_run, tmp_path, capsys):
    """Nothing is asked, no interval is narrow, nothing of the health example is there, and it
    goes through.
    """
    run_dir = copy_of(
        finished_run, tmp_path / "run", "dataset", "adapter", "merged", "manifest.json"
    )
    splits = datasets.load_from_disk(run_dir / "dataset")
    text = [{"role": "assistant", "content": "A text."}]
    texts = {
        "prompt": [[]] * 2,
        "completion": [text] * 2,
        "text": ["A text."] * 2,
        "group": ["a", "b"],
    }
    splits["test"] = datasets.Dataset.from_dict(texts)
    report = json.loads((run_dir / "dataset" / "report.json").read_text())
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "new")
    copy_of(tmp_path / "new", run_dir / "dataset")
    (run_dir / "dataset" / "report.json").write_text(
        json.dumps(report | {"example": None, "templates": {}})
    )
    run_tiny("04_evaluate", run_dir, **NO_SETTINGS)
    said = capsys.readouterr().out
    assert "nothing is answered" in said
    assert "2 questions: too few" in said
    assert "medical" not in said
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    assert metrics["base"]["generation"] is None
    assert metrics["base"]["perplexity"]["response_ci95"] is None
    assert (run_dir / "evaluation" / "samples.jsonl").read_text().strip() == ""


def test_rows_longer_than_the_window(finished_run, tmp_path, capsys):
    """The shortest row, too: what is computed by hand is then the end of it, by the package as
    well.
    """
    run_dir = copy_of(
        finished_run, tmp_path / "run", "dataset", "adapter", "merged", "manifest.json"
    )
    run_tiny("04_evaluate", run_dir, **NO_SETTINGS, window=16, stride=8)
    assert "perplexity of the shortest row" in capsys.readouterr().out


def test_a_test_split_of_one_row(finished_run, tmp_path, capsys):
    run_dir = copy_of(
        finished_run, tmp_path / "run", "dataset", "adapter", "merged", "manifest.json"
    )
    splits = datasets.load_from_disk(run_dir / "dataset")
    splits["test"] = splits["test"].select([0])
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "new")
    copy_of(tmp_path / "new", run_dir / "dataset")
    run_tiny("04_evaluate", run_dir, **NO_SETTINGS)
    output = capsys.readouterr().out
    assert "with 1 questions that means nothing" in output
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    assert metrics["base"]["perplexity"]["response_ci95"] is None


@pytest.mark.parametrize("fits", [True, False], ids=["elsewhere", "too large"])
def test_a_merged_model_that_is_not_at_hand_or_does_not_fit(
    finished_run, tmp_path, monkeypatch, capsys, fits
):
    """Elsewhere, it is merged again; where it does not fit, it is evaluated in 4 bits; both at
    once is refused.
    """
    run_dir = copy_of(
        finished_run, tmp_path / "run", "dataset", "adapter", "merged", "manifest.json"
    )
    if fits:
        monkeypatch.setattr(run_models, "find_merged", lambda run, run_dir: None)
    else:
        monkeypatch.setattr(run_models, "available_memory_gib", lambda: 0.9 * 1_000_000 * 4 / 2**30)
    run_tiny("04_evaluate", run_dir, **NO_SETTINGS)
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    before = json.loads((finished_run / "evaluation" / "metrics.json").read_text())
    one, other = (entry["merged"]["perplexity"]["response"] for entry in (metrics, before))
    assert metrics["adapter"]["perplexity"]["response"] == pytest.approx(
        before["adapter"]["perplexity"]["response"]
    )
    if fits:
        assert one == pytest.approx(other, rel=1e-4)
        assert "evaluated_in" not in metrics["merged"]
        monkeypatch.setattr(run_models, "available_memory_gib", lambda: 0.0001)
        with pytest.raises(StageError, match="run this notebook on a larger machine"):
            run_models.load_merged(None, run_dir / "adapter", str(TINY), None, torch.float32)
    else:
        assert "it is evaluated in 4 bits" in capsys.readouterr().out
        assert metrics["merged"]["evaluated_in"] == "NF4"
        assert one == pytest.approx(other, rel=0.05)
        assert one != pytest.approx(other, rel=1e-6)
        assert "merged, in 4 bits" in tables_module.results_table(metrics).index


def test_the_notebook_states_no_table_of_its_own():
    source = (ROOT / "notebooks_py" / "04_evaluate.py").read_text(encoding="utf-8")
    assert not re.search(r"(?i)remedy|medical|yoga", source.replace("home_remedies", ""))
