"""For developers: what is written in one place of the repository, and copied to others.

`parameters.json` from the notebooks' parameter cells; repository, ref and runtime for Colab, and
the text of the notebooks' first code cell, from `pyproject.toml` into README, docs and notebooks.
"""

import ast
import json
import re
import tomllib
from pathlib import Path
from typing import Any

from tabletune.cli.paths import repository
from tabletune.errors import StageError
from tabletune.run.files import write_text_if_changed
from tabletune.run.parameters import read_text

REPOSITORY_NAME = r"[\w.-]+/[\w.-]+"
# pages of docs/ that notebooks link to: in Colab and in examples/ a relative link leads nowhere
LINKED_PAGES = "glossary|right-answers"
# the first line of a folded cell of parameters; Colab shows it as the cell's title
RARELY_CHANGED = "# @title Rarely changed"
PLACES = {  # {where it stands: what is written there}
    rf"(?<=colab\.research\.google\.com/github/){REPOSITORY_NAME}/blob/[\w.-]+": (
        "{repository}/blob/{ref}"
    ),
    rf"(?<=https://github\.com/){REPOSITORY_NAME}/blob/[\w.-]+(?=/docs/(?:{LINKED_PAGES})\.md)": (
        "{repository}/blob/{ref}"
    ),
    r"(?<=\n#       runtime_version: ).*": "'{colab_runtime}'",
    r"(?s)(?<=\n)# @title Install [^\n]*\nimport .*?(?=\n\n# %%)": "{install_cell}",
}


def renew_copies(repository_name: str | None) -> None:
    """Renew parameters.json, badges and install cells, for another repository if one is named.

    Raises StageError if the name is not OWNER/NAME.
    """
    home = repository()
    if repository_name:
        change_repository(home / "pyproject.toml", repository_name)
    series = tomllib.loads(read_text(home / "pyproject.toml"))["tool"]["series"]
    pages = [home / "README.md", *sorted((home / "docs").glob("*.md"))]
    notebooks = sorted((home / "notebooks_py").glob("*.py"))
    for path in [*pages, *notebooks]:
        write_text_if_changed(path, with_series(read_text(path), series))
    parameters = {path.stem: parameters_in(read_text(path)) for path in notebooks}
    text = json.dumps(parameters, indent=1, ensure_ascii=False) + "\n"
    write_text_if_changed(home / "src" / "tabletune" / "resources" / "parameters.json", text)


def change_repository(path: Path, name: str) -> None:
    """Write another repository, OWNER/NAME, into pyproject.toml.

    Raises StageError if that is no such name.
    """
    if not re.fullmatch(REPOSITORY_NAME, name):
        raise StageError(f"{name!r}: use owner/name, as on GitHub.")
    text = read_text(path)
    former = tomllib.loads(text)["tool"]["series"]["repository"]
    write_text_if_changed(path, text.replace(f'"{former}"', f'"{name}"'))


def with_series(text: str, series: dict[str, str]) -> str:
    """The text of a page or a notebook, with what pyproject.toml says of the series.

    That is the repository, the ref, Colab's runtime and the first code cell.
    """
    values = series | {"install_cell": series["install_cell"].strip().format(**series)}
    for pattern, template in PLACES.items():
        # a backslash in what is written means nothing to re
        new = template.format(**values).replace("\\", r"\\")
        text = re.sub(pattern, new, text)
    return text


def parameters_in(source: str) -> dict[str, Any]:
    """The parameters of a notebook, {name: default}.

    They stand in the cells with the tags "main-parameters" and "parameters", and in those that
    begin with RARELY_CHANGED. Papermill puts a run's settings behind the one with the tag
    "parameters", so that one is the last of them.
    """
    parameters = {}
    # jupytext's format: `# %%` and the cell's tags open a cell
    for cell in re.split(r"(?m)^# %%", source):
        head, _, body = cell.partition("\n")
        if "parameters" not in head and not body.startswith(RARELY_CHANGED):
            continue
        for line in ast.parse(body).body:
            if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                parameters[line.targets[0].id] = ast.literal_eval(line.value)
    return parameters
