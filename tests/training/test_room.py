"""Which batches fit into memory, and what a step becomes by that."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from tabletune.errors import StageError
from tabletune.training.memory import TrainingMemory
from tabletune.training.room import SAFE_SHARE, Room, divide_steps

CHOSEN = {
    "lora_r": 8,
    "lora_dropout": 0.0,
    "lora_options": {},
    "optim": "adamw_torch",
    "gradient_checkpointing": False,
    "use_liger_kernel": False,
    "quantization": "nf4",
    "max_length": 256,
    "epochs": 1,
    "batch_size": 8,
    "min_steps": 1,
    "gradient_accumulation_steps": 1,
    "base_model": "b",
    "ignore_memory": False,
    "training_options": {},
}
LAYERS = 24


class FakeMemory(SimpleNamespace):
    """A memory in which each row of a batch takes 1 GiB, and recomputing all layers halves that."""

    gpu, max_length = True, 512
    shape = SimpleNamespace(layers=LAYERS)

    def parts(self, tokens, recomputed_layers=0, cuda_graph=False):
        rows = tokens / 512
        return pd.Series({"base model": 1.0, "activations": rows * (1 - recomputed_layers / 48)})

    def total(self, *arguments):
        return self.parts(*arguments).sum()


def room_of(gib, may_recompute=True):
    """A Room with so much memory, of which SAFE_SHARE is used."""
    return Room(FakeMemory(), gib / SAFE_SHARE, may_recompute)


@pytest.mark.parametrize(
    ("rows", "change", "expected"),
    [
        (40, {"batch_size": 16, "min_steps": 300}, (16, 1, 3)),  # a number is taken as it is
        (40, {"batch_size": "auto", "min_steps": 300}, (1, 1, 40)),
        (40, {"batch_size": "auto", "min_steps": 20}, (2, 1, 20)),
        (40, {"training_options": {"max_steps": 60}, "epochs": 3}, (8, 1, 60)),
        (400, {"batch_size": "auto", "min_steps": 20}, (16, 1, 25)),
        (400, {"batch_size": 8, "gradient_accumulation_steps": 2, "processes": 2}, (8, 2, 13)),
        (
            400,
            {"batch_size": "auto", "min_steps": 20, "gradient_accumulation_steps": 4},
            (5, 4, 20),
        ),
        (400, {"batch_size": "auto", "min_steps": 20, "processes": 2}, (10, 1, 20)),
        (40, {"batch_size": 16, "min_steps": 300, "epochs": 0.5}, (16, 1, 2)),
    ],
)
def test_what_a_step_is(rows, change, expected):
    chosen = CHOSEN | change
    assert divide_steps(chosen, rows, room_of(100), change.get("processes", 1)) == expected


@pytest.mark.parametrize("batch_size", [0, -1, "many", 2.5])
def test_other_batch_sizes_are_refused(batch_size):
    with pytest.raises(StageError, match="batch_size"):
        divide_steps(CHOSEN | {"batch_size": batch_size}, 40, room_of(100), 1)


@pytest.mark.parametrize(
    ("gib", "may_recompute", "batch_size"),
    [
        (17, False, 16),
        (16.9, False, 8),  # the same step in two parts
        (5, False, 4),
        (4, False, 2),  # no part of 4 rows fits, so there are smaller ones
        (1.5, False, 1),  # nothing fits
        (17, True, 16),
        (16.9, True, 16),  # with one layer recomputed
        (9, True, 8),
        (5, True, 4),
        (3.5, True, 4),  # with most layers recomputed
    ],
)
def test_a_step_is_divided_by_the_room_there_is(gib, may_recompute, batch_size):
    assert room_of(gib, may_recompute).batch_size_for(16) == batch_size


def test_a_small_step_is_not_divided():
    assert room_of(100).batch_size_for(3) == 3


@pytest.mark.parametrize(
    ("gib", "count"), [(17, 0), (16.9, 1), (13, 12), (9.4, LAYERS - 1), (2, LAYERS)]
)
def test_as_few_layers_are_recomputed_as_the_room_demands(gib, count):
    assert room_of(gib).recomputed_layers(16) == count


def test_nothing_is_recomputed_if_it_may_not():
    assert room_of(2, may_recompute=False).recomputed_layers(16) == 0


def test_without_a_gpu_all_layers_are_recomputed_or_none():
    room = room_of(100)
    room.memory.gpu = False
    assert room.recomputed_layers(1) == LAYERS


@pytest.mark.parametrize(("gib", "rows"), [(100, 8), (6, 8), (4, 6), (2, 4)])
def test_the_validation_takes_up_to_8_rows_where_they_fit(gib, rows):
    assert room_of(gib).evaluation_rows(4) == rows


# --- the cliff: profiles on their cards, with every adapter


def profile_room(model, targets, lora_r, max_length, card):
    """The Room of a 7B or 8B under the profile of a card."""
    t4 = card == "t4"
    memory = TrainingMemory(
        model,
        torch.float16 if t4 else torch.bfloat16,
        True,
        targets,
        lora_r=lora_r,
        optim="paged_adamw_32bit" if t4 else "adamw_torch_fused",
        max_length=max_length,
    )
    return Room(memory, 14.5 if t4 else 39, may_recompute=t4, uses_cuda_graph=True)


@pytest.fixture(scope="module")
def llama():
    from test_memory import published_skeleton

    return published_skeleton("llama-2-7b-chat")


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("lora_r", [16, 64])
@pytest.mark.parametrize("max_length", [512, 2048])
@pytest.mark.parametrize("card", ["t4", "a100"])
def test_a_7b_trains_on_both_cards_with_little_recomputed(llama, targets, lora_r, max_length, card):
    """Every adapter and length: the step fits, and at most a third of the layers are recomputed."""
    room = profile_room(llama, targets, lora_r, max_length, card)
    rows = room.batch_size_for(16)
    recomputed = room.recomputed_layers(rows)
    assert room.fits(rows)
    assert rows * max_length >= 2048
    assert recomputed <= 32 / 3
