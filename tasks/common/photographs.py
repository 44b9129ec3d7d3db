"""Photographs that ship inside installed packages: the textures of the generated clips.

Training and validation use different photographs. Packages are looked up, not imported.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tasks.common.optional import need
from tasks.common.video.errors import VideoDataError

# (package, file below it)
TRAIN = tuple(
    ("skimage", f"data/{name}")
    for name in (
        "astronaut.png", "brick.png", "camera.png", "coffee.png", "gravel.png", "hubble_deep_field.jpg",
        "ihc.png", "motorcycle_left.png", "rocket.jpg",
    )
)  # fmt: skip
VALIDATION = (
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/grass.png"),
    ("skimage", "data/retina.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
SPLITS = {"train": TRAIN, "validation": VALIDATION}
_INSTALL = {"skimage": "pip install 'foxtrot[video]' (it needs scikit-image)", "matplotlib": "reinstall it"}
LONGEST = 640  # pixels of a photograph's longer side: more would only be thrown away by the crops
_TRIES = 8
_FLAT = 10.0  # standard deviation of grey levels below which a crop shows nothing
_ZOOM = 2.5


def photograph_files(split: str) -> list[Path]:
    """The files of one split.

    Raises:
        ImportError: the package that carries them is not installed.
        VideoDataError: another version of it, without one of them.
    """
    return [_file(package, name) for package, name in SPLITS[split]]


def _file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the generated clips take their textures from photographs in the package {package!r}, which is "
            f"not installed: {_INSTALL[package]}"
        )
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise VideoDataError(f"{path}: not in this version of {package}: {_INSTALL[package]}")
    return path


def photographs_digest() -> str:
    """Hash of all photographs: part of what decides the generated clips."""
    state = blake2b(digest_size=16)
    for split in SPLITS:
        for path in photograph_files(split):
            state.update(path.read_bytes())
    return state.hexdigest()


@lru_cache(maxsize=len(SPLITS))
def load_photographs(split: str) -> tuple[UInt8[np.ndarray, "H W 3"], ...]:
    """The photographs of a split as RGB arrays, the longer side at most 640 pixels."""
    image_module = need("PIL.Image", "reading photographs")
    arrays = []
    for path in photograph_files(split):
        image = image_module.open(path).convert("RGB")
        image.thumbnail((LONGEST, LONGEST), image_module.Resampling.BILINEAR)
        arrays.append(np.asarray(image))
    return tuple(arrays)


@dataclass(frozen=True)
class Texturer:
    """Random textures from the photographs of one split."""

    split: str

    def crop(self, size: int, rng: np.random.Generator) -> UInt8[np.ndarray, "size size 3"]:
        """A square of a photograph, randomly placed, scaled, turned, mirrored and tinted; not a flat one."""
        image_module = need("PIL.Image", "resizing photographs")
        photographs = load_photographs(self.split)
        for _ in range(_TRIES):
            photograph = photographs[rng.integers(len(photographs))]
            height, width = photograph.shape[:2]
            side = min(int(size * rng.uniform(1.0, _ZOOM)), height, width)
            top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            tint = rng.uniform(0.75, 1.25, 3)
            crop = photograph[top : top + side, left : left + side]
            if crop.std() > _FLAT:
                break
        crop = np.ascontiguousarray(np.rot90(crop[:, ::-1] if mirrored else crop, turns))
        image = image_module.fromarray(crop).resize((size, size), image_module.Resampling.BILINEAR)
        return np.clip(np.asarray(image, np.float32) * tint, 0, 255).astype(np.uint8)
