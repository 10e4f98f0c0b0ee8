"""The menu of the site: pages by what a reader wants, executed notebooks, the API reference.

A hook of mkdocs: `on_config` runs before the pages are collected.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "Start": ["index.md", "questions.md", "colab.md", "own-data.md", "models.md"],
    "Right answers": ["right-answers.md", "when-to-fine-tune.md", "how-many-rows.md", "trust.md"],
    "Use": ["export.md", "parameters.md", "troubleshooting.md", "glossary.md"],
    "Hardware": ["gpus.md", "benchmarks.md", "compatibility.md"],
    "Teach and contribute": ["teaching.md", "contributing.md", "architecture.md", "changelog.md"],
}
EXAMPLES = {"style": "cpu_run", "knowledge": "knowledge_run"}


def on_config(config):
    """Set the menu. Pages that are not in PAGES stand at its end."""
    nav = [{title: list(pages)} for title, pages in PAGES.items()]
    listed = {page for pages in PAGES.values() for page in pages}
    more = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in listed]
    if more:
        nav.append({"More": more})
    for name, folder in EXAMPLES.items():
        notebooks = sorted((ROOT / "examples" / folder).glob("*.ipynb"))
        if notebooks:
            pages = [f"notebooks/{name}/{path.name}" for path in notebooks]
            nav.append({f"The notebooks, executed: {name}": pages})
    packages = sorted(path.parent for path in (ROOT / "src" / "tabletune").glob("*/__init__.py"))
    pages = ["api/index.md", *(f"api/{package.name}.md" for package in packages)]
    nav.append({"API reference": pages})
    config.nav = nav
    return config
