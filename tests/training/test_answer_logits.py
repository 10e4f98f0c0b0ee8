"""Logits only where the loss looks: the same loss and gradients, and off where it is not worth
it.
"""

import pytest
import torch
from conftest import TINY
from transformers import AutoModelForCausalLM

from tabletune.training.answer_logits import loss_of_answers, worth_it


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 100, (2, 40))
    labels = torch.full_like(ids, -100)
    labels[0, 30:] = ids[0, 30:]
    labels[1, 20:25] = ids[1, 20:25]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def gradient(model):
    return model.model.layers[0].mlp.up_proj.weight.grad


@pytest.mark.parametrize("num_items", [None, 30])
def test_loss_and_gradients_are_those_of_all_logits(model, batch, num_items):
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    expected = model(**batch, **options).loss
    expected.backward()
    wanted = gradient(model).clone()
    model.zero_grad()
    loss, output = loss_of_answers(model, batch, num_items)
    loss.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(gradient(model), wanted, atol=1e-6)
    assert output.logits.shape[1] == 15


@pytest.mark.parametrize(("answer", "expected"), [(3, True), (6, False)])
def test_only_long_prompts_are_worth_it(model, answer, expected):
    assert worth_it(model, [[-100] * (10 - answer) + [7] * answer]) == expected
