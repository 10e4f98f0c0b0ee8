"""Base models of random weights, in the shapes of published ones."""

import json
from pathlib import Path

from common import ROOT


def make_base_model(folder, size):
    """Make a base model of random weights, with the tokenizer of the tiny profile, on the GPU.

    `size` is "7b" or "70b" for a Llama 2, or an entry of models/. Weights are stored in 16 bits,
    but those of the 70B in 4, in the way that FSDP can shard, and made one layer at a time: in
    16 bits they would take 128 GiB of disk.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shapes = {
        "7b": {"intermediate_size": 11008, "num_hidden_layers": 32},
        "70b": {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    }
    torch.manual_seed(0)
    AutoTokenizer.from_pretrained(ROOT / ".cache" / "tiny-llama").save_pretrained(folder)
    if size in shapes:
        config = LlamaConfig(**shapes[size], max_position_embeddings=4096, dtype="float16")
    else:
        published = json.loads(
            (ROOT / "tests" / "model_configs" / f"{size}.json").read_text(encoding="utf-8")
        )
        config = AutoConfig.for_model(**published["config"])
    if size != "70b":
        torch.set_default_dtype(torch.float16 if size in shapes else torch.bfloat16)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, max_shard_size="5GB")
        return
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    files = {}
    for name, parameter in skeleton.named_parameters():
        files.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter.shape
    weight_map = {}
    for part, names in files.items():
        tensors = {}
        for name, shape in names.items():
            norm = len(shape) == 1
            weight = (torch.ones if norm else torch.randn)(
                shape, dtype=torch.float16, device="cuda"
            )
            tensors[name] = weight if norm else weight.mul_(config.initializer_range)
            if ".layers." in name and not norm:
                tensors[name], state = quantize_4bit(
                    weight, quant_type="nf4", compress_statistics=True, quant_storage=torch.float32
                )
                tensors |= {
                    f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()
                }
        weight_map |= dict.fromkeys(tensors, f"{part}.safetensors")
        save_file(tensors, Path(folder) / f"{part}.safetensors", metadata={"format": "pt"})
    (Path(folder) / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    config.architectures = ["LlamaForCausalLM"]
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.float32,
    ).to_dict()
    config.save_pretrained(folder)
