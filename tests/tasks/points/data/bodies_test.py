"""Tracks of rigid bodies by their poses, without a renderer; MuJoCo's rooms, where one can be drawn."""

import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.points.data import PointsDataConfig, check_clip, open_points_data, simulated
from tasks.points.data.__main__ import main
from tasks.points.data.body_tracks import Recorded, sample_pixels, track_pixels
from tasks.points.data.clips import inside
from tasks.points.data.render import sample
from tasks.points.data.room import camera_path, draw_room
from tasks.points.data.simulated import SimulatedClips, SimulationConfig, open_renderer
from tasks.points.data.textures import open_photographs
from tests.tasks.points.data.movi_files import BoxScene
from tests.tasks.points.data.rooms import require_egl

SMALL = SimulationConfig(frames=5, height=48, width=64, points=60, fewest=3, most=4, noise=0.0, drift=0.0)


def box_record(scene: BoxScene) -> Recorded:
    """The box over the floor, as a simulator tells of it."""
    _, distances, segments, _ = scene.pictures()
    rows, columns = np.meshgrid(*[np.arange(scene.size) + 0.5] * 2, indexing="ij")
    along = scene.camera.depth_of_distance(np.stack([rows.ravel(), columns.ravel()], axis=-1))
    depths = distances * along.reshape(scene.size, scene.size)
    still = np.tile(np.eye(3), (scene.frames, 1, 1))
    return Recorded(
        scene.camera, depths, segments, np.stack([np.zeros_like(scene.positions), scene.positions]),
        np.stack([still, scene.rotations]),
    )  # fmt: skip


def test_tracks_are_those_of_the_bodies() -> None:
    scene = BoxScene(frames=5, size=48)
    record = box_record(scene)
    query_tyx, bodies = sample_pixels(np.random.default_rng(0), record, 200)
    tracks, visible = track_pixels(record, query_tyx, bodies)
    at = query_tyx[:, 0].astype(int)
    assert set(bodies) == {0, 1}
    assert np.array_equal(tracks[np.arange(200), at], query_tyx[:, 1:])
    agree = []
    for point in range(200):
        _, thing, own, _ = scene.cast(at[point], query_tyx[point : point + 1, 1:])
        for t in range(scene.frames):
            world = scene.world(t, thing, own)
            place, _ = scene.camera.project(np.repeat(world[:, None], scene.frames, axis=1))
            assert np.abs(place[0, t] - tracks[point, t]).max() < 1e-4
            if inside(place[0, t : t + 1] - 0.5, 47, 47)[0]:
                seen, _, _, _ = scene.cast(t, place[:, t])
                away = np.linalg.norm(world[0] - scene.camera.positions[t])
                agree.append(visible[point, t] == (seen[0] >= 0.99 * away))
    assert len(agree) > 500
    assert np.mean(agree) > 0.97


def test_what_shows_nothing_is_never_asked_for() -> None:
    record = box_record(BoxScene(frames=3, size=32))
    empty = replace(record, bodies=np.where(np.arange(32) < 16, record.bodies, -1))
    query_tyx, bodies = sample_pixels(np.random.default_rng(0), empty, 100)
    assert query_tyx[:, 2].max() < 16
    assert bodies.min() >= 0


def test_points_behind_the_camera_are_out_of_sight() -> None:
    scene = BoxScene(frames=3, size=32)
    record = box_record(scene)
    turned = replace(scene.camera, rotations=scene.camera.rotations.copy())
    turned.rotations[2] = turned.rotations[2] @ np.diag([-1.0, 1.0, -1.0])  # looking back
    query_tyx, bodies = sample_pixels(np.random.default_rng(0), record, 50)
    early = query_tyx[:, 0] < 2
    tracks, visible = track_pixels(replace(record, camera=turned), query_tyx[early], bodies[early])
    assert not visible[:, 2].any()
    assert np.all(tracks[:, 2] == -32)
    assert np.isfinite(tracks).all()


def test_the_camera_looks_into_the_room() -> None:
    for seed in range(5):
        positions, rotations = camera_path(np.random.default_rng(seed), 40)
        assert np.allclose(np.einsum("tji,tjk->tik", rotations, rotations), np.eye(3), atol=1e-12)
        assert np.allclose(np.linalg.det(rotations), 1)
        assert np.all(np.abs(positions[:, :2]) < 6)
        assert np.all((positions[:, 2] > 0.5) & (positions[:, 2] < 4))
        ahead = positions - 3 * rotations[:, :, 2]
        assert np.all(np.linalg.norm(ahead[:, :2], axis=-1) < np.linalg.norm(positions[:, :2], axis=-1))
        assert np.all(rotations[:, 2, 1] > 0.5)  # its up is up


def test_rooms_are_as_drawn() -> None:
    photographs = open_photographs("train")
    room, again, other = (draw_room(np.random.default_rng(seed), photographs, 3) for seed in (0, 0, 1))
    assert room.xml == again.xml
    assert room.assets == again.assets
    assert room.xml != other.xml
    assert room.velocities.shape == (3, 6)
    assert draw_room(np.random.default_rng(0), photographs, 0).velocities.shape == (0, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "need at least 1 frame"),
        ({"height": 8}, "need 16 to 4096"),
        ({"fewest": 5, "most": 4}, "0 <= fewest <= most"),
        ({"noise": -1.0}, "noise"),
    ],
)
def test_bad_simulations(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**options)
    with pytest.raises(ValueError, match="need at least 1"):
        SimulatedClips(SMALL, "train", 0)
    with pytest.raises(ValueError, match="split 'test'"):
        SimulatedClips(SMALL, "test", 1)


@pytest.fixture(scope="module")
def egl() -> None:
    """Skips where no picture can be drawn."""
    require_egl()


@pytest.mark.usefixtures("egl")
def test_a_simulated_clip() -> None:
    clips = SimulatedClips(SMALL, "train", 3)
    clip = check_clip(clips.open(1), "x")
    assert clip.video.shape == (5, 48, 64, 3)
    assert clip.tracks_yx.shape == (60, 5, 2)
    again = pickle.loads(pickle.dumps(clips)).open(1)
    assert np.array_equal(clip.video, again.video)
    assert np.array_equal(clip.tracks_yx, again.tracks_yx)
    assert not np.array_equal(clip.video, clips.open(2).video)
    rows = np.arange(60)
    asked = clip.tracks_yx[rows, clip.query_frames]
    assert np.allclose(asked % 1, 0.5, atol=1e-4)
    assert clip.visible[rows, clip.query_frames].all()
    assert 0.3 < clip.visible.mean() < 1


@pytest.mark.usefixtures("egl")
def test_pictures_stay_with_their_points() -> None:
    """Simulated colours along tracks change little; a few pixels away, more."""
    right, wrong = [], []
    for index in range(3):
        clip = SimulatedClips(replace(SMALL, height=96, width=96, points=200), "train", 3).open(index)
        shown = inside(clip.tracks_yx - 4, 88, 88) & clip.visible
        for point in range(200):
            at = int(clip.query_frames[point])
            reference = sample(clip.video[at], clip.tracks_yx[point, at][None, None, ::-1])[0, 0].astype(
                float
            )
            for t in np.flatnonzero(shown[point] & (np.arange(5) != at)):
                place = clip.tracks_yx[point, t][None, None, ::-1]
                right.append(np.abs(sample(clip.video[t], place)[0, 0] - reference).mean())
                wrong.append(np.abs(sample(clip.video[t], place + np.float32(4))[0, 0] - reference).mean())
    assert len(right) > 300
    assert np.median(wrong) > 2 * np.median(right)


@pytest.mark.usefixtures("egl")
def test_simulate_writes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", f"--output={tmp_path}", "--clips=2", "--held-out=1", "--workers=1"]
    size = ["--frames=3", "--height=32", "--width=32", "--points=30", "--fewest=2", "--most=2"]
    assert main([*arguments, *size]) == 0
    assert "train: 2 clips, 6 frames" in capsys.readouterr().out
    data = open_points_data(
        PointsDataConfig(source="records", path=str(tmp_path), frames=3, height=32, width=32, tracks=8)
    )
    assert data.batches(2)[0]["video"].shape == (2, 3, 32, 32, 3)
    assert len(data.held_out) == 1


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert main(["simulate", f"--output={tmp_path}", "--workers=1"]) == 2
    assert "pip install 'foxtrot[sim]'" in capsys.readouterr().err
    assert main(["simulate", f"--output={tmp_path}", "--most=0"]) == 2
    assert "0 <= fewest <= most" in capsys.readouterr().err


def test_a_missing_egl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def Renderer(self, *_: object) -> None:
            raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(simulated, "load_mujoco", Broken)
    with pytest.raises(ImportError, match=r"cannot draw without a screen .*eglQueryString.*libegl1"):
        open_renderer(None, 16, 16)
