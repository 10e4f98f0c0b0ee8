"""The environments of `make test-newest` and `make test-colab`."""

from importlib.metadata import version

import pytest
from library_sets import colab, installed_versions, newest, requirements

PINS = """
# models and data
torch==2.13.0
transformers==5.13.1
liger-kernel==0.8.5; sys_platform == "linux"  # GPU kernels
numpy==2.0.2; python_version < "3.13"
numpy==2.1.3; python_version == "3.13"
numpy==2.3.5; python_version > "3.13"
pytest==8.4.2

# what these bring in, so that a machine set up next year is the same
huggingface_hub==1.23.0
setuptools==84.2.1
-e .
"""
RUNTIME = "# Python 3.13.15\ntransformers==5.15.0\nhuggingface-hub==1.27.0\nsetuptools==75.2.0\n"


@pytest.mark.parametrize(
    ("python", "number"), [((3, 11), "2.0.2"), ((3, 13), "2.1.3"), ((3, 14), "2.3.5")]
)
def test_the_line_for_a_python_counts(python, number):
    assert ("numpy", number, "") in requirements(PINS, python)


def test_newest_frees_what_is_asked_for_and_leaves_the_rest_to_pip():
    assert newest(PINS, (3, 11)) == [
        "torch==2.13.0",
        "transformers",
        'liger-kernel; sys_platform == "linux"',
        "numpy",
        "pytest==8.4.2",
    ]


def test_colab_has_the_versions_of_the_runtime():
    assert colab(PINS, RUNTIME, (3, 11)) == [
        "torch==2.13.0",
        "transformers==5.15.0",
        'liger-kernel==0.8.5; sys_platform == "linux"',
        "numpy==2.0.2",
        "pytest==8.4.2",
        "huggingface_hub==1.27.0",
        "setuptools==84.2.1",
    ]


def test_what_an_environment_has_is_one_line():
    line = installed_versions()
    assert f"transformers {version('transformers')}, peft {version('peft')}, " in line
    assert "\n" not in line
