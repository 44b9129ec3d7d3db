"""Anti-aliased discs, rings and lines, hundreds at a time, placed to a fraction of a pixel.

A shape becomes samples: pixels with the share of each that it covers. Places are raster coordinates: (0, 0)
is the outer corner of the top-left pixel, whose centre is at (0.5, 0.5). What lies outside of the picture is
left out.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Size = tuple[int, int]  # (height, width) of a picture, in pixels


class Samples(NamedTuple):
    """Pixels that shapes cover.

    Attributes:
      pixel: index of each in the picture, row by row.
      shape: which shape covers it.
      fill: share covered in the shape's colour, in [0, 1].
      edge: share covered with the shape's outline included; at least `fill`.
      along: of lines, where between start and end it lies, in [0, 1]; of others 1.
    """

    pixel: Int[np.ndarray, " n"]
    shape: Int[np.ndarray, " n"]
    fill: Float[np.ndarray, " n"]
    edge: Float[np.ndarray, " n"]
    along: Float[np.ndarray, " n"]


def discs(
    size: Size, centres_xy: Float[np.ndarray, "shapes 2"], radius: float, outline: float = 1.0
) -> Samples:
    """Filled discs with an outline around them, all sizes in pixels."""
    shape, pixel, distance = _stamps(size, centres_xy, radius + outline)
    edge = _cover(radius + outline - distance)
    return Samples(pixel, shape, _cover(radius - distance), edge, np.ones_like(edge))


def rings(
    size: Size,
    centres_xy: Float[np.ndarray, "shapes 2"],
    radius: float,
    thickness: float,
    outline: float = 1.0,
) -> Samples:
    """Hollow rings: a line of some thickness along each circle, outlined on both sides; sizes in pixels."""
    shape, pixel, distance = _stamps(size, centres_xy, radius + thickness / 2 + outline)
    inside = thickness / 2 - np.abs(distance - radius)
    edge = _cover(inside + outline)
    return Samples(pixel, shape, _cover(inside), edge, np.ones_like(edge))


def lines(
    size: Size,
    start_xy: Float[np.ndarray, "shapes 2"],
    end_xy: Float[np.ndarray, "shapes 2"],
    thickness: float,
    outline: float = 1.0,
) -> Samples:
    """Straight lines with round ends; sizes in pixels."""
    reach = thickness / 2 + outline + 0.5
    start, step = start_xy.astype(np.float32), (end_xy - start_xy).astype(np.float32)
    shape, x, y = _near_lines(size, start, step, reach)
    vx, vy = x + 0.5 - start[shape, 0], y + 0.5 - start[shape, 1]
    dx, dy = step[shape, 0], step[shape, 1]
    along = np.clip((vx * dx + vy * dy) / np.maximum(dx**2 + dy**2, 1e-9), 0, 1)
    distance = np.hypot(vx - along * dx, vy - along * dy)
    near = np.flatnonzero(distance < reach)
    inside = thickness / 2 - distance[near]
    pixel = y[near] * size[1] + x[near]
    return Samples(pixel, shape[near], _cover(inside), _cover(inside + outline), along[near])


def _cover(depth: np.ndarray) -> np.ndarray:
    """Share of a pixel that a shape covers, by how deep its centre lies inside the shape's edge."""
    return np.clip(depth + 0.5, 0, 1)


def _stamps(size: Size, centres_xy: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, pixel and distance from the centre of all pixels that discs of a radius touch."""
    reach = radius + 0.5
    window = np.arange(math.ceil(2 * reach) + 1, dtype=np.float32)
    centres = centres_xy.astype(np.float32)
    corner = np.floor(centres - reach)
    x, y = corner[:, :1] + window, corner[:, 1:] + window
    dx, dy = x + 0.5 - centres[:, :1], y + 0.5 - centres[:, 1:]
    distance = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
    kept = distance < reach
    kept &= ((x >= 0) & (x < size[1]))[:, None, :] & ((y >= 0) & (y < size[0]))[:, :, None]
    shape, row, column = np.nonzero(kept)
    left, top = corner.astype(np.int64).T
    return shape, (top[shape] + row) * size[1] + left[shape] + column, distance[kept]


def _near_lines(
    size: Size, start: np.ndarray, step: np.ndarray, reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape, x and y of all pixels near lines, and of some that are not.

    A steep line is walked along its rows, a flat one along its columns: so few pixels lie across.
    """
    steep = np.abs(step[:, 1]) > np.abs(step[:, 0])
    along, across = np.where(steep, 1, 0), np.where(steep, 0, 1)
    each = np.arange(len(start))
    begin, side = start[each, along], start[each, across]
    length, slope = step[each, along], step[each, across]
    slope = np.divide(slope, length, out=np.zeros_like(slope), where=length != 0)
    extent = np.where(steep, size[0], size[1])
    first = np.clip(np.floor(np.minimum(begin, begin + length) - reach), 0, extent).astype(np.int64)
    last = np.clip(np.floor(np.maximum(begin, begin + length) + reach), -1, extent - 1).astype(np.int64)
    counts = np.maximum(last - first + 1, 0)
    shape = np.repeat(each, counts)
    a = np.arange(len(shape)) - np.repeat(np.cumsum(counts) - counts - first, counts)
    # Beyond the ends only the round caps are left, and they do not lean.
    ahead = np.clip(a + 0.5 - begin[shape], np.minimum(length, 0)[shape], np.maximum(length, 0)[shape])
    middle = side[shape] + slope[shape] * ahead
    half = math.ceil(reach * math.sqrt(2))  # lines lean by 45 degrees at most
    b = np.floor(middle).astype(np.int64)[:, None] + np.arange(-half, half + 1)
    kept = (b >= 0) & (b < np.where(steep, size[1], size[0])[shape][:, None])
    row, column = np.nonzero(kept)
    shape, a, b = shape[row], a[row], b[row, column]
    turned = steep[shape]
    return shape, np.where(turned, b, a), np.where(turned, a, b)
