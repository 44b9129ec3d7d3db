"""Clips with point tracks: sources, training examples, prepared shards. See the README beside this file."""

from tasks.points.data.assemble import PointsData, open_points_data
from tasks.points.data.clips import Clips, PointClip, check_clip
from tasks.points.data.config import PointsDataConfig
from tasks.points.data.examples import HeldOutExamples, TrainExamples
from tasks.points.data.sheet import draw_sheet, write_track_sheet

__all__ = [
    "Clips",
    "HeldOutExamples",
    "PointClip",
    "PointsData",
    "PointsDataConfig",
    "TrainExamples",
    "check_clip",
    "draw_sheet",
    "open_points_data",
    "write_track_sheet",
]
