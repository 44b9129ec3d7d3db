"""Generated clips for the tests that read some."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated set of the default classes: 60 training and 20 validation clips of 32 x 32 pixels."""
    from tasks.video.data.generated import MotionConfig, generate  # imports jax: not before pytest is set up

    folder = tmp_path_factory.mktemp("motion") / "clips"
    generate(MotionConfig(train=60, validation=20, size=32), folder, workers=1)
    return folder
