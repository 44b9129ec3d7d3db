"""The embedded generator: pictures and tracks of a scene agree, and occlusion is that of a z-buffer."""

import dataclasses
import pickle

import numpy as np
import pytest

from tasks.common.video.errors import VideoDataError
from tasks.points.data.appearance import AppearanceConfig, finish
from tasks.points.data.clips import check_clip, inside
from tasks.points.data.generated import GeneratedClips
from tasks.points.data.paths import constant
from tasks.points.data.point_budget import choose_places, split_budget
from tasks.points.data.render import render, sample
from tasks.points.data.scene import Layer, Placing, Scene, SceneConfig, draw_scene
from tasks.points.data.scene_points import choose_points, track_points
from tasks.points.data.textures import Photographs, cut_texture, draw_shape, open_photographs, wash
from tasks.points.data.view import View, opacity

PLAIN = AppearanceConfig(exposure=0.0, drift=0.0, noise=0.0, compressed=0.0)
BUSY = SceneConfig(fewest=6, most=6, smallest=0.3, largest=0.7, ripple=0.5, still=0.0)


@pytest.fixture(scope="module")
def photographs() -> Photographs:
    return open_photographs("train")


def clips(photographs: Photographs, **options: object) -> GeneratedClips:
    given = {"count": 8, "frames": 6, "height": 48, "width": 64, "points": 40, "scene": BUSY, **options}
    return GeneratedClips(photographs, **given)


def place_at(x: float, y: float, centre: tuple[float, float] = (0.0, 0.0)) -> Placing:
    return Placing(constant(np.array([x, y, 0, 0, 0, 0, 0, 0.0])), centre)


def plain_layer(x: float, y: float, height: int, width: int, grey: int, alpha: int = 255) -> Layer:
    texture = np.full((height, width, 4), grey, np.uint8)
    texture[..., 3] = alpha
    return Layer(texture, place_at(x, y))


def two_layers(alpha: int = 255) -> Scene:
    """A background of 30, a square of 200 that covers columns 4..7 and rows 2..5."""
    background = plain_layer(-4, -4, 24, 28, 30)
    square = plain_layer(4, 2, 4, 4, 200, alpha)
    camera = place_at(10, 8, (10.0, 8.0))
    return Scene(16, 20, 2, (background, square), camera)


def test_layers_lie_where_they_are_placed() -> None:
    frames = render(two_layers())
    wanted = np.full((16, 20), 30.0)
    wanted[2:6, 4:8] = 200
    assert np.array_equal(frames[0], np.repeat(wanted[..., None], 3, 2))
    assert np.array_equal(frames[0], frames[1])
    tracks, visible = track_points(
        two_layers(), np.array([0, 0, 1]), np.array([[10.5, 7.5], [13.0, 10.0], [0.5, 0.5]])
    )
    # The background's (10.5, 7.5) is at (6.5, 3.5) of the frame, below the square.
    assert np.allclose(tracks[:, 0], [[3.5, 6.5], [6.0, 9.0], [2.5, 4.5]])
    assert visible[:, 0].tolist() == [False, True, True]


@pytest.mark.parametrize(("alpha", "seen"), [(127, True), (128, False)])
def test_half_transparent_is_where_hiding_begins(alpha: int, seen: bool) -> None:
    _, visible = track_points(two_layers(alpha), np.array([0]), np.array([[10.5, 7.5]]))
    assert visible.all() == seen


def test_opacity_is_sampled_as_pictures_are() -> None:
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (7, 9, 4)).astype(np.uint8)
    places = rng.uniform(-1, 10, (40, 3, 2)).astype(np.float32)
    found = opacity(Layer(texture, place_at(0, 0)), places.astype(np.float64))
    assert np.abs(found - sample(texture, places)[..., 3]).max() <= 0.51
    assert found[(places < 0).any(axis=-1)].max() == 0


def test_textures_stay_with_their_points(photographs: Photographs) -> None:
    """Around a point that is seen, the picture is the same in every frame; two pixels away it is not."""
    right, wrong = [], []
    for index in range(4):
        source = clips(photographs, height=96, width=96, points=60, appearance=PLAIN)
        scene, rng = source.draw(index)
        layers, at, places = choose_points(rng, scene, 60)
        tracks, visible = track_points(scene, layers, places)
        video = render(scene).astype(np.uint8)
        view = View(scene, np.arange(scene.frames, dtype=float))
        for point in range(60):
            # A cross of texture places around the point, wherever it is in the frame at that time.
            around = places[point] + 1.5 * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
            xy = view.to_frame(int(layers[point]), around)
            usable = visible[point] & inside(xy[..., ::-1] - 3, 90, 90).all(axis=0)
            usable &= ~view.covered(int(layers[point]), xy).any(axis=0)
            usable &= (view.on_top(xy) == layers[point]).all(axis=0)
            if usable.sum() < 2 or not usable[at[point]]:
                continue
            patches = np.stack([sample(video[t], xy[None, :, t].astype(np.float32))[0] for t in range(6)])
            moved = np.stack([sample(video[t], xy[None, :, t].astype(np.float32) + 2)[0] for t in range(6)])
            reference = patches[at[point]].astype(float)
            others = np.flatnonzero(usable & (np.arange(6) != at[point]))
            right += [np.abs(patches[t] - reference).mean() for t in others]
            wrong += [np.abs(moved[t] - reference).mean() for t in others]
            assert np.allclose(xy[0, :, ::-1], tracks[point], atol=1e-3)
    assert len(right) > 200
    assert np.mean(right) < 4.0
    assert np.mean(wrong) > 3 * np.mean(right)


def test_occlusion_is_that_of_a_z_buffer(photographs: Photographs) -> None:
    """Against pictures of the scene in which every layer is one grey: a pixel shows what is in front."""
    compared = 0
    for index in range(6):
        scene, rng = clips(photographs).draw(index)
        marked = []
        for number, layer in enumerate(scene.layers):
            texture = layer.texture.copy()
            texture[..., :3] = 30 * number
            texture[..., 3] = np.where(texture[..., 3] > 127, 255, 0)  # no soft edges
            marked.append(dataclasses.replace(layer, texture=texture))
        hard = dataclasses.replace(scene, layers=tuple(marked))
        buffer = render(hard)[..., 0] / 30
        layers, _, places = choose_points(rng, hard, 200)
        tracks, visible = track_points(hard, layers, places)
        frame = inside(tracks, scene.height, scene.width)
        for point, time in np.argwhere(frame):
            row, column = tracks[point, time].astype(int)
            seen = buffer[time, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            if np.ptp(seen) == 0:  # not at an edge, where a pixel is of two
                compared += 1
                assert visible[point, time] == (round(seen.flat[0]) == layers[point]), (index, point, time)
        assert not visible[~frame].any()
    assert compared > 2000


def test_points_that_leave_and_come_back_are_where_their_material_is(photographs: Photographs) -> None:
    """Frame to texture and back, at every time and for every kind of layer."""
    for index in range(4):
        scene, rng = clips(photographs).draw(index)
        view = View(scene, np.array([0.0, 2.5, 5.0]))
        for number in range(len(scene.layers)):
            xy = rng.uniform(0, 48, (20, 3, 2))
            texture = view.to_texture(number, xy)
            for time in range(3):
                assert np.abs(view.to_frame(number, texture[:, time])[:, time] - xy[:, time]).max() < 1e-6


def test_a_clip_is_a_pure_function_of_its_index(photographs: Photographs) -> None:
    source = clips(photographs)
    first, again = source.open(3), pickle.loads(pickle.dumps(source)).open(3)
    for name in ("video", "tracks_yx", "visible", "query_frames"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    for other in (
        source.open(4),
        clips(photographs, seed=1).open(3),
        clips(open_photographs("validation")).open(3),
    ):
        assert not np.array_equal(first.video, other.video)
    with pytest.raises(IndexError, match="clip 8 of 8"):
        source.open(8)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (3, 40, 130), (80, 32, 24)])
def test_any_length_and_size(photographs: Photographs, frames: int, height: int, width: int) -> None:
    clip = clips(photographs, frames=frames, height=height, width=width, points=9).open(0)
    check_clip(clip, "x")
    assert clip.video.shape == (frames, height, width, 3)
    assert clip.tracks_yx.shape == (9, frames, 2)
    rows = np.arange(9)
    assert clip.visible[rows, clip.query_frames].all()
    asked = clip.tracks_yx[rows, clip.query_frames]
    assert np.allclose(asked % 1, 0.5, atol=1e-3)  # centres of pixels


def test_a_scene_without_layers_or_motion(photographs: Photographs) -> None:
    still = SceneConfig(fewest=0, most=0, camera=0.0)
    clip = clips(photographs, scene=still, appearance=PLAIN).open(0)
    assert np.array_equal(clip.video[0], clip.video[-1])
    assert np.ptp(clip.tracks_yx, axis=1).max() == 0
    assert clip.visible.all()


def test_motion_blur_averages_the_exposure(photographs: Photographs) -> None:
    """Longer exposures of a moving scene have less contrast, and stay centred on the frame's time."""
    fast = dataclasses.replace(BUSY, slowest=0.08, fastest=0.08)
    scene, _ = clips(photographs, scene=fast).draw(0)
    sharp, blurred = render(scene), render(scene, 0.8)
    detail = [np.abs(np.diff(frames, axis=2)).mean() for frames in (sharp, blurred)]
    assert detail[1] < 0.9 * detail[0]
    before, after = (np.abs(blurred[1:-1] - other).mean() for other in (sharp[:-2], sharp[2:]))
    assert np.abs(blurred[1:-1] - sharp[1:-1]).mean() < 0.6 * min(before, after)
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        render(scene, 1.5)


def test_appearance() -> None:
    grey = np.full((6, 32, 40, 3), 100, np.float32)
    assert np.array_equal(finish(np.random.default_rng(0), grey.copy(), PLAIN), grey)
    noisy = finish(np.random.default_rng(1), grey.copy(), dataclasses.replace(PLAIN, noise=20.0)).astype(int)
    assert 0.5 < noisy[0].std() < 20
    assert not np.array_equal(noisy[0], noisy[1])
    drifting = finish(np.random.default_rng(1), grey.copy(), dataclasses.replace(PLAIN, drift=0.3)).astype(
        int
    )
    assert np.ptp(drifting.mean(axis=(1, 2, 3))) > 0.5
    assert abs(drifting - 100).max() < 70
    wave = grey + 60 * np.sin(np.arange(40))[:, None].astype(np.float32)
    squeezed = finish(
        np.random.default_rng(0), wave.copy(), dataclasses.replace(PLAIN, compressed=1.0, best=30)
    )
    assert 0 < np.abs(squeezed - wave).mean() < 15


def test_budget() -> None:
    assert split_budget(np.array([100, 3, 10]), 60).tolist() == [47, 3, 10]
    assert split_budget(np.array([100, 100, 100]), 60).tolist() == [20, 20, 20]
    assert split_budget(np.array([5, 5]), 60).tolist() == [5, 5]
    things = np.repeat([0, 1, 2], [8000, 1600, 400])
    chosen = choose_places(np.random.default_rng(0), things, 240)
    assert len(set(chosen.tolist())) == 240
    # A tenth of the smallest, and equal shares of what is left.
    assert np.bincount(things[chosen]).tolist() == [100, 100, 40]
    assert (
        len(choose_places(np.random.default_rng(0), np.zeros(50, int), 30)) == 30
    )  # above a tenth, if need be
    many = np.repeat(np.arange(40), 100)
    taken = np.unique(many[choose_places(np.random.default_rng(0), many, 50)])
    assert len(taken) <= 25


def test_queries_come_mostly_early(photographs: Photographs) -> None:
    source = clips(photographs, frames=20, points=150, height=32, width=32)
    at = np.concatenate([source.open(i).query_frames for i in range(3)])
    assert 0.2 < (at == 0).mean() < 0.5
    assert (at >= 10).mean() > 0.15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fewest": 3, "most": 2}, "need 0 <= fewest <= most"),
        ({"slowest": 0.2, "fastest": 0.1}, "need 0 < slowest <= fastest"),
        ({"camera": 1.5}, "a share is between 0 and 1"),
        ({"tilt": 0.6}, "below 0.5"),
        ({"soonest": 4.0, "latest": 3.0}, "need 0 < soonest <= latest"),
        ({"wash": 1.1}, "wash = 1.1: a share is between 0 and 1"),
    ],
)
def test_bad_scenes(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneConfig(**options)


def test_bad_appearance_and_clips(photographs: Photographs) -> None:
    for options, message in (({"drift": 1.0}, "drift"), ({"worst": 0}, "JPEG"), ({"exposure": -1}, "share")):
        with pytest.raises(ValueError, match=message):
            AppearanceConfig(**options)
    for options in ({"count": 0}, {"points": 0}, {"height": 8}):
        with pytest.raises(ValueError, match="need at least 1"):
            clips(photographs, **options)
    with pytest.raises(ValueError, match="need at least 1 frame"):
        draw_scene(np.random.default_rng(0), photographs, 8, 8, 4)


def test_textures_and_shapes(photographs: Photographs) -> None:
    rng = np.random.default_rng(0)
    pictures = [cut_texture(rng, photographs, 30, 50) for _ in range(10)]
    assert all(p.shape == (30, 50, 3) for p in pictures)
    assert np.mean([p.std() for p in pictures]) > 15
    for _ in range(40):
        alpha = draw_shape(rng, 30.0)
        assert 0.05 < (alpha > 127).mean() < 0.95
        assert alpha[0].max() == alpha[-1].max() == alpha[:, 0].max() == alpha[:, -1].max() == 0
        assert 15 < max(alpha.shape) < 70


def test_a_wash_tells_the_places_of_a_picture_apart() -> None:
    """Of a grey picture no two patches look alike under it; a share of 0 changes and draws nothing."""
    grey = np.full((48, 64, 3), 128, np.uint8)
    rng = np.random.default_rng(0)
    assert wash(rng, grey, 0.0) is grey
    assert rng.random() == np.random.default_rng(0).random()
    for seed in range(10):
        washed = wash(np.random.default_rng(seed), grey, 1.0)
        patches = washed.reshape(6, 8, 8, 8, 3).mean(axis=(1, 3)).reshape(-1, 3)
        gaps = np.linalg.norm(patches[:, None] - patches, axis=-1) + 1e3 * np.eye(len(patches))
        assert gaps.min() > 4
        half = wash(np.random.default_rng(seed), grey, 0.5)
        assert np.abs(half - (64 + washed / 2)).max() <= 1


def test_paths_turn_as_soon_as_they_are_asked_to(photographs: Photographs) -> None:
    """What turns every frame and a half goes back and forth in eight; by default hardly anything does."""

    def turning(**options: float) -> float:
        scene = SceneConfig(still=0.0, slowest=0.1, fastest=0.2, camera=0.0, **options)
        turns = []
        for seed in range(10):
            for layer in draw_scene(np.random.default_rng(seed), photographs, 64, 64, 8, scene).layers[1:]:
                steps = np.diff(layer.placing.path(np.arange(8.0))[:, :2], axis=0)
                turns.append(np.sign(steps[1:]) != np.sign(steps[:-1]))
        return float(np.mean(turns))

    assert turning(soonest=1.5, latest=1.5) > 2 * turning()


def test_a_folder_of_photographs(tmp_path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(9):
        picture = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    train, held_out = (open_photographs(split, str(tmp_path)) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (7, 2)
    assert not set(train.files) & set(held_out.files)
    clip = GeneratedClips(train, 2, 3, 32, 32, 5).open(0)
    assert clip.video.std() > 5
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(VideoDataError, match=r"0\.png: cannot be read as a picture"):
        held_out[0]
    for folder, message in (("nowhere", "no such folder"), (str(tmp_path.parent / "e"), "no such folder")):
        with pytest.raises(VideoDataError, match=message):
            open_photographs("train", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoDataError, match="0 pictures in it"):
        open_photographs("train", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="there are train, validation"):
        open_photographs("test")
