"""What a finished run prints."""

import pytest

from tabletune.cli.summary import print_findings, print_recommendation
from tabletune.errors import StageError
from tabletune.report.text import RUN_HERE
from tabletune.run.files import write_json


def test_the_recommendation_of_notebook_5_is_printed(tmp_path, capsys):
    (tmp_path / "baselines").mkdir()
    verdict = {"sentences": ["Do not fine-tune.", "Of 8 questions, …"]}
    write_json(tmp_path / "baselines" / "metrics.json", {"verdict": verdict})
    print_recommendation(tmp_path)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[:2] == verdict["sentences"]
    assert str(tmp_path / "baselines") in lines[-1]


def test_commands_name_the_run(tmp_path, capsys):
    run = tmp_path / "my run"
    (run / "baselines").mkdir(parents=True)
    verdict = {"sentences": ["Copy.", f"To ship it: `make ask {RUN_HERE} MODEL_PART=copy`."]}
    write_json(run / "baselines" / "metrics.json", {"verdict": verdict})
    print_recommendation(run)
    assert f"`make ask RUN_DIR='{run}' MODEL_PART=copy`" in capsys.readouterr().out


def test_the_findings_of_notebook_6_are_printed(tmp_path, capsys):
    (tmp_path / "trust").mkdir()
    metrics = {
        "base": {},
        "adapter": {"grounding": None},
        "memorization": ["It memorizes."],
        "shipping": ["Ship one.", "Its cost."],
        "differences": {"adapter - base": {}},
    }
    write_json(tmp_path / "trust" / "metrics.json", metrics)
    print_findings(tmp_path)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[:2] == ["It memorizes.", "Ship one."]
    assert str(tmp_path / "trust") in lines[-1]


def test_without_notebook_5_it_is_named(tmp_path):
    with pytest.raises(StageError, match="05_baselines"):
        print_recommendation(tmp_path)
