"""What a job's process is robust against: terminals and locales without UTF-8, readers that leave, closed descriptors.

In real processes. The probes load neither torch nor Ray.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_diffsynth.console import open_stream, prepare_process

ROOT = Path(__file__).resolve().parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}

PROBE = """
import logging, sys
sys.path.insert(0, {root!r})
from ray_diffsynth.cli import main
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.progress import Progress

def run(config):
    print("Käfer ● 猫", config.output_path)
    logging.getLogger("ray_diffsynth").info("log ● 猫")
    with Progress("train", total=1) as progress:
        progress.advance(1, caption="● 猫")
    for _ in range(2000):
        print("x" * 80, file=sys.stderr)
        print("x" * 80)
    open({done!r}, "w").write("all of the work was done")
    open("Küche.txt", "x", encoding="utf-8").close()

raise SystemExit(main(TrainConfig, run))
"""


def command(folder: Path) -> list[str]:
    script = folder / "job.py"
    script.write_text(PROBE.format(root=str(ROOT), done=str(folder / "done")), encoding="utf-8")
    return [sys.executable, str(script), "--model", "m", "--dataset_base_path", "d", "--output_path", "Bücher/猫"]


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    return {**kept, **changes}


@pytest.mark.parametrize(
    "changes", [ASCII, {"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_a_terminal_without_utf8(changes: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), cwd=tmp_path, env=environment(**changes), capture_output=True)
    assert done.returncode == 0, done.stderr
    ascii_only = "ascii" in changes.get("PYTHONIOENCODING", "")
    cat = b"\\u25cf \\u732b" if "PYTHONIOENCODING" in changes else "● 猫".encode()
    assert (b"K\\xe4fer " if ascii_only else b"fer ") + cat in done.stdout
    assert b"log " + cat in done.stderr and b"caption " + cat in done.stderr
    assert (tmp_path / "Küche.txt").is_file(), "a file's name is UTF-8 whatever the terminal is"


def test_a_message_on_an_ascii_terminal(tmp_path: Path) -> None:
    words = [*command(tmp_path), "--dataset", "猫"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(**ASCII), capture_output=True)
    assert done.returncode == 2 and b"--dataset is not an option" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "closing", ["2>{log} | head -n 1", "2>&1 | head -n 1", ">&- 2>{log}", ">&- 2>&-", "<&- >{log}"]
)
def test_output_that_nobody_reads_does_not_end_the_work(closing: str, tmp_path: Path) -> None:
    line = f'"$@" {closing.format(log=tmp_path / "log")}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", line, "bash", *command(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True)
    log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").read_text() == "all of the work was done"
    assert "Broken" not in log + done.stderr.decode() and "Error" not in log + done.stderr.decode()


def test_help_into_a_pipe_that_ends(tmp_path: Path) -> None:
    line = '"$@" --help | head -n 1; exit ${PIPESTATUS[0]}'
    words = ["bash", "-c", line, "bash", sys.executable, str(ROOT / "jobs" / "train.py")]
    done = subprocess.run(words, env=environment(**ASCII), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.startswith(b"usage: train.py")


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(path: str) -> str:
        return path.replace("~", os.environ["HOME"]) if "HOME" in os.environ else path

    monkeypatch.setattr(os.path, "expanduser", nowhere)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("HOME")
    prepare_process()
    assert os.environ["HOME"] == str(tmp_path / f"home-{os.getuid()}") and os.path.isdir(os.environ["HOME"])
    assert os.stat(os.environ["HOME"]).st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.delenv("HOME")
    (tmp_path / "home-12345").mkdir()
    prepare_process()
    assert os.environ["HOME"] not in ("", str(tmp_path / "home-12345")), "a folder of someone else is not taken"


def test_streams_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own, notebook = io.StringIO(), io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", own)
    monkeypatch.setattr(sys, "stderr", notebook)
    prepare_process()
    assert sys.stdout is own and sys.stderr is notebook


def test_a_full_disk_is_no_reader_that_left() -> None:
    with pytest.raises(OSError, match="No space left"):
        print("text", file=open_stream(os.open("/dev/full", os.O_WRONLY), "utf-8"))
