"""Files that a download left in place of the content are told by their first bytes."""

from __future__ import annotations

import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from ray_diffsynth.data.placeholders import looks_like_lfs_pointer, looks_like_pickle, text_of, wrong_content

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 253806278\n"


@pytest.mark.parametrize(
    "data",
    [
        POINTER,
        POINTER.replace(b"\n", b"\r\n"),  # checked out on Windows
        b"\xef\xbb\xbf" + POINTER,
        b"version https://hawser.github.com/spec/v1\noid sha256:00\nsize 3\n",  # before Git LFS had its name
        POINTER[:60],
        b"/annex/objects/SHA256E-s3--ab.safetensors\n",
        b"../.git/annex/objects/x1/Xy/SHA256E-s3--ab.png",
    ],
)
def test_pointers(data: bytes) -> None:
    assert looks_like_lfs_pointer(data)
    assert "Git LFS pointer" in (wrong_content(data) or "") and "git lfs pull" in (wrong_content(data) or "")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        save({"a": torch.zeros(2)}),
        png(),
        json.dumps({"version": "https://git-lfs.github.com/spec/v1"}).encode(),
        b"#version: 0.2\nt h\n",
        b"a caption about a version of https://git-lfs.github.com/spec/v1",
    ],
)
def test_content(data: bytes) -> None:
    assert not looks_like_lfs_pointer(data)
    assert wrong_content(data) is None
    assert not looks_like_pickle(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html>\n<html>", "web page"),
        (b"<html><body>Sign in", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "web page"),
        (b"\0" * 100, "zeros"),
    ],
)
def test_what_else_lies_there(data: bytes, message: str) -> None:
    assert message in (wrong_content(data) or "") and "download" in (wrong_content(data) or "")


def test_pickles_are_told_by_their_bytes() -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    assert looks_like_pickle(buffer.getvalue())


def test_text() -> None:
    assert text_of(b"Entry not found") == "Entry not found"
    assert text_of(b"Access to model x is restricted.\nLog in.") == "Access to model x is restricted."
    assert text_of(save({"a": torch.zeros(2)})) is None
    assert text_of(b"") is None
