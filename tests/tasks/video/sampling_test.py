"""Which frames, and which part of them."""

import numpy as np
import pytest

from tasks.common.video.errors import VideoError
from tasks.common.video.frames import JpegClip, Window, read_window
from tasks.video.data.sampling import Sampling, crop_position, draw_rng
from tests.tasks.common.video.video_files import jpeg, numbered_frames


@pytest.mark.parametrize("frames", [16, 32, 64])
@pytest.mark.parametrize("stride", [1, 2])
def test_dense_clips_lie_anywhere_in_the_video(frames: int, stride: int) -> None:
    sampling = Sampling(frames, stride)
    firsts = set()
    for seed in range(200):
        indices = sampling.train(140, draw_rng(0, 0, seed))
        assert np.all(np.diff(indices) == stride)
        assert indices[0] >= 0
        assert indices[-1] < 140
        firsts.add(int(indices[0]))
    last = 140 - sampling.span
    assert min(firsts) <= last // 10
    assert max(firsts) >= last - last // 10
    assert Sampling(frames, stride).train(sampling.span, draw_rng(0, 0, 5)).tolist() == list(
        range(0, sampling.span, stride)
    )


def test_short_videos_are_filled_up_as_documented() -> None:
    assert Sampling(6, 2, pad="repeat").train(5, draw_rng(0, 0, 0)).tolist() == [0, 2, 4, 4, 4, 4]
    assert Sampling(6, 2, pad="loop").train(5, draw_rng(0, 0, 0)).tolist() == [0, 2, 4, 1, 3, 0]
    assert Sampling(4, pad="repeat").test(1).tolist() == [0, 0, 0, 0]
    assert Sampling(6, mode="uniform").test(3).tolist() == [0, 0, 1, 1, 2, 2]
    assert Sampling(6, mode="uniform", pad="loop").test(4).tolist() == [0, 1, 2, 3, 0, 1]


def test_uniform_clips_take_one_frame_of_each_segment() -> None:
    sampling = Sampling(8, mode="uniform")
    seen = set()
    for seed in range(50):
        indices = sampling.train(80, draw_rng(0, 0, seed))
        assert (indices // 10).tolist() == list(range(8))
        seen.update(indices.tolist())
    assert len(seen) > 75
    assert sampling.test(80).tolist() == list(range(5, 80, 10))
    assert sampling.test(80, 0, 2).tolist() == [2, 12, 22, 32, 42, 52, 62, 72]
    assert sampling.test(80, 1, 2).tolist() == [7, 17, 27, 37, 47, 57, 67, 77]


def test_test_clips_are_evenly_spaced() -> None:
    sampling = Sampling(16, 2)
    assert [int(sampling.test(121, i, 4)[0]) for i in range(4)] == [0, 30, 60, 90]
    assert int(sampling.test(121)[0]) == 45
    assert [int(sampling.test(20, i, 4)[0]) for i in range(4)] == [0, 0, 0, 0]
    assert [crop_position(i, 3) for i in range(3)] == [0.0, 0.5, 1.0]
    assert crop_position(0, 1) == 0.5


def test_draws_depend_on_seed_draw_and_index_alone() -> None:
    draws = {(s, d, i): draw_rng(s, d, i).random() for s in (0, -1, 7) for d in range(3) for i in range(3)}
    assert len(set(draws.values())) == len(draws)
    assert draws == {key: draw_rng(*key).random() for key in draws}


def test_bad_sampling_is_refused(unchecked_types: None) -> None:
    for options, message in (
        ({"frames": 0}, "need frames >= 1 and stride >= 1, got 0 x 1"),
        ({"mode": "tsn"}, "sampling 'tsn'"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**options)
    with pytest.raises(ValueError, match="clip 2 of 2"):
        Sampling(4).test(9, 2, 2)
    with pytest.raises(ValueError, match="crop 3 of 3"):
        crop_position(3, 3)


def test_windows_of_the_same_size_are_cut_without_blurring() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    for position, left in ((0.0, 0), (0.5, 16), (1.0, 32)):
        np.testing.assert_array_equal(
            Window(48, 48, position=position).apply(frame), frame[:, left : left + 48]
        )
    tall = frame.transpose(1, 0, 2)
    np.testing.assert_array_equal(Window(48, 48, position=1.0).apply(tall), tall[32:])
    assert Window(48, 80).apply(frame) is frame


def test_windows_keep_the_shape_of_things_unless_stretched() -> None:
    assert Window(32, 32, position=0.25).box(64, 128) == (16.0, 0.0, 80.0, 64.0)
    assert Window(32, 64, position=0.5).box(64, 100) == (0.0, 7.0, 100.0, 57.0)
    assert Window(32, 32, "stretch").box(64, 128) == (0.0, 0.0, 128.0, 64.0)
    frame = np.zeros((64, 128, 3), np.uint8)
    frame[:, 64:] = 200
    assert Window(16, 16, position=0.0).apply(frame)[:, :-1].max() == 0  # antialiasing looks over the edge
    assert Window(16, 16, position=1.0).apply(frame)[:, 1:].min() == 200
    assert Window(16, 32, "stretch").apply(frame).shape == (16, 32, 3)


def test_jpeg_clips(tmp_path) -> None:
    frames = numbered_frames(6)
    clip = JpegClip([jpeg(f) for f in frames], "clip 3")
    window = read_window(clip, [5, 0, 5], Window(32, 48))
    assert np.abs(window.astype(int) - frames[[5, 0, 5]]).max() < 12
    good = jpeg(frames[0])
    for encoded, reason in (
        ([], "no frames in it"),
        ([good[: len(good) // 2]], r"frame 0 of 1 is damaged"),
        ([b"GIF89a" + good], r"frame 0 of 1 is damaged"),
    ):
        with pytest.raises(VideoError, match=f"clip 4: {reason}"), JpegClip(encoded, "clip 4") as broken:
            broken.read([0])
