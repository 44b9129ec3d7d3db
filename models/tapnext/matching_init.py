"""Initial parameters from which TAPNext learns to match in minutes: its maps start as what matching needs.

To track, a point's token must read the picture where it is asked for, remember what it read, and find that in
later frames. From independent random maps these three steps are of no use one without the other, and their
composition takes long to form. Here each starts in its place (after "mimetic initialisation", Trockman and
Kolter 2023, arXiv 2305.09828: query and key maps that start equal, value and output maps that start inverse):

  1. Image tokens carry sine and cosine positions, those of the queries, in the channels that these fill, and
     the coarsest cosine coefficients of their patch in channels that the positions leave (nearly) constant.
  2. The first layer's attention compares positions and passes on patches.
  3. The recurrent blocks of the later layers pass the points' tokens on: they are written when the point is
     asked for, and kept. To image tokens they add little. In the first layer nothing is passed on: a point
     would go on reading where it was asked for.
  4. The later layers' attention compares patches, one head also positions, and passes on positions.

The other maps, the MLPs and the heads start as `init_params` draws them, the former's outputs smaller.
Nothing is learnt yet; all of it is trained. The architecture is the same.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.common.params import flatten_names, unflatten_names
from models.common.shapes import Key, Params
from models.tapnext.config import TAPNextConfig
from models.tapnext.parameters import init_params
from models.tapnext.queries import query_embedding

_CONSTANT = 0.01  # variance over the image below which a channel of the positions is free
_FASTEST = 0.35  # radians a pixel up to which positions are compared: finer ones repeat between patches
_STRONG = 1e-3  # share of the positions' variance above which a direction of theirs is compared
_COEFFICIENTS = 9  # of a patch, for each colour
_CONTENT = 6.0  # what they are multiplied by
_DETAIL = 2.0  # and all but the mean again: colours are shared by many places, with their slopes by fewer
_MARK = 3.0  # in the channels that mark image tokens and query tokens; negative in the other points' tokens
_IMAGE_ONLY = 7.5  # how much rather attention looks at image tokens: bias of a query over sqrt(head width)
_REST = 0.1  # scale of the random parts of the maps that are set here, and of the MLPs' outputs
_PASSED = 1.5  # gain of positions from matching; half of it for the head that compares positions too
_RADIUS = 0.85  # of the recurrence, at the gate's strongest
_GATES = {"a_gate": (3.0, -4.0), "input_gate": (3.0, -2.0)}  # (weight of the query's mark, bias)
_KEPT = 0.3  # of the place where a point was asked for, in the memory
_NEAR = 0.3  # weight of positions beside patches, where a head compares both
_WITH_POSITIONS = 12  # coefficients that this head compares, at most


class Channels(NamedTuple):
    """What the channels of the residual stream are for.

    Attributes:
      mean: [D], the mean position.
      coarse: [D], 1 where a position changes slowly enough to be compared, else 0.
      positions: [D, R], orthonormal directions in which positions differ.
      content: [C] the channels of the patches' coefficients.
      image, asked: marks of image tokens and of query tokens.
    """

    mean: Float[np.ndarray, " D"]
    coarse: Float[np.ndarray, " D"]
    positions: Float[np.ndarray, "D R"]
    content: Int[np.ndarray, " C"]
    image: int
    asked: int


def init_matching_params(config: TAPNextConfig, key: Key) -> Params:
    """Initial parameters, float32, canonical names: `init_params` and then `with_matching`.

    Works under `jax.jit` and `jax.eval_shape`.

    Raises:
      ValueError: see `with_matching`.
    """
    return with_matching(config, init_params(config, key))


def with_matching(config: TAPNextConfig, params: Params) -> Params:
    """Random parameters with matching put in place, see above.

    Args:
      params: as `init_params` draws them.

    Raises:
      ValueError: a model of one layer (it takes two to match) or of one head; another width of the
        recurrence than the model's; or one too narrow, where positions leave no channels.
    """
    if config.depth < 2 or config.num_heads < 2 or config.recurrent_width != config.width:
        raise ValueError(
            f"depth = {config.depth}, num_heads = {config.num_heads}, lru_width = {config.recurrent_width}: "
            f"the matching initialisation needs at least 2 layers, 2 heads and lru_width = {config.width}"
        )
    channels = assign_channels(config)
    values = flatten_names(params)
    values |= _tokens(config, channels, values)
    for layer in range(config.depth):
        prefix, first = f"layers/{layer}/", layer == 0
        group = {name.removeprefix(prefix): x for name, x in values.items() if name.startswith(prefix)}
        group |= _memory(config, channels, group, first) | _attention(config, channels, group, first)
        values |= {f"{prefix}{name}": value for name, value in group.items()}
    return unflatten_names(values)


def assign_channels(config: TAPNextConfig) -> Channels:
    """Which channels the positions of this model's image need, and what the others are used for.

    Raises:
      ValueError: too few are left.
    """
    table = _embed(config, _places(config.image_size, (1, 1)))
    mean, variance = table.mean(axis=0), table.var(axis=0)
    count = config.width // 4
    frequencies = np.tile(10000.0 ** (-np.arange(count) / (count - 1)), 4)
    free = np.argsort(variance, kind="stable")[: np.count_nonzero(variance < _CONSTANT)]
    colours = min(_COEFFICIENTS, (len(free) - 2) // 3, math.prod(config.patch_size))
    if colours < 1:
        raise ValueError(
            f"width = {config.width}: positions of {config.image_size} pixels leave {len(free)} channels; "
            "the matching initialisation needs 5"
        )
    coarse = ((frequencies < _FASTEST) & (variance >= _CONSTANT)).astype(np.float64)
    _, strength, directions = np.linalg.svd(((table - mean) * coarse)[::7], full_matrices=False)
    used = int(np.count_nonzero(strength**2 > _STRONG * np.sum(strength**2)))
    used = min(used, config.width // config.num_heads - 1)
    content = free[2 : 2 + 3 * colours]
    return Channels(mean, coarse, directions[:used].T, content, int(free[0]), int(free[1]))


def _places(size: tuple[int, int], step: tuple[int, int]) -> np.ndarray:
    """[P, 2] (y, x), the centres of a grid of cells."""
    rows, columns = ((np.arange(n // s) + 0.5) * s for n, s in zip(size, step, strict=True))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def _embed(config: TAPNextConfig, places_yx: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(query_embedding(config, jnp.asarray(places_yx, jnp.float32)), np.float64)


def cosines(size: int) -> Float[np.ndarray, "n n"]:
    """Rows are the orthonormal cosine functions (DCT-II) of `size` pixels, coarsest first."""
    rows = np.cos(np.pi / size * np.outer(np.arange(size), np.arange(size) + 0.5)) * np.sqrt(2 / size)
    rows[0] /= np.sqrt(2)
    return rows


def _tokens(config: TAPNextConfig, channels: Channels, values: dict[str, Array]) -> dict[str, Array]:
    """Step 1: patches, their positions, and the tokens of points."""
    rows, columns = (cosines(size) for size in config.patch_size)
    order = sorted(np.ndindex(*config.patch_size), key=lambda at: (sum(at), abs(at[0] - at[1])))
    kernel = np.zeros((*config.patch_size, 3, config.width))
    for number, channel in enumerate(channels.content):
        row, column = order[number // 3]
        wave = np.outer(rows[row], columns[column]) / math.sqrt(math.prod(config.patch_size))
        gain = _CONTENT if number < 3 else _CONTENT * _DETAIL
        kernel[:, :, number % 3, channel] = gain * wave
    positions = _embed(config, _places(config.image_size, config.patch_size)) - channels.mean
    positions[:, [channels.image, channels.asked, *channels.content]] = 0
    positions[:, channels.image] = _MARK
    query = -channels.mean
    query[channels.asked] += _MARK
    found = {
        "image/patch/kernel": _float32(kernel.reshape(-1, config.width)),
        "image/positions": _float32(positions),
        "points/query": _float32(query),
    }
    for name in ("points/mask", "points/unknown"):
        found[name] = (_REST * values[name]).at[channels.asked].add(-_MARK)
    return found


def _memory(
    config: TAPNextConfig, channels: Channels, group: dict[str, Array], first: bool
) -> dict[str, Array]:
    """Step 3. The first channel of each of the gates' blocks reads the query's mark, in place of the channels
    of the positions' finest waves."""
    width, heads = config.width, config.num_heads
    read = np.arange(0, width, width // heads)
    finest = [part + step for step in range(width) for part in range(0, width, width // 4)]
    dropped = [channel for channel in finest if channel not in (channels.image, channels.asked)][:heads]
    kept = np.setdiff1d(np.arange(width), dropped)
    passed = np.setdiff1d(np.arange(width), read)
    into, out = np.zeros((width, width)), np.zeros((width, width))
    into[kept, passed] = 1
    out[passed, kept] = 0.0 if first else np.where(channels.coarse[kept] > 0, _KEPT, 1.0)
    into[:, read] = 0
    into[channels.asked, read] = 1
    out[:, channels.asked] = 0
    found = {
        "recurrent/linear_x/kernel": 0.3 * _REST * group["recurrent/linear_x/kernel"] + _float32(into),
        "recurrent/linear_out/kernel": _REST * group["recurrent/linear_out/kernel"] + _float32(out),
        # The other branch multiplies: by gelu(1), and for image tokens by nearly 0.
        "recurrent/linear_y/kernel": (_REST * group["recurrent/linear_y/kernel"]).at[channels.image].set(-1),
        "recurrent/linear_y/bias": jnp.ones_like(group["recurrent/linear_y/bias"]),
        "recurrent/conv/kernel": group["recurrent/conv/kernel"].at[-1].add(1),
        "recurrent/rglru/a_param": jnp.full_like(group["recurrent/rglru/a_param"], math.log(1 / _RADIUS - 1)),
        "channel_mlp/down/kernel": _REST * group["channel_mlp/down/kernel"],
        "mlp/down/kernel": _REST * group["mlp/down/kernel"],
    }
    for gate, (weight, bias) in _GATES.items():
        name = f"recurrent/rglru/{gate}"
        found[f"{name}/kernel"] = (_REST * group[f"{name}/kernel"]).at[:, 0].set(weight)
        found[f"{name}/bias"] = jnp.full_like(group[f"{name}/bias"], bias)
    return found


def _attention(
    config: TAPNextConfig, channels: Channels, group: dict[str, Array], first: bool
) -> dict[str, Array]:
    """Steps 2 and 4: one head of the first layer, two of each other one."""
    width, size = config.width, config.width // config.num_heads
    content = np.eye(width)[:, channels.content]
    both = [content[:, :_WITH_POSITIONS], _NEAR * channels.positions]
    heads = [(channels.positions, content, 1.0)]
    if not first:
        compared = np.concatenate(both, axis=1)
        heads = [(content, channels.positions, _PASSED), (compared, channels.positions, _PASSED / 2)]
    found = {name: group[name] for name in group if name.startswith("attn/")}
    found["attn/out_proj/kernel"] *= _REST
    for head, (compared, passed, gain) in enumerate(heads):
        part = slice(head * size, (head + 1) * size)
        # Scores are the inner products of what is compared, and one term that prefers image tokens.
        compare, value = np.zeros((width, size)), np.zeros((width, size))
        used, carried = min(compared.shape[1], size - 1), min(passed.shape[1], size)
        compare[:, :used] = compared[:, :used] * size**0.25
        value[:, :carried] = passed[:, :carried]
        key, bias = compare.copy(), np.zeros(size)
        key[channels.image, -1], bias[-1] = 1, _IMAGE_ONLY * math.sqrt(size)
        parts = {"q_proj/kernel": compare, "k_proj/kernel": key, "v_proj/kernel": value}
        for name, kernel in parts.items():
            found[f"attn/{name}"] = found[f"attn/{name}"].at[:, part].set(_float32(kernel))
        found["attn/q_proj/bias"] = found["attn/q_proj/bias"].at[part].set(_float32(bias))
        out = _float32(gain * value.T)
        found["attn/out_proj/kernel"] = found["attn/out_proj/kernel"].at[part].set(out)
    return found


def _float32(values: np.ndarray) -> Array:
    return jnp.asarray(values, jnp.float32)
