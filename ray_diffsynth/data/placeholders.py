"""Recognises, by a file's first bytes, what failed downloads leave in place of its content. No imports."""

from __future__ import annotations

HEAD = 1024
"""Bytes of a file's beginning that are enough for `wrong_content`."""
_LFS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_ANNEX = (b"/annex/objects/", b"../.git/annex/objects/", b".git/annex/objects/")
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def looks_like_lfs_pointer(data: bytes) -> bool:
    """Whether `data` (a file or its beginning) is a pointer of Git LFS or git-annex, not what it stands for."""
    start = data[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith((*_LFS, *_ANNEX))


def wrong_content(head: bytes) -> str | None:
    """What a file with these first bytes is instead of weights, an image or a configuration, and the fix; else None.

    It ends a sentence that starts with the file's name and "is": "a Git LFS pointer …; run `git lfs pull` …".
    """
    if not head:
        return "empty (0 bytes), an unfinished download; download it again"
    if looks_like_lfs_pointer(head):
        return (
            "a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its repository, "
            "or download the file itself"
        )
    start = head[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(_PAGES):
        return (
            "a web page (HTML or XML), an error or a log-in page saved under the file's name; download it again, "
            "by `hf download` or the page's download link"
        )
    if not head.strip(b"\0"):
        return "nothing but zeros, an unfinished download; download it again"
    return None


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file with these first bytes is what `torch.save` or `pickle` write, whatever its name says."""
    return head.startswith(_PICKLES)


def text_of(head: bytes, limit: int = 60) -> str | None:
    """The first line if the bytes are plain text, such as the reason that a server gave in place of a file."""
    try:
        text = head[:HEAD].decode("utf-8").strip()
    except UnicodeDecodeError:
        return None
    if not text or not all(character.isprintable() or character.isspace() for character in text):
        return None
    line = text.splitlines()[0]
    return line[:limit] + ("…" if len(line) > limit else "")
