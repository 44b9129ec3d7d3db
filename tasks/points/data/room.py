"""A room with falling, rolling and lying bodies, as a MuJoCo model: shapes, sizes and pictures at random."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tasks.common.optional import need
from tasks.points.data.paths import wander
from tasks.points.data.textures import Photographs, cut_texture

CAMERA = "eye"
_HALF = 6.0  # metres, of the room's sides
_HIGH = 6.0  # metres, of its ceiling
_PICTURE = 256  # pixels of a texture's side
_TRIES = 20  # places drawn for each body
_STEP = 0.004  # seconds, of the simulation
_KINDS = ("box", "ellipsoid", "sphere", "cylinder", "capsule")


@dataclass(frozen=True)
class Room:
    """A model and how it starts.

    xml: of MuJoCo.
    assets: files that the XML names.
    velocities: [bodies, 6], of the free bodies at the start: metres and radians a second.
    field_of_view: of the camera, degrees, vertical.
    """

    xml: str
    assets: dict[str, bytes]
    velocities: Float[np.ndarray, "bodies 6"]
    field_of_view: float


def draw_room(rng: np.random.Generator, photographs: Photographs, bodies: int) -> Room:
    """A random room with so many bodies."""
    assets, materials = {}, []
    for number in range(bodies + 3):
        name = f"picture{number}"
        assets[f"{name}.png"] = _png(cut_texture(rng, photographs, _PICTURE, _PICTURE))
        kind = "2d" if number < 3 else "cube"
        materials.append(
            f'<texture name="{name}" type="{kind}" file="{name}.png"/>'
            f'<material name="{name}" texture="{name}" texuniform="{str(number < 3).lower()}" '
            f'texrepeat="{rng.uniform(0.15, 0.5):.4f} {rng.uniform(0.15, 0.5):.4f}" '
            f'specular="{rng.uniform(0, 0.4):.3f}" shininess="{rng.uniform(0, 0.6):.3f}"/>'
        )
    places = _places(rng, bodies)
    things = [_body(rng, number, place) for number, place in enumerate(places)]
    field_of_view = float(rng.uniform(40, 65))
    xml = f"""<mujoco>
<option timestep="{_STEP}" integrator="implicitfast"/>
<visual><quality shadowsize="1024"/><map znear="0.005" zfar="10"/>
<headlight ambient="{_three(rng, 0.35, 0.6)}" diffuse="{_three(rng, 0.2, 0.5)}" specular="0.1 0.1 0.1"/>
</visual>
<statistic extent="5" center="0 0 1"/>
<asset>{"".join(materials)}</asset>
<worldbody>
{_walls()}
<light pos="{rng.uniform(-3, 3):.3f} {rng.uniform(-3, 3):.3f} {_HIGH - 0.5}" dir="0 0 -1" castshadow="true"
 diffuse="{_three(rng, 0.3, 0.7)}" specular="0.2 0.2 0.2" cutoff="90" exponent="1"/>
<body name="{CAMERA}" mocap="true"><camera name="{CAMERA}" fovy="{field_of_view}"/></body>
{"".join(things)}
</worldbody>
</mujoco>"""
    return Room(xml, assets, _velocities(rng, places), field_of_view)


def _three(rng: np.random.Generator, low: float, high: float) -> str:
    return " ".join(f"{value:.3f}" for value in rng.uniform(low, high) * rng.uniform(0.85, 1.0, 3))


def _png(picture: np.ndarray) -> bytes:
    images: Any = need("PIL.Image", "encoding textures")
    file = io.BytesIO()
    images.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _walls() -> str:
    """Floor, four walls, ceiling: whatever the camera looks at has a place in the world. All face inward:
    behind a plane, everything is solid."""
    side, high = _HALF, _HIGH / 2
    planes = (
        ("0 0 0", "1 0 0 0 1 0", f"{side} {side}", 0),
        (f"{side} 0 {high}", "0 -1 0 0 0 1", f"{side} {high}", 1),
        (f"{-side} 0 {high}", "0 1 0 0 0 1", f"{side} {high}", 1),
        (f"0 {side} {high}", "1 0 0 0 0 1", f"{side} {high}", 2),
        (f"0 {-side} {high}", "-1 0 0 0 0 1", f"{side} {high}", 2),
        (f"0 0 {_HIGH}", "1 0 0 0 -1 0", f"{side} {side}", 0),
    )
    return "\n".join(
        f'<geom type="plane" pos="{place}" xyaxes="{axes}" size="{size} 0.1" material="picture{number}"/>'
        for place, axes, size, number in planes
    )


def _places(rng: np.random.Generator, bodies: int) -> Float[np.ndarray, "bodies 3"]:
    """Places in the air, each the farthest of some from those before: so that none begin inside another."""
    places = np.empty((bodies, 3))
    for number in range(bodies):
        drawn = rng.uniform((-2.5, -2.5, 0.6), (2.5, 2.5, 4.5), (_TRIES, 3))
        gaps = np.linalg.norm(drawn[:, None] - places[None, :number], axis=-1)
        places[number] = drawn[gaps.min(axis=1, initial=np.inf).argmax() if number else 0]
    return places


def _body(rng: np.random.Generator, number: int, place: np.ndarray) -> str:
    kind = str(rng.choice(_KINDS))
    half = rng.uniform(0.18, 0.5, 3)
    size = {"sphere": half[:1], "cylinder": half[:2], "capsule": half[:2] * (0.7, 1.0)}.get(kind, half)
    turn = rng.standard_normal(4)
    return (
        f'<body pos="{_text(place)}" quat="{_text(turn / np.linalg.norm(turn))}"><freejoint/>'
        f'<geom type="{kind}" size="{_text(size)}" material="picture{number + 3}" '
        f'density="{rng.uniform(200, 1500):.1f}" '
        f'friction="{rng.uniform(0.3, 1.2):.3f} 0.01 0.001" '
        f'solref="{rng.uniform(0.004, 0.03):.4f} {rng.uniform(0.2, 1.0):.3f}"/></body>'
    )


def _text(values: np.ndarray) -> str:
    return " ".join(f"{value:.6f}" for value in values)


def _velocities(
    rng: np.random.Generator, places: Float[np.ndarray, "bodies 3"]
) -> Float[np.ndarray, "bodies 6"]:
    """Most are thrown towards the middle, spinning; some only fall."""
    count = len(places)
    thrown = (rng.random(count) < 0.7)[:, None]
    linear = -places * (1, 1, 0) * rng.uniform(0, 1.5, (count, 1)) + rng.normal(0, 1.0, (count, 3))
    return np.concatenate([linear, rng.normal(0, 4.0, (count, 3))], axis=1) * thrown


def camera_path(
    rng: np.random.Generator, frames: int
) -> tuple[Float[np.ndarray, "T 3"], Float[np.ndarray, "T 3 3"]]:
    """(positions, rotations) of a camera that wanders about the room and looks near its middle: its axes are
    to the right, up, and away from what it looks at."""
    # Distance from the middle, direction, height; where it looks; roll. Per second at 12 frames.
    low = np.array([2.8, -1e3, 0.6, -0.8, -0.8, 0.1, -0.2])
    high = np.array([5.0, 1e3, 3.5, 0.8, 0.8, 1.5, 0.2])
    spacing = float(rng.uniform(8, 24))
    speed = np.exp(rng.uniform(np.log(0.1), np.log(1.0)))
    step = np.array([0.05, 0.035, 0.05, 0.03, 0.03, 0.03, 0.006]) * spacing * speed
    away, angle, height, x, y, z, roll = wander(rng, frames, spacing, step, low, high)(np.arange(frames)).T
    positions = np.stack([away * np.cos(angle), away * np.sin(angle), height], axis=-1)
    back = positions - np.stack([x, y, z], axis=-1)
    back /= np.linalg.norm(back, axis=-1, keepdims=True)
    right = np.cross(np.array([0.0, 0.0, 1.0]), back)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    up = np.cross(back, right)
    cos, sin = np.cos(roll)[:, None], np.sin(roll)[:, None]
    return positions, np.stack([cos * right + sin * up, cos * up - sin * right, back], axis=-1)
