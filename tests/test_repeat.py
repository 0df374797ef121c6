"""The script that runs tests again and again: what it counts, and that nothing stops it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import repeat

pytestmark = pytest.mark.slow

FLAKY = """
import os
from pathlib import Path
import pytest

ROUND = Path(__file__).with_suffix(".rounds")

def test_a_first():
    with ROUND.open("a") as file:
        file.write(".")

def test_b_fails_once():
    assert len(ROUND.read_text()) != 1

@pytest.mark.skip
def test_c_skipped():
    pass

def test_d_ends_its_process_once():
    if len(ROUND.read_text()) == 2:
        os._exit(1)

def test_e_last():
    pass
"""


def test_every_round_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_flaky.py"
    file.write_text(FLAKY)
    code = repeat.main(["--times", "3", "--busy", "1", "--logs", str(tmp_path / "logs"), str(file)])
    said = capsys.readouterr().out
    assert code == 1
    lines = [line for line in said.splitlines() if "::" in line or line.startswith("    ")]
    logs = tmp_path / "logs"
    assert [line.partition("  ")[0] + line[line.find("::") :] if "::" in line else line.strip() for line in lines] == [
        "3 passed, 0 failed::test_a_first",
        "0 passed, 0 failed, 3 skipped::test_c_skipped",
        "2 passed, 0 failed::test_e_last",
        "2 passed, 1 failed::test_b_fails_once",
        str(logs / "001.log"),
        "2 passed, 1 failed::test_d_ends_its_process_once",
        str(logs / "002.log"),
    ]
    assert "assert len(ROUND.read_text()) != 1" in (logs / "001.log").read_text()


def test_nothing_collected_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert repeat.main(["--times", "1", "--logs", str(tmp_path), str(tmp_path / "absent.py")]) == 1
    assert f"(the round itself, exit code 4)\n    {tmp_path / '001.log'}" in capsys.readouterr().out


def test_all_passed_is_zero(tmp_path: Path) -> None:
    (tmp_path / "test_fine.py").write_text("def test_fine():\n    pass\n")
    assert repeat.main(["--times", "1", "--logs", str(tmp_path), str(tmp_path / "test_fine.py")]) == 0
