"""Which files are images and videos, by the endings of their names (lower case)."""

from __future__ import annotations

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif"),
    *(".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".dds", ".tga", ".icb", ".vda", ".vst", ".ppm"),
    *(".pgm", ".pbm", ".pnm", ".pcx", ".sgi", ".bw", ".rgb", ".rgba", ".qoi", ".psd", ".ras", ".xbm", ".xpm", ".ico"),
)
"""What Pillow decodes by itself."""

VIDEO_SUFFIXES = (
    *(".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".m2v", ".wmv", ".asf", ".flv", ".f4v"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".mxf", ".vob"),
)
"""What PyAV decodes; an animated GIF is an image where images are wanted."""

_RAW = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".k25", ".kdc", ".mef", ".mos"),
    *(".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
)
_OTHER = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".exr", ".hdr", ".svg", ".psb", ".xcf", ".kra", ".ai", ".eps", ".ps"),
    *(".pdf", ".emf", ".wmf", ".fits", ".icns", ".pcd", ".dcm"),
)
UNREADABLE_SUFFIXES = (*_RAW, *_OTHER)
"""Images that are not read: camera raw files, and formats that Pillow lacks or hands to another program."""


def why_unreadable(name: str) -> str:
    """Why the image of this name is not read, and the fix."""
    kind = "a camera's raw file" if name.lower().endswith(_RAW) else "a format that is not read"
    return f"{kind}; save it as PNG or JPEG"
