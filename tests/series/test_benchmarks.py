"""What the benchmarks compare, and how they make one figure of several runs. They need a GPU to run."""

import runpy
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def benchmark():
    """The names of benchmarks/run.py."""
    before = list(sys.path)
    yield runpy.run_path(str(ROOT / "benchmarks" / "run.py"))
    sys.path[:] = before


@pytest.fixture(scope="module")
def whole_job(benchmark):
    """The module benchmarks/whole_job.py."""
    return sys.modules["whole_job"]


ADAPTERS = ["", ", all-linear r 16", ", all-linear r 64"]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        ("a100 profile, 39 GiB", "Unsloth 12 x 512, 39 GiB"),
        (
            "t4 profile, 14.5 GiB, fp16",
            "Unsloth 8 x 512, 14.5 GiB, fp16, its checkpointing",
        ),
    ],
)
def test_both_sides_train_the_same_adapter_in_the_same_memory(benchmark, ours, peer, adapter):
    engine, limit, settings = benchmark["ROWS"][ours + adapter]
    peer_engine, peer_limit, peer_settings = benchmark["ROWS"][peer + adapter]
    assert (engine, peer_engine) == ("notebook", "unsloth")
    assert limit == peer_limit
    assert settings.get("lora_r", 64) == peer_settings["lora_r"]
    layers = "ALL_LINEAR" if settings.get("lora_target_modules") else "ATTENTION"
    assert peer_settings["targets"] == benchmark[layers]


@pytest.mark.parametrize("adapter", ADAPTERS[:2])
@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        ("whole job, a100 profile, 39 GiB", "whole job, Unsloth, 39 GiB"),
        ("whole job, t4 profile, 14.5 GiB, fp16", "whole job, Unsloth, 14.5 GiB, fp16"),
    ],
)
def test_whole_jobs_of_both_sides_have_the_same_adapter(benchmark, ours, peer, adapter):
    _, limit, settings = benchmark["JOBS"][ours + adapter]
    _, peer_limit, peer_settings = benchmark["JOBS"][peer + adapter]
    assert limit == peer_limit
    assert settings.get("lora_r", 64) == peer_settings.get("lora_r", 64)
    of_all = settings.get("lora_target_modules") == "all-linear"
    assert of_all == (peer_settings.get("targets") == benchmark["ALL_LINEAR"])


def test_the_median_of_several_runs_counts(benchmark):
    runs = [{"rate": 3, "peak": 1}, {"error": "out of memory"}, {"rate": 1}, {"rate": 2, "peak": 5}]
    assert benchmark["middle"](runs, "rate") == {"rate": 2, "peak": 5, "runs": [1, 2, 3]}


def test_runs_that_all_failed_stay_an_error(benchmark):
    assert benchmark["middle"]([{"error": "a"}, {"error": "b"}], "rate") == {"error": "b"}


def test_a_row_shows_the_spread_of_its_runs(benchmark):
    result = {
        "tokens_per_second": 2000,
        "runs": [1000, 2000, 4000],
        "peak_gib": 11.04,
        "expected_gib": 12.0,
        "of_limit": 0.5,
    }
    last = benchmark["table"]({"a row": result}).splitlines()[-1]
    assert last == "| a row | 2,000 (1,000 to 4,000) | 11.0 (12.0 expected) | 50% |"


def test_a_stage_lasts_until_the_next_one_begins(whole_job):
    seconds = whole_job.seconds_of_stages({"one": 10.0, "two": 14.0, "three": 20.0}, 21.0)
    assert seconds == {"one": 4.0, "two": 6.0, "three": 1.0}


def test_a_whole_job_is_the_command_that_make_calls(whole_job):
    settings = {"profile": "a100", "lora_r": 16}
    command = whole_job.run_all_command(settings, "a model", "a run")
    assert command[1:7] == ["-m", "tabletune", "run-all", "a run", "--profile", "a100"]
    assert '"lora_r": 16' in command[-1]


@pytest.mark.slow
def test_a_whole_job_tells_the_seconds_of_each_notebook(whole_job, tmp_path):
    """With the tiny profile, on any machine."""
    base = ROOT / ".cache" / "tiny-llama"
    log = tmp_path / "log.txt"
    result = whole_job.run_all({"profile": "tiny"}, 1.0, base, tmp_path / "run", log)
    assert list(result["seconds"]) == whole_job.STAGES
    assert all(seconds > 1 for seconds in result["seconds"].values())
    assert "04_evaluate" in log.read_text(encoding="utf-8")
