"""What is left of a training."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from tabletune.errors import StageError
from tabletune.model.loading import skeleton
from tabletune.training.results import base_model_loss, training_metrics


class FakeTrainer:
    """A trainer that tells its callbacks of an evaluation and logs it, as Trainer does."""

    def __init__(self):
        self.state = SimpleNamespace(log_history=[{"step": 54, "loss": 1.6}])
        self.heard = []
        self.callback_handler = SimpleNamespace(callbacks=[self.heard.append])
        self.adapter_on = True
        self.model = SimpleNamespace(disable_adapter=self.disable_adapter)

    @contextmanager
    def disable_adapter(self):
        self.adapter_on = False
        yield
        self.adapter_on = True

    def evaluate(self):
        metrics = {"eval_loss": 1.8 if self.adapter_on else 3.9}
        self.state.log_history.append(metrics)
        for callback in self.callback_handler.callbacks:
            callback(metrics)
        return metrics


def test_the_loss_of_the_base_is_that_without_the_adapter():
    assert base_model_loss(FakeTrainer()) == 3.9


def test_the_loss_of_the_base_stands_in_no_log_as_if_it_were_the_last_step():
    """A progress table, TensorBoard and the history tell of the trained model."""
    trainer = FakeTrainer()
    base_model_loss(trainer)
    assert trainer.heard == []
    assert trainer.state.log_history == [{"step": 54, "loss": 1.6}]


def test_the_callbacks_hear_of_what_comes_after_the_loss_of_the_base():
    trainer = FakeTrainer()
    base_model_loss(trainer)
    trainer.evaluate()
    assert trainer.heard == [{"eval_loss": 1.8}]


def test_a_base_model_that_computes_no_numbers_is_not_called_diverged():
    class Failing(FakeTrainer):
        def evaluate(self):
            raise StageError("the training has diverged")

    with pytest.raises(StageError, match="loss of the base model itself is no number"):
        base_model_loss(Failing())


def adapted_model(rank=8, **options):
    """A small Llama with an adapter, without memory, and how many weights it had before."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100}
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    base = skeleton(config)
    weights = base.num_parameters()
    lora_config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(base, lora_config), weights


def metrics_of(model, load_best_model_at_end=True):
    """The metrics of a training of three steps that ended in the second epoch."""
    history = [{"step": 3, "loss": 1.6, "seconds": 2.0}]
    state = SimpleNamespace(log_history=history, epoch=1.5, global_step=3, best_metric=1.8)
    args = SimpleNamespace(load_best_model_at_end=load_best_model_at_end)
    trainer = SimpleNamespace(model=model, state=state, args=args)
    trainer.evaluate = lambda: {"eval_loss": 1.9}
    return training_metrics(trainer, 100, 10, 3.9)


def test_the_loss_afterwards_is_that_of_the_adapter_that_is_saved():
    """Without load_best_model_at_end it is the last one, though a better one was seen."""
    model, _ = adapted_model()
    assert metrics_of(model)["eval_loss_after"] == 1.8
    assert metrics_of(model, load_best_model_at_end=False)["eval_loss_after"] == 1.9


def test_the_share_of_trained_weights_is_beside_the_base_without_its_adapter():
    model, base_weights = adapted_model()
    adapter_weights = 2 * 2 * 8 * (32 + 32)  # layers, matrices of each, rank, rows and columns
    expected = round(100 * adapter_weights / base_weights, 4)
    assert metrics_of(model)["trainable_percent"] == expected


def test_a_trained_part_of_the_base_counts_in_the_base():
    """With modules_to_save a copy of the head is trained; the base still has its own."""
    model, base_weights = adapted_model(modules_to_save=["lm_head"])
    expected = round(100 * (2 * 2 * 8 * (32 + 32) + 100 * 32) / base_weights, 4)
    assert metrics_of(model)["trainable_percent"] == expected
