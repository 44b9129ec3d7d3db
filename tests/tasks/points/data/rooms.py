"""What tests of MuJoCo's rooms need to run."""

import pytest

from tasks.points.data.simulated import load_mujoco, open_renderer


def require_egl() -> None:
    """Skips the test where no picture can be drawn."""
    try:
        mujoco = load_mujoco()
    except ImportError:
        pytest.skip("mujoco is not installed (extra: sim)")
    try:
        open_renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).close()
    except ImportError:
        pytest.skip("no EGL to draw MuJoCo's scenes with")
