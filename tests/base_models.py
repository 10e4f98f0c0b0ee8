"""Tiny random base models, one for each kind of architecture and chat template, stored as the Hub
stores such models.

`build(name, folder)` makes one; `cached(name)` makes it once and gives its folder. Each has about 1e5 parameters, two to
four layers, and a chat template of our own that keeps one trait of the family that it is named after:

    python tests/base_models.py qwen3_moe some/folder
"""

import csv
import hashlib
import json
import os
import sys
from functools import cache, partial
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GenerationConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}

# Templates: each keeps one trait. `bos_token` is written by the template where its family's is.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{% if loop.previtem is not defined or loop.previtem.role != 'system' %}{{ bos_token }}"
    "[INST] {% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (  # says a system prompt where there is none
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
) + CHATML
QWEN3 = (  # writes an empty block of thinking into the last answer; the prompt has one only if thinking is switched off
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ answer }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
R1 = (  # opens a thought for the answer to go on with, and drops thoughts from what it is told
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GEMMA = (  # no system role, turns in strict order, answers trimmed; a turn's end is not the tokenizer's EOS
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA4 = (  # closes the channel of thoughts in the prompt, and has none in an answer
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim }}{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not enable_thinking %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
PHI3 = (  # ends with the EOS only where no answer is asked for
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DATED = (  # today's date
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}"
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}{{ '\n\n<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
HARMONY = (  # channels; the last answer ends otherwise than earlier ones
    "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content + '<|Assistant|></think>' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@cache
def vocabulary(kind):
    """A trained tokenizer of 500 pieces, as JSON: of "llama"'s or "gemma"'s kind, with bytes to
    fall back on, or of "bytes".
    """
    with open(ROOT / "data" / "home_remedies.csv", encoding="utf-8") as file:
        texts = [" ".join(row) for row in csv.reader(file)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind != "bytes":
        base = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        first, last = (
            ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)])
            if kind == "llama"
            else ([], [])
        )
        base.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        base.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        base.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
        special, alphabet = (
            ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            [],
        )
    else:
        base = Tokenizer(models.BPE())
        base.pre_tokenizer, base.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    base.train_from_iterator(texts, trainer)
    content = json.loads(base.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return json.dumps(content)


def make_tokenizer(template, kind="bytes", special=(), plain=(), add_bos=True, **named):
    """A tokenizer with `special` and `plain` tokens added; its post-processor writes the BOS if
    it has one. `named` are its `bos`, `eos` and `pad` token, as far as it has them.
    """
    base = Tokenizer.from_str(vocabulary(kind))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    bos = named.get("bos")
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token", named.get(name))
    if kind != "bytes":
        tokenizer.unk_token = "<unk>"
    if bos and add_bos:
        number = tokenizer.convert_tokens_to_ids(bos)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
        )
    tokenizer.chat_template = template
    return tokenizer


def causal(family, head="ForCausalLM", **settings):
    """What makes a model of a family of transformers' from the ids of its tokens."""

    def make(**ids):
        model = getattr(transformers, family + head)
        return model(model.config_class(**{**SMALL, **settings, **ids}))

    return make


def multimodal(family, text, vision, **settings):
    """What makes a model that reads images, too; the ids are its text part's."""

    def make(**ids):
        config = getattr(transformers, f"{family}Config")(
            text_config={**SMALL, **text, **ids}, vision_config={**VISION, **vision}, **settings
        )
        return getattr(transformers, f"{family}ForConditionalGeneration")(config)

    return make


llama = partial(make_tokenizer, kind="llama", bos="<s>", eos="</s>")
gemma = partial(make_tokenizer, kind="gemma", bos="<s>", eos="</s>", pad="<pad>")
IM = ["<|im_start|>", "<|im_end|>"]
chatml = partial(make_tokenizer, CHATML, special=IM, eos="<|im_end|>", pad="<|endoftext|>")
HEADERS = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end_of_text|>",
]
THINK = ["<think>", "</think>"]
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
}
HYBRID |= {"linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}

# name: (tokenizer, model, tokens at which the generation config stops; None: the EOS)
BASES = {
    "llama": (partial(llama, LLAMA2), causal("Llama"), None),
    "llama_tied": (
        partial(llama, LLAMA2, pad="<unk>"),
        causal("Llama", tie_word_embeddings=True),
        None,
    ),
    "qwen2": (  # no head_dim in its config, no BOS, tied, biases, more rows in the embeddings than tokens
        partial(make_tokenizer, QWEN2, special=IM, eos="<|im_end|>", pad="<|endoftext|>"),
        causal("Qwen2", tie_word_embeddings=True),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3": (
        partial(
            make_tokenizer, QWEN3, special=IM, plain=THINK, eos="<|im_end|>", pad="<|endoftext|>"
        ),
        causal("Qwen3", head_dim=24),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "r1": (
        partial(llama, R1, special=["<|User|>", "<|Assistant|>"], plain=THINK, pad="</s>"),
        causal("Llama"),
        None,
    ),
    "gemma": (
        partial(gemma, GEMMA, special=["<start_of_turn>", "<end_of_turn>", "<pad>"]),
        causal("Gemma2", head_dim=16, query_pre_attn_scalar=16),
        ["</s>", "<end_of_turn>"],
    ),
    "phi3": (
        partial(
            llama,
            PHI3,
            special=["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
            eos="<|endoftext|>",
            pad="<|endoftext|>",
            add_bos=False,
        ),
        causal("Phi3"),
        ["<|endoftext|>", "<|end|>"],
    ),
    "gpt_neox": (
        partial(
            make_tokenizer,
            CHATML,
            special=IM,
            bos="<|endoftext|>",
            eos="<|endoftext|>",
            add_bos=False,
        ),
        causal("GPTNeoX"),
        None,
    ),
    "gpt2": (
        partial(make_tokenizer, None, bos="<|endoftext|>", eos="<|endoftext|>", add_bos=False),
        causal("GPT2", "LMHeadModel", n_embd=64, n_layer=2, n_head=4, n_positions=512),
        None,
    ),
    "qwen3_moe": (
        partial(
            make_tokenizer, CHATML, special=IM, plain=THINK, eos="<|im_end|>", pad="<|endoftext|>"
        ),
        causal("Qwen3Moe", head_dim=16, num_experts=4, **EXPERTS),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "mixtral": (partial(llama, LLAMA2), causal("Mixtral", num_local_experts=4), None),
    "deepseek_v3": (
        partial(llama, DEEPSEEK, special=["<|User|>", "<|Assistant|>"], plain=THINK, pad="</s>"),
        causal(
            "DeepseekV3",
            num_key_value_heads=4,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            **LATENT,
            **EXPERTS,
        ),
        None,
    ),
    "gpt_oss": (  # no SDPA; experts stored as one tensor, with biases
        partial(
            make_tokenizer,
            HARMONY,
            special=["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
            eos="<|return|>",
            pad="<|endoftext|>",
        ),
        causal(
            "GptOss",
            head_dim=16,
            num_local_experts=4,
            layer_types=["sliding_attention", "full_attention"],
            **EXPERTS,
        ),
        ["<|return|>", "<|endoftext|>"],
    ),
    "granite_hybrid": (
        partial(
            make_tokenizer,
            GRANITE,
            special=["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
            eos="<|end_of_text|>",
            pad="<|endoftext|>",
        ),
        causal(
            "GraniteMoeHybrid",
            layer_types=["mamba", "attention"],
            num_local_experts=4,
            shared_intermediate_size=32,
            tie_word_embeddings=True,
            **MAMBA,
            num_experts_per_tok=2,
        ),
        None,
    ),
    "lfm2": (
        partial(
            make_tokenizer,
            CHATML,
            special=["<|startoftext|>", *IM],
            bos="<|startoftext|>",
            eos="<|im_end|>",
            pad="<|endoftext|>",
        ),
        causal("Lfm2", layer_types=["conv", "full_attention"], tie_word_embeddings=True),
        None,
    ),
    "mamba2": (
        chatml,
        causal("Mamba2", num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=32),
        None,
    ),
    "falcon_h1": (
        chatml,
        causal("FalconH1", head_dim=16, mamba_d_ssm=128, mamba_chunk_size=32, **MAMBA),
        None,
    ),
    "apertus": (  # its activation has persistent buffers and parameters
        chatml,
        causal("Apertus"),
        None,
    ),
    "gemma3": (
        partial(gemma, GEMMA, special=["<start_of_turn>", "<end_of_turn>", "<pad>"]),
        multimodal(
            "Gemma3", {"head_dim": 16, "query_pre_attn_scalar": 16}, {}, mm_tokens_per_image=4
        ),
        ["</s>", "<end_of_turn>"],
    ),
    "gemma3n": (  # a root in its layers, which has no gradient where the embedding of padding is all zeros
        partial(gemma, GEMMA, special=["<start_of_turn>", "<end_of_turn>", "<pad>"]),
        causal(
            "Gemma3n",
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"],
            activation_sparsity_pattern=[0.0, 0.0],
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=512,
            laurel_rank=8,
        ),
        ["</s>", "<end_of_turn>"],
    ),
    "gemma4": (  # layers have a persistent buffer, `layer_scalar`
        partial(gemma, GEMMA4, special=["<|turn>", "<turn|>", "<|channel>", "<channel|>", "<pad>"]),
        multimodal(
            "Gemma4",
            {
                "head_dim": 16,
                "global_head_dim": 16,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": 512,
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            {"head_dim": 16, "num_key_value_heads": 2},
        ),
        ["</s>", "<turn|>"],
    ),
    "mistral3": (
        partial(
            llama,
            MISTRAL,
            special=["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
            pad="<unk>",
        ),
        multimodal(
            "Mistral3",
            {"model_type": "mistral", "head_dim": 16},
            {"model_type": "pixtral", "head_dim": 16},
            image_token_index=3,
        ),
        None,
    ),
    "qwen3_5": (
        partial(
            make_tokenizer, QWEN3, special=IM, plain=THINK, eos="<|im_end|>", pad="<|endoftext|>"
        ),
        multimodal(
            "Qwen3_5",
            HYBRID,
            {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
        ),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3_vl": (  # a text config without tie_word_embeddings
        chatml,
        multimodal(
            "Qwen3VL",
            {"head_dim": 16},
            {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
            | {"deepstack_visual_indexes": [0]},
        ),
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "dated": (
        partial(
            make_tokenizer,
            DATED,
            special=HEADERS,
            bos="<|begin_of_text|>",
            eos="<|eot_id|>",
            pad="<|end_of_text|>",
        ),
        causal("Llama", tie_word_embeddings=True),
        ["<|end_of_text|>", "<|eot_id|>"],
    ),
    "bare": (
        partial(make_tokenizer, None, eos="<|endoftext|>"),
        causal("Llama"),
        None,
    ),  # no BOS, no template, no pad
    "beyond": (
        partial(llama, CHATML, special=IM),
        causal("Llama"),
        None,
    ),  # more tokens than rows of the embeddings
}
OTHERS = {  # more families, each with a trait of its own modules; all with one tokenizer
    "deepseek_v2": causal(
        "DeepseekV2", **{**LATENT, "num_key_value_heads": 4}, n_routed_experts=4, **EXPERTS
    ),
    "glm4_moe": causal(
        "Glm4Moe", n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, **EXPERTS
    ),
    "afmoe": causal(
        "Afmoe", head_dim=16, num_experts=4, num_dense_layers=1, **EXPERTS
    ),  # attention with a gate_proj
    "phimoe": causal(
        "Phimoe", num_local_experts=4, num_experts_per_tok=2
    ),  # a router that is a linear layer
    "qwen3_next": causal(
        "Qwen3Next", num_experts=4, shared_expert_intermediate_size=32, **HYBRID, **EXPERTS
    ),
    "nemotron_h": causal(  # stored under other names
        "NemotronH",
        hybrid_override_pattern="M-*-",
        num_hidden_layers=4,
        head_dim=16,
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=1,
        chunk_size=32,
    ),
    "llama4": multimodal(  # its text part has the output layer
        "Llama4",
        {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 96},
        {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
    ),
}
BASES |= {name: (chatml, model, None) for name, model in OTHERS.items()}
"""Those that stand for what people fine-tune most, and fail in different ways: for tests that have little time."""
CHEAP = [
    "llama_tied",
    "qwen2",
    "qwen3",
    "r1",
    "gemma",
    "phi3",
    "gpt_neox",
    "qwen3_moe",
    "gemma3",
    "granite_hybrid",
    "dated",
    "bare",
]


def as_on_the_hub(name, weights):
    """The tensors of a saved model under the names, in the dtypes, and with the extras that the
    Hub has.
    """
    if name == "deepseek_v3":  # the router's correction is kept in fp32
        return {
            key: value.float() if "correction_bias" in key else value
            for key, value in weights.items()
        }
    if name == "qwen3_5":  # a head for several tokens at once, which transformers does not read
        return weights | {"mtp.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    return weights


def build(name, folder, dtype=torch.bfloat16):
    """Make the base model `name` in a folder: weights, config, tokenizer, generation config.

    Returns the folder.
    """
    make_its_tokenizer, make_model, stops = BASES[name]
    tokenizer, folder = make_its_tokenizer(), Path(folder)
    rows = -(-len(tokenizer) // 8) * 8 + (
        32 if name in ("qwen2", "qwen3", "qwen3_moe", "qwen3_5") else 0
    )
    rows = 500 if name == "beyond" else rows
    ids = {
        f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")
    }
    torch.manual_seed(0)
    model = make_model(vocab_size=rows, **ids).to(dtype)
    model.config.dtype = dtype
    generation = GenerationConfig(**ids)
    generation.eos_token_id = (
        tokenizer.convert_tokens_to_ids(stops) if stops else tokenizer.eos_token_id
    )
    model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(as_on_the_hub(name, load_file(file)), file, metadata={"format": "pt"})
    if hasattr(model.config, "vision_config"):
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "AnyImageProcessor"})
        )
    return folder


def cached(name):
    """The folder of the base model `name` in .cache, made at the first call, and again once this
    file changes.
    """
    state = f"{Path(__file__).read_text()}{transformers.__version__}{tokenizers.__version__}{torch.__version__}"
    place = ROOT / ".cache" / "test-models" / hashlib.sha256(state.encode()).hexdigest()[:8]
    if not (place / name).exists():
        partial_folder = place / f"{name}.{os.getpid()}"
        build(name, partial_folder)
        partial_folder.rename(place / name)
    return place / name


if __name__ == "__main__":
    build(*sys.argv[1:])
