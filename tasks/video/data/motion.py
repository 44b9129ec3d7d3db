"""Generated clips whose classes need time: pairs that no bag of frames can tell apart.

A clip shows a sprite (a piece of a photograph) over a background (another piece). It is one turn of a loop of
T states: T pictures are drawn, and the class is nothing but the order in which they are shown, from a
uniformly random place in the loop on.

| pair | states | first member | second member |
|---|---|---|---|
| horizontal | places on a line through the frame, in and out at its ends | moves right | moves left |
| vertical | the same, upright | moves down | moves up |
| order | T/4 red, T/4 blue, T/2 plain | red then blue | blue then red |
| count | T/2 bright, T/2 plain | flashes once (T/2 long) | flashes twice (T/4 each) |
| speed | places on a circle, either way round | circles slowly: 1 turn | circles fast: 3 turns |
| appear | T opacities | appears (slowly; it goes at once) | disappears (slowly; it comes at once) |
| approach | T sizes | approaches (grows; then a new one) | recedes |

For given textures and places both members show the same T pictures, each once, so that:
- the set of frames of a clip (any order, all times) has the same distribution for both members;
- the picture at any one time t has the same distribution for both, and for every t.
A model that sees one frame, or frames in a shuffled order, is therefore right at most half of the time within
a pair, and at most half of the time over all classes, even if it knows every pair. (Shuffled frames do show
which pair it is; so may a single frame, in part.) This holds for all T frames at stride 1: fewer frames of a
clip, or a larger stride, show a part of the loop, whose places or looks need not be as many for both members
(three turns sampled at every third frame look like one).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

from tasks.common.photographs import Texturer

VERSION = 1  # of the pictures: raise it with any change that alters one

PAIRS: dict[str, tuple[str, str]] = {
    "horizontal": ("moves right", "moves left"),
    "vertical": ("moves down", "moves up"),
    "order": ("red then blue", "blue then red"),
    "count": ("flashes once", "flashes twice"),
    "speed": ("circles slowly", "circles fast"),
    "appear": ("appears", "disappears"),
    "approach": ("approaches", "recedes"),
}
DEFAULT_PAIRS = ("horizontal", "order", "count", "speed", "appear")
_RED, _BLUE, _WHITE = (235.0, 45.0, 30.0), (40.0, 70.0, 240.0), (255.0, 255.0, 255.0)
_SPRITE = 0.4  # of the frame's side
_SMALLEST, _LARGEST = 0.16, 0.8  # idem, of the sprite that approaches
_BACKGROUND = 0.55  # contrast kept: the sprite has to stand out


def class_names(pairs: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of the given pairs, members of a pair next to each other.

    Raises:
        ValueError: an unknown pair, one named twice, or none.
    """
    for name in pairs:
        if name not in PAIRS:
            raise ValueError(f"unknown pair {name!r}: there are {', '.join(PAIRS)}")
    if not pairs or len(set(pairs)) != len(pairs):
        raise ValueError(f"pairs = {pairs}: name at least one pair, and each once")
    return tuple(member for name in pairs for member in PAIRS[name])


@dataclass(frozen=True)
class Look:
    """How the sprite is drawn in one state.

    x, y: centre, in pixels.
    diameter: in pixels.
    opacity: 0..1.
    tint, strength: colour it is blended with, and by how much.
    """

    x: float
    y: float
    diameter: float
    opacity: float = 1.0
    tint: tuple[float, float, float] = _WHITE
    strength: float = 0.0


def state_order(pair: str, member: int, frames: int, rng: np.random.Generator) -> Int[np.ndarray, " frames"]:
    """The order in which the T states are shown: a permutation of range(T).

    Args:
        pair: see the module.
        member: 0 or 1.
        frames: T, a multiple of 4, at least 8.
        rng: draws the place in the loop, and for `speed` the way round.
    """
    steps = np.arange(frames)
    phase = int(rng.integers(frames))
    if pair == "speed":
        turn = int(rng.choice((-1, 1)))
        # A number of turns without a common divisor with T visits every state once, as one turn does.
        fast = next(n for n in (3, 5, 7, 11) if math.gcd(n, frames) == 1)
        return (phase + turn * (fast if member else 1) * steps) % frames
    if pair == "count":
        at, quarter = (phase + steps) % frames, frames // 4
        shown = np.array([0, 2, 1, 3] if member else [0, 1, 2, 3])
        return shown[at // quarter] * quarter + at % quarter
    return (phase + (-steps if member else steps)) % frames


def _looks(pair: str, size: int, frames: int, rng: np.random.Generator) -> list[Look]:
    """The T states of a loop; nothing here knows which member is shown."""
    diameter = _SPRITE * size * rng.uniform(0.9, 1.1)
    x, y = rng.uniform(0.3 * size, 0.7 * size, 2)
    offset = rng.random()
    states = range(frames)
    if pair in ("horizontal", "vertical"):
        length = size + diameter  # it has left the frame whole before it comes in again
        along = [((k + offset) / frames * length) % length - diameter / 2 for k in states]
        return [Look(a, y, diameter) if pair == "horizontal" else Look(x, a, diameter) for a in along]
    if pair == "speed":
        radius = 0.28 * size
        angles = [2 * math.pi * (k + offset) / frames for k in states]
        x, y = size / 2 + 0.1 * (x - size / 2), size / 2 + 0.1 * (y - size / 2)
        return [Look(x + radius * math.cos(a), y + radius * math.sin(a), diameter) for a in angles]
    if pair == "order":
        tints = {0: (_RED, 0.6), 1: (_BLUE, 0.6)}
        looks = [tints.get(4 * k // frames, (_WHITE, 0.0)) for k in states]
        return [Look(x, y, diameter, 1.0, *look) for look in looks]
    if pair == "count":
        return [Look(x, y, diameter, strength=0.75 if 2 * k < frames else 0.0) for k in states]
    if pair == "appear":
        return [Look(x, y, diameter, opacity=(k + 0.5) / frames) for k in states]
    ratio = _LARGEST / _SMALLEST
    return [Look(x, y, size * _SMALLEST * ratio ** ((k + offset) / frames)) for k in states]


def render_clip(
    pair: str, member: int, texturer: Texturer, rng: np.random.Generator, size: int = 64, frames: int = 16
) -> UInt8[np.ndarray, "T S S 3"]:
    """One clip. With generators in the same state, both members show the same pictures in other orders.

    Args:
        pair: see the module.
        member: 0 or 1.
        texturer: where pictures are taken from.
        rng: draws everything.
        size: S, side of a frame in pixels.
        frames: T, a multiple of 4, at least 8.

    Raises:
        ValueError: size or frames that no clip can have.
    """
    if frames < 8 or frames % 4 or size < 16:
        raise ValueError(
            f"{frames} frames of {size} pixels: need a multiple of 4, at least 8, and at least 16 pixels"
        )
    background = texturer.crop(size, rng).astype(np.float32)
    background = background.mean() + _BACKGROUND * (background - background.mean())
    texture = texturer.crop(size, rng).astype(np.float32)
    # Away from the background's brightness, whichever way there is more room.
    shift = 60.0 if background.mean() < 128 else -60.0
    texture = np.clip(texture - texture.mean() + background.mean() + shift, 0, 255)
    shape = _SHAPES[int(rng.integers(len(_SHAPES)))]
    looks = _looks(pair, size, frames, rng)
    pictures = np.stack([_draw(background, texture, shape, look) for look in looks])
    return pictures[state_order(pair, member, frames, rng)]


Distance = Callable[[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]], Float[np.ndarray, "h w"]]
# Distance of (x, y) from the sprite's centre, 1 at its edge.
_SHAPES: tuple[Distance, ...] = (
    lambda x, y: np.sqrt(x * x + y * y),
    lambda x, y: np.maximum(np.abs(x), np.abs(y)) * 1.12,
    lambda x, y: (np.abs(x) + np.abs(y)) * 0.85,
)


def _draw(
    background: Float[np.ndarray, "S S 3"], texture: Float[np.ndarray, "S S 3"], shape: Distance, look: Look
) -> UInt8[np.ndarray, "S S 3"]:
    """One picture: the sprite, its texture scaled with it, over the background."""
    size = len(background)
    radius = look.diameter / 2
    pixels = np.arange(size, dtype=np.float32) + 0.5
    x, y = (pixels - np.float32(look.x)) / radius, (pixels - np.float32(look.y)) / radius
    distance = shape(x[None, :], y[:, None])
    alpha = np.clip((1 - distance) * radius + 0.5, 0, 1)[..., None] * look.opacity  # one pixel of soft edge
    # The texture moves with the sprite; nearest pixel of the middle of the texture, clipped outside.
    columns = np.clip((x * 0.5 + 0.5) * size, 0, size - 1).astype(np.int64)
    rows = np.clip((y * 0.5 + 0.5) * size, 0, size - 1).astype(np.int64)
    sprite = texture[rows[:, None], columns[None, :]]
    sprite = sprite + look.strength * (np.asarray(look.tint, np.float32) - sprite)
    return np.clip(background + alpha * (sprite - background) + 0.5, 0, 255).astype(np.uint8)
