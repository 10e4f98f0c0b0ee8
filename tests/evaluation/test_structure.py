"""structure: is an answer the answer template, filled in?"""

import pytest

from tabletune.evaluation.structure import fixed_text, has_structure, writes_json

JSON_TEMPLATE = '{{"label": {label}}}'
LINES_OF_JSON = '{{\n  "label": {label},\n  "why": "{why}"\n}}'


@pytest.mark.parametrize(
    ("answer", "structured"),
    [
        ('{"label": 0}', True),
        ('{"label": 12}', True),
        ('{"label": }', False),
        ('{"label": zero}', False),
        ('{"label": 0', False),
        ("0", False),
        ('The answer is {"label": 0}', False),
        ('{"label": 0, "label": 1}', False),
    ],
)
def test_a_template_of_json_has_a_structure(answer, structured):
    assert has_structure(answer, JSON_TEMPLATE, "label") is structured


@pytest.mark.parametrize(
    ("answer", "structured"),
    [
        ('{\n  "label": 1,\n  "why": "It {really} is."\n}', True),
        ('{\n  "why": "It is.",\n  "label": 1\n}', False),
        ('{\n  "label": 1,\n  "why": "a "quoted" word"\n}', False),
    ],
)
def test_a_template_of_json_over_several_lines(answer, structured):
    assert has_structure(answer, LINES_OF_JSON, "label") is structured


def test_fixed_text_has_single_braces():
    assert fixed_text(JSON_TEMPLATE) == '{"label":  }'


def test_which_templates_write_json():
    assert writes_json(JSON_TEMPLATE)
    assert not writes_json("{{label}} is {label}")
    assert not writes_json("Answer: {label}")
