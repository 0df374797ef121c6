"""Images on one sheet, in the cells of a grid."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class ImageGrid:
    """A sheet of cells, counted row by row, with a gap between them and around all.

    widths: of the columns, heights: of the rows, and gap, in pixels. `image` is the sheet (RGB).
    """

    def __init__(
        self, widths: Sequence[int], heights: Sequence[int], *, gap: int = 0, background: str = "white"
    ) -> None:
        self.widths, self.heights, self.gap = list(widths), list(heights), gap
        size = (sum(self.widths) + gap * (len(self.widths) + 1), sum(self.heights) + gap * (len(self.heights) + 1))
        self.image = Image.new("RGB", size, background)
        self._draw = ImageDraw.Draw(self.image)

    @classmethod
    def uniform(
        cls,
        images: Sequence[Image.Image],
        columns: int,
        *,
        gap: int = 0,
        background: str = "white",
        heading: int = 0,
        labels: Sequence[str] = (),
        font: Font | None = None,
    ) -> ImageGrid:
        """Of the images row by row in cells as large as the largest, each below its label.

        heading: pixels above each image, for its label.
        """
        width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
        grid = cls([width] * columns, [height + heading] * -(-len(images) // columns), gap=gap, background=background)
        for cell, image in enumerate(images):
            if labels:
                grid.write(cell, grid.shortened(labels[cell], width, font), font)
            grid.paste(cell, image, below=heading)
        return grid

    def paste(self, cell: int, image: Image.Image, *, below: int = 0) -> None:
        """Paste an image into the upper left corner of a cell, `below` pixels down."""
        left, top = self._corner(cell)
        self.image.paste(image, (left, top + below))

    def write(self, cell: int, text: str, font: Font | None = None) -> None:
        """Write a text, of several lines too, into the upper left corner of a cell."""
        self._draw.text(self._corner(cell), text, fill="black", font=font)

    def shortened(self, text: str, width: int, font: Font | None = None) -> str:
        """The text in one line of at most `width` pixels, its end left out where it does not fit."""
        text = " ".join(text.split())
        if self._draw.textlength(text, font=font) <= width:
            return text
        while text and self._draw.textlength(f"{text}…", font=font) > width:
            text = text[:-1]
        return f"{text}…"

    def _corner(self, cell: int) -> tuple[int, int]:
        row, column = divmod(cell, len(self.widths))
        return (
            sum(self.widths[:column]) + self.gap * (column + 1),
            sum(self.heights[:row]) + self.gap * (row + 1),
        )
