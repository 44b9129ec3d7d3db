"""Video for classification: sources, decoding, clips, prepared shards. See the README beside this file."""

from tasks.common.video.decoding import Limits, VideoFile, VideoInfo, probe
from tasks.common.video.errors import VideoDataError, VideoError, VideoTimeout
from tasks.common.video.skips import SkipReport
from tasks.video.data.assemble import VideoData, open_video_data
from tasks.video.data.config import VideoDataConfig
from tasks.video.data.examples import TestViews, TrainClips
from tasks.video.data.sampling import Sampling
from tasks.video.data.sources import Videos

__all__ = [
    "Limits",
    "Sampling",
    "SkipReport",
    "TestViews",
    "TrainClips",
    "VideoData",
    "VideoDataConfig",
    "VideoDataError",
    "VideoError",
    "VideoFile",
    "VideoInfo",
    "VideoTimeout",
    "Videos",
    "open_video_data",
    "probe",
]
