"""An output_path in which nothing can be written is refused before any work is done, with the reason."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ray_diffsynth.cli import main
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.output_path import check_output_path


def refusal(path: str | Path) -> str:
    with pytest.raises(ConfigError) as refused:
        check_output_path(str(path))
    return str(refused.value)


def test_what_can_be_made_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "a" / "b" / "c", tmp_path / "link" / "a", f"file://{tmp_path}/a"):
        check_output_path(str(path))
    for url in ("s3://bucket/a", "memory://a", "gs://bucket"):
        check_output_path(url)


def test_files_in_the_place_of_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert "is a file; give a folder" in refusal(tmp_path / "file")
    assert f"{tmp_path / 'file'} is a file, in which no folder can be made" in refusal(tmp_path / "file" / "a" / "b")
    assert "is a link that leads nowhere" in refusal(tmp_path / "dangling")
    assert "is a link that leads nowhere" in refusal(tmp_path / "round" / "a")


@pytest.mark.parametrize(("path", "told"), [("", "is empty"), (" ", "is empty"), ("a\0b", "holds a NUL")])
def test_what_is_no_path(path: str, told: str) -> None:
    assert told in refusal(path)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EACCES, "may not be written by this user"),
        (errno.EROFS, "is on a file system that is mounted read-only"),
        (errno.ENOSPC, "has no space left"),
        (errno.ENOENT, "takes no new folder (No such file or directory)"),  # an automounter's root, say
    ],
)
def test_a_folder_in_which_nothing_can_be_made(
    number: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = os.mkdir

    def mkdir(path: str, mode: int = 0o777) -> None:
        if Path(path).parent == tmp_path:  # root may write everywhere
            raise OSError(number, os.strerror(number), path)
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    said = refusal(tmp_path / "new" / "folder")
    assert f"{tmp_path} {told}" in said and "give another folder" in said
    check_output_path(str(tmp_path / "new"), writes=False)
    arguments = ["--model", "m", "--dataset_base_path", "d", "--output_path", str(tmp_path / "new")]
    assert main(PreprocessConfig, lambda config: None, [*arguments, "--dry_run"]) == 0
    with pytest.raises(SystemExit) as refused:
        main(PreprocessConfig, lambda config: None, arguments)
    assert refused.value.code == 2


def test_the_attempt_leaves_nothing(tmp_path: Path) -> None:
    check_output_path(str(tmp_path / "a" / "b"))
    check_output_path(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    shutil.rmtree(folder)
    assert "the working folder has been removed" in refusal("out")
    check_output_path(str(tmp_path / "out"))
