"""What is left of a training."""

from contextlib import contextmanager
from types import SimpleNamespace

from tabletune.training.results import base_model_loss


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
