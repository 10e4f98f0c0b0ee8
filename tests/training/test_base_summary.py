"""What notebook 2 shows of the base model."""

import pytest
import torch
from transformers import LlamaConfig

from tabletune.model.loading import skeleton
from tabletune.training.base_summary import summarize_base_model

SIZES = {"hidden_size": 1000, "intermediate_size": 1000, "vocab_size": 500}


def summary_of(quantization, dtype):
    """The summary of a model of two layers: 14 million weights in them, a million beside them."""
    model = skeleton(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **SIZES))
    return summarize_base_model(model, "all-linear", "auto", quantization, dtype)


@pytest.mark.parametrize(
    ("quantization", "dtype", "expected"),
    [
        ("none", torch.bfloat16, "all 15.0 million weights in 16 bits"),
        ("none", torch.float32, "all 15.0 million weights in 32 bits"),
        ("nf4", torch.float16, "14.0 million weights in 4 bits, 1.0 million in 16"),
        ("8bit", torch.float32, "14.0 million weights in 8 bits, 1.0 million in 32"),
    ],
)
def test_weights_that_are_not_quantized_have_the_bits_of_the_dtype(quantization, dtype, expected):
    assert summary_of(quantization, dtype)["in memory"] == expected


def test_weights_in_32_bits_take_twice_the_memory_of_16():
    assert summary_of("none", torch.bfloat16)["weights"] == "0.03 GiB"
    assert summary_of("none", torch.float32)["weights"] == "0.06 GiB"


def test_the_adapted_matrices_are_counted():
    adapted = summary_of("none", torch.float32)["adapters on"]
    assert adapted.startswith("14 matrices: 2 × down_proj, ")
