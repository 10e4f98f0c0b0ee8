"""Every kind of base model through notebooks 1 to 4: it works to the end, or is refused before
anything long.
"""

import json

import pytest
from base_models import BASES, CHEAP, cached
from conftest import run_script

from tabletune.errors import StageError
from tabletune.run.parameters import PARAMETERS

SETTINGS = {
    "max_length": 256,
    "lora_r": 4,
    "batch_size": 4,
    "learning_rate": 0.01,
    "optim": "adamw_torch",
    "gradient_checkpointing": False,
    "use_liger_kernel": False,
    "report_to": "none",
    "evaluations": 1,
    "eval_batch_size": 16,
    "samples": 2,
    "max_new_tokens": 4,
    "bootstrap_samples": 100,
    "base_model_revision": "",
}
STAGES = ["01_format_dataset", "02_finetune_qlora", "03_merge_adapter", "04_evaluate"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Forty questions with an answer each."""
    path = tmp_path_factory.mktemp("table") / "trams.jsonl"
    rows = [
        {"question": f"Where does tram {i} go?", "answer": f"To stop {7 * i % 30}, past the mill."}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def go_through(name, table, run, **changed):
    """Run the four notebooks in this process. Returns the content of `evaluation/metrics.json`."""
    chosen = {
        **SETTINGS,
        "base_model": str(cached(name)),
        "dataset": str(table),
        "run_dir": str(run),
        **changed,
    }
    for stage in STAGES:
        run_script(
            stage, **{key: value for key, value in chosen.items() if key in PARAMETERS[stage]}
        )
    return json.loads((run / "evaluation" / "metrics.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in CHEAP else pytest.mark.slow)
        for name in BASES
        if name != "beyond"
    ],
)
def test_a_base_goes_through_the_series(name, table, tmp_path):
    """It learns, the merged model is proven, and three models are scored."""
    check(go_through(name, table, tmp_path), tmp_path)


@pytest.mark.parametrize(
    "chosen",
    [
        {"lora_options": {"use_rslora": True}},
        {"lora_options": {"use_dora": True}},
        {"quantization": "none", "training_options": {"neftune_noise_alpha": 5, "max_steps": 6}},
        {"base_weights": "dequantized", "lora_target_modules": "all-linear"},
    ],
    ids=["rslora", "dora", "plain lora, neftune", "dequantized"],
)
def test_options_go_through_the_series(chosen, table, tmp_path):
    check(go_through("llama_tied", table, tmp_path, **chosen), tmp_path)


def check(metrics, tmp_path):
    """A run learned something, its merged model was proven, and the three models were scored."""
    trained = json.loads((tmp_path / "training" / "metrics.json").read_text())
    assert trained["eval_loss_after"] < trained["eval_loss_before"]
    merged = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert merged["max_logit_difference"] < 0.1 * merged["logit_range"]
    perplexities = {
        model: metrics[model]["perplexity"]["response"] for model in ("base", "adapter", "merged")
    }
    assert perplexities["adapter"] < perplexities["base"]
    assert perplexities["merged"] == pytest.approx(perplexities["adapter"], rel=0.1)


def test_tokens_beyond_the_embeddings_are_refused_by_notebook_1(table, tmp_path):
    with pytest.raises(StageError, match="has no row among the model's"):
        go_through("beyond", table, tmp_path)
    assert not (tmp_path / "dataset").exists()
