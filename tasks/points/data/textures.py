"""Textures cut from photographs, and the shapes of the things that carry them.

The photographs are those in installed packages (`tasks/common/photographs.py`), or a folder of anybody's own.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.photographs import LONGEST, SPLITS, load_photographs
from tasks.common.video.errors import VideoDataError

Picture = UInt8[np.ndarray, "h w 3"]
Alpha = UInt8[np.ndarray, "h w"]
_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_FLAT = 3.0  # grey levels from pixel to pixel, in the median, below which a texture shows too little
_TRIES = 5  # textures drawn until one shows enough: some smooth ones remain
_OPENED = 64  # photographs of a folder kept in memory
_FINE = 4  # a shape is drawn so many times as large, for soft edges
_HELD_OUT = 7  # every so manieth photograph of a folder is for validation
_WASH = 115.0  # grey levels, amplitude of a wash of colours
MARGIN = 2  # pixels without anything around a shape, so that sampling never meets the texture's edge


@dataclass(frozen=True)
class Photographs:
    """Photographs of one split. Picklable.

    split: "train" or "validation": no photograph is in both.
    files: of a folder; empty: those in installed packages.
    """

    split: str
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files) or len(load_photographs(self.split))

    def __getitem__(self, index: int) -> Picture:
        """One of them, RGB, at most 640 pixels long. Raises VideoDataError: a damaged file."""
        return _read(self.files[index]) if self.files else load_photographs(self.split)[index]


def open_photographs(split: str, folder: str = "") -> Photographs:
    """The photographs of a split.

    Args:
        split: "train" or "validation".
        folder: with at least two pictures in it, at any depth: every seventh by name is for validation;
          "": the photographs in installed packages.

    Raises:
        VideoDataError: no such folder, or too few pictures in it.
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: there are {', '.join(SPLITS)}")
    if not folder:
        return Photographs(split)
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise VideoDataError(f"{root}: no such folder of photographs")
    files = sorted(str(p) for p in root.rglob("*") if p.suffix.lower() in _ENDINGS)
    if len(files) < 2:
        raise VideoDataError(f"{root}: {len(files)} pictures in it ({', '.join(_ENDINGS)}); need at least 2")
    held_out = files[:: min(_HELD_OUT, len(files))]
    kept = sorted(set(files) - set(held_out))
    return Photographs(split, tuple(kept if split == "train" else held_out))


@lru_cache(maxsize=_OPENED)
def _read(path: str) -> Picture:
    image_module = need("PIL.Image", "reading photographs")
    try:
        with image_module.open(path) as image:
            image.draft("RGB", (LONGEST, LONGEST))
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        raise VideoDataError(
            f"{path}: cannot be read as a picture ({error}): remove or replace it"
        ) from error
    picture.thumbnail((LONGEST, LONGEST), image_module.Resampling.BILINEAR)
    return np.asarray(picture)


def _resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    image_module = need("PIL.Image", "resizing photographs")
    image = image_module.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((width, height), image_module.Resampling.BILINEAR))


def cut_texture(rng: np.random.Generator, photographs: Photographs, height: int, width: int) -> Picture:
    """A piece of a photograph, of that many pixels: randomly placed, enlarged or reduced, turned, mirrored
    and coloured; not a flat one, if five tries find another."""
    for _ in range(_TRIES):
        photograph = photographs[int(rng.integers(len(photographs)))]
        if rng.random() < 0.5:
            photograph = photograph.transpose(1, 0, 2)
        # Reduced up to three times, or enlarged up to two: fine grain and smooth surfaces.
        zoom = np.exp(rng.uniform(np.log(0.5), np.log(3.0)))
        zoom = min(zoom, photograph.shape[0] / height, photograph.shape[1] / width)
        rows, columns = max(2, int(height * zoom)), max(2, int(width * zoom))
        rows, columns = min(rows, photograph.shape[0]), min(columns, photograph.shape[1])
        top = int(rng.integers(photograph.shape[0] - rows + 1))
        left = int(rng.integers(photograph.shape[1] - columns + 1))
        flips = rng.random(2) < 0.5
        crop = photograph[top : top + rows, left : left + columns]
        picture = _resize(crop[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1], height, width)
        if _detail(picture) > _FLAT:
            break
    return _colour(rng, picture)


def _detail(picture: Picture) -> float:
    """How much a picture changes from a pixel to the next, down and to the right, in the median."""
    green = picture[..., 1].astype(np.int16)
    change = np.abs(np.diff(green, axis=0))[:, 1:] + np.abs(np.diff(green, axis=1))[1:]
    return float(np.median(change))


def _colour(rng: np.random.Generator, picture: Picture) -> Picture:
    """Other colours: channels exchanged, scaled, and sometimes inverted."""
    order = rng.permutation(3) if rng.random() < 0.3 else np.arange(3)
    contrast, tint = rng.uniform(0.6, 1.25), rng.uniform(0.8, 1.2, 3)
    centre = rng.uniform(90, 160)
    inverted = -1.0 if rng.random() < 0.15 else 1.0
    levels = np.arange(256, dtype=np.float64)[:, None]
    table = (levels - 127.5) * inverted * contrast * tint + centre
    table = np.clip(table + 0.5, 0, 255).astype(np.uint8)
    return np.stack([table[:, c][picture[..., order[c]]] for c in range(3)], axis=-1)


def wash(rng: np.random.Generator, picture: Picture, share: float) -> Picture:
    """A picture under a smooth wash of colours that tells its places apart: red, green and blue are waves in
    three directions, one to 1.6 times as long as the picture.

    Photographs repeat themselves and are flat in places, so that much must be learnt before any point is
    found again; here each patch looks like itself only.

    Args:
        rng: of all draws; none are made for a share of 0.
        share: of the result, 0 to 1.
    """
    if share == 0:
        return picture
    height, width = picture.shape[:2]
    length = max(height, width) * rng.uniform(1.0, 1.6)
    turns = rng.uniform(0, 2 * np.pi) + rng.choice((-1, 1)) * np.arange(3) * 2 * np.pi / 3
    angles, phases = turns + rng.normal(0, 0.25, 3), rng.uniform(0, 2 * np.pi, 3)
    down = np.exp(2j * np.pi / length * np.arange(height)[:, None] * np.sin(angles) + 1j * phases)
    along = np.exp(2j * np.pi / length * np.arange(width)[:, None] * np.cos(angles))
    waves = (down[:, None] * along).imag
    mixed = (1 - share) * picture + share * (127.5 + _WASH * waves)
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


def draw_shape(rng: np.random.Generator, size: float) -> Alpha:
    """The opacity of a thing about `size` pixels across: round, many-cornered, with a hole, a grating.

    Inside is 255, outside 0, the edge one pixel soft; `MARGIN` pixels around are empty.
    """
    draw_module = need("PIL.ImageDraw", "drawing shapes")
    image_module = need("PIL.Image", "drawing shapes")
    aspect = np.exp(rng.uniform(-0.5, 0.5))
    kind = rng.choice(
        ("blob", "polygon", "ellipse", "box", "ring", "grating"), p=(0.35, 0.2, 0.12, 0.15, 0.1, 0.08)
    )
    half = max(size / 2, 3.0) * _FINE
    half_x, half_y = half * aspect, half / aspect
    width, height = 2 * int(half_x) + 1, 2 * int(half_y) + 1
    image = image_module.new("L", (width, height), 0)
    draw = draw_module.Draw(image)
    box = (0, 0, width - 1, height - 1)
    if kind in ("blob", "polygon"):
        draw.polygon(_outline(rng, str(kind), half_x, half_y), fill=255)
    elif kind in ("ellipse", "ring"):
        draw.ellipse(box, fill=255)
        if kind == "ring":
            hole = rng.uniform(0.35, 0.65)
            draw.ellipse(
                (half_x * (1 - hole), half_y * (1 - hole), half_x * (1 + hole), half_y * (1 + hole)), fill=0
            )
    elif kind == "box":
        draw.rectangle(box, fill=255)
    else:
        _grating(rng, draw, width, height)
    alpha = _resize(np.asarray(image), max(3, round(height / _FINE)), max(3, round(width / _FINE)))
    return np.pad(alpha, MARGIN)


def _outline(rng: np.random.Generator, kind: str, half_x: float, half_y: float) -> list[tuple[float, float]]:
    """Corners around the middle: many and smoothly placed for a blob, few for a polygon."""
    if kind == "polygon":
        count = int(rng.integers(3, 9))
        angles = 2 * np.pi * (np.arange(count) + rng.uniform(-0.35, 0.35, count)) / count
        radii = rng.uniform(0.55, 1.0, count)
    else:
        angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        orders = np.arange(2, 7)
        weights = rng.normal(0, 0.35, len(orders)) / orders
        waves = np.cos(orders * angles[:, None] + rng.uniform(0, 2 * np.pi, len(orders)))
        radii = np.maximum(1 + waves @ weights, 0.25)
        radii = radii / radii.max()
    xs, ys = half_x * (1 + radii * np.cos(angles)), half_y * (1 + radii * np.sin(angles))
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


def _grating(rng: np.random.Generator, draw: Any, width: int, height: int) -> None:
    """Bars with gaps between them: what lies behind comes and goes quickly."""
    bars = int(rng.integers(2, 5))
    pitch = width / (bars - 0.5)
    for bar in range(bars):
        left = bar * pitch
        draw.rectangle((int(left), 0, int(left + pitch / 2), height - 1), fill=255)
    rail = int(height * rng.uniform(0.1, 0.2)) + 1
    draw.rectangle((0, 0, width - 1, rail), fill=255)
