"""The image's learnt positions for another resolution, as PyTorch's bicubic interpolation resamples them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from models.common.vit import Grid

CUBIC = -0.75  # the free parameter of the cubic kernel; `jax.image.resize` has -0.5


def resample_positions(table: Float[Array, "P D"], old: Grid, new: Grid) -> Float[Array, "Q D"]:
    """Bicubic resampling without antialiasing: what TAPNext++ does for 512 pixels (sheet 1.8).

    Pixel centres correspond (align_corners false); places beyond the border take the border's value. So it
    differs from `models.common.vit.resize_positions`, which TRecViT uses, in kernel, border and antialiasing.

    Args:
      table: row-major over the grid `old`.

    Raises:
      ValueError: a table that is not of that grid.
    """
    if table.shape[0] != old[0] * old[1]:
        raise ValueError(f"the table has {table.shape[0]} positions; grid {old} needs {old[0] * old[1]}")
    if old == new:
        return table
    rows, columns = (jnp.asarray(cubic_weights(*sizes)) for sizes in zip(old, new, strict=True))
    image = table.reshape(*old, -1)
    resampled = jnp.einsum("ih,jw,hwd->ijd", rows, columns, image, precision="highest")
    return resampled.reshape(new[0] * new[1], -1).astype(table.dtype)


def cubic_weights(old: int, new: int) -> np.ndarray:
    """[new, old] float32: the weight of each old entry in each new one."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        entry = first + tap
        np.add.at(weights, (np.arange(new), np.clip(entry, 0, old - 1)), _cubic(np.abs(place - entry)))
    return weights.astype(np.float32)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel at distances 0 to 2."""
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
