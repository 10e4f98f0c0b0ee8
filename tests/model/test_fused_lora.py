"""Fused LoRA layers compute what PEFT computes, and keep less."""

import weakref

import bitsandbytes as bnb
import peft
import pytest
import torch
from conftest import enable_checkpointing
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from tabletune.model.fused_lora import LoraProduct, can_be_fused, frozen_weight, fuse_adapters
from tabletune.model.recompute import (
    decoder_layers,
    is_gated_mlp,
    recompute_cheap_parts,
    recompute_first_layers,
)

HIDDEN = 64
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
IDS = torch.arange(64).reshape(2, 32)
ADAPTERS = [
    {},
    {"lora_dropout": 0.3},
    {"use_rslora": True, "r": 4},
    {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
]


def quantize(model):
    """Put the linear layers of the decoder into NF4, in place."""
    for layer in decoder_layers(model):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear:
                    new = bnb.nn.Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    new.weight = bnb.nn.Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4"
                    ).to("cpu")
                    setattr(parent, name, new)
    model.is_loaded_in_4bit = True
    return model


def adapted(config=LlamaConfig, quantized=False, **lora):
    """A small model with adapters whose B is not zero, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE))
    if quantized:
        quantize(model)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**options | lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model, autocast=None):
    """The loss of one batch, and the gradients of all adapters in one vector."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    trained = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in trained)
    return loss.item(), torch.cat([gradient.flatten() for gradient in trained])


def assert_near(one, other, tolerance):
    """Two results of `loss_and_gradients` are the same to a relative difference."""
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    assert (one[1] - other[1]).norm() < tolerance * other[1].norm()


@pytest.mark.parametrize("lora", ADAPTERS)
@pytest.mark.parametrize("quantized", [False, True])
def test_fused_layers_have_the_loss_and_the_gradients_of_pefts(lora, quantized):
    model = adapted(quantized=quantized, **lora)
    expected = loss_and_gradients(model)
    assert fuse_adapters(model) == 3 * (4 if "target_modules" in lora else 7)
    assert_near(loss_and_gradients(model), expected, 1e-5)


def test_fused_layers_agree_under_autocast():
    model = adapted().to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    expected = loss_and_gradients(model, torch.bfloat16)
    assert fuse_adapters(model)
    assert_near(loss_and_gradients(model, torch.bfloat16), expected, 0.02)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
@pytest.mark.parametrize("fused", [False, True])
def test_cheap_recomputation_changes_nothing(config, fused):
    model = adapted(config)
    if fused:
        fuse_adapters(model)
    expected = loss_and_gradients(model)
    recompute_cheap_parts(model, torch.float32)
    loss, gradients = loss_and_gradients(model)
    assert loss == expected[0]
    assert torch.equal(gradients, expected[1])


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"lora_dropout": 0.3}])
def test_cheap_recomputation_changes_nothing_for_pefts_own_layers(lora):
    model = adapted(**lora)
    expected = loss_and_gradients(model)
    recompute_cheap_parts(model, torch.float32)
    loss, gradients = loss_and_gradients(model)
    assert loss == expected[0]
    assert torch.equal(gradients, expected[1])


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_partly_recomputed_layers_change_nothing(count, dropout):
    model = adapted(lora_dropout=dropout)
    fuse_adapters(model)
    recompute_cheap_parts(model, torch.float32)
    expected = loss_and_gradients(model)
    enable_checkpointing(model, use_reentrant=False)
    recompute_first_layers(model, count)
    flags = [layer.gradient_checkpointing for layer in decoder_layers(model)]
    assert flags == [True] * count + [False] * (3 - count)
    loss, gradients = loss_and_gradients(model)
    assert loss == expected[0]
    assert torch.equal(gradients, expected[1])


def alive_after_forward(model):
    """How many outputs of hidden norms and inputs of `down_proj` a forward pass leaves in
    memory.
    """
    references = []

    def keep_output(module, inputs, output):
        references.append(weakref.ref(output))

    def keep_input(module, inputs):
        references.append(weakref.ref(inputs[0]))

    for layer in decoder_layers(model):
        layer.input_layernorm.register_forward_hook(keep_output)
        layer.post_attention_layernorm.register_forward_hook(keep_output)
        layer.mlp.down_proj.register_forward_pre_hook(keep_input)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    alive = sum(reference() is not None for reference in references)
    del loss
    return alive


def test_norms_and_the_inside_of_the_mlp_are_not_kept():
    model = adapted()
    fuse_adapters(model)
    assert alive_after_forward(model) == 9
    model = adapted()
    fuse_adapters(model)
    recompute_cheap_parts(model, torch.float32)
    assert alive_after_forward(model) == 0


def saved_numbers(function):
    """How many numbers autograd keeps while a function runs, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(storages.values())


def test_dropout_costs_no_memory():
    layer = adapted(lora_dropout=0.3).base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 8, HIDDEN, requires_grad=True)
    plain = saved_numbers(lambda: layer(x))
    fuse_adapters(layer)
    weights = sum(w.numel() for w in (layer.lora_A.default.weight, layer.lora_B.default.weight))
    thin = 2 * 8 * 8
    assert saved_numbers(lambda: layer(x)) == x.numel() + thin + weights
    assert plain > x.numel() + thin + weights


def test_gradients_of_the_fused_product_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 5), (2, 5), (7, 2)))
    inputs = [tensor.requires_grad_() for tensor in (x, a, b)]
    product = lambda x, a, b: LoraProduct.apply(x, a, b, layer, 0.5, 0.0)  # noqa: E731
    assert torch.autograd.gradcheck(product, inputs)


def test_an_adapter_that_is_switched_off_or_merged_is_not_added():
    model = adapted()
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=IDS).logits
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    fuse_adapters(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base)
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_what_peft_computes_in_another_precision_is_left_to_it():
    """A bf16 base with fp32 adapters outside autocast, as in the evaluation of an adapter."""
    model = adapted().to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        fuse_adapters(model)
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}, {"bias": "all"}])
def test_other_kinds_of_adapters_are_not_fused(lora):
    model = adapted(**lora)
    if lora.get("bias"):
        layer = torch.nn.Linear(4, 4)
        wrapped = torch.nn.ModuleDict({"layer": layer})
        model = get_peft_model(wrapped, LoraConfig(target_modules=["layer"], bias="all"))
    assert fuse_adapters(model) == 0


def test_a_model_trains_and_saves_as_before(tmp_path):
    model = adapted()
    names = set(model.state_dict())
    fuse_adapters(model)
    recompute_cheap_parts(model, torch.float32)
    assert set(model.state_dict()) == names
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before, _ = loss_and_gradients(model)
    optimizer.step()
    assert loss_and_gradients(model)[0] < before
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_second_trainer_of_a_model_changes_nothing():
    model = adapted()
    fuse_adapters(model)
    recompute_cheap_parts(model, torch.float32)
    layer = decoder_layers(model)[0]
    forwards = (layer.forward, layer.mlp.up_proj.forward)
    assert fuse_adapters(model) == 21
    recompute_cheap_parts(model, torch.float32)
    assert (layer.forward, layer.mlp.up_proj.forward) == forwards


def test_an_mlp_of_another_kind_is_left_alone():
    model = adapted().base_model.model
    mlp = model.model.layers[0].mlp
    assert is_gated_mlp(mlp, torch.float32)
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) + mlp.up_proj(x))
    assert not is_gated_mlp(mlp, torch.float32)
    assert not is_gated_mlp(model.model.layers[0].self_attn, torch.float32)


def test_a_norm_that_is_changed_in_place_is_kept():
    """Its output is not what the recipe would give."""
    model = adapted()
    for layer in decoder_layers(model):
        attention = layer.self_attn
        usual = attention.forward
        attention.forward = lambda hidden_states, usual=usual, **rest: usual(
            hidden_states=hidden_states.mul_(2), **rest
        )
    expected = loss_and_gradients(model)
    recompute_cheap_parts(model, torch.float32)
    assert torch.equal(loss_and_gradients(model)[1], expected[1])


def test_the_frozen_weight_of_a_4_bit_layer_is_what_it_multiplies_by():
    model = adapted(quantized=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer()
    x = torch.eye(HIDDEN)
    torch.testing.assert_close(frozen_weight(layer, torch.float32), layer(x).T)


def test_peft_still_has_what_the_fused_forward_replaces():
    """A canary: the two classes, and the arithmetic of their forward, which LoraProduct repeats."""
    layer = adapted().base_model.model.model.layers[0].mlp.up_proj
    assert type(layer) is peft.tuners.lora.Linear
    assert peft.tuners.lora.Linear4bit.__name__ == "Linear4bit"
    assert can_be_fused(layer)
    x = torch.randn(3, HIDDEN)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.get_base_layer()(x) + layer.scaling["default"] * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)
