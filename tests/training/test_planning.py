"""What is printed and planned before a training, by the memory that there is."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, PartialState
from conftest import ROOT, TINY
from test_room import CHOSEN, room_of
from transformers import AutoConfig

from tabletune.errors import StageError
from tabletune.training import planning
from tabletune.training.planning import room_for_training


def test_the_step_is_said_in_one_line(capsys):
    chosen = CHOSEN | {"batch_size": 2, "min_steps": 300, "gradient_accumulation_steps": 4}
    processes = SimpleNamespace(num_processes=2)
    plan = planning.plan_steps(chosen, range(100), range(300), room_of(100), processes)
    assert plan == (2, 4, 7)
    said = capsys.readouterr().out
    assert said.startswith("a step is 2 rows × 4 accumulated × 2 GPUs, about 48 examples; 7 steps")
    assert "fewer than min_steps=300" in said


def test_with_max_steps_no_other_batch_size_is_advised(capsys):
    chosen = CHOSEN | {"min_steps": 300, "training_options": {"max_steps": 10}}
    planning.plan_steps(
        chosen, range(100), range(300), room_of(100), SimpleNamespace(num_processes=1)
    )
    said = capsys.readouterr().out
    assert "min_steps" not in said
    assert "set max_steps in training_options" in said


def test_a_step_of_one_row_that_is_one_example_is_said_in_the_singular(capsys):
    chosen = CHOSEN | {"batch_size": 1, "min_steps": 1}
    examples = range(86)
    planning.plan_steps(chosen, examples, examples, room_of(100), SimpleNamespace(num_processes=1))
    assert capsys.readouterr().out.startswith("a step is 1 row, 1 example; 86 steps")


# --- the whole plan of a model


@pytest.fixture
def ask(monkeypatch):
    """The Room of a training of a small model in one process, with so much memory."""

    def ask(gib, layers=2, **change):
        monkeypatch.setattr(planning, "available_memory_gib", lambda: gib)
        config = AutoConfig.from_pretrained(TINY, num_hidden_layers=layers)
        processes = PartialState(cpu=True)
        return room_for_training(CHOSEN | change, config, torch.float32, "auto", 400, processes)

    return ask


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_only_weights_that_do_not_fit_are_refused(ask, capsys):
    ask(64)
    assert "If it does not fit" not in capsys.readouterr().out
    assert ask(0.5).expected.sum() > 0.5
    assert "lower batch_size and raise gradient" in capsys.readouterr().out
    with pytest.raises(StageError, match=r"The weights alone take 0\.0 GiB of memory"):
        ask(1e-4)
    assert ask(1e-4, ignore_memory=True)


def test_nothing_is_recomputed_where_a_gpu_has_room_for_all(ask, gpu, capsys):
    options = {"gradient_checkpointing": True, "use_liger_kernel": True, "layers": 24}
    roomy = ask(64, **options)
    assert roomy.recomputed_layers(8) == 0
    assert "nothing is recomputed" in capsys.readouterr().out
    tight = ask(0.9 * roomy.expected.sum(), **options)
    assert 0 < tight.recomputed_layers(8) < 24
    assert tight.expected.sum() < roomy.expected.sum()
    said = capsys.readouterr().out
    assert "nothing is recomputed" not in said
    assert f"{tight.recomputed_layers(8)} of 24 layers are recomputed" in said


def test_steps_on_small_batches_are_a_cuda_graph(ask, gpu):
    assert "CUDA graph" in ask(64, use_liger_kernel=True).expected
    assert "CUDA graph" not in ask(64, use_liger_kernel=True, batch_size=32).expected
    assert "CUDA graph" not in ask(64, use_liger_kernel=True, lora_dropout=0.1).expected


@pytest.mark.parametrize(
    "options", [{"rank_pattern": {"q_proj": 64}}, {"use_dora": True}, {"modules_to_save": ["norm"]}]
)
def test_what_lora_options_train_is_counted_as_peft_does(ask, options):
    term = "adapter, gradients, optimizer"
    assert ask(64, lora_options=options).expected[term] > ask(64).expected[term]


def test_fewer_layers_with_an_adapter_take_less(ask):
    fewer = ask(64, lora_options={"layers_to_transform": [0]}).memory.trained_weights()
    assert fewer == ask(64).memory.trained_weights() / 2


def test_memory_that_is_not_reused_in_parts_is_expected_to_be_reserved(ask, gpu, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    expandable = ask(64).expected.sum()
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert ask(64).expected.sum() > expandable


def test_a_model_that_one_gpu_cannot_hold_is_sharded_over_two(monkeypatch):
    processes = SimpleNamespace(num_processes=2, distributed_type=DistributedType.MULTI_GPU)
    monkeypatch.setattr(planning, "gather_object", lambda values: values)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = AutoConfig.from_pretrained(TINY)
    for gib, sharded in ((64, False), (0.7, True)):
        monkeypatch.setattr(planning, "available_memory_gib", lambda gib=gib: gib)
        room = room_for_training(CHOSEN, config, torch.float32, "auto", 40, processes)
        assert room.sharded == sharded


def test_a_model_of_an_earlier_pass_is_gone_before_memory_is_planned():
    """Run All, pressed twice: what the first model takes would not be there for the second."""
    text = (ROOT / "notebooks_py" / "02_finetune_qlora.py").read_text(encoding="utf-8")
    forgets = text.index("model = trainer = None")
    frees = text.index("free_memory()\n")
    plans = text.index("planning.room_for_training(")
    assert forgets < frees < plans
