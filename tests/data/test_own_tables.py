"""The five tables of docs/own-data.md."""

import re
from collections import Counter

import pytest
from conftest import ROOT, TINY
from table_helpers import formatted, pairs

from tabletune.run.parameters import PARAMETERS, read_profile


@pytest.mark.parametrize(
    ("name", "shape", "rows"),
    [("code", "instruction", 26), ("chat", "messages", 22), ("classification", "columns", 48),
     ("long_answers", "instruction", 20), ("hindi", "instruction", 30)],
)  # fmt: skip
def test_own_tables_come_out_as_documented(tmp_path, monkeypatch, name, shape, rows):
    monkeypatch.chdir(ROOT)
    profile = read_profile(ROOT / "examples" / "own_tables" / f"{name}.yaml")
    known = {key: value for key, value in profile.items() if key in PARAMETERS["01_format_dataset"]}
    source = ROOT / known.pop("dataset")
    report, splits = formatted(
        tmp_path, source, **{**known, "base_model": str(TINY), "max_length": 2000}
    )
    assert report["shape"] == shape
    assert report["example"] is None
    assert not report["changed"]
    assert report["rows_in"] == report["rows_out"] == rows
    answers = [answer for _, answer in pairs(splits)]
    if name == "code":
        for answer in answers:
            compile(re.search("```python\n(.*?)\n```", answer, re.DOTALL)[1], name, "exec")
    if name == "classification":
        assert Counter(answers) == {"repair": 12, "order": 12, "invoice": 12, "none": 12}
    if name == "chat":
        assert {prompt[0]["role"] for split in splits.values() for prompt, _ in split} == {"system"}
    if name == "long_answers":
        assert min(len(answer.split()) for answer in answers) > 140
