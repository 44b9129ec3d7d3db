"""A picture of the videos on which a tracker did worst: truth and prediction over their frames."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tasks.common.video.sheet import write_sheet
from tasks.points.data.tracked_video import TrackedVideo
from tasks.points.evaluators import VideoResult, queries_of
from tasks.points.metrics import AVERAGE_JACCARD, METRIC_SIZE, QueryMode
from tasks.points.painting import Painter, blend
from tasks.points.resize import resize_frame
from tasks.points.strokes import discs, lines, rings

_FRAMES = 8  # of each video
_POINTS = 24  # of each video: those with the largest errors; more would hide the picture
_TRUE, _GUESS, _LINE = (60, 230, 90), (255, 70, 60), (255, 210, 40)
LEGEND = "Green: truth, where visible; red rings: prediction, where said to be; yellow: the error"


def worst_videos(results: Sequence[VideoResult], most: int) -> list[int]:
    """Indices of the videos of lowest Jaccard, the worst first; those without a value are left out."""
    values = [result.metrics[AVERAGE_JACCARD] for result in results]
    known = [index for index, value in enumerate(values) if not math.isnan(value)]
    return sorted(known, key=lambda index: values[index])[:most]


def write_worst_cases(
    path: Path, videos: Sequence[TrackedVideo], results: Sequence[VideoResult], mode: QueryMode, most: int
) -> None:
    """Writes a PNG: a row of frames for each of the worst videos, from its first query on.

    Raises:
      VideoError: a frame cannot be read.
    """
    rows: list[tuple[str, np.ndarray]] = []
    for index in worst_videos(results, most):
        video, result = videos[index], results[index]
        title = f"{video.name}: AJ {100 * result.metrics[AVERAGE_JACCARD]:.1f}, {len(result.track)} queries"
        rows.append((f"{title}. {LEGEND}" if not rows else title, drawn_frames(video, result, mode)))
    if rows:
        write_sheet(path, rows, columns=_FRAMES)


def drawn_frames(video: TrackedVideo, result: VideoResult, mode: QueryMode) -> UInt8[np.ndarray, "n h w 3"]:
    """Some frames of a video, evenly spaced, truth and prediction of the points that went most astray."""
    truth = queries_of(video, mode)
    error = np.linalg.norm(truth.tracks_xy - result.tracks_xy, axis=-1)
    wrong = np.where(~truth.occluded & result.visible, error, 0) + 16.0 * (truth.occluded == result.visible)
    points = np.argsort(-wrong.mean(axis=1), kind="stable")[:_POINTS]
    first = int(result.query_tyx[:, 0].min())
    wanted = np.unique(
        np.linspace(first, len(video) - 1, min(_FRAMES, len(video) - first)).round().astype(int)
    )
    drawn = []
    for t, frame in enumerate(video.frames()):
        if t in wanted:
            small = resize_frame(frame, METRIC_SIZE, METRIC_SIZE)
            drawn.append(
                _draw(
                    small,
                    truth.tracks_xy[points, t],
                    ~truth.occluded[points, t],
                    result.tracks_xy[points, t],
                    result.visible[points, t],
                )
            )
    blank = [np.full_like(drawn[0], 255)] * (_FRAMES - len(drawn))  # all rows of a sheet are of one length
    return np.stack([*drawn, *blank])


def _draw(
    frame: UInt8[np.ndarray, "H W 3"],
    truth_xy: Float[np.ndarray, "n 2"],
    seen: Bool[np.ndarray, " n"],
    guess_xy: Float[np.ndarray, "n 2"],
    guessed: Bool[np.ndarray, " n"],
) -> UInt8[np.ndarray, "H W 3"]:
    picture, size = np.array(frame), (frame.shape[0], frame.shape[1])
    painter, both = Painter(size), seen & guessed
    for samples, colour in (
        (lines(size, truth_xy[both], guess_xy[both], 1.2, 0.6), _LINE),
        (rings(size, guess_xy[guessed], 3.5, 1.4, 0.7), _GUESS),
        (discs(size, truth_xy[seen], 2.2, 0.8), _TRUE),
    ):
        colours = np.tile(np.asarray(colour, np.uint8), (len(truth_xy), 1))
        ink = painter.ink(samples, colours)
        blend(picture, ink.pixel, ink.colour, ink.opacity)
    return picture
