"""What commands share that read one video and write a film and files of the same name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.common.errors import ConfigError
from tasks.common.video.decoding import Limits, VideoFile
from tasks.common.video.errors import VideoDataError, VideoError


def open_video(name: str, limits: Limits) -> VideoFile:
    """The video of --video=NAME, as far as it can be read.

    Raises:
      ConfigError: a folder, or nothing that can be read as a video within the limits, and why.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"--video={name} is a folder: one video file is needed")
    try:
        return VideoFile(path, limits=limits, partial=True)
    except VideoError as error:
        raise ConfigError(
            f"--video={name}: {error.reason}; needed: a video file, such as .mp4, .mkv or .webm, of at most "
            f"{limits.frames:,} frames of at most {limits.pixels:,} pixels"
        ) from error
    except (VideoDataError, ImportError) as error:
        raise ConfigError(f"--video={name}: {error}") from error


def with_ending(base: Path, ending: str) -> Path:
    """The path of one of the written files, such as base.jsonl."""
    return base.with_name(base.name + ending)


def output_base(output: str, stem: str, endings: Sequence[str], sources: Mapping[str, str]) -> Path:
    """Path of the written files, without their endings.

    Args:
      output: --output: a folder, or the .mp4 file of the film.
      stem: name of the files in that folder.
      endings: of the files.
      sources: what is read and must not be written over -> its path.

    Raises:
      ConfigError: it would be.
    """
    folder = Path(output).expanduser()
    base = folder.with_suffix("") if folder.suffix.lower() == ".mp4" else folder / stem
    for what, source in sources.items():
        for written in (with_ending(base, ending) for ending in endings):
            if written.resolve() == Path(source).expanduser().resolve():
                raise ConfigError(f"--output={folder}: {written} is {what} itself; name another")
    return base
