"""A headless Chromium that opens a page and tells what it sees."""

from __future__ import annotations

import html.parser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; `make browser` installs it as root")

_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)


class Dom(html.parser.HTMLParser):
    """The elements of a page as (tag, attributes), and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of the elements with that tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """The text, single spaces between words."""
        return " ".join(" ".join(self.words).split())

    @property
    def values(self) -> dict[str, str]:
        """What elements with data-key say."""
        return {a["data-key"]: a["data-value"] for _, a in self.elements if "data-key" in a}


def look_at(page: Path, profile: Path, *options: str) -> tuple[Dom, list[str]]:
    """The page as Chromium builds it, and what it wrote on the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "--enable-logging=stderr", *options]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        env={**os.environ, "LANG": "C.UTF-8"},
    )
    assert done.returncode == 0 and "<html" in done.stdout, done.stderr[-2000:]
    return Dom(done.stdout), re.findall(r"CONSOLE.*", done.stderr)


def overflow(page: Path, profile: Path, width: int) -> int:
    """How many pixels the page is wider than a window of `width`; measured by a script in a copy of the page."""
    text = re.sub(r"<meta http-equiv=.*?>", "", page.read_text(encoding="utf-8"))
    script = "document.body.dataset.over = document.documentElement.scrollWidth - window.innerWidth"
    copy = profile.parent / "measured.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    dom, _ = look_at(copy, profile, f"--window-size={width},800")
    return int(dom.all("body")[0]["data-over"])
