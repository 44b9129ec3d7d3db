"""Recorded videos: chunks, groups, both directions, endless streams, memory that does not grow."""

import gc
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.tapnext import TAPNextRuntime, track_clip, track_stream
from models.tapnext import clips as clips_module
from tests.models.tapnext.small_tapnext import RUNTIME, random_params, run, small, video

CONFIG = small()
PARAMS = random_params(CONFIG)
FRAMES = np.asarray((127.5 * (video(1, 7)[0] + 1)).astype(jnp.uint8))
QUERIES = np.array([[0, 2.3, 7.1], [3, 6.6, 1.2], [6, 3.4, 10.9]], np.float32)


def raw(frames, queries):
    """(tracks [Q, T, 2], visibility logits [Q, T]) of one call of the model."""
    clip, points = jnp.asarray(frames)[None], jnp.asarray(queries)[None]
    output, _ = run(CONFIG, RUNTIME, PARAMS, clip, points)
    return np.asarray(output.tracks_yx[0]), np.asarray(output.visible_logits[0])


def test_both_ways_takes_what_lies_before_a_query_from_the_reversed_clip():
    found = track_clip(CONFIG, PARAMS, FRAMES, QUERIES, chunk=3)
    forward = raw(FRAMES, QUERIES)
    turned = QUERIES.copy()
    turned[:, 0] = 6 - turned[:, 0]
    backward = [part[:, ::-1] for part in raw(FRAMES[::-1], turned)]
    for q, first in enumerate((0, 3, 6)):
        for name, f, b in zip(("tracks_yx", "visible_logits"), forward, backward, strict=True):
            expected = np.concatenate([b[q, :first], f[q, first:]])
            np.testing.assert_allclose(getattr(found, name)[q], expected, atol=1e-4)
    np.testing.assert_array_equal(found.visible, found.visible_logits > 0)
    assert ((found.certainty >= 0) & (found.certainty <= 1 + 1e-6)).all()
    one_way = track_clip(CONFIG, PARAMS, FRAMES, QUERIES, chunk=3, both_ways=False)
    for q, first in enumerate((0, 3, 6)):
        assert np.isnan(one_way.tracks_yx[q, :first]).all()
        assert not one_way.visible[q, :first].any()
        np.testing.assert_array_equal(one_way.tracks_yx[q, first:], found.tracks_yx[q, first:])


@pytest.mark.slow
def test_chunks_change_nothing():
    found = [track_clip(CONFIG, PARAMS, FRAMES, QUERIES, chunk=chunk) for chunk in (3, 100)]
    for name in found[0]._fields:
        for other in found[1:]:
            np.testing.assert_allclose(getattr(other, name), getattr(found[0], name), atol=1e-4)


def test_groups_are_tracked_on_their_own_by_one_program():
    """Filling rows are seen by nobody; points of one group do see each other."""

    def logits(queries, **options):
        options |= {"both_ways": False, "chunk": 3}
        return track_clip(CONFIG, PARAMS, FRAMES, queries, **options).visible_logits

    before = clips_module._step_program()._cache_size()
    found = logits(QUERIES, group_size=2)
    assert clips_module._step_program()._cache_size() == before + 1
    np.testing.assert_allclose(found[:2], logits(QUERIES[:2]), atol=1e-4)
    np.testing.assert_allclose(found[2:], logits(QUERIES[2:]), atol=1e-4)
    assert np.abs(logits(QUERIES)[0] - found[0]).max() > 1e-4


def test_stream_is_the_clip_and_stops_with_the_video():
    parts = list(track_stream(CONFIG, PARAMS, iter(FRAMES), QUERIES, chunk=3))
    assert [part.visible.shape[1] for part in parts] == [3, 3, 1]
    expected = track_clip(CONFIG, PARAMS, FRAMES, QUERIES, both_ways=False, chunk=3)
    for name in expected._fields:
        found = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(found, getattr(expected, name))


def test_an_endless_stream_takes_constant_memory():
    """Of 300 frames no more is kept than of 30, here in NumPy's and Python's memory and on the device."""
    endless = (FRAMES[i % 7] for i in itertools.count())
    stream = track_stream(CONFIG, PARAMS, endless, QUERIES, chunk=3)

    def advance(chunks: int) -> tuple[int, int]:
        for _ in range(chunks):
            next(stream)
        gc.collect()
        on_device = sum(x.nbytes for x in jax.live_arrays())
        return tracemalloc.get_traced_memory()[0], on_device

    tracemalloc.start()
    try:
        host, device = advance(10)
        later_host, later_device = advance(90)
    finally:
        tracemalloc.stop()
    assert later_device <= device
    assert later_host - host < 100 * FRAMES[0].nbytes


class Reader:
    """A video that is read from somewhere, a stretch at a time; remembers the longest."""

    longest = 0

    def __len__(self) -> int:
        return len(FRAMES)

    def __getitem__(self, index: slice) -> np.ndarray:
        self.longest = max(self.longest, index.stop - index.start)
        return FRAMES[index]


def test_a_clip_is_read_a_chunk_at_a_time():
    reader = Reader()
    found = track_clip(CONFIG, PARAMS, reader, QUERIES, chunk=3)
    assert reader.longest == 3
    expected = track_clip(CONFIG, PARAMS, FRAMES, QUERIES, chunk=3)
    np.testing.assert_array_equal(found.tracks_yx, expected.tracks_yx)


@pytest.mark.slow
def test_one_frame_and_bfloat16():
    half = TAPNextRuntime(compute_dtype="bfloat16")
    found = track_clip(CONFIG, PARAMS, FRAMES[:1], QUERIES[:1], runtime=half, radius=3)
    assert found.tracks_yx.shape == (1, 1, 2)
    assert not np.isnan(found.tracks_yx).any()


def test_clear_errors():
    def call(video=FRAMES, queries=QUERIES, **options):
        return track_clip(CONFIG, PARAMS, video, queries, **options)

    with pytest.raises(ValueError, match="the video has no frames"):
        call(FRAMES[:0])
    with pytest.raises(ValueError, match="t from 0 below 6"):
        call(FRAMES[:6])
    with pytest.raises(ValueError, match="chunk = 0; it must be at least 1"):
        call(chunk=0)
    with pytest.raises(ValueError, match="group_size = 0; it must be at least 1"):
        call(group_size=0)
    with pytest.raises(ValueError, match=r"gave an array of shape \(7, 8, 12\), not \[T, height, width, 3\]"):
        call(FRAMES[..., 0])
    with pytest.raises(ValueError, match="frame width = 10; it must be a multiple of the patch size"):
        call(FRAMES[:, :, :10])
    with pytest.raises(ValueError, match=r"as .* all would fit: is the order right"):
        call(queries=QUERIES[:, [0, 2, 1]])
