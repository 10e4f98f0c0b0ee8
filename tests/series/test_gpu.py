"""On an NVIDIA GPU, with the real weights of SmolLM2-135M: `make test-gpu`."""

import json
import runpy
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, make, profile_parameters, run_script
from datasets import load_from_disk
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from tabletune.chat.tokenizer import load_tokenizer, load_tokenizer_of_run
from tabletune.errors import StageError
from tabletune.evaluation import answers as answers_module
from tabletune.model import cuda_graphs, generation
from tabletune.model.cuda_graphs import cuda_graph
from tabletune.model.quantization import load_base
from tabletune.run.artifacts import load_dataset_of_run
from tabletune.run.parameters import PARAMETERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]
SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"
ON_GPU = {"use_liger_kernel": True, "optim": "paged_adamw_32bit"}
NOISE = 0.03  # in nats: five seeds of one setting differed by up to 0.02


def settings(run_dir, **parameters):
    """The cpu profile with what only a GPU has switched on."""
    return profile_parameters("cpu", run_dir, **{**ON_GPU, **parameters})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder of the cpu profile in which notebook 1 has run."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    done = make("01_format_dataset", "PROFILE=cpu", f"RUN_DIR={folder}")
    assert done.returncode == 0, done.stderr
    return folder


class Skips(TrainerCallback):
    """Note of each optimizer step whether the fp16 gradient scaler skipped it."""

    def __init__(self, trainer):
        self.trainer, self.skipped = trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        self.skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)


def train(run_dir, **parameters):
    """Run notebook 2 up to its training, then train.

    Returns validation losses, skipped steps and the globals.
    """
    stage = run_script("02_finetune_qlora", before="## Train", **settings(run_dir, **parameters))
    trainer = stage.trainer
    shutil.rmtree(stage.run / "checkpoints")
    trainer.args.per_device_eval_batch_size = (
        4  # the mean over batches depends on how rows are batched
    )
    skips = Skips(trainer)
    trainer.add_callback(skips)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"], skips.skipped, stage


@pytest.fixture(scope="module")
def full_precision(run_dir):
    return train(run_dir, precision="fp32", use_liger_kernel=False)[:2]


@pytest.mark.parametrize("profile", ["t4", "a100"])
def test_a_profile_learns_as_much_from_an_example_as_the_seeds_settings(run_dir, profile):
    """Speed may not cost quality: one pass over the same rows, the profile's batches and rate
    against the seed's.
    """
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    seeds = {
        "packing": False,
        "batch_size": 4,
        "min_steps": 1,
        "learning_rate": 2e-4,
        "lora_dropout": 0.1,
    }
    of_profile = yaml.safe_load((ROOT / "profiles" / f"{profile}.yaml").read_text())
    defaults = PARAMETERS["02_finetune_qlora"]
    ours = {
        name: of_profile.get(name, defaults[name]) for name in (*seeds, "gradient_checkpointing")
    }
    _, after, _, stage = train(run_dir, lora_target_modules=attention, **ours)
    _, after_seeds, _, _ = train(run_dir, lora_target_modules=attention, **seeds)
    print(
        f"{profile}: {after:.3f} in {stage.plan.steps} steps; the seed's settings: {after_seeds:.3f}"
    )
    assert after < after_seeds + NOISE


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_full_precision_learns(run_dir, full_precision, precision):
    before, after, skipped, stage = train(run_dir, precision=precision)
    assert before == pytest.approx(full_precision[0], abs=NOISE)
    assert after == pytest.approx(full_precision[1], abs=NOISE)
    assert after < before - 1
    assert not any(skipped[10:]), "the gradient scaler has found its scale"
    assert {p.dtype for p in stage.trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_base_stored_in_4_bits_trains_in_fp16(run_dir, full_precision, tmp_path):
    """Stored by someone with another card, as bf16; the seed's traps: dtype of the adapter,
    dtype of the layers.
    """
    stored = tmp_path / "stored"
    nf4 = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    model = AutoModelForCausalLM.from_pretrained(
        SMOLLM2,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=BitsAndBytesConfig(**nf4),
    )
    model.save_pretrained(stored)
    for file in [*SMOLLM2.glob("*token*"), *SMOLLM2.glob("*.jinja")]:
        shutil.copy(file, stored)
    before, after, skipped, _ = train(run_dir, precision="fp16", base_model=str(stored))
    assert before == pytest.approx(full_precision[0], abs=2 * NOISE)
    assert after == pytest.approx(full_precision[1], abs=2 * NOISE)
    assert not any(skipped[10:])


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 0.001), ("bf16", 0.05)])
def test_gradients_of_packed_and_unpacked_rows_agree(run_dir, precision, rounding):
    """Through 4-bit layers, to what rounding allows; rows that see each other differ by far
    more.
    """
    stage = run_script(
        "02_finetune_qlora", before="## Train", **settings(run_dir, precision=precision)
    )
    model, collate = stage.trainer.model.eval(), stage.trainer.data_collator  # eval: no dropout
    row = max(stage.train, key=lambda row: len(row["seq_lengths"]))
    ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
    pieces = [
        {name: row[name][end - length : end] for name in ("input_ids", "labels")}
        for end, length in zip(ends, row["seq_lengths"], strict=True)
    ]
    leaking = {**row, "seq_lengths": [ends[-1]]}
    assert len(pieces) > 1

    def gradient(examples):
        batch = {name: tensor.cuda() for name, tensor in collate(examples).items()}
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            model(**batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=0.02, generator=torch.Generator("cuda").manual_seed(0)
            )
    packed, unpacked, leaked = gradient([row]), gradient(pieces), gradient([leaking])
    differences = [
        ((other - unpacked).norm() / unpacked.norm()).item() for other in (packed, leaked)
    ]
    print(precision, differences)
    assert differences[0] < rounding
    assert differences[1] > max(0.1, 5 * differences[0])


def test_the_cpu_profile_reaches_its_quality_on_the_gpu(run_dir):
    """The figures of README's run on a CPU, in bf16 on the GPU; the merged model computes what
    the adapter computes.
    """
    done = make("run-all", "PROFILE=cpu", f"RUN_DIR={run_dir}", "ARGS=-p use_liger_kernel true")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    print(json.dumps(metrics, indent=1))
    on_cpu = (ROOT / "examples" / "cpu_run" / "metrics.json").read_text()
    for name, figures in json.loads(on_cpu).items():
        if name in ("base", "adapter", "merged"):
            here = metrics[name]["perplexity"]["response"]
            low, high = figures["perplexity"]["response_ci95"]
            assert low < here < high, name
    assert metrics["adapter"]["generation"]["stop_rate"] == 1
    report = json.loads((run_dir / "merged" / "merge_report.json").read_text())
    assert report["max_logit_difference"] < 0.5
    adapter = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}


def test_batched_generation_is_five_times_as_fast(run_dir):
    rows, chat = load_dataset_of_run(run_dir)[0]["test"], load_tokenizer_of_run(run_dir / "adapter")
    model, prompts = stage_model(run_dir), [rows[i % len(rows)]["prompt"] for i in range(20)]
    seconds = {
        size: answers_module.generate(model, *chat, prompts, size, 64, min_new_tokens=64)[1]
        for size in (20, 1)
    }
    again = answers_module.generate(model, *chat, prompts, 20, 64, min_new_tokens=64)[1]
    assert seconds[1] > 5 * again, (seconds, again)


def test_answers_to_many_long_prompts_fit_into_what_is_left(run_dir, monkeypatch):
    """What a layer holds of 64 prompts while it reads them counts: it is a third of the memory."""
    model = load_base(str(SMOLLM2), None, torch.bfloat16)
    tokenizer, stops = load_tokenizer(str(SMOLLM2))
    prompts = [[{"role": "user", "content": "Which remedy helps? " * 250}]] * 64
    sizes = []
    measure = answers_module.max_batch_size

    def noted(*arguments):
        sizes.append(measure(*arguments))
        return sizes[-1]

    monkeypatch.setattr(answers_module, "max_batch_size", noted)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    free = torch.cuda.memory_allocated() + 1.2 * 2**30
    torch.cuda.set_per_process_memory_fraction(free / total)
    try:
        answers, _ = answers_module.generate(model, tokenizer, stops, prompts, 64, 8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(answers) == 64
    assert 1 < sizes[0] < 64, "the limit decides"


def stage_model(run_dir):
    """The merged model of a run, on the GPU."""
    return AutoModelForCausalLM.from_pretrained(
        run_dir / "merged", dtype=torch.bfloat16, device_map={"": 0}
    )


def test_an_adapter_on_the_tied_output_layer_is_refused(run_dir):
    with pytest.raises(StageError, match="is an embedding or tied to one"):
        run_script(
            "02_finetune_qlora",
            before="## Train",
            **settings(run_dir, lora_target_modules=["lm_head"]),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sharded_base_computes_what_it_did_before(dtype):
    ids = torch.arange(3, 67, device="cuda")[None]
    whole, sharded = (load_base(str(SMOLLM2), None, dtype, "sdpa", sharded=True) for _ in range(2))
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        with torch.no_grad():
            assert torch.equal(sharded(ids).logits, whole.cuda()(ids).logits)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_of_fsdp_keep_numbers_stored_in_32_bits_and_change_some_in_16(dtype):
    """Between GPUs, FSDP copies a layer of one dtype by `_foreach_copy_` (`all_gather_copy_in` in
    torch 2.13).

    When 16 bits stay the same, too,
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945 is mended and `load_base`
    may store 4-bit numbers as `dtype`.
    """

    def copied(bits, dtype):
        copy = torch.empty_like(bits)
        torch._foreach_copy_([copy.view(dtype)], [bits.view(dtype)])
        return copy

    every = torch.arange(2**16, device="cuda", dtype=torch.int32)
    twice, once = every << 16 | every, every.short()
    assert torch.equal(copied(twice, torch.float32), twice)
    assert not torch.equal(copied(once, dtype), once)


def test_recorded_steps_write_the_same_answers(run_dir, monkeypatch):
    """Greedy, in fp32, by the loop of `generate` and by ours, whose steps are a CUDA graph."""
    model = load_base(str(SMOLLM2), None, torch.float32)
    tokenizer, stops = load_tokenizer(str(SMOLLM2))
    prompts = load_from_disk(run_dir / "dataset")["test"]["prompt"][:6]
    graphs = []
    monkeypatch.setattr(
        generation, "cuda_graph", lambda step: graphs.append(cuda_graph(step)) or graphs[-1]
    )
    ours = answers_module.generate(model, tokenizer, stops, prompts, 4, 24)[0]
    assert [graph.__name__ for graph in graphs] == ["replay", "replay"]
    monkeypatch.setattr(answers_module, "static_cache", lambda *_: None)
    assert answers_module.generate(model, tokenizer, stops, prompts, 4, 24)[0].equals(ours)


def test_recorded_layers_train_as_others_do(run_dir, monkeypatch):
    one_row = {"precision": "bf16", "batch_size": 1, "epochs": 0.2}
    recorded = []
    graph_layers = cuda_graphs.graph_layers

    def noted(decoder, shape):
        take_out = graph_layers(decoder, shape)
        recorded.append(decoder.forward.__qualname__)
        return take_out

    monkeypatch.setattr(cuda_graphs, "graph_layers", noted)
    _, after, _, stage = train(run_dir, **one_row)
    assert len(recorded) == 1
    assert "graph_layers" in recorded[0]
    decoder = stage.trainer.model.get_base_model().model
    assert "graph_layers" not in decoder.forward.__qualname__
    monkeypatch.setattr(cuda_graphs, "MOST_TOKENS", 0)
    assert train(run_dir, **one_row)[1] == pytest.approx(after, abs=NOISE)


def test_a_row_of_the_benchmarks_is_measured(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    benchmark["make_dataset"](tmp_path, SMOLLM2, benchmark["WARM_UP"] + benchmark["STEPS"])
    row = benchmark["measure"]("a100 profile, a row a step", SMOLLM2, tmp_path)
    assert row["steps"] == benchmark["STEPS"]
    assert row["skipped_steps"] == 0
    assert row["loss"][-1] < row["loss"][0]
    assert row["tokens_per_second"] == pytest.approx(
        row["tokens_per_step"] / row["seconds_per_step"], rel=0.2
    )
