"""The sets that points are evaluated on, by name: TAP-Vid's, in each of their layouts, one's own, and the
held-out clips of every source that is trained on (`clip_sets.py`)."""

from pathlib import Path

from tasks.points.data.clip_sets import CLIP_SOURCES
from tasks.points.data.own_folder import read_own_folder
from tasks.points.data.tapvid import OFFICIAL_VIDEOS, has_pickles, read_tapvid
from tasks.points.data.tapvid_csv import read_tapvid_csv
from tasks.points.data.tracked_video import PointDataError, TrackedSet

OFFICIAL = ("davis", "kinetics", "rgb_stacking", "robotap")
_WITH_CSV = ("kinetics", "robotap")
FOLDER = "folder"


def open_set(dataset: str, path: Path | str | None = None) -> TrackedSet:
    """The videos of a set, all annotations read and checked.

    Args:
      dataset: one of `OFFICIAL`; "folder" for one's own videos; or the path of such a folder itself.
      path: a pickle, a folder of pickles, or (Kinetics, RoboTAP) a CSV file or its folder; one's own folder.

    Raises:
      PointDataError: no such set or file, or what is in it cannot be used.
    """
    if dataset not in (*OFFICIAL, FOLDER):
        if path is not None or not Path(dataset).expanduser().exists():
            raise PointDataError(
                f"dataset {dataset!r}: must be one of {', '.join((*OFFICIAL, FOLDER, *CLIP_SOURCES))}, or a "
                "folder that exists"
            )
        dataset, path = FOLDER, dataset
    if path is None:
        raise PointDataError(f"dataset {dataset}: needs --data_path=FILE_OR_FOLDER")
    path = Path(path).expanduser()
    if not path.exists():
        raise PointDataError(f"{path}: no such file or folder")
    if has_pickles(path):
        return read_tapvid(path)
    if dataset == FOLDER:
        return read_own_folder(path)
    if dataset in _WITH_CSV and (path.suffix == ".csv" or (path.is_dir() and any(path.glob("*.csv")))):
        return read_tapvid_csv(path)
    layouts = "pickles (.pkl)" + (", or CSV files beside videos" if dataset in _WITH_CSV else "")
    raise PointDataError(f"{path}: not the set {dataset}: expected {layouts}")


def official_videos(dataset: str) -> int | None:
    """How many videos the complete set has; None where that is not fixed."""
    return OFFICIAL_VIDEOS.get(dataset)
