"""Fused LoRA layers, cheap recomputation and CUDA graphs on an NVIDIA GPU, with Liger's kernels."""

import pytest
import torch
from conftest import enable_checkpointing
from test_fused_lora import adapted

from tabletune.model.cuda_graphs import graph_layers
from tabletune.model.fused_lora import fuse_adapters
from tabletune.model.inspection import text_part
from tabletune.model.recompute import (
    decoder_layers,
    recompute_cheap_parts,
    recompute_first_layers,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]
IDS = torch.arange(64).reshape(2, 32)
POSITIONS = torch.arange(16).repeat(2, 2)
DTYPES = [torch.bfloat16, torch.float16]


def model_on_gpu(dtype, **lora):
    """The small model of the other tests in 4 bits and half precision, adapters in fp32."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = adapted(quantized=True, **lora)
    _apply_liger_kernel_to_instance(model=model.get_base_model())
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
    model = model.cuda()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return model


def gradients(model, dtype):
    """The loss and the gradients of all adapters for one batch, after the same random numbers."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cuda", dtype):
        ids, positions = IDS.cuda(), POSITIONS.cuda()
        loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
    (loss * 128).backward()  # as the loss scaler of fp16 does
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    return loss.item(), torch.cat([gradient.flatten() for gradient in trained])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fused_layers_train_as_pefts_do(dtype, dropout):
    """With dropout, too: the same numbers are dropped, forward and backward."""
    model = model_on_gpu(dtype, lora_dropout=dropout)
    loss, expected = gradients(model, dtype)
    assert fuse_adapters(model) == 21
    fused_loss, found = gradients(model, dtype)
    assert fused_loss == pytest.approx(loss, abs=1e-3)
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cheap_recomputation_changes_no_bit(dtype):
    model = model_on_gpu(dtype)
    fuse_adapters(model)
    expected = gradients(model, dtype)
    recompute_cheap_parts(model, dtype)
    loss, found = gradients(model, dtype)
    assert loss == expected[0]
    assert torch.equal(found, expected[1])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_graph_with_recomputed_layers_has_the_same_gradients(count):
    dtype = torch.bfloat16
    model = model_on_gpu(dtype)
    fuse_adapters(model)
    recompute_cheap_parts(model, dtype)
    expected = gradients(model, dtype)
    if count:
        enable_checkpointing(model, use_reentrant=False, preserve_rng_state=False)
        recompute_first_layers(model, count)
    assert sum(layer.gradient_checkpointing for layer in decoder_layers(model)) == count
    decoder = text_part(model.get_base_model())
    with torch.autocast("cuda", dtype, cache_enabled=False):
        graph_layers(decoder, (2, 32))
    for _ in range(2):
        loss, found = gradients(model, dtype)
        assert loss == pytest.approx(expected[0], abs=1e-3)
        assert (found - expected[1]).norm() < 0.01 * expected[1].norm()
