"""Links of the site: links of README and docs/ lead to pages here, else to GitHub.

A hook of mkdocs: `on_page_markdown` sees each page before it becomes HTML.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
# pages of the repository that stand under another name in the site
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def page_of(path: str, site_files: set[str]) -> str | None:
    """The site's page for a file of the repository, such as `docs/models.md`, or None."""
    executed = f"notebooks/style/{posixpath.basename(path)}"
    candidates = [MOVED.get(path), path.removeprefix("docs/")]
    if path.startswith("notebooks/"):
        candidates = [executed]
    if path.startswith("docs/") or path in MOVED or path.startswith("notebooks/"):
        return next((name for name in candidates if name in site_files), None)
    return path if path in site_files else None


def on_page_markdown(markdown: str, page, config, files) -> str:
    """The page with its links put right."""
    site_files = {file.src_uri for file in files}
    own = next((old for old, new in MOVED.items() if new == page.file.src_uri), None)
    folder = "" if own else posixpath.dirname(f"docs/{page.file.src_uri}")

    def replace(match: re.Match) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        site_page = page_of(path, site_files)
        if site_page:
            new = posixpath.relpath(site_page, posixpath.dirname(page.file.src_uri) or ".")
        elif (ROOT / path).exists():
            new = f"{config['repo_url']}/blob/main/{path}"
        else:
            return match[0]
        return match[1] + new + (f"#{anchor}" if anchor else "") + match[3]

    if page.file.src_uri.startswith(("api/", "notebooks/")):
        return markdown
    return LINK.sub(replace, markdown)
