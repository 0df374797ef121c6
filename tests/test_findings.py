"""The findings are whole: listed, pinned, independent of this project. They are not run: that needs the network."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "findings"
FINDINGS = sorted(path for path in FOLDER.glob("*.sh") if path.name != "lib.sh")


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_says_what_it_shows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = text.partition('. "$(dirname')[0]
    for part in ("# Guess: ", "# What happens: ", "# Seen: "):
        assert part in head
    packages = re.findall(r"^install (.+)$", text, re.MULTILINE)
    assert packages and all(re.fullmatch(r'"?[\w\[\],-]+==[\w.]+"?', word) for word in " ".join(packages).split())
    named = re.search(r"# (\w[\w ]*?) (\d[\d.]*\d):", head)
    assert named and f"=={named[2]}" in text, "the version of the first line is that which is installed"
    assert "ray_diffsynth" not in text and "assert " in text
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_table_lists_them_all() -> None:
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.sh\)", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _ in listed] == [path.stem for path in FINDINGS] and all(a == b for a, b in listed)
    assert len(FINDINGS) >= 4
