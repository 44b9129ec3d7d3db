"""TAPNext++'s augmentations against results of the official code (tests/golden/tapnext/README.md).

Cases and their options are found by their keys: `roll_[no]rotate_s2`, `homography[_replicate]_s2`; without
_s2 the strength is 1. The official functions draw once more first, to decide whether they do anything.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from tasks.points.data.augment import roll, sway
from tasks.points.data.clips import PointClip
from tasks.points.data.motion_paths import corner_paths, homographies, roll_path, roll_video, warp_video
from tasks.points.data.warps import project

PLACES = 2e-3  # pixels
GREY = 2  # grey levels: another bilinear filter, which rounds otherwise

Arrays = dict[str, np.ndarray]


def load(path: Path) -> tuple[Arrays, list[str]]:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, sorted({name.partition("/")[0] for name in arrays if "/" in name})


def generator(arrays: Arrays) -> np.random.RandomState:
    rng = np.random.RandomState(int(arrays["np_random_seed"]))
    rng.rand()
    return rng


def strength(case: str) -> float:
    found = re.search(r"_s(\d+(?:\.\d+)?)(?:_|$)", case)
    return float(found[1]) if found else 1.0


@pytest.mark.golden("augmentations.npz", room="tapnext")
def test_places_and_pictures(golden_file: Path) -> None:
    arrays, cases = load(golden_file)
    video, given = arrays["video"], arrays["trajs_2d"].astype(np.float64).swapaxes(0, 1)
    frames, height, width = video.shape[:3]
    assert {case.partition("_")[0] for case in cases} == {"roll", "homography"}
    for case in cases:
        rng, wanted = generator(arrays), arrays[f"{case}/trajs_2d"].swapaxes(0, 1)
        picture = arrays[f"{case}/video"].astype(float)
        if case.startswith("roll"):
            path = roll_path(rng, frames, height, width, strength(case), rotate="norotate" not in case)
            places, moved = path.move(given, height, width), roll_video(video, path)
            # The official frames grow by the padding when they rotate; the first part is the frame.
            assert picture.shape[1:3] == (height + path.pad, width + path.pad)
            picture = picture[:, :height, :width]
        else:
            matrices = homographies(corner_paths(rng, frames, height, width, strength(case)), height, width)
            places = project(matrices, given)
            moved = warp_video(video, matrices, "replicate" if "replicate" in case else "constant")
        np.testing.assert_allclose(places, wanted, atol=PLACES, rtol=0, err_msg=case)
        difference = np.abs(moved.astype(float) - picture)
        assert difference.max() <= GREY, case
        if case.startswith("roll_norotate"):
            assert difference.max() == 0


@pytest.mark.golden("augmentations.npz", room="tapnext")
def test_clips_move_as_places_do(golden_file: Path) -> None:
    """`roll` and `sway` of a clip, in raster coordinates, half a pixel more than the official ones."""
    arrays, cases = load(golden_file)
    video, given = arrays["video"], arrays["trajs_2d"].swapaxes(0, 1)
    tracks_yx = (given[..., ::-1] + 0.5).astype(np.float32)
    height, width = video.shape[1:3]
    inside = np.all((tracks_yx >= 0) & (tracks_yx < (height, width)), axis=-1)
    clip = PointClip(video, tracks_yx, inside, np.full(len(given), -1, np.int32))
    for case in cases:
        rng, wanted = generator(arrays), arrays[f"{case}/trajs_2d"].swapaxes(0, 1)[..., ::-1] + 0.5
        if case.startswith("roll"):
            moved = roll(clip, rng, strength(case), rotate="norotate" not in case)
        else:
            border = "replicate" if "replicate" in case else "constant"
            moved = sway(clip, rng, strength(case), border)
        places = moved.tracks_yx
        assert np.all(np.abs(places[inside] - wanted[inside]) < PLACES), case
        shown = np.all((places >= 0) & (places < (height, width)), axis=-1)
        np.testing.assert_array_equal(moved.visible, inside & shown, err_msg=case)
