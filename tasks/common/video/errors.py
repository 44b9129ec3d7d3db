"""What can be wrong with video data."""


class VideoDataError(ValueError):
    """A list, layout, shard or package that cannot be used: names the file, what is wrong, what would be
    right."""


class VideoError(VideoDataError):
    """One video file that cannot be read.

    Attributes:
        name: the file (or record).
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, " ".join(reason.split())

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class VideoTimeout(VideoDataError):
    """Reading a file took longer than its budget of time.

    Not a `VideoError`: leaving such a file out would make what a batch holds depend on the speed of the
    machine.
    """
