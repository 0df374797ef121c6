"""What the site has beside the pages of docs/: the README as its first page, and each file that a page links to.

Links are written so that they work where the repository is shown. Here those that lead out of docs/ lead to a page with
that file: Markdown as it is, anything else as code.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".sh": "sh", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}
FIRST = {"README.md": "index.md", "configs/README.md": "project/configs.md", "CHANGELOG.md": "project/changelog.md"}
"""Files of the repository that have a page although no page links to them."""

_pages: dict[str, str] = {}
"""File of the repository -> its page in the site."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that is reached by links."""
    root = Path(config.config_file_path).parent
    _pages.clear()
    _pages.update({f"docs/{file.src_uri}": file.src_uri for file in files})
    own = [source for source in _pages if source.endswith(".md")]
    _pages.update(FIRST)
    waiting = [*own, *FIRST]
    while waiting:
        for target in _targets(root, waiting.pop()):
            if target not in _pages and (root / target).is_file():
                _pages[target] = _place(target)
                if target.endswith(".md"):
                    waiting.append(target)
    for source, uri in _pages.items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, uri, content=_content(root / source, source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links between files of the repository links between pages."""
    uri = page.file.src_uri
    source = next(source for source, place in _pages.items() if place == uri)

    def in_site(link: str) -> str:
        place = _pages.get(_resolved(source, link))
        return link if place is None else posixpath.relpath(place, posixpath.dirname(uri) or ".")

    return _outside_code(markdown, lambda text: LINK.sub(lambda found: in_site(found[1]), text))


def _targets(root: Path, source: str) -> list[str]:
    """The files of the repository that a page links to."""
    found: list[str] = []
    text = (root / source).read_text(encoding="utf-8")
    _outside_code(text, lambda part: found.extend(LINK.findall(part)) or part)
    return [_resolved(source, link) for link in found if "://" not in link]


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _place(target: str) -> str:
    """CONTRIBUTING.md -> project/contributing.md; ray_diffsynth/cli.py -> source/ray_diffsynth/cli.py.md."""
    if target.endswith(".md"):
        name = target.removesuffix("/README.md").removesuffix(".md")
        return f"project/{name.lower()}.md"
    return f"source/{target.lstrip('.')}.md"


def _content(path: Path, source: str) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    fence = "`" * (max(map(len, re.findall("`+", text)), default=2) + 1)
    return f"# `{source}`\n\n{max(fence, '```')}{LANGUAGES.get(path.suffix, 'text')}\n{text}{max(fence, '```')}\n"


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    parts = FENCED.split(markdown)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))
