"""What the video task promises of its embedded set: the README's own command, as long as it takes there."""

from pathlib import Path

import pytest

from launch import sweep
from tasks.video.reports import final_figures


# Eight minutes. At step 500 of 1,000 the three stand at 73, 22 and 46 %; a schedule of half the length ends
# before the full model has taken off.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_time_tells_what_single_frames_and_shuffled_ones_do_not(tmp_path: Path) -> None:
    """30 points of top-1 above the same budget on one frame, 15 above it on frames in random order.

    A little after the middle of the README's own command.
    """
    sweep.main(["configs/trecvit_controls.py:stop=560", f"--runs={tmp_path}"])
    top1 = {name: final_figures(tmp_path / name)["top1"] for name in ("full", "single_frame", "shuffled")}
    assert top1["full"] >= top1["single_frame"] + 0.30, top1
    assert top1["full"] >= top1["shuffled"] + 0.15, top1
