"""Training examples as token ids and labels."""

import pytest

from tabletune.training.collator import Collator
from tabletune.training.examples import IGNORED, count_labels, labels_of


def test_labels_are_the_ids_in_the_loss():
    encoded = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}
    assert labels_of(encoded) == [IGNORED, IGNORED, 7, 8]


def test_the_first_token_has_no_label():
    """A plain text is in the loss from its beginning; packed, the text before would predict it."""
    encoded = {"input_ids": [5, 6, 7], "completion_mask": [1, 1, 1]}
    assert labels_of(encoded) == [IGNORED, 6, 7]


def test_labels_are_counted_without_what_is_ignored():
    assert count_labels({"labels": [[IGNORED, 6, 7], [IGNORED, IGNORED, 8]]}) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_has_the_labels_of_its_rows_and_ignores_padding(packed):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "seq_lengths": [3]},
        {"input_ids": [5, 6], "labels": [IGNORED, 6], "seq_lengths": [1, 1]},
    ]
    if not packed:
        rows = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    batch = Collator(pad_token_id=0, max_length=3)(rows)
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 6, IGNORED]]
    visible = batch["position_ids"] if packed else batch["attention_mask"]
    assert visible.tolist() == ([[0, 1, 2], [0, 0, 0]] if packed else [[1, 1, 1], [1, 1, 0]])
