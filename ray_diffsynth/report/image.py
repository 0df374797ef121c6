"""Images within a page: small enough to lie in its HTML, with words for those who cannot see them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

SIDE = 256
"""Longest side of a thumbnail in pixels."""


@dataclass(frozen=True)
class PageImage:
    """An image within the page: encoded bytes, what stands below it, and what is read out in its place.

    Images in a row that share a `group` stand together under it as their heading.
    """

    data: bytes
    caption: str
    alt: str
    kind: str = "jpeg"
    group: str = ""

    @property
    def url(self) -> str:
        """The image as a data URL."""
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


def thumbnail(image: Image.Image, side: int = SIDE) -> bytes:
    """The image as a JPEG of at most `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.convert("RGB").save(data, format="JPEG", quality=80)
    return data.getvalue()
