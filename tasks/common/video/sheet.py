"""A contact sheet: one row of frames per clip, to look at what a data set holds."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.storage import atomic_write

_TEXT = 14  # pixels of the line above a row
_GAP = 2


def contact_sheet(
    rows: Sequence[tuple[str, UInt8[np.ndarray, "T H W 3"]]], columns: int = 16
) -> UInt8[np.ndarray, "h w 3"]:
    """Rows of frames, each under its title.

    Args:
        rows: (title, frames) of each clip; all frames of one size.
        columns: frames shown of a clip, evenly spaced.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no clips to show")
    image_module, draw_module = need("PIL.Image", "contact sheets"), need("PIL.ImageDraw", "contact sheets")
    height, width = rows[0][1].shape[1:3]
    shown = [
        clip[np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)] for _, clip in rows
    ]
    most = max(map(len, shown))
    sheet = image_module.new(
        "RGB", (most * (width + _GAP) + _GAP, len(rows) * (height + _TEXT + _GAP) + _GAP), "white"
    )
    draw = draw_module.Draw(sheet)
    for number, ((title, _), clip) in enumerate(zip(rows, shown, strict=True)):
        top = number * (height + _TEXT + _GAP) + _GAP
        # Pillow's built-in font has Latin letters only.
        draw.text((_GAP, top), title.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, frame in enumerate(clip):
            sheet.paste(image_module.fromarray(frame), (column * (width + _GAP) + _GAP, top + _TEXT))
    return np.asarray(sheet)


def write_sheet(
    path: Path, rows: Sequence[tuple[str, UInt8[np.ndarray, "T H W 3"]]], columns: int = 16
) -> None:
    """`contact_sheet` as a PNG file."""
    file = io.BytesIO()
    need("PIL.Image", "contact sheets").fromarray(contact_sheet(rows, columns)).save(file, "PNG")
    atomic_write(path, file.getvalue())
