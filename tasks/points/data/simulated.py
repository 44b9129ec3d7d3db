"""MuJoCo scenes as clips with exact tracks: bodies that fall and roll in a room, a camera that wanders.

Needs the extra `sim`, and EGL (with a GPU, or Mesa's software renderer) for pictures without a screen.
"""

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from tasks.common.optional import need
from tasks.common.photographs import SPLITS, photographs_digest
from tasks.points.data.appearance import AppearanceConfig, finish
from tasks.points.data.body_tracks import Recorded, sample_pixels, track_pixels
from tasks.points.data.clips import PointClip
from tasks.points.data.projection import Camera
from tasks.points.data.room import CAMERA, Room, camera_path, draw_room
from tasks.points.data.textures import open_photographs

VERSION = 1  # of the clips: raise it with any change that alters one


@dataclass(frozen=True)
class SimulationConfig:
    """What is simulated.

    frames, rate: of a clip, and a second.
    height, width: of the frames, in pixels.
    points: tracks of a clip, at most.
    fewest, most: bodies.
    settled: seconds that pass before the first frame, at most: bodies fly, roll or lie.
    noise, drift, compressed: see `AppearanceConfig`.
    photographs: folder of pictures for textures; "": those in installed packages.
    seed: of everything.
    """

    frames: int = 24
    rate: float = 12.0
    height: int = 256
    width: int = 256
    points: int = 512
    fewest: int = 3
    most: int = 12
    settled: float = 1.0
    noise: float = 4.0
    drift: float = 0.1
    compressed: float = 0.0
    photographs: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1 or not self.rate > 0 or self.points < 1:
            raise ValueError(
                f"{self.frames} frames at {self.rate} a second, {self.points} points: need at least 1 frame, "
                "a rate above 0, and 1 point"
            )
        if not (16 <= self.height <= 4096 and 16 <= self.width <= 4096):
            raise ValueError(f"frames of {self.height} x {self.width} pixels: need 16 to 4096")
        if not 0 <= self.fewest <= self.most <= 100 or self.settled < 0:
            raise ValueError(
                f"{self.fewest} to {self.most} bodies, {self.settled} s before the first frame: need "
                "0 <= fewest <= most <= 100 and at least 0 s"
            )
        self.appearance()

    def appearance(self) -> AppearanceConfig:
        """What a camera adds."""
        return AppearanceConfig(exposure=0.0, noise=self.noise, drift=self.drift, compressed=self.compressed)


@dataclass(frozen=True)
class SimulatedClips:
    """Clips by index; a clip is a pure function of the configuration, the split and the index (and of
    MuJoCo's version and the renderer).

    config: what is simulated.
    split: whose photographs.
    count: how many there are.
    """

    config: SimulationConfig
    split: str
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"{self.count} clips: need at least 1")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r}: there are {', '.join(SPLITS)}")

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"simulated:{self.split}:{self.config.seed}:{index}"

    def key(self, index: int) -> Any:
        version = load_mujoco().__version__
        return [VERSION, version, photographs_digest(), asdict(self.config), self.split, index]

    def open(self, index: int) -> PointClip:
        """The clip. Raises ImportError: MuJoCo or EGL is missing."""
        config = self.config
        seed = [0x73696D, config.seed % 2**63, sorted(SPLITS).index(self.split), index]
        rng = np.random.default_rng(seed)
        bodies = int(rng.integers(config.fewest, config.most + 1))
        room = draw_room(rng, open_photographs(self.split, config.photographs), bodies)
        video, recorded = record(room, rng, config)
        query_tyx, things = sample_pixels(rng, recorded, config.points)
        tracks_yx, visible = track_pixels(recorded, query_tyx, things)
        video = finish(rng, video.astype(np.float32), config.appearance())
        return PointClip(video, tracks_yx, visible, query_tyx[:, 0].astype(np.int32))


def load_mujoco() -> Any:
    """The package, set to draw without a screen. Raises ImportError: it is not installed."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when it is imported
    return need("mujoco", "simulating scenes")


def open_renderer(model: Any, height: int, width: int) -> Any:
    """MuJoCo's renderer of frames of that size.

    Raises:
        ImportError: there is no EGL, or none that works.
    """
    mujoco = load_mujoco()
    try:
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # what PyOpenGL and the driver raise
        raise ImportError(
            f"MuJoCo cannot draw without a screen (MUJOCO_GL={os.environ.get('MUJOCO_GL')}): {error}: "
            "install EGL (Debian: libegl1 and libgl1-mesa-dri), or set MUJOCO_GL=osmesa"
        ) from error


def record(
    room: Room, rng: np.random.Generator, config: SimulationConfig
) -> tuple[UInt8[np.ndarray, "T H W 3"], Recorded]:
    """(frames, what they show) of a room.

    Raises:
        ImportError: MuJoCo or EGL is missing.
    """
    mujoco = load_mujoco()
    model = mujoco.MjModel.from_xml_string(room.xml, room.assets)
    model.vis.global_.offheight, model.vis.global_.offwidth = config.height, config.width
    data = mujoco.MjData(model)
    if len(room.velocities):
        data.qvel[:] = room.velocities.ravel()
    mujoco.mj_step(model, data, int(rng.uniform(0, config.settled) / model.opt.timestep))
    positions, rotations = camera_path(rng, config.frames)
    focal = config.height / 2 / np.tan(np.deg2rad(room.field_of_view) / 2)
    camera = Camera(positions, rotations, float(focal), config.height, config.width)
    shape = (config.frames, config.height, config.width)
    video, depths = np.empty((*shape, 3), np.uint8), np.empty(shape)
    bodies = np.empty(shape, np.int64)
    poses = np.empty((model.nbody, config.frames, 3)), np.empty((model.nbody, config.frames, 3, 3))
    renderer = open_renderer(model, config.height, config.width)
    try:
        for frame in range(config.frames):
            data.mocap_pos[0] = positions[frame]
            mujoco.mju_mat2Quat(data.mocap_quat[0], rotations[frame].ravel())
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera=CAMERA)
            video[frame], depths[frame], bodies[frame] = _draw(mujoco, model, renderer)
            poses[0][:, frame], poses[1][:, frame] = data.xpos, data.xmat.reshape(-1, 3, 3)
            time = data.time + 1 / config.rate
            while data.time < time - model.opt.timestep / 2:
                mujoco.mj_step(model, data)
    finally:
        renderer.close()
    return video, Recorded(camera, depths, bodies, *poses)


def _draw(
    mujoco: Any, model: Any, renderer: Any
) -> tuple[UInt8[np.ndarray, "H W 3"], Float[np.ndarray, "H W"], Int[np.ndarray, "H W"]]:
    """(picture, depth along the view in metres, number of the body or -1) of the scene."""
    picture = renderer.render()
    renderer.enable_depth_rendering()
    depth = renderer.render().astype(np.float64)
    renderer.disable_depth_rendering()
    renderer.enable_segmentation_rendering()
    numbers, kinds = np.moveaxis(renderer.render(), -1, 0)
    renderer.disable_segmentation_rendering()
    is_body = kinds == int(mujoco.mjtObj.mjOBJ_GEOM)
    return picture, depth, np.where(is_body, model.geom_bodyid[np.where(is_body, numbers, 0)], -1)
