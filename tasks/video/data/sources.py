"""Labelled videos by index: files, and TFDS data sets whose examples hold encoded video or frames."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from tasks.common.optional import need
from tasks.common.video.decoding import Limits
from tasks.common.video.errors import VideoDataError, VideoError
from tasks.common.video.frames import Clip, FileClip, JpegClip
from tasks.video.data.lists import Listing

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG"


@runtime_checkable
class Videos(Protocol):
    """Random access to labelled videos. Picklable: worker processes get a copy."""

    classes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def labels(self) -> Int32[np.ndarray, " videos"]:
        """Indices into classes."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where the video comes from, for messages and reports."""
        ...

    def open(self, index: int) -> Clip:
        """The video, to read frames from. Raises VideoError."""
        ...


class FileVideos:
    """The video files of a listing."""

    def __init__(self, listing: Listing, limits: Limits | None = None):
        self.listing, self.limits = listing, limits or Limits()
        self.classes, self.missing = listing.classes, listing.missing

    @property
    def labels(self) -> np.ndarray:
        return self.listing.labels

    def __len__(self) -> int:
        return len(self.listing)

    def name(self, index: int) -> str:
        return str(self.listing.paths[index])

    def open(self, index: int) -> Clip:
        return FileClip(self.listing.paths[index], limits=self.limits)


class TfdsVideos:
    """A split of a prepared TFDS data set, stored as ArrayRecord: TensorFlow is not needed.

    TFDS's own Video feature needs TensorFlow; here the feature holds encoded bytes, either a whole video file
    (`tfds.features.Tensor(shape=(), dtype=np.object_)`, or Text) or a sequence of JPEG or PNG frames.

    Args:
        name: data set name ('name', 'name/config:1.0.0'), or '' if `data_dir` is the folder of one prepared
            data set (that holds dataset_info.json).
        data_dir: TFDS's data_dir; '' is its default.
        split: which split (TFDS syntax).
        video_field, label_field: features; the label is a ClassLabel or a whole number.
        limits: beyond which a video is refused.

    Raises:
        ImportError: tensorflow_datasets or importlib_resources is missing.
        VideoDataError: not prepared, unknown split, no such features.
    """

    missing: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        data_dir: str = "",
        split: str = "train",
        video_field: str = "video",
        label_field: str = "label",
        limits: Limits | None = None,
    ):
        self._name, self._data_dir, self._split = name, data_dir, split
        self._video, self._label, self.limits = video_field, label_field, limits or Limits()
        self._check()
        self.classes = self._classes()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_source", "_builder")}

    @property
    def location(self) -> str:
        """What is read, for messages."""
        return f"tfds:{self._name or self._data_dir}:{self._split}"

    @cached_property
    def _builder(self) -> Any:
        need("importlib_resources", "TFDS")
        tfds = need("tensorflow_datasets", "data.source='tfds'")
        folder = Path(self._data_dir).expanduser() if self._data_dir else None
        if not self._name and not (folder and (folder / "dataset_info.json").is_file()):
            raise VideoDataError(f"{folder}: no prepared TFDS data set: there is no dataset_info.json")
        try:
            if self._name:
                builder = tfds.builder(self._name, data_dir=str(folder) if folder else None)
            else:
                builder = tfds.builder_from_directory(str(folder))
        except Exception as error:  # TFDS raises many kinds
            raise VideoDataError(f"{self.location}: {type(error).__name__}: {error}") from error
        if not builder.info.splits:
            raise VideoDataError(
                f"TFDS data set {self._name!r} is not prepared under {builder.data_dir}: run its "
                "download_and_prepare(file_format='array_record') first; nothing is downloaded here"
            )
        return builder

    @cached_property
    def _source(self) -> Any:
        try:
            return self._builder.as_data_source(split=self._split)
        except VideoDataError:
            raise
        except Exception as error:  # TFDS raises many kinds
            raise VideoDataError(f"{self.location}: {type(error).__name__}: {error}") from error

    def _check(self) -> None:
        if len(self._source) == 0:
            raise VideoDataError(f"{self.location}: no examples")
        example = self._source[0]
        fields = ", ".join(sorted(example)) if isinstance(example, dict) else type(example).__name__
        for field in (self._video, self._label):
            if not isinstance(example, dict) or field not in example:
                raise VideoDataError(f"{self.location}: no feature {field!r} (there is: {fields})")
        if np.asarray(example[self._label]).dtype.kind not in "iu":
            raise VideoDataError(f"{self.location}: feature {self._label!r} is no whole number")
        try:
            _encoded(example[self._video], self.location)
        except VideoError as error:
            raise VideoDataError(f"{error} in feature {self._video!r}") from error

    def _classes(self) -> tuple[str, ...]:
        feature = self._builder.info.features[self._label]
        names = getattr(feature, "names", None)
        if names:
            return tuple(names)
        return tuple(str(i) for i in range(int(self.labels.max()) + 1))

    @cached_property
    def labels(self) -> np.ndarray:
        return np.asarray([int(self._source[i][self._label]) for i in range(len(self._source))], np.int32)

    def __len__(self) -> int:
        return len(self._source)

    def name(self, index: int) -> str:
        return f"{self.location}:{index}"

    def open(self, index: int) -> Clip:
        name = self.name(index)
        content = _encoded(self._source[index][self._video], name)
        if isinstance(content, bytes):
            return FileClip(content, name, self.limits)
        return JpegClip(content, name, limits=self.limits)


def _encoded(value: Any, name: str) -> bytes | list[bytes]:
    """A video file's content, or encoded frames."""
    if isinstance(value, str):
        raise VideoError(name, "text, not encoded video")
    if isinstance(value, bytes) or np.ndim(value) == 0:
        content = value if isinstance(value, bytes) else np.asarray(value).item()
        if isinstance(content, bytes):
            return content
    elif np.ndim(value) == 1:
        frames = [f for f in list(value) if isinstance(f, bytes) and f.startswith((_JPEG, _PNG))]
        if len(frames) == len(value):
            return frames
    kind = f"{np.asarray(value).dtype}{list(np.shape(value))}"
    raise VideoError(name, f"{kind}: expected the bytes of a video file, or of JPEG or PNG frames")


class VideoSubset:
    """Some videos of a source."""

    def __init__(self, videos: Videos, indices: Sequence[int] | np.ndarray):
        self.videos, self._indices = videos, np.asarray(indices, np.int64)
        self.classes, self.missing = videos.classes, videos.missing

    @property
    def labels(self) -> np.ndarray:
        return self.videos.labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self.videos.name(int(self._indices[index]))

    def open(self, index: int) -> Clip:
        return self.videos.open(int(self._indices[index]))
