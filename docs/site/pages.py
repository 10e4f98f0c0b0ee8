"""Pages of the site that stand elsewhere or are generated: run by the mkdocs plugin gen-files.

- `index.md` is README.md;
- `notebooks/` are the executed notebooks of examples/, outputs included;
- `api/` has one page for each package, made from its docstrings.
"""

import json
import re
from pathlib import Path

import mkdocs_gen_files
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {"style": "cpu_run", "knowledge": "knowledge_run"}

# code in Markdown, between any number of backticks, or else a formula between dollar signs
CODE_OR_FORMULA = re.compile(r"(`+).+?\1|\$(\S|\S[^$`]*\S)\$", re.DOTALL)
# a badge of Colab is a picture from the network, which a page on the disk may not have
BADGE = re.compile(rb"!\[Open in Colab\](\[badge\]|\(https://[^)]*\))")


def with_folded_cells(content: bytes) -> bytes:
    """A notebook in which the cells that JupyterLab folds are folded, too: their title is shown."""
    notebook = json.loads(content)
    for cell in notebook["cells"]:
        is_folded = cell["metadata"].get("jupyter", {}).get("source_hidden")
        if not is_folded or cell.get("outputs"):
            continue
        code = "".join(cell["source"])
        title = code.partition("\n")[0].removeprefix("# @title").strip()
        text = f"<details><summary>{title}</summary>\n\n```python\n{code}\n```\n\n</details>"
        cell.update(cell_type="markdown", source=text)
        for name in ("outputs", "execution_count"):
            cell.pop(name, None)
    return json.dumps(notebook).encode()


def with_mathml(text: str) -> str:
    """Markdown with its formulas in MathML, which browsers show without a script from elsewhere."""
    return CODE_OR_FORMULA.sub(lambda found: convert(found[2]) if found[2] else found[0], text)


def with_formulas(content: bytes) -> bytes:
    """A notebook whose formulas are in MathML."""
    notebook = json.loads(content)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_mathml("".join(cell["source"]))
    return json.dumps(notebook).encode()


def add_file(source: Path, target: str) -> None:
    """Put a file of the repository into the site under another name."""
    content = source.read_bytes()
    if source.suffix == ".ipynb":
        content = with_folded_cells(with_formulas(content))
    if source.suffix in (".md", ".ipynb"):
        content = BADGE.sub(b"Open in Colab", content)
    with mkdocs_gen_files.open(target, "wb") as file:
        file.write(content)


add_file(ROOT / "README.md", "index.md")
add_file(ROOT / "CHANGELOG.md", "changelog.md")
add_file(ROOT / "CONTRIBUTING.md", "contributing.md")
add_file(ROOT / "docs" / "site" / "site.css", "assets/site.css")

for name, folder in EXAMPLES.items():
    for notebook in sorted((ROOT / "examples" / folder).glob("*.ipynb")):
        add_file(notebook, f"notebooks/{name}/{notebook.name}")

for image in [*(ROOT / "examples").rglob("*.png"), *(ROOT / "benchmarks").glob("*.png")]:
    add_file(image, image.relative_to(ROOT).as_posix())

packages = sorted(path.parent for path in (ROOT / "src" / "tabletune").glob("*/__init__.py"))
overview = ["# API reference", "", "Made from the docstrings, one page for each package.", ""]
for package in packages:
    modules = [path for path in sorted(package.glob("*.py")) if path.stem != "__init__"]
    lines = [f"# tabletune.{package.name}", ""]
    for module in modules:
        lines += [f"::: tabletune.{package.name}.{module.stem}", ""]
    overview.append(f"- [`tabletune.{package.name}`]({package.name}.md)")
    with mkdocs_gen_files.open(f"api/{package.name}.md", "w") as file:
        file.write("\n".join(lines))
with mkdocs_gen_files.open("api/index.md", "w") as file:
    file.write("\n".join(overview) + "\n")
