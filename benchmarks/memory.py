"""The peak memory of a training beside notebook 2's estimate, for each row of memory.json.

    python benchmarks/memory.py [--only NUMBER]... [--out FILE]

Each row is measured in a process of its own: a base model of random weights is made on the GPU in
its quantization, and trained for some steps by the notebook's trainer, on packed rows with the
lengths of the Hub's table. `tokens_per_second` is the median of the steps after the first two.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for its neighbours, from any folder

from common import HERE, LENGTHS, ROOT, installed_packages, limit_memory, now

WARM_UP, STEPS = 2, 5
OPTIONS = ("lora_r", "lora_dropout", "lora_options", "optim", "quantization", "max_length")


def published_config(name):
    """The config of an entry of models/."""
    from transformers import AutoConfig

    file = ROOT / "tests" / "model_configs" / f"{name}.json"
    return AutoConfig.for_model(**json.loads(file.read_text(encoding="utf-8"))["config"])


def quantized(weight, quantization, dtype):
    """A linear layer with this weight, [out, in], as notebook 2 loads it."""
    import bitsandbytes as bnb
    import torch

    outputs, inputs = weight.shape
    if quantization == "nf4":
        layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, device="meta")
        options = {"compress_statistics": True, "quant_type": "nf4"}
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).cuda()
    elif quantization == "8bit":
        layer = bnb.nn.Linear8bitLt(
            inputs, outputs, bias=False, has_fp16_weights=False, device="meta"
        )
        layer.weight = bnb.nn.Int8Params(weight.half().cpu(), requires_grad=False).cuda()
    else:
        layer = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def make_model(config, dtype, quantization):
    """A base model of random weights on the GPU."""
    import torch

    from tabletune.model.inspection import linear_layers
    from tabletune.model.loading import model_class

    torch.manual_seed(0)
    with torch.device("meta"):
        model = model_class(config)(config).to(dtype)
    for name, layer in linear_layers(model).items():
        parent, _, last = name.rpartition(".")
        weight = torch.randn(layer.weight.shape, device="cuda", dtype=dtype) * 0.02
        setattr(model.get_submodule(parent), last, quantized(weight, quantization, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            if parameter.dim() == 1:
                weight = torch.ones(parameter.shape, device="cuda", dtype=dtype)
            else:
                weight = torch.randn(parameter.shape, device="cuda", dtype=dtype) * 0.02
            setattr(model.get_submodule(parent), last, torch.nn.Parameter(weight))
    for module in model.modules():
        if "RotaryEmbedding" in type(module).__name__:
            module.__init__(config, device="cuda")
    model.tie_weights()
    model.is_loaded_in_4bit = quantization == "nf4"
    model.is_loaded_in_8bit = quantization == "8bit"
    return model.requires_grad_(False)


def packed_rows(count, max_length, vocabulary):
    """So many packed rows of random tokens."""
    from datasets import Dataset

    rng = random.Random(0)
    rows = []
    for _ in range(count):
        lengths = []
        while (left := max_length - sum(lengths)) > 8:
            lengths.append(min(left, max(8, rng.choice(LENGTHS))))
        tokens = [rng.randrange(3, vocabulary) for _ in range(sum(lengths))]
        rows.append({"input_ids": tokens, "labels": tokens, "seq_lengths": lengths})
    return Dataset.from_list(rows)


def placeholder_tokenizer():
    """A tokenizer of a few tokens, as a trainer wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(8)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t1", eos_token="t2", pad_token="t0"
    )


def make_trainer(row, model, adapter, clock):
    """The notebook's trainer for a row of memory.json."""
    from peft import get_peft_model
    from trl import SFTConfig

    from tabletune.model.compat import checkpointing_arguments
    from tabletune.training.collator import Collator
    from tabletune.training.trainer import TokenTrainer, training_callbacks

    count = row["rows"] * (WARM_UP + STEPS)
    examples = packed_rows(count, row["max_length"], model.config.get_text_config().vocab_size)
    with model.device:
        model = get_peft_model(model, adapter)
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(prefix="memory-"),
        per_device_train_batch_size=row["rows"],
        max_steps=WARM_UP + STEPS,
        learning_rate=3e-4,
        optim=row["optim"],
        max_length=row["max_length"],
        **checkpointing_arguments(
            row["recomputed_layers"] > 0,
            {"use_reentrant": False, "preserve_rng_state": row["lora_dropout"] > 0},
        ),
        use_liger_kernel=True,
        bf16=row["dtype"] == "bfloat16",
        fp16=row["dtype"] == "float16",
        max_grad_norm=0.3,
        report_to="none",
        save_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )
    return TokenTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples.select([0]),
        data_collator=Collator(0, row["max_length"]),
        processing_class=placeholder_tokenizer(),
        callbacks=[clock, *training_callbacks(0, row["recomputed_layers"])],
    )


def measure(row):
    """A row of memory.json with what is measured here, and the estimate in GiB."""
    limit_memory(row["limit_gib"])
    import torch
    from peft import LoraConfig
    from transformers import TrainerCallback

    from tabletune.model.loading import skeleton
    from tabletune.training.lora_targets import lora_targets, shortest_target_names
    from tabletune.training.memory import TrainingMemory

    config = published_config(row["model"])
    dtype = getattr(torch, row["dtype"])
    shapes = skeleton(config)
    names = lora_targets(shapes, row["targets"])
    memory = TrainingMemory(shapes, dtype, True, names, **{name: row[name] for name in OPTIONS})
    model = make_model(config, dtype, row["quantization"])
    adapter = LoraConfig(
        r=row["lora_r"],
        lora_alpha=16,
        lora_dropout=row["lora_dropout"],
        target_modules=shortest_target_names(shapes, names),
        task_type="CAUSAL_LM",
        **row["lora_options"],
    )
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()

    trainer = make_trainer(row, model, adapter, Clock())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    torch.cuda.synchronize()
    seconds = [start.elapsed_time(end) / 1e3 for start, end in pairwise(ends)][WARM_UP - 1 :]
    tokens = sum(map(len, trainer.train_dataset["input_ids"])) / len(ends)
    decoder = trainer.model.get_base_model().get_decoder()
    graph = "graph_layers" in getattr(decoder.forward, "__qualname__", "")
    expected = memory.total(row["rows"] * row["max_length"], row["recomputed_layers"], graph)
    return row | {
        "cuda_graph": graph,
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "expected_gib": round(expected, 2),
        "packages": installed_packages(),
    }


def write_rows(path, content):
    """Write memory.json, a row a line."""
    lines = [f' "{key}": {json.dumps(value)}' for key, value in content.items() if key != "rows"]
    rows = ",\n  ".join(json.dumps(row) for row in content["rows"])
    lines.append(f' "rows": [\n  {rows}\n ]')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main():
    """Measure all rows, or those of `--only`, and print estimate and peak of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", type=int, metavar="NUMBER", help="of a row")
    parser.add_argument("--out", type=Path, default=HERE / "memory.json")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    stored = json.loads((HERE / "memory.json").read_text(encoding="utf-8"))
    rows = stored["rows"]
    if options.row is not None:
        print("RESULT", json.dumps(measure(rows[options.row])), flush=True)
        os._exit(0)
    import torch

    if not torch.cuda.is_available():
        sys.exit("The benchmark needs an NVIDIA GPU; there is none here.")
    print("| row | estimate, GiB | peak, GiB | estimate ÷ peak |\n|---|--:|--:|--:|")
    # an option that notebook 2 sets, read when PyTorch is imported
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for number in options.only or range(len(rows)):
        command = [sys.executable, __file__, "--row", str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not results:
            print(f"| {number} | | failed: {done.stderr.strip()[-300:]} | |", flush=True)
            continue
        result = json.loads(results[0].removeprefix("RESULT "))
        expected, peak = result.pop("expected_gib"), result["peak_gib"]
        stored |= {"gpu": torch.cuda.get_device_name(), "measured": now()[:10]}
        stored["packages"] = result.pop("packages")
        rows[number] = result
        print(f"| {number} | {expected:.1f} | {peak:.1f} | {expected / peak:.2f} |", flush=True)
        write_rows(options.out, stored)


if __name__ == "__main__":
    main()
