"""Notebook 02: what a step is, the loss, the adapter, checkpoints; on a small data set made
here.
"""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from conftest import TINY, run_tiny
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl import SFTConfig

from tabletune.chat.encoding import encode_all
from tabletune.chat.tokenizer import load_tokenizer_of_run
from tabletune.errors import StageError
from tabletune.evaluation.scoring import score
from tabletune.model import cuda_graphs
from tabletune.model.compat import checkpointing_name
from tabletune.model.loading import skeleton
from tabletune.model.quantization import load_base
from tabletune.training import checkpoints as checkpoints_module
from tabletune.training import examples as examples_module
from tabletune.training import planning, trainer_settings
from tabletune.training import results as results_module
from tabletune.training.checkpoints import newest_checkpoint
from tabletune.training.collator import Collator
from tabletune.training.fsdp import ShardedTraining, check_sharding
from tabletune.training.option_checks import targets_to_adapt
from tabletune.training.planning import room_for_training
from tabletune.training.room import StepPlan
from tabletune.training.trainer_settings import when_to_evaluate

FAST = {"max_length": 128, "evaluations": 2, "batch_size": 4, "report_to": "none"}


def write_dataset(run, rows=40):
    """What notebook 1 leaves: conversations of unequal length, a few of them for validation and
    test.
    """

    def row(i):
        answer = " ".join(["Drink warm water with honey"] * (1 + i % 7)) + f", {i} times."
        return {
            "prompt": [{"role": "user", "content": f"What helps against cold number {i}?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "text": "",
            "group": str(i),
        }

    splits = {
        "train": range(rows),
        "validation": range(rows, rows + 9),
        "test": range(rows + 9, rows + 15),
    }
    DatasetDict(
        {name: Dataset.from_list([row(i) for i in part]) for name, part in splits.items()}
    ).save_to_disk(run / "dataset")
    report = {
        "fingerprint": "abc",
        "templates": {"question": "", "answer": "", "answer_column": ""},
    }
    (run / "dataset" / "report.json").write_text(json.dumps(report))
    return run


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The globals of notebook 02 after it has run in this process."""
    return run_tiny("02_finetune_qlora", write_dataset(tmp_path_factory.mktemp("stage")), **FAST)


def test_the_loss_covers_the_response_and_its_stop_and_nothing_else(stage):
    """Also in packed rows, which are taken apart here by their positions; a CPU computes no
    padding for nothing.
    """
    tokenizer, answers = stage.tokenizer, []
    for batch in stage.trainer.get_train_dataloader():
        [(rows, length)] = {tuple(tensor.shape) for tensor in batch.values()}
        assert rows == len(batch["labels"])
        assert batch["position_ids"][:, -1].any()
        assert length <= stage.max_length
        parts = (batch[k].tolist() for k in ("input_ids", "labels", "position_ids"))
        for ids, labels, positions in zip(*parts, strict=True):
            starts = [i for i, position in enumerate(positions) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                if end - start == 1:  # padding
                    assert (ids[start], labels[start]) == (tokenizer.pad_token_id, -100)
                    continue
                assert ids[start] == tokenizer.bos_token_id
                assert positions[start:end] == list(range(end - start))
                in_loss = [i for i in range(start, end) if labels[i] != -100]
                assert [labels[i] for i in in_loss] == [ids[i] for i in in_loss]
                assert in_loss == list(range(in_loss[0], end)), (
                    "one stretch, to the end of the example"
                )
                assert tokenizer.decode(ids[start : in_loss[0]]).endswith("[/INST]")
                assert ids[end - 1] in stage.stops
                answers.append(ids[start:end])
    assert sorted(answers) == sorted(stage.encoded["train"]["input_ids"]), "each example once"


def test_the_adapter_is_trained_in_fp32_and_learns(stage):
    checkpoints = list((stage.run / "checkpoints").glob("checkpoint-*/adapter_model.safetensors"))
    assert {p.dtype for path in checkpoints for p in load_file(path).values()} == {torch.float32}
    trained = {n: p for n, p in stage.trainer.model.named_parameters() if p.requires_grad}
    assert all(p.abs().max() > 0 for p in trained.values()), "B starts at zero"
    metrics = json.loads((stage.run / "training" / "metrics.json").read_text())
    assert metrics == stage.metrics
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"] - 0.1
    assert metrics["steps"] == stage.plan.steps == -(-len(stage.train) // stage.plan.batch_size)
    assert metrics["tokens"] == sum(map(len, stage.encoded["train"]["input_ids"]))


def test_what_is_saved_is_the_best_checkpoint_and_says_where_it_is_from(stage):
    saved = load_file(stage.run / "adapter" / "adapter_model.safetensors")
    best = load_file(f"{stage.trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert saved.keys() == best.keys()
    provenance = json.loads((stage.run / "adapter" / "provenance.json").read_text())
    assert provenance == {
        "base_model": str(TINY),
        "base_model_revision": stage.base_model_revision,
        "quantization": "nf4",
        "dataset_fingerprint": "abc",
        "dtype": "float32",
    }
    assert load_tokenizer_of_run(stage.run / "adapter")[1] == stage.stops
    entry = json.loads((stage.run / "manifest.json").read_text())["02_finetune_qlora"]
    assert entry["parameters"]["lora_r"] == stage.lora_r
    assert entry["inputs"]["dataset"] == "abc"


def test_checkpoints_are_few_and_small(stage):
    """Two, of the adapter and its optimizer in fp32 and nothing of the base model; the tokenizer
    is the rest.
    """
    checkpoints = list((stage.run / "checkpoints").glob("checkpoint-*"))
    trainable = stage.metrics["trainable_parameters"]
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        files = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
        assert 0 <= files.pop("adapter_model.safetensors") - 4 * trainable < 2**15
        assert 0 <= files.pop("optimizer.pt") - 8 * trainable < 2**15
        assert sum(files.values()) < 2**20, files


def test_packed_rows_do_not_see_each_other(stage):
    """Loss and gradients of examples packed into rows equal those of the same examples padded,
    and leaks would show.
    """
    rows = [row for row in stage.packed if len(row["seq_lengths"]) > 1][:2]
    examples, leaking = [], []
    for row in rows:
        ends = np.cumsum(row["seq_lengths"])
        examples += [
            {name: row[name][end - n : end] for name in ("input_ids", "labels")}
            for end, n in zip(ends, row["seq_lengths"], strict=True)
        ]
        leaking.append({**row, "seq_lengths": [int(ends[-1])]})
    assert len(examples) > len(rows)
    model, collate = (
        stage.trainer.model.eval(),
        Collator(stage.tokenizer.pad_token_id, stage.max_length),
    )

    def gradient(batch):
        model.zero_grad()
        loss = model(**collate(batch)).loss
        loss.backward()
        return loss.item(), torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        )

    (loss, packed), (loss_padded, padded), (_, leaked) = map(gradient, (rows, examples, leaking))
    assert loss == pytest.approx(loss_padded, abs=1e-5)
    assert (padded - packed).norm() < 1e-4 * padded.norm()
    assert (padded - leaked).norm() > 1e-2 * padded.norm()


def test_the_validation_loss_is_a_tokens_whatever_the_batch(stage):
    """The same as all tokens' losses added up and divided once; transformers' own mean over
    batches is another.
    """
    rows, model, total, count = stage.encoded["validation"], stage.trainer.model, 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            tokens = (labels[:, 1:] != -100).sum().item()
            total, count = total + model(ids, labels=labels).loss.item() * tokens, count + tokens
    for batch_size in (1, 4, 9):
        stage.trainer.args.per_device_eval_batch_size = batch_size
        logged = len(stage.trainer.state.log_history)
        assert stage.trainer.evaluate()["eval_loss"] == pytest.approx(total / count, abs=1e-5)
        del stage.trainer.state.log_history[logged:]


def test_tokens_seen_count_no_padding(stage):
    history = json.loads((stage.run / "training" / "log_history.json").read_text())
    seen = [entry["num_input_tokens_seen"] for entry in history if "num_input_tokens_seen" in entry]
    assert seen[-1] == stage.metrics["tokens"]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]


def test_the_training_cell_twice_in_a_row_trains_once(stage):
    before = {
        name: p.clone() for name, p in stage.trainer.model.named_parameters() if p.requires_grad
    }
    checkpoint = checkpoints_module.checkpoint_to_resume(stage.trainer)
    stage.trainer.train(resume_from_checkpoint=checkpoint)
    assert stage.trainer.state.global_step == stage.plan.steps
    assert stage.trainer.state.epoch == 1
    assert all(
        torch.equal(before[name], p)
        for name, p in stage.trainer.model.named_parameters()
        if name in before
    )
    assert results_module.training_metrics(stage.trainer, 10, 1, 1.0)["epochs"] == 1


def test_a_finished_training_is_found_and_nothing_changes(stage, tmp_path, capsys):
    run = shutil.copytree(stage.run, tmp_path / "run", copy_function=shutil.copy2)
    files = times_of_files(run)
    again = run_tiny("02_finetune_qlora", run, **FAST)
    assert "All is done already: adapter, training/metrics.json" in capsys.readouterr().out
    assert again.metrics == stage.metrics
    assert times_of_files(run) == files


def times_of_files(folder):
    """When the files of a folder were changed, but for the lock that every start touches."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    "change", [{"evaluations": 1}, {"learning_rate": 0.02}, "other data"], ids=str
)
def test_another_training_moves_the_finished_one_aside(stage, tmp_path, change):
    run = shutil.copytree(stage.run, tmp_path / "run", copy_function=shutil.copy2)
    adapter = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    if change == "other data":
        report = json.loads((run / "dataset" / "report.json").read_text()) | {"fingerprint": "def"}
        (run / "dataset" / "report.json").write_text(json.dumps(report))
        change = {}
    stage_again = run_tiny("02_finetune_qlora", run, **{**FAST, **change})
    [aside] = (run / "earlier").iterdir()
    assert (aside / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (aside / "checkpoints" / "settings.json").exists()
    assert (aside / "training" / "metrics.json").exists()
    assert stage_again.metrics["steps"] == stage.plan.steps
    assert (run / "adapter" / "provenance.json").exists()


def test_checkpoints_that_are_not_whole_do_not_count(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    assert newest_checkpoint(folder) is None
    for step, state in ((5, "{}"), (10, "{}"), (15, '{"cut o')):
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (folder / "checkpoint-20").mkdir()
    assert newest_checkpoint(folder).endswith("checkpoint-10")
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-5"]


def test_rows_that_may_not_be_packed_are_not(stage, capsys, monkeypatch):
    monkeypatch.setattr(planning, "packing_leak", lambda model: 0.085)
    examples = planning.rows_to_train_on(
        stage.trainer.model, stage.encoded["train"], stage.packed, True
    )
    assert examples is stage.encoded["train"]
    assert "8.5%" in capsys.readouterr().out
    settings = trainer_settings.sft_arguments(
        stage.stage, False, torch.float32, stage.room, StepPlan(2, 1, 10), packed=False
    )
    assert settings["train_sampling_strategy"] == "group_by_length"
    batch = Collator(0, 128)([stage.encoded["train"][i] for i in range(3)])
    assert batch["attention_mask"].sum() == sum(
        len(stage.encoded["train"][i]["input_ids"]) for i in range(3)
    )


def test_a_base_that_computes_no_numbers_is_refused(stage):
    """As Gemma 3 in fp16, whose largest number is 65,504."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e7
    planning.rows_to_train_on(model, stage.encoded["train"], stage.packed, False)
    with pytest.raises(StageError, match=r'infinity or NaN in float16. Set precision to "fp32"'):
        planning.rows_to_train_on(model.half(), stage.encoded["train"], stage.packed, False)
    with pytest.raises(
        StageError, match="infinity or NaN in float16"
    ):  # and no perplexity of it is shown
        score(
            model,
            encode_all(list(stage.splits["test"]), stage.tokenizer, stage.stops),
            0,
            2,
            128,
            64,
        )


def test_a_training_that_diverges_is_stopped_and_leaves_no_adapter(tmp_path):
    """At its first validation, and before that step's checkpoint; notebook 3 takes no adapter
    without numbers.
    """
    run = write_dataset(tmp_path / "run")
    with pytest.raises(StageError, match=r"training has diverged\. Lower learning_rate, 1 now"):
        options = {"lora_alpha": 10**9, "learning_rate": 1, "max_grad_norm": 1e30, "warmup": 0}
        run_tiny("02_finetune_qlora", run, **FAST, **options)
    assert not (run / "adapter").exists()
    assert newest_checkpoint(run / "checkpoints") is None


def losses_logged(trainer, *losses, fp16=False):
    """What the trainer says of these training losses, logged one after the other."""
    args = SimpleNamespace(fp16=fp16, learning_rate=0.1)
    state = SimpleNamespace(log_history=[], global_step=5)
    watcher = SimpleNamespace(args=args, state=state)
    watcher.diverged = partial(type(trainer).diverged, watcher)
    for loss in losses:
        type(trainer).check_training_loss(watcher, loss)
        state.log_history.append({"loss": loss})


def test_a_training_loss_that_is_no_number_stops_the_training(stage):
    losses_logged(stage.trainer, 2.0, 1.5)
    with pytest.raises(StageError, match=r"training loss is nan at step 5.* Lower learning_rate"):
        losses_logged(stage.trainer, 2.0, float("nan"))


def test_with_fp16_one_loss_that_is_no_number_may_be_a_step_left_out(stage):
    losses_logged(stage.trainer, 2.0, float("inf"), 1.5, fp16=True)
    with pytest.raises(StageError, match="training loss is inf"):
        losses_logged(stage.trainer, 2.0, float("nan"), float("inf"), fp16=True)


def test_the_trainer_looks_at_each_training_loss_that_it_logs(stage):
    with pytest.raises(StageError, match="training loss is nan"):
        stage.trainer.log({"loss": float("nan")})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"precision": "bf16"}, "precision=bf16: training in half precision needs a GPU"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs a GPU"),
        ({"optim": "adam"}, "optim=adam: adam is not a valid"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type=cosin: cosin is not a valid"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "training_options: One of min_lr or min_lr_rate",
        ),
        ({"optim": "paged_adamw_32bit"}, "optim=paged_adamw_32bit: the paged optimizers"),
        ({"lora_target_modules": ["q_proj", "embed_tokens"]}, '"embed_tokens" is an embedding'),
        ({"lora_target_modules": ["no_such"]}, 'no layer is called "no_such"'),
        ({"quantization": "2bit"}, 'quantization="2bit": use nf4, 8bit or none'),
        ({"attn_implementation": "no_such"}, "attn_implementation"),
        (
            {"attn_implementation": "flash_attention_2"},
            'attn_implementation="flash_attention_2" needs a GPU',
        ),
        (
            {"attn_implementation": "flex_attention"},
            'attn_implementation="flex_attention" needs a GPU',
        ),
        ({"report_to": "wandb"}, "report_to=wandb: that package is not installed here"),
        (
            {"training_options": {"report_to": ["trackio"]}},
            "report_to=trackio: that package is not installed here",
        ),
        (
            {"training_options": {"weight_decai": 1}},
            r"SFTConfig has no 'weight_decai'\. Did you mean 'weight_decay'",
        ),
        (
            {"training_options": {"completion_only_loss": False}},
            "'completion_only_loss' would have no effect",
        ),
        ({"lora_options": {"r": 8}}, "sets 'r' itself. Set the parameter lora_r instead"),
        (
            {"training_options": {"num_train_epochs": 2}},
            "sets 'num_train_epochs' itself. Set the parameter epochs instead",
        ),
        (
            {"lora_options": {"use_rlora": True}},
            r"LoraConfig has no 'use_rlora'\. Did you mean 'use_rslora'",
        ),
        (
            {"lora_options": {"init_lora_weights": "pissa_niter_16"}},
            '"pissa_niter_16" changes the base',
        ),
        (
            {"lora_options": {"lora_bias": True}},
            "lora_options: Impossible to merge LoRA with `lora_bias=True`",
        ),
        (
            {"lora_options": {"layer_replication": [[0, 2], [1, 2]]}},
            "which the base model does not have",
        ),
        (
            {"training_options": {"metric_for_best_model": "accuracy"}},
            "can only be the validation loss",
        ),
        (
            {"training_options": {"greater_is_better": True}},
            "greater_is_better would keep the checkpoint with the largest loss",
        ),
        (
            {"training_options": {"eval_strategy": "sometimes"}},
            "training_options: sometimes is not a valid",
        ),
        (
            {
                "early_stopping_patience": 2,
                "training_options": {"eval_strategy": "no", "load_best_model_at_end": False},
            },
            "early_stopping_patience needs evaluations",
        ),
        (
            {"early_stopping_patience": 2, "training_options": {"load_best_model_at_end": False}},
            "early_stopping_patience needs a metric_for_best_model",
        ),
        ({"training_options": {"use_liger_kernel": True}}, "use_liger_kernel needs a GPU"),
        ({"max_length": 20}, "max_length=20, but the longest example has"),
        ({"batch_size": "few"}, "batch_size='few'"),
    ],
)
def test_what_cannot_work_stops_before_the_model_is_loaded(stage, monkeypatch, parameters, message):
    monkeypatch.setattr("tabletune.model.quantization.load_base", None)
    with pytest.raises(StageError, match=message):
        run_tiny("02_finetune_qlora", stage.run, **{**FAST, **parameters})


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [5]}]
)
def test_what_changes_a_tied_layer_is_refused_before_training(options):
    """It could be trained, but not merged; where nothing is tied, it can."""
    chosen = {
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": "auto",
        "lora_options": options,
    }
    config = AutoConfig.from_pretrained(TINY, tie_word_embeddings=False)
    assert len(targets_to_adapt(chosen, skeleton(config))) == 4 * config.num_hidden_layers
    config = AutoConfig.from_pretrained(TINY, tie_word_embeddings=True)
    with pytest.raises(
        StageError, match=r"would change model\.embed_tokens, which is tied to another layer"
    ):
        targets_to_adapt(chosen, skeleton(config))


@pytest.mark.parametrize(
    ("options", "strategy", "every"),
    [
        ({}, "steps", 7),
        ({"save_steps": 3}, "steps", 3),
        ({"eval_steps": 2, "save_steps": 4}, "steps", 2),
        ({"eval_strategy": "epoch"}, "epoch", 7),
        ({"save_strategy": "no"}, "no", 7),
        ({"save_strategy": "best"}, "steps", 7),
    ],
)
def test_a_word_on_evaluation_is_one_on_checkpoints(options, strategy, every):
    told = when_to_evaluate(options, 7)
    assert told == dict(
        eval_strategy=strategy, save_strategy=strategy, eval_steps=every, save_steps=every
    )
    SFTConfig(**told | options, load_best_model_at_end=True, use_cpu=True, bf16=False)


def test_more_than_plain_lora_on_a_base_stored_in_4_bits_is_refused_before_training():
    chosen = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": "auto"}
    config = AutoConfig.from_pretrained(TINY)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert targets_to_adapt(chosen | {"lora_options": {"use_rslora": True}}, skeleton(config))
    with pytest.raises(StageError, match="stored in 4 bits, and only plain LoRA"):
        targets_to_adapt(chosen | {"lora_options": {"use_dora": True}}, skeleton(config))


def test_options_that_leave_out_logs_and_the_choice_of_a_checkpoint(tmp_path):
    """The notebook ends all the same: with the loss of all steps, and with a validation at the
    end.
    """
    options = {
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_steps": 500,
    }
    run_tiny("02_finetune_qlora", write_dataset(tmp_path / "run"), **FAST, training_options=options)
    metrics = json.loads((tmp_path / "run" / "training" / "metrics.json").read_text())
    assert metrics["eval_loss_after"] < metrics["eval_loss_before"]
    assert metrics["loss_first"] == metrics["loss_last"]


def test_activations_are_kept_where_a_model_cannot_recompute_them(stage, monkeypatch, capsys):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    room = room_for_training({**stage.stage.parameters, "gradient_checkpointing": True}, stage.config, torch.float32,
                             "auto", 40, stage.processes)  # fmt: skip
    assert "LlamaForCausalLM does not support gradient checkpointing" in capsys.readouterr().out
    settings = trainer_settings.sft_arguments(
        stage.stage, False, torch.float32, room, StepPlan(2, 1, 10), packed=True
    )
    assert settings[checkpointing_name()] is False


def test_recorded_layers_accumulate_and_take_fewer_rows(monkeypatch):
    """As the usual ones; a graph here is a function that leaves its gradients in the same memory
    each time.
    """
    replayed = []

    def graphed(layers, inputs, num_warmup_iters):
        parameters = [p for p in layers.parameters() if p.requires_grad]
        left = [torch.zeros_like(p) for p in parameters]

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx, ids, positions, *_):
                replayed.append((ids.shape, positions.shape))
                with torch.enable_grad():
                    ctx.output = layers(ids, positions)
                return ctx.output.detach()

            @staticmethod
            def backward(ctx, gradient):
                for memory, new in zip(
                    left, torch.autograd.grad(ctx.output, parameters, gradient), strict=True
                ):
                    memory.copy_(new)
                return None, None, *(memory.detach() for memory in left)

        return lambda ids, positions: Graph.apply(ids, positions, *parameters)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    model = AutoModelForCausalLM.from_pretrained(TINY)
    ids, positions = torch.arange(3, 227).view(7, 32), torch.arange(32).remainder(20).repeat(7, 1)

    def gradients():
        model.zero_grad()
        losses = []
        for part in (slice(4), slice(4, 7)):
            batch = {"input_ids": ids[part], "labels": ids[part], "position_ids": positions[part]}
            losses.append(model(**batch, use_cache=False).loss)
            losses[-1].backward()
        return [loss.item() for loss in losses], torch.cat(
            [p.grad.flatten() for p in model.parameters()]
        )

    losses, usual = gradients()
    take_out = cuda_graphs.graph_layers(model.model, (4, 32))
    losses_recorded, recorded = gradients()
    assert replayed == [((4, 32), (4, 32))] * 2
    take_out()
    assert torch.equal(gradients()[1], usual)
    assert len(replayed) == 2
    assert losses_recorded == pytest.approx(losses, abs=1e-6)
    assert (recorded - usual).norm() < 1e-5 * usual.norm()


def test_a_graph_of_layers_goes_when_the_training_ends():
    """Whatever the training recorded is taken out, once; without a recording nothing happens."""
    taken_out = []
    callback = cuda_graphs.CudaGraphCallback()
    callback.on_train_end(None, None, None)
    callback.take_out = lambda: taken_out.append(True)
    callback.on_train_end(None, None, None)
    callback.on_train_end(None, None, None)
    assert taken_out == [True]


def test_a_published_data_set_is_as_good_as_notebook_1s_folder(stage, tmp_path, monkeypatch):
    published = datasets.load_from_disk(stage.run / "dataset")
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"some-one/set": published}[name])
    splits, report = examples_module.load_examples(tmp_path, "some-one/set", PartialState(cpu=True))
    assert splits["train"].to_list() == published["train"].to_list()
    assert report["published"] == "some-one/set"
    assert report["fingerprint"]
    assert report["splits"] == {name: len(rows) for name, rows in published.items()}
    for other in (
        published.rename_column("prompt", "question"),
        DatasetDict(train=published["train"]),
    ):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, other=other: other)
        with pytest.raises(StageError, match="published_dataset=some-one/set lacks"):
            examples_module.load_examples(
                tmp_path / "other", "some-one/set", PartialState(cpu=True)
            )
    assert not (tmp_path / "other" / "dataset").exists()


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}], ids=str)
def test_options_reach_lora_and_the_trainer(tmp_path, options):
    more = {
        "weight_decay": 0.01,
        "neftune_noise_alpha": 5,
        "max_steps": 2,
        "eval_steps": 1,
        "save_steps": 1,
    }
    run = write_dataset(tmp_path, rows=12)
    stage = run_tiny("02_finetune_qlora", run, **FAST, lora_options=options, training_options=more)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert all(config[name] == value for name, value in options.items())
    assert stage.trainer.args.weight_decay == 0.01
    assert stage.metrics["steps"] == 2
    assert stage.metrics["eval_loss_after"] < stage.metrics["eval_loss_before"]


def test_a_process_takes_one_gpu_however_many_there_are(stage):
    """Seen with two: batches of twice `batch_size`, and twice the loss."""
    assert stage.trainer.args.n_gpu == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_base_that_is_to_be_sharded_computes_the_same(dtype):
    """FSDP shards floating-point numbers only; accelerate would leave others whole on each GPU,
    without an error.

    16-bit ones it would change on a GPU: tests/series/test_gpu.py.
    """
    ids = torch.arange(20)[None]
    usual, sharded = (load_base(str(TINY), None, dtype, sharded=choice) for choice in (False, True))
    with torch.no_grad():
        assert torch.equal(usual(ids).logits, sharded(ids).logits)


def test_a_sharded_training_asks_for_each_layer_ahead_of_time():
    """In the order in which they compute, and in the stream that does."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        units = [
            fully_shard(unit) for unit in (model.model.embed_tokens, *model.model.layers, model)
        ]
        ShardedTraining().on_train_begin(None, None, None, model=model)
        *states, outermost = (unit._get_fsdp_state() for unit in units)
        assert [state._states_to_forward_prefetch for state in (outermost, *states)] == [
            *([s] for s in states),
            [],
        ]
        assert all(group.unshard_async_op for state in states for group in state._fsdp_param_groups)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("stored", "optim", "processes", "message"),
    [
        (
            None,
            "paged_adamw_32bit",
            "2",
            "optim=paged_adamw_32bit: the optimizers of bitsandbytes cannot be divided among GPUs",
        ),
        ("uint8", "adamw_torch", "2", "stores its 4-bit weights as uint8, which FSDP cannot shard"),
        (
            None,
            "adamw_torch",
            "1000",
            r"Reading the model takes 1000\.0 GiB of RAM before it is sharded",
        ),
        ("float32", "adamw_torch", "1000", None),
    ],
)
def test_what_cannot_be_sharded_is_refused(monkeypatch, stored, optim, processes, message):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    config = SimpleNamespace(
        quantization_config={"bnb_4bit_quant_storage": stored} if stored else None
    )
    if message is None:
        return check_sharding(config, "some-base", optim, 1.0)
    with pytest.raises(StageError, match=message):
        check_sharding(config, "some-base", optim, 1.0)
