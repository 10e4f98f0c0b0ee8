"""Every architecture of the tests trains through fused adapters as through PEFT's.

Gradients are compared in models whose weights are random: what a recipe or a hook gets wrong in an
unusual layer shows there.
"""

import pytest
import torch
from conftest import enable_checkpointing
from peft import LoraConfig, get_peft_model
from test_loading import KINDS
from transformers import (
    FalconConfig,
    Gemma3nTextConfig,
    GptOssConfig,
    GraniteMoeHybridConfig,
    Olmo2Config,
    Qwen3NextConfig,
)

from tabletune.model.cuda_graphs import uses_dropout
from tabletune.model.fused_lora import fuse_adapters
from tabletune.model.loading import model_class, skeleton
from tabletune.model.recompute import (
    decoder_layers,
    recompute_cheap_parts,
    recompute_first_layers,
)
from tabletune.training.lora_targets import lora_targets, shortest_target_names

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
}
MORE = {
    "olmo2": Olmo2Config(**SMALL),  # norms behind attention and MLP
    "gpt_oss": GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "granite_hybrid": GraniteMoeHybridConfig(
        **SMALL,
        layer_types=["mamba", "attention"],
        num_local_experts=0,
        shared_intermediate_size=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_expand=2,
        mamba_n_groups=1,
        mamba_d_state=8,
    ),
    "qwen3_next": Qwen3NextConfig(
        **SMALL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "gemma3n": Gemma3nTextConfig(
        **SMALL,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["sliding_attention", "full_attention"],
    ),
}
IDS = (torch.arange(48) % 100 + 2).reshape(2, 24)


def adapted(config):
    """A model of this config with adapters on all linear layers, whose B is not zero."""
    torch.manual_seed(0)
    model = model_class(config)(config)
    for parameter in model.parameters():
        if not parameter.isfinite().all():
            torch.nn.init.normal_(parameter, std=0.02)
    targets = shortest_target_names(model, lora_targets(model, "all-linear"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model):
    """The loss of a batch, and the gradients of all adapters in one vector, 0 where there is
    none.
    """
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
    return loss.item(), torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_every_architecture_trains_as_with_pefts_layers(kind):
    model = adapted((KINDS | MORE)[kind])
    loss, expected = gradients(model)
    assert expected.isfinite().all()
    assert expected.any()
    fuse_adapters(model)
    fused_loss, fused = gradients(model)
    assert fused_loss == pytest.approx(loss, rel=1e-5)
    assert (fused - expected).norm() < 1e-4 * expected.norm()
    recompute_cheap_parts(model, torch.float32)
    assert torch.equal(gradients(model)[1], fused)
    if not model.supports_gradient_checkpointing:
        return
    preserve = uses_dropout(model)  # GPT-2's config has some
    enable_checkpointing(model, use_reentrant=False, preserve_rng_state=preserve)
    recompute_first_layers(model, 1)
    flags = [layer.gradient_checkpointing for layer in decoder_layers(model)]
    assert flags == [True, *[False] * (len(flags) - 1)]
    assert torch.equal(gradients(model)[1], fused)


@pytest.mark.parametrize(
    ("config", "draws"),
    [
        (KINDS["llama"], False),
        (KINDS["gpt2"], True),
        (Olmo2Config(**SMALL, attention_dropout=0.1), True),
        (FalconConfig(hidden_dropout=0.1), True),  # a function without a module
        (FalconConfig(), False),
    ],
)
def test_dropout_is_found_in_modules_and_configs(config, draws):
    assert uses_dropout(skeleton(config)) == draws


def test_dropout_of_an_adapter_is_found():
    model = adapted(KINDS["llama"])
    assert not uses_dropout(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"] = (
        torch.nn.Dropout(0.1)
    )
    assert uses_dropout(model)
