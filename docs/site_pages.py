"""What the site (`make docs`) has beside the pages in docs/: README as its first page, and others.

MkDocs calls these functions by their names (`hooks` in mkdocs.yml).
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "log.md": "LOG.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages whose files lie in the project's root, by their names in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the root."""
    for page, name in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links between files of the project into links between pages of the site."""
    for page, name in ELSEWHERE.items():
        markdown = re.sub(rf"\]\((\.\./)?{re.escape(name)}(?=[)#])", f"]({page}", markdown)
    return markdown.replace("](docs/", "](")
