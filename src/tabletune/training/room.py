"""The room that a training has: which batches fit into memory, and what a step becomes by that.

A *batch* is what a GPU takes at once, in one forward pass; a *step* is what the optimizer takes
before it changes the adapter once: one batch or several, on each GPU.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from tabletune.errors import StageError
from tabletune.model.cuda_graphs import is_small_batch
from tabletune.training.memory import TrainingMemory

MOST_ROWS = 16  # of a step that "auto" makes
LEAST_TOKENS = 2048  # to take at once where there are as many: every batch dequantizes all weights
# What a batch costs, in tokens of training, measured with a 7B on H100 and H200: dequantizing all
# weights takes as long as 280 tokens, recomputing all layers as long as a third of the batch.
DEQUANTIZING_TOKENS = 280
RECOMPUTING_SHARE = 1 / 3
# Of the memory that there is. The estimate was at most 5% too low, in 49 measurements.
SAFE_SHARE = 0.96
MOST_EVALUATION_ROWS = 8


@dataclass
class Room:
    """What a training takes beside what there is, and what follows from it for its batches."""

    memory: TrainingMemory
    available_gib: float
    may_recompute: bool  # whether layers may be recomputed in the backward pass
    uses_cuda_graph: bool = False  # whether steps on small batches become a CUDA graph
    has_dropout: bool = True  # if so, recomputing must draw the same random numbers again
    sharded: bool = False
    expected: pd.Series | None = None  # GiB by part of the step that is planned

    def is_cuda_graph(self, rows: int) -> bool:
        """Whether a step on batches of `rows` rows becomes a CUDA graph."""
        return self.uses_cuda_graph and is_small_batch(rows, self.memory.max_length, 1)

    def total(self, rows: int, recomputed_layers: int) -> float:
        """The estimate in GiB for batches of `rows` full rows."""
        tokens = rows * self.memory.max_length
        return self.memory.total(tokens, recomputed_layers, self.is_cuda_graph(rows))

    def recomputed_layers(self, rows: int) -> int:
        """How many layers must be recomputed for batches of `rows` full rows: the first that many.

        Without a GPU, and where the model is sharded, it is all or none of them.
        """
        layers = self.memory.shape.layers
        if not self.may_recompute:
            return 0
        if not self.memory.gpu or self.sharded:
            return layers
        safe_gib = SAFE_SHARE * self.available_gib
        if self.total(rows, 0) <= safe_gib:
            return 0
        # each layer more takes less memory, so halves of the range are enough to look at
        return bisect_left(range(layers), True, key=lambda n: self.total(rows, n) <= safe_gib)

    def fits(self, rows: int) -> bool:
        """Whether batches of `rows` full rows fit, with as much recomputed as they need."""
        needed = self.total(rows, self.recomputed_layers(rows))
        return needed <= SAFE_SHARE * self.available_gib

    def cost(self, rows: int) -> float:
        """What a batch of `rows` full rows takes a row, in tokens of training."""
        share = self.recomputed_layers(rows) / self.memory.shape.layers
        tokens = rows * self.memory.max_length * (1 + share * RECOMPUTING_SHARE)
        return (tokens + DEQUANTIZING_TOKENS) / rows

    def batch_size_for(self, step_rows: int) -> int:
        """In how large equal parts a GPU takes the rows of a step: those that cost least."""
        sizes = range(1, step_rows + 1)
        fitting = [size for size in sizes if step_rows % size == 0 and self.fits(size)]
        if not fitting:
            return 1
        # the fewer tokens a batch has, the more its dequantizing counts
        full = [size for size in fitting if size * self.memory.max_length >= LEAST_TOKENS]
        if full:
            return min(full, key=self.cost)
        # the whole step has fewer tokens: it is one batch, if that fits
        if step_rows in fitting:
            return step_rows
        return min(fitting, key=self.cost)

    def evaluation_rows(self, batch_size: int) -> int:
        """How many rows the validation takes at once: a batch, and on a GPU up to 8 if they fit.

        It keeps no activations, so it takes less than a training that recomputes all of them.
        """
        most = batch_size
        if self.memory.gpu:
            for rows in range(batch_size, MOST_EVALUATION_ROWS + 1):
                if self.fits(rows):
                    most = rows
        return most


class StepPlan(NamedTuple):
    """What a step of the optimizer is."""

    batch_size: int  # rows in one forward pass, on each GPU
    accumulated: int  # forward passes before a step
    steps: int  # of the whole training


def rows_of_step(parameters: dict[str, Any], rows: int, processes: int) -> int:
    """How many rows each GPU takes in a step, `gradient_accumulation_steps` apart.

    `batch_size` is taken as it is. "auto" is at most 16, but so few that there are `min_steps`
    steps: a small table would end before the model has learned (5 steps an epoch taught nothing,
    300 did).
    Raises StageError if batch_size is neither a number nor "auto".
    """
    batch_size = parameters["batch_size"]
    is_count = isinstance(batch_size, int) and batch_size > 0
    if batch_size != "auto" and not is_count:
        raise StageError(f'batch_size={batch_size!r}: use a whole number of rows, or "auto".')
    if is_count:
        return batch_size
    steps = parameters["min_steps"] * parameters["gradient_accumulation_steps"] * processes
    return max(1, min(MOST_ROWS, int(rows * parameters["epochs"] / steps)))


def divide_steps(parameters: dict[str, Any], rows: int, room: Room, processes: int) -> StepPlan:
    """The StepPlan of a training on so many rows.

    A number as `batch_size` is taken at once, whatever it takes; "auto" is divided by the room.
    """
    step_rows = rows_of_step(parameters, rows, processes)
    batch_size = step_rows
    if parameters["batch_size"] == "auto":
        batch_size = room.batch_size_for(step_rows)
    accumulated = parameters["gradient_accumulation_steps"] * (step_rows // batch_size)
    batches = math.ceil(rows / (batch_size * processes))
    steps = math.ceil(math.ceil(batches / accumulated) * parameters["epochs"])
    max_steps = parameters["training_options"].get("max_steps", -1)
    if max_steps > 0:  # then it counts, and not the epochs
        steps = max_steps
    return StepPlan(batch_size, accumulated, steps)
