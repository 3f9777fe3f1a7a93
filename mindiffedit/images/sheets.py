"""Several pictures in one: grids, rows with captions, tables with labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from mindiffedit.errors import InputError, InputTypeError
from mindiffedit.images.colours import to_srgb
from mindiffedit.images.pictures import few, restore_size
from mindiffedit.images.reading import MAX_PIXELS

__all__ = ["contact_sheet", "labelled_grid", "make_image_grid"]


def make_image_grid(images: list[PIL.Image.Image], rows: int, cols: int, resize: int | None = None) -> PIL.Image.Image:
    """One RGB picture of `rows` × `cols` pictures, row by row.

    Args:
        images: rows * cols pictures; tiles have the size of the first.
        rows: number of rows.
        cols: number of columns.
        resize: make each picture a square of this side first, in pixels.

    Returns:
        The picture.

    Raises:
        InputError: Another number of pictures, or none.
    """
    if len(images) != rows * cols or len(images) == 0:
        raise InputError(
            "{count} pictures do not fill a grid of {height} rows and {width} columns.",
            "images",
            count=len(images),
            height=rows,
            width=cols,
        )
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", size=(cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, box=(i % cols * width, i // cols * height))
    return grid


def labelled_grid(items: Sequence[tuple[str, PIL.Image.Image]], smallest_side: int = 256) -> PIL.Image.Image:
    """Pictures side by side, each under its caption.

    Args:
        items: (caption, picture) pairs; all tiles get the size of the first picture.
        smallest_side: where that size has a side below this many pixels, tiles are enlarged by a whole factor,
            so that captions can be read.

    Raises:
        InputError: There is no picture.
    """
    if len(items) == 0:
        raise InputError("there is no picture to put into the grid; give at least one.", "items")
    return _table([[picture for _, picture in items]], [], [caption for caption, _ in items], "", "", smallest_side)


def contact_sheet(
    rows: Sequence[Sequence[PIL.Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    corner: str | None = None,
    title: str | None = None,
    smallest_side: int = 96,
) -> PIL.Image.Image:
    """A table of pictures, such as the results over two options, with a label for each row and each column.

    Args:
        rows: list of lists of PIL pictures, all of one length; every cell gets the size of the first picture.
        row_labels: texts at the left and on top.
        column_labels: as `row_labels`.
        corner: text over the row labels, such as what rows and columns are; None: nothing.
        title: text over everything; None: nothing.
        smallest_side: where the first picture has a side below this many pixels, cells are enlarged by a whole
            factor.

    Returns:
        PIL picture in RGB. Texts that do not fit in four lines are cut off.

    Raises:
        ValueError: No picture, rows of different lengths, another number of labels than of rows or columns,
            more than `MAX_PIXELS` pixels in all.
        TypeError: A cell is no PIL picture.
    """
    rows = [list(row) for row in rows]
    columns = len(rows[0]) if rows else 0
    if columns == 0 or any(len(row) != columns for row in rows):
        raise InputError(
            "the rows of a contact sheet have to have as many pictures each, at least one, but have {lengths}.",
            "rows",
            lengths=few([len(row) for row in rows]) or "none",
        )
    for name, labels, count in (("row_labels", row_labels, len(rows)), ("column_labels", column_labels, columns)):
        if isinstance(labels, str) or len(labels) != count:
            raise InputError(
                "{parameter} of this contact sheet has to be {count} texts, but is {labels!r}.",
                name,
                count=count,
                labels=labels,
            )
    for cell in (cell for row in rows for cell in row):
        if not isinstance(cell, PIL.Image.Image):
            raise InputTypeError("cells of a contact sheet are PIL pictures, but one is {cell!t}.", "rows", cell=cell)
        if 0 in cell.size:
            size = f"{cell.width} x {cell.height}"
            raise InputError("a cell of the contact sheet is {size} pixels; leave it out.", "rows", size=size)
    width, height = (side * _factor(rows, smallest_side) for side in rows[0][0].size)
    if len(rows) * height * columns * width > MAX_PIXELS:
        raise InputError(
            "the contact sheet would be {width} x {height} pixels; at most {most} pixels are drawn: give fewer or "
            "smaller pictures.",
            "rows",
            width=columns * width,
            height=len(rows) * height,
            most=MAX_PIXELS,
        )
    return _table(rows, [str(label) for label in row_labels], column_labels, corner or "", title or "", smallest_side)


def _factor(rows: Sequence[Sequence[PIL.Image.Image]], smallest_side: int) -> int:
    return max(1, -(-smallest_side // min(rows[0][0].size)))


def _table(rows, row_labels, column_labels, corner: str, title: str, smallest_side: int) -> PIL.Image.Image:
    """The pictures of `rows` in cells of one size, with texts around them; without row labels no room at the left."""
    factor = _factor(rows, smallest_side)
    width, height = (side * factor for side in rows[0][0].size)
    font_size = int(np.clip(width // 14, 12, 36))
    font = PIL.ImageFont.load_default(size=font_size)
    gap = max(4, font_size // 3)
    measure = PIL.ImageDraw.Draw(PIL.Image.new("L", (1, 1)))

    def high(text):
        return int(np.ceil(measure.multiline_textbbox((0, 0), text, font=font)[3])) if text else 0

    left = gap
    if row_labels:
        longest = max(font.getlength(text) for text in (*row_labels, corner))
        left = min(int(np.ceil(longest)) + 2 * gap, max(width, 8 * font_size))
    full_width = left + len(column_labels) * (width + gap)
    title = _wrapped(title, font, full_width - 2 * gap)
    corner = _wrapped(corner, font, left - 2 * gap)
    tops = [_wrapped(str(label), font, width) for label in column_labels]
    above = high(title) + (gap if title else 0)
    first_row = above + max(high(text) for text in (*tops, corner)) + 2 * gap

    sheet = PIL.Image.new("RGB", (full_width, first_row + len(rows) * (height + gap)), "white")
    pen = PIL.ImageDraw.Draw(sheet)

    def write(text, middle, top):
        if text:
            pen.multiline_text((middle, top), text, fill="black", font=font, anchor="ma", align="center")

    write(title, full_width / 2, gap)
    write(corner, left / 2, above + gap)
    for column, text in enumerate(tops):
        write(text, left + column * (width + gap) + width / 2, above + gap)
    for i, row in enumerate(rows):
        top = first_row + i * (height + gap)
        if row_labels:
            text = _wrapped(row_labels[i], font, left - 2 * gap)
            write(text, left / 2, top + max(0, height - high(text)) / 2)
        for column, picture in enumerate(row):
            sheet.paste(_tile(picture, (width, height)), (left + column * (width + gap), top))
    return sheet


def _tile(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """A picture to be part of another, which has no profile: in sRGB. Masks keep their edges."""
    if picture.mode not in ("L", "1"):
        picture = to_srgb(picture)
    return to_srgb(restore_size(picture, size))


def _wrapped(text: str, font, width: int) -> str:
    """`text` in at most four lines no wider than `width` pixels; what does not fit ends in dots."""
    if not text.strip():
        return ""
    characters = max(4, int(1.2 * width * len(text) / font.getlength(text)))
    while True:
        lines = textwrap.wrap(text, characters, max_lines=4, placeholder="...")
        if characters == 4 or all(font.getlength(line) <= width for line in lines):
            return "\n".join(lines)
        characters -= 1
